"""The random numbers of a batch's views: crop boxes, flips, colours, blur; drawn on the CPU, for `render` to carry out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from byol_core.system.seeds import seed_from
from byol_core.views import image_ops
from byol_core.views.recipes import ViewRecipe

_TRIES = 10  # torchvision's RandomResizedCrop tries this often before it takes a central crop

# Each number of a view has its own column in the image's random stream, so switching one operation off or on leaves
# what the others draw unchanged. First come the yes-or-no draws, then the numbers, grouped as they are used.
_FLIP, _JITTER, _GREY, _BLUR, _SOLARIZE = range(5)
_ANGLE, _ZOOM, _SHEAR, _SHIFT_X, _SHIFT_Y, _SIGMA = range(5, 11)
_FACTORS, _ORDER = slice(11, 15), slice(15, 19)
_TOP, _LEFT = 19, 20
_AREA, _LOG_RATIO = slice(21, 21 + _TRIES), slice(21 + _TRIES, 21 + 2 * _TRIES)
_COLUMNS = 21 + 2 * _TRIES
_NOISE, _ELASTIC = _COLUMNS, _COLUMNS + 1  # keys of streams of their own


@dataclass(frozen=True)
class ViewParams:
    """All random numbers of one view of a batch, one row per image, on the CPU.

    affine: (B, 2, 3) and displacements: (B, 2, 3, 3), float32, as `image_ops.affine` takes them, or None. boxes: (B, 4)
    int64 top, left, height, width, or None where images of the view's size are taken whole. flip, jitter, grey,
    solarize: (B,) bool.
    factors: (B, 4) float32 and order: (B, 4) int64, as `image_ops.jitter` takes them. sigma: (B,) float32, 0 where the
    image is not blurred. noise_keys: (B,) int64.
    """

    affine: Tensor | None
    displacements: Tensor | None
    boxes: Tensor | None
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor
    sigma: Tensor
    solarize: Tensor
    noise_keys: Tensor


def draw(recipe: ViewRecipe, seed: int, epoch: int, indices: Tensor, view: int, heights: Tensor | int,
         widths: Tensor | int) -> ViewParams:
    """The parameters of one view of each image: a pure function of (seed, epoch, image index, view).

    Distributed as torchvision's RandomAffine, RandomResizedCrop, ColorJitter and GaussianBlur draw them. No generator
    is involved, so neither the other images of the batch nor anything drawn before plays a part.

    indices: (B,) int64 on the CPU, the images' places in the data set. view: 0 or 1. heights, widths: of the images in
    pixels, (B,) int64 or one number for all.
    Raises: ValueError for an affine recipe on images of different sizes.
    """
    heights = torch.as_tensor(heights).expand(len(indices))
    widths = torch.as_tensor(widths).expand(len(indices))
    same_size = bool((heights == heights[:1]).all() and (widths == widths[:1]).all())
    if recipe.warps and not same_size:
        raise ValueError("draw: a recipe that rotates, zooms, shears, shifts or bends needs images of one size in a batch")
    bits, uniform = _stream(seed, epoch, indices, view)
    low, span = _ranges(recipe)
    number = uniform * span + low  # (B, columns)
    chance = torch.tensor([recipe.flip, recipe.jitter, recipe.grey, recipe.blur if recipe.blur_kernel > 1 else 0.0,
                           recipe.solarize], dtype=torch.float64)
    flip, jitter, grey, blur, solarize = (uniform[:, :len(chance)] < chance).unbind(1)
    if recipe.crop_scale is not None:
        boxes = _crop_boxes(recipe, number, heights, widths)
    elif bool((heights != recipe.size).any() or (widths != recipe.size).any()):
        boxes = torch.stack([torch.zeros_like(heights), torch.zeros_like(widths), heights, widths], dim=1)
    else:
        boxes = None
    affine = None
    if recipe.warps:
        shift = torch.stack([number[:, _SHIFT_X] * widths, number[:, _SHIFT_Y] * heights], dim=1).round()  # whole pixels
        affine = image_ops.affine_matrices(number[:, _ANGLE], number[:, _ZOOM], number[:, _SHEAR], shift).float()
    displacements = None
    if recipe.elastic > 0:
        displacements = recipe.elastic * image_ops.hashed_normals(bits[:, _ELASTIC], 18).view(-1, 2, 3, 3)
    return ViewParams(affine, displacements, boxes, flip, jitter, factors=number[:, _FACTORS].float(),
                      order=uniform[:, _ORDER].argsort(1), grey=grey, sigma=(number[:, _SIGMA] * blur).float(),
                      solarize=solarize, noise_keys=bits[:, _NOISE])


def draw_boxes(recipe: ViewRecipe, seed: int, epoch: int, indices: Tensor, view: int, heights: Tensor | int,
               widths: Tensor | int) -> Tensor:
    """Only the (B, 4) crop boxes that `draw` gives for the same arguments, for whoever crops before rendering.

    Raises: ValueError for a recipe without a crop.
    """
    if recipe.crop_scale is None:
        raise ValueError("draw_boxes: crop_scale=None; this recipe takes images whole")
    low, span = _ranges(recipe)
    number = _stream(seed, epoch, indices, view)[1] * span + low
    return _crop_boxes(recipe, number, torch.as_tensor(heights).expand(len(indices)),
                       torch.as_tensor(widths).expand(len(indices)))


def _stream(seed: int, epoch: int, indices: Tensor, view: int) -> tuple[Tensor, Tensor]:
    """(B, columns + 2) int64 random bits of each image's view, and all but the last two as float64 in [0, 1)."""
    keys = image_ops.mix(indices + seed_from(seed, "views", epoch, view))
    bits = image_ops.hashed_bits(keys, _COLUMNS + 2)
    return bits, ((bits[:, :_COLUMNS] >> 11) & ((1 << 53) - 1)).double().mul_(2.0**-53)


