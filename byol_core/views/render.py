"""Random views of a whole batch at once, on any device, from the parameters that `draw` has drawn."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from byol_core.views import image_ops
from byol_core.views.draw import ViewParams
from byol_core.views.recipes import ViewRecipe, normalise

_CACHED_PIXELS = 2**18  # on a CPU, views of so many pixels at once fit into its cache: up to twice as fast


def render(images: Tensor, params: ViewParams, recipe: ViewRecipe) -> Tensor:
    """One view of each image with the drawn parameters, on the images' device.

    Images that were cropped to the view's size elsewhere are finished with `dataclasses.replace(params, boxes=None)`.

    images: (B, 3, H, W), uint8 or float in [0, 1]; unchanged.
    Returns: (B, 3, size, size) float32, normalised.
    Raises: ValueError if there are no boxes and the images are not of the view's size.
    """
    if params.boxes is None and tuple(images.shape[-2:]) != (recipe.size, recipe.size):
        raise ValueError(f"render: images of {images.shape[-2]}x{images.shape[-1]} pixels without boxes; "
                         f"the recipe's view has {recipe.size}x{recipe.size}")
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False), _whole_float32():
        rows = max(1, _CACHED_PIXELS // recipe.size**2)
        if images.device.type != "cpu" or len(images) <= rows:
            return _render(images, params, recipe)
        views = torch.empty(len(images), 3, recipe.size, recipe.size)
        for start in range(0, len(images), rows):
            part = slice(start, start + rows)
            views[part] = _render(images[part], _rows_of(params, part), recipe)
        return views


def render_all(images: Sequence[Tensor], params: Sequence[ViewParams], recipes: Sequence[ViewRecipe]) -> list[Tensor]:
    """`render` for each batch of images with its own parameters and recipe.

    On an accelerator all are rendered at once, as small images cost the number of operations there and not their size;
    but only where the recipes differ in nothing but how often things happen, as those of the BYOL paper do.
    """
    chances = {name: getattr(recipes[0], name) for name in ("flip", "jitter", "grey", "blur", "solarize")}  # for draw alone
    alike = all(replace(recipe, **chances) == recipes[0] for recipe in recipes)
    if images[0].device.type == "cpu" or not alike:
        return [render(*one) for one in zip(images, params, recipes)]
    return list(_render_at_once(images, params, recipes[0]))


def _render_at_once(images: Sequence[Tensor], params: Sequence[ViewParams], recipe: ViewRecipe) -> tuple[Tensor, ...]:
    joined: list[Any] = []
    for field in fields(ViewParams):
        values = [getattr(one, field.name) for one in params]
        joined.append(None if values[0] is None else torch.cat(values))
    return render(torch.cat(list(images)), ViewParams(*joined), recipe).split([len(one) for one in images])


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Resizing is a product of matrices, for which the ten bits of TF32 are too few."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def _render(images: Tensor, params: ViewParams, recipe: ViewRecipe) -> Tensor:
    def blur(rows: Tensor, sigma: Tensor) -> Tensor:
        return image_ops.gaussian_blur(rows, sigma, recipe.blur_kernel)

    def solarize(rows: Tensor) -> Tensor:
        return image_ops.solarize(rows, recipe.solarize_threshold)

    unit = 1 / 255 if images.dtype == torch.uint8 else 1.0
    images = images.to(torch.float32, copy=True).mul_(unit)
    if params.affine is not None:
        images = image_ops.affine(images, params.affine, params.displacements)
    if params.boxes is not None:
        images = image_ops.crop_resize(images, params.boxes, recipe.size, params.flip, recipe.interpolation)
    else:
        images = image_ops.on_rows_(images, params.flip, lambda rows: rows.flip(3))
    images = image_ops.on_rows_(images, params.jitter, image_ops.jitter, params.factors, params.order)
    images = image_ops.on_rows_(images, params.grey, image_ops.grey)
    images = image_ops.on_rows_(images, params.sigma > 0, blur, params.sigma)
    images = image_ops.on_rows_(images, params.solarize, solarize)
    if recipe.noise > 0:
        images = image_ops.add_noise(images, recipe.noise, params.noise_keys)
    return normalise(images, recipe)


def _rows_of(params: ViewParams, rows: slice) -> ViewParams:
    values = (getattr(params, field.name) for field in fields(params))
    parts: list[Any] = [None if value is None else value[rows] for value in values]
    return ViewParams(*parts)
