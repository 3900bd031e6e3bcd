"""The third source of views: workers cut two crops out of each image, and the device does the rest in batches."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from byol_core.images.decoding import BadImageError, upright_size
from byol_core.views.batches import Order, Views, WorkerBatches, first_readable
from byol_core.views.draw import draw, draw_boxes
from byol_core.views.pixels import Failure, ImageData
from byol_core.views.recipes import ViewRecipe
from byol_core.views.render import render_all

REDUCED_BY = (8, 4, 2)  # what JPEG decoders offer
SPARE = 2  # a reduced image still has so many pixels per pixel of the view, along both sides of the crop

Box = list[int]  # top, left, height, width


class CropBatches(WorkerBatches):
    """Two views per image, for images of any size and number: cut out and resized in workers, finished on `device`.

    The parameters are those that `draw` gives, so a view is a function of (seed, epoch, index, view) alone.
    Raises: ValueError for a recipe that warps, as that precedes the crop.
    """

    def __init__(self, data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], order: Order, workers: int,
                 device: torch.device) -> None:
        if any(recipe.warps for recipe in recipes):
            raise ValueError("a recipe that rotates, zooms, shears, shifts or bends needs images of one size - "
                             "use --views cpu")
        super().__init__(data, recipes, order, workers, pin_memory=device.type == "cuda")
        self.recipes = recipes
        self.device = device
        self._indices = -1, torch.empty(0)  # the epoch, and its micro-batches

    def _finished(self, views: Views, epoch: int, number: int) -> Views:
        if self._indices[0] != epoch:
            self._indices = epoch, self.order.epoch(epoch)
        on_device = [crop.to(self.device, non_blocking=True) for crop in views]
        params = [replace(draw(recipe, self.order.seed, epoch, self._indices[1][number], view, recipe.size, recipe.size),
                          boxes=None) for view, recipe in enumerate(self.recipes)]
        view1, view2 = render_all(on_device, params, self.recipes)
        return view1, view2

    def _dataset(self, data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], seed: int) -> Dataset[Any]:
        return _CropDataset(data, recipes, seed)


class _CropDataset(Dataset[tuple[Tensor, ...]]):
    def __init__(self, data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], seed: int) -> None:
        self.data, self.recipes, self.seed = data, recipes, seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor, list[Failure]]]:
        """Both crops of a whole batch of images, for whose boxes a few large operations will do."""
        epoch, indices = keys[0][0], [index for _, index in keys]
        sizes = [self._size(index) for index in indices]
        boxes = self._boxes(epoch, indices, sizes)
        samples = []
        for index, size, places in zip(indices, sizes, boxes):
            read = partial(self._crops, epoch=epoch, index=index, size=size, boxes=places)
            (crop1, crop2), failures = first_readable(read, self.seed, epoch, index, len(self.data))
            samples.append((crop1, crop2, failures))
        return samples

    def _size(self, index: int) -> tuple[int, int]:
        try:
            return upright_size(self.data.files.source(index))
        except BadImageError:
            return 1, 1  # decoding it will fail for the same reason, and if not, show another size

    def _boxes(self, epoch: int, indices: list[int], sizes: Sequence[tuple[int, int]]) -> list[list[Box]]:
        """The boxes of both views for each image."""
        heights, widths = torch.tensor(sizes).unbind(1)
        whole = torch.stack([torch.zeros_like(heights), torch.zeros_like(widths), heights, widths], dim=1)
        boxes = [whole if recipe.crop_scale is None else
                 draw_boxes(recipe, self.seed, epoch, torch.tensor(indices), view, heights, widths)
                 for view, recipe in enumerate(self.recipes)]
        return torch.stack(boxes, dim=1).tolist()

    def _crops(self, source: int, epoch: int, index: int, size: tuple[int, int], boxes: list[Box]) -> list[Tensor]:
        """Both crops in the place of image `index`, cut out of image `source`. size: what the boxes were drawn for."""
        by = reduction(boxes, self.recipes)
        image = self.data.image(source, by)
        height, width = size
        if image.size != (width // by, height // by):
            if by > 1 and image.size != (width, height):  # neither reduced nor in full
                image = self.data.image(source)
            by = 1
            if image.size != (width, height):  # a stand-in, or the header did not tell
                boxes = self._boxes(epoch, [index], [(image.height, image.width)])[0]
        return [cut(image, box, by, recipe) for box, recipe in zip(boxes, self.recipes)]


def reduction(boxes: list[Box], recipes: Sequence[ViewRecipe]) -> int:
    """By how much an image may be reduced while decoding: its crops keep at least SPARE times the views' sides."""
    spare = min(min(box[2:]) / recipe.size for box, recipe in zip(boxes, recipes))
    return next((by for by in REDUCED_BY if spare >= SPARE * by), 1)


def cut(image: Image.Image, box: Box, reduced_by: int, recipe: ViewRecipe) -> Tensor:
    """The crop of one view, (3, size, size) uint8, resized with antialiasing. box: in pixels of the full image.

    Source: torchvision `resized_crop` on bytes, and equal to it. Of reduced images it differs by 1/255 on average (125
    photographs; by up to 26/255 along its edges, as pixels beside the box are looked at).
    """
    top, left, height, width = box
    size, mode = recipe.size, InterpolationMode(recipe.interpolation)
    if reduced_by == 1:
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height)))).permute(2, 0, 1)
        return F.resize(pixels, [size, size], mode, antialias=True)
    place = (left / reduced_by, top / reduced_by, (left + width) / reduced_by, (top + height) / reduced_by)
    resample = Image.Resampling.BICUBIC if recipe.interpolation == "bicubic" else Image.Resampling.BILINEAR
    return F.pil_to_tensor(image.resize((size, size), resample, box=place))