def _ranges(recipe: ViewRecipe) -> tuple[Tensor, Tensor]:
    """(columns,) float64 lowest value, and span up to the highest, of the number in each column of the stream."""
    ranges = [(0.0, 1.0)] * _COLUMNS
    degree = math.pi / 180
    ranges[_ANGLE] = (-recipe.rotate * degree, recipe.rotate * degree)
    ranges[_ZOOM] = recipe.zoom
    ranges[_SHEAR] = (-recipe.shear * degree, recipe.shear * degree)
    ranges[_SHIFT_X] = ranges[_SHIFT_Y] = (-recipe.shift, recipe.shift)
    ranges[_SIGMA] = recipe.blur_sigma
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    ranges[_FACTORS] = [*((max(0.0, 1 - strength), 1 + strength) for strength in strengths), (-recipe.hue, recipe.hue)]
    ranges[_AREA] = [recipe.crop_scale or (1.0, 1.0)] * _TRIES
    ranges[_LOG_RATIO] = [(math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1]))] * _TRIES
    low, high = torch.tensor(ranges, dtype=torch.float64).unbind(1)
    return low, high - low


def _crop_boxes(recipe: ViewRecipe, number: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """(B, 4) int64: the first of ten draws that fits into the image, else its centre at the nearest allowed ratio."""
    area = number[:, _AREA] * (heights * widths).unsqueeze(1)  # (B, _TRIES)
    ratio = number[:, _LOG_RATIO].exp()
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width >= 1) & (width <= widths.unsqueeze(1)) & (height >= 1) & (height <= heights.unsqueeze(1))
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    central_height = torch.minimum(heights, (widths / recipe.crop_ratio[0]).round())
    central_width = torch.minimum(widths, (heights * recipe.crop_ratio[1]).round())
    height = torch.where(found, height.gather(1, first).squeeze(1), central_height).long()
    width = torch.where(found, width.gather(1, first).squeeze(1), central_width).long()
    top = torch.where(found, (number[:, _TOP] * (heights - height + 1)).long(), (heights - height) // 2)
    left = torch.where(found, (number[:, _LEFT] * (widths - width + 1)).long(), (widths - width) // 2)
    return torch.stack([top, left, height, width], dim=1)
