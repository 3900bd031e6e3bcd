"""View recipes (the numbers of an augmentation) and the reference pipeline that applies them image by image."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from byol_core.views import image_ops

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_PROBABILITIES = ("flip", "jitter", "grey", "blur", "solarize")
_NON_NEGATIVE = ("brightness", "contrast", "saturation", "rotate", "shear", "elastic", "noise")


@dataclass(frozen=True)
class ViewRecipe:
    """Every number of one random view; the defaults switch each operation off, so `ViewRecipe(size)` only normalises.

    The operations run in the order of the fields: affine, crop and resize, flip, colour jitter, grey, blur, solarize,
    noise, clip to [0, 1], normalise. Each is drawn anew for every image.

    size: edge of the square view in pixels.
    rotate, shear: largest angle in degrees, drawn from [-x, x]; zoom: lowest and highest factor; shift: largest
        displacement as a fraction of each side, in whole pixels. elastic: standard deviation, as a fraction of each side,
        of the displacements on a 3x3 grid that bend the image. What moves in from outside the image is black.
    crop_scale: lowest and highest share of the image's area; None takes the whole image, resized if it differs.
    crop_ratio: lowest and highest width / height, drawn log-uniformly. interpolation: always antialiased.
    flip, jitter, grey, blur, solarize: probabilities in [0, 1].
    brightness, contrast, saturation: factors are drawn from [max(0, 1 - x), 1 + x]; hue: turns from [-x, x], up to 0.5.
    blur_sigma: lowest and highest standard deviation in pixels; blur_kernel: taps, odd; 0 or 1 never blurs.
    solarize_threshold: values from here on are inverted.
    noise: standard deviation of the Gaussian noise added to values in [0, 1].
    mean, std: per channel, subtracted and divided last.

    Raises: ValueError naming the field and its value.
    """

    size: int
    rotate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 0
    solarize: float = 0.0
    solarize_threshold: float = 0.5
    noise: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        def require(condition: bool, field: str, allowed: str) -> None:
            if not condition:
                raise ValueError(f"ViewRecipe: {field}={getattr(self, field)!r}; {allowed}")

        def is_range(bounds: tuple[float, float], low: float, high: float) -> bool:
            return isinstance(bounds, (tuple, list)) and len(bounds) == 2 \
                and low < bounds[0] <= bounds[1] <= high and math.isfinite(bounds[1])

        require(isinstance(self.size, int) and self.size >= 1, "size", "give a whole number of pixels, at least 1")
        for field in _PROBABILITIES:
            require(0 <= getattr(self, field) <= 1, field, "a probability lies in [0, 1]")
        for field in _NON_NEGATIVE:
            require(0 <= getattr(self, field) < math.inf, field, "must be finite and at least 0")
        require(self.rotate <= 180, "rotate", "degrees, at most 180")
        require(self.shear < 90, "shear", "degrees, under 90")
        require(0 <= self.shift <= 1, "shift", "a fraction of the side, in [0, 1]")
        require(is_range(self.zoom, 0, math.inf), "zoom", "give (low, high) with 0 < low <= high")
        require(self.crop_scale is None or is_range(self.crop_scale, 0, 1), "crop_scale",
                "give (low, high) with 0 < low <= high <= 1, or None for the whole image")
        require(is_range(self.crop_ratio, 0, math.inf), "crop_ratio", "give (low, high) with 0 < low <= high")
        require(self.interpolation in ("bicubic", "bilinear"), "interpolation", "choose 'bicubic' or 'bilinear'")
        require(0 <= self.hue <= 0.5, "hue", "turns, in [0, 0.5]")
        require(is_range(self.blur_sigma, 0, math.inf), "blur_sigma", "give (low, high) with 0 < low <= high")
        require(self.blur_kernel == 0 or self.blur_kernel % 2 == 1 and 0 < self.blur_kernel < 2 * self.size,
                "blur_kernel", f"give an odd number of taps under twice the size ({self.size}), or 0 for no blur")
        require(0 <= self.solarize_threshold <= 1, "solarize_threshold", "a value in [0, 1]")
        require(len(self.mean) == 3 and all(map(math.isfinite, self.mean)), "mean", "give three finite numbers")
        require(len(self.std) == 3 and all(0 < x < math.inf for x in self.std), "std", "give three positive numbers")

    @property
    def scale(self) -> str:
        """In words, what is done with the numbers of an image of the right size."""
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"less the mean ({mean}), divided by the std ({std})"

    @property
    def warps(self) -> bool:
        """True if the view rotates, zooms, shears, shifts or bends."""
        return self.rotate > 0 or self.shear > 0 or self.shift > 0 or self.zoom != (1.0, 1.0) or self.elastic > 0


def paper_recipes(size: int, *, blur: tuple[float, float] | None = None) -> tuple[ViewRecipe, ViewRecipe]:
    """The BYOL paper's two views T and T', at any size.

    size: edge of the view in pixels. blur: probabilities for the two views, (0.0, 0.0) for none; None is the paper's.
    The blur kernel is a tenth of the size, odd: 23 taps at 224, 3 at 32, and so weak below 20 pixels that it vanishes.

    Returns: the recipe of view 1 and that of view 2; they differ in blur and solarization only.
    Source: BYOL, table 6; kernel as in the authors' code; colour operations as torchvision defines them.
    """
    blur1, blur2 = (1.0, 0.1) if blur is None else blur
    first = ViewRecipe(size, crop_scale=(0.08, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                       saturation=0.2, hue=0.1, grey=0.2, blur=blur1, blur_kernel=2 * (size // 20) + 1)
    return first, replace(first, blur=blur2, solarize=0.2)


def digits_recipes(size: int = 8) -> tuple[ViewRecipe, ViewRecipe]:
    """Two equal recipes for small grey drawings such as digits: no crop, flip or hue, which would change what is drawn.

    size: edge of the view in pixels.
    """
    recipe = ViewRecipe(size, rotate=20.0, zoom=(0.75, 1.25), shear=6.0, shift=0.1, elastic=0.06, jitter=1.0,
                        brightness=0.4, contrast=0.4, blur=1.0, blur_sigma=(0.1, 0.8), blur_kernel=3, noise=0.05,
                        interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return recipe, recipe


def cpu_view(recipe: ViewRecipe) -> Callable[[Image.Image], Tensor]:
    """The reference pipeline: one RGB image in, one normalised view out, by torchvision's own transforms.

    Draws from torch's default generator, so seed that per image. Affine and crop work on bytes, where torchvision is
    fastest; everything after them is float32.

    Returns: a picklable function from a PIL image in mode RGB to a (3, size, size) float32 tensor.
    """
    steps: list[Callable[..., Tensor]] = [v2.PILToTensor()]
    if recipe.elastic > 0:
        steps.append(partial(_warp, recipe=recipe))  # torchvision would have to resample twice
    elif recipe.warps:
        # fill=None is black too; fill=0 would darken the border pixels twice, by the padding and by a mask.
        steps.append(v2.RandomAffine(recipe.rotate, (recipe.shift, recipe.shift), recipe.zoom,
                                     (-recipe.shear, recipe.shear), InterpolationMode.BILINEAR, fill=None))
    size, interpolation = [recipe.size, recipe.size], InterpolationMode(recipe.interpolation)
    if recipe.crop_scale is None:
        steps.append(v2.Resize(size, interpolation, antialias=True))
    else:
        steps.append(v2.RandomResizedCrop(size, recipe.crop_scale, recipe.crop_ratio, interpolation, antialias=True))
    steps.append(v2.RandomHorizontalFlip(recipe.flip))
    steps.append(v2.ToDtype(torch.float32, scale=True))
    colours = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    steps.append(v2.RandomApply([colours], recipe.jitter))
    steps.append(v2.RandomGrayscale(recipe.grey))
    if recipe.blur_kernel > 1:
        steps.append(v2.RandomApply([v2.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma)], recipe.blur))
    steps.append(v2.RandomSolarize(recipe.solarize_threshold, recipe.solarize))
    if recipe.noise > 0:
        steps.append(v2.GaussianNoise(sigma=recipe.noise))
    steps.append(partial(normalise, recipe=recipe))
    return v2.Compose(steps)


def plain_view(recipe: ViewRecipe) -> Callable[[Image.Image], Tensor]:
    """The deterministic view for evaluation: resize, centre crop, normalise.

    An image of exactly size x size is taken as it is. A recipe without a crop was trained on whole images, so the whole
    image is resized to size x size. Otherwise the shorter side becomes round(size * 256 / 224) pixels, or size where it
    is shorter than that already, and the centre is cut out.

    Returns: a picklable function from a PIL image in mode RGB to a (3, size, size) float32 tensor.
    """
    return partial(_plain_view, recipe=recipe)


def normalise(images: Tensor, recipe: ViewRecipe) -> Tensor:
    """(images - mean) / std per channel; images: (..., 3, H, W) float in [0, 1]."""
    mean, std = _channel_constants(images, recipe)
    return (images - mean).div_(std)


def inverse_normalise(images: Tensor, recipe: ViewRecipe) -> Tensor:
    """images * std + mean per channel, clipped to [0, 1]: what a normalised view (..., 3, H, W) looks like."""
    mean, std = _channel_constants(images, recipe)
    return (images * std).add_(mean).clamp_(0, 1)


def _channel_constants(images: Tensor, recipe: ViewRecipe) -> Tensor:
    """Mean and std as a (2, 3, 1, 1) tensor beside the images, sent without waiting for the device."""
    constants = torch.tensor((recipe.mean, recipe.std), dtype=images.dtype).view(2, 3, 1, 1)
    return constants.to(images.device, non_blocking=images.is_cuda)


def _warp(image: Tensor, recipe: ViewRecipe) -> Tensor:
    """Rotate, zoom, shear, shift and bend a (3, H, W) uint8 image in one resampling; float32 in [0, 1]."""
    angle, shear = (math.radians(limit) * torch.empty(1).uniform_(-1, 1) for limit in (recipe.rotate, recipe.shear))
    sides = torch.tensor([image.shape[-1], image.shape[-2]])
    shift = (torch.empty(1, 2).uniform_(-recipe.shift, recipe.shift) * sides).round()
    matrix = image_ops.affine_matrices(angle, torch.empty(1).uniform_(*recipe.zoom), shear, shift)
    displacements = recipe.elastic * torch.randn(1, 2, 3, 3)
    return image_ops.affine(image.unsqueeze(0) / 255, matrix, displacements).squeeze(0)


def _plain_view(image: Image.Image, recipe: ViewRecipe) -> Tensor:
    size, interpolation = recipe.size, InterpolationMode(recipe.interpolation)
    if image.size != (size, size):
        if recipe.crop_scale is None:
            image = F.resize(image, [size, size], interpolation)
        else:
            shorter = round(size * 256 / 224) if min(image.size) >= size else size
            image = F.center_crop(F.resize(image, [shorter], interpolation), [size, size])
    return normalise(F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), recipe)
