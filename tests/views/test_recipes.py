"""The recipes' numbers, their refusals, and the reference pipeline."""

import dataclasses
import math
import pickle

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from byol_core.views.recipes import (IMAGENET_MEAN, IMAGENET_STD, ViewRecipe, cpu_view, digits_recipes, inverse_normalise,
                                     normalise, paper_recipes, plain_view)


def picture(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width * 1000 + height)
    return F.to_pil_image(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))


def as_floats(image: Image.Image) -> torch.Tensor:
    return F.pil_to_tensor(image) / 255


def test_paper_recipes_are_the_papers_table() -> None:
    first, second = paper_recipes(224)
    for recipe in (first, second):
        assert (recipe.crop_scale, recipe.crop_ratio, recipe.interpolation) == ((0.08, 1.0), (3 / 4, 4 / 3), "bicubic")
        assert (recipe.flip, recipe.jitter, recipe.grey) == (0.5, 0.8, 0.2)
        assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (recipe.blur_sigma, recipe.blur_kernel, recipe.solarize_threshold) == ((0.1, 2.0), 23, 0.5)
        assert (recipe.mean, recipe.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert not recipe.warps and recipe.noise == 0
    assert (first.blur, first.solarize) == (1.0, 0.0)
    assert (second.blur, second.solarize) == (0.1, 0.2)
    assert [recipe.blur for recipe in paper_recipes(224, blur=(0.5, 0.25))] == [0.5, 0.25]


@pytest.mark.parametrize("size, kernel", [(224, 23), (128, 13), (96, 9), (32, 3), (8, 1)])
def test_paper_blur_kernel_is_a_tenth_of_the_size(size: int, kernel: int) -> None:
    assert [recipe.blur_kernel for recipe in paper_recipes(size)] == [kernel, kernel]


def test_digits_recipes_keep_what_is_drawn() -> None:
    for recipe in digits_recipes():
        assert (recipe.size, recipe.crop_scale, recipe.flip, recipe.hue, recipe.solarize) == (8, None, 0, 0, 0)
        assert recipe.warps and recipe.rotate < 45


@pytest.mark.parametrize("field, value", [
    ("size", 0), ("size", 8.5), ("crop_scale", (0.0, 1.0)), ("crop_scale", (0.5, 0.2)), ("crop_scale", (0.5, 1.1)),
    ("crop_scale", 0.5), ("crop_ratio", (0.0, 1.0)), ("crop_ratio", (2.0, 1.0)), ("crop_ratio", (1.0, math.inf)),
    ("interpolation", "nearest"), ("flip", -0.1), ("flip", 1.1), ("jitter", math.nan), ("grey", 2), ("blur", -1),
    ("solarize", 1.5), ("brightness", -0.4), ("contrast", math.inf), ("saturation", math.nan), ("hue", 0.6),
    ("hue", -0.1), ("blur_sigma", (0.0, 1.0)), ("blur_sigma", (2.0, 1.0)), ("blur_kernel", 4), ("blur_kernel", -1),
    ("blur_kernel", 33), ("solarize_threshold", 1.1), ("rotate", -1), ("rotate", 181), ("zoom", (0.0, 1.0)),
    ("zoom", (1.2, 1.0)), ("shear", 90), ("shift", 1.5), ("shift", math.nan), ("noise", -0.1), ("mean", (0.5, 0.5)),
    ("mean", (0.5, math.nan, 0.5)), ("std", (0.5, 0.0, 0.5))])
def test_recipe_refuses_a_number_out_of_range_and_names_it(field: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        dataclasses.replace(ViewRecipe(16), **{field: value})  # type: ignore[arg-type]
    assert f"{field}={value!r}" in str(error.value)


def test_cpu_view_with_everything_off_only_normalises() -> None:
    image = picture(16, 16)
    view = cpu_view(ViewRecipe(16))(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (as_floats(image) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(view, expected, atol=1e-6, rtol=0)
    assert type(view) is torch.Tensor


def test_cpu_view_runs_in_the_papers_order_and_normalises_last() -> None:
    recipe = ViewRecipe(16, flip=1.0, grey=1.0, blur=1.0, blur_sigma=(1.0, 1.0), blur_kernel=5, solarize=1.0,
                        mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    image = picture(16, 16)
    expected = F.rgb_to_grayscale(F.horizontal_flip(as_floats(image)), 3)
    expected = F.solarize(F.gaussian_blur(expected, [5, 5], [1.0, 1.0]), 0.5)
    expected = F.normalize(expected, list(recipe.mean), list(recipe.std))
    torch.testing.assert_close(cpu_view(recipe)(image), expected, atol=1e-5, rtol=0)


def test_cpu_view_jitters_before_it_turns_grey() -> None:
    # After grey, a hue shift would change nothing.
    recipe = ViewRecipe(16, jitter=1.0, hue=0.5, grey=1.0)
    image = picture(16, 16)
    plain = F.normalize(F.rgb_to_grayscale(as_floats(image), 3), list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.manual_seed(0)
    assert (cpu_view(recipe)(image) - plain).abs().max() > 0.1


def test_cpu_view_resizes_a_whole_image_when_there_is_no_crop() -> None:
    view = cpu_view(ViewRecipe(16, interpolation="bilinear"))(picture(40, 20))
    expected = F.resize(F.pil_to_tensor(picture(40, 20)), [16, 16], InterpolationMode.BILINEAR, antialias=True) / 255
    torch.testing.assert_close(inverse_normalise(view, ViewRecipe(16)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", [*paper_recipes(32), *digits_recipes(8)])
def test_cpu_view_follows_torchs_generator_and_survives_pickling(recipe: ViewRecipe) -> None:
    image, view = picture(30, 21), cpu_view(recipe)
    torch.manual_seed(3)
    first, second = view(image), view(image)
    torch.manual_seed(3)
    again = pickle.loads(pickle.dumps(view))(image)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert first.shape == (3, recipe.size, recipe.size) and first.dtype == torch.float32


@pytest.mark.parametrize("width, height", [(1, 1), (1, 50), (50, 1), (9, 7), (224, 3)])
def test_cpu_view_takes_images_of_any_shape(width: int, height: int) -> None:
    for recipe in (*paper_recipes(32), *digits_recipes(8)):
        assert cpu_view(recipe)(picture(width, height)).isfinite().all()


@pytest.mark.parametrize("width, height, shorter", [(64, 48, 37), (40, 32, 37), (33, 33, 37), (20, 20, 32),
                                                    (20, 50, 32), (100, 31, 32)])
def test_plain_view_resizes_the_shorter_side_and_cuts_out_the_centre(width: int, height: int, shorter: int) -> None:
    recipe = paper_recipes(32)[0]
    image = picture(width, height)
    resized = F.resize(image, [shorter], InterpolationMode.BICUBIC)
    expected = as_floats(F.center_crop(resized, [32, 32]))
    torch.testing.assert_close(inverse_normalise(plain_view(recipe)(image), recipe), expected, atol=1e-5, rtol=0)


def test_plain_view_takes_an_image_of_the_right_size_as_it_is() -> None:
    recipe, image = paper_recipes(32)[1], picture(32, 32)
    torch.testing.assert_close(plain_view(recipe)(image), normalise(as_floats(image), recipe), atol=1e-6, rtol=0)


def test_plain_view_shows_the_whole_image_where_training_did() -> None:
    recipe, image = digits_recipes(8)[0], picture(20, 30)
    expected = as_floats(F.resize(image, [8, 8], InterpolationMode.BILINEAR))
    torch.testing.assert_close(inverse_normalise(plain_view(recipe)(image), recipe), expected, atol=1e-5, rtol=0)


def test_inverse_normalise_undoes_normalise_and_clips() -> None:
    recipe, images = paper_recipes(8)[0], torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(inverse_normalise(normalise(images, recipe), recipe), images, atol=1e-6, rtol=0)
    assert inverse_normalise(normalise(images * 3 - 1, recipe), recipe).aminmax() == (0, 1)
