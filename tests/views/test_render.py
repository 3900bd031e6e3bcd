"""Rendered views against torchvision's functionals and pipeline."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from byol_core.views import image_ops
from byol_core.views import render as render_module
from byol_core.views.draw import ViewParams, draw
from byol_core.views.recipes import ViewRecipe, cpu_view, digits_recipes, inverse_normalise, normalise, paper_recipes
from byol_core.views.render import render, render_all
from tests.helpers.views import BUSY, DRAWN, photograph, same_distribution


def by_torchvision(image: Tensor, params: ViewParams, row: int, recipe: ViewRecipe) -> Tensor:
    """The same view of one float image by torchvision's functionals, without noise."""
    if params.affine is not None:
        inverse = torch.eye(3, dtype=torch.float64)
        inverse[:2] = params.affine[row]
        forward = inverse.inverse()
        angle = math.degrees(math.atan2(forward[1, 0], forward[0, 0]))
        zoom = math.sqrt(torch.linalg.det(forward[:2, :2]))
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        shear = math.degrees(math.atan(-(cos * forward[0, 1] + sin * forward[1, 1]) / zoom))
        image = F.affine(image, angle, forward[:2, 2].tolist(), zoom, [shear, 0.0], InterpolationMode.BILINEAR)
    top, left, height, width = (0, 0, *image.shape[1:]) if params.boxes is None else params.boxes[row].tolist()
    size = [recipe.size, recipe.size]
    mode = InterpolationMode(recipe.interpolation)
    image = F.resized_crop(image, top, left, height, width, size, mode, antialias=True)
    image = F.horizontal_flip(image) if params.flip[row] else image
    image = image.clamp(0, 1)
    if params.jitter[row]:
        for place in params.order[row].tolist():
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[place]
            image = adjust(image, params.factors[row, place].item())
    image = F.rgb_to_grayscale(image, 3) if params.grey[row] else image
    sigma = params.sigma[row].item()
    image = F.gaussian_blur(image, [recipe.blur_kernel] * 2, [sigma, sigma]) if sigma > 0 else image
    image = F.solarize(image, recipe.solarize_threshold) if params.solarize[row] else image
    return F.normalize(image, list(recipe.mean), list(recipe.std))


@pytest.mark.parametrize("recipe, height, width", [
    (paper_recipes(32)[0], 32, 32), (paper_recipes(32)[1], 48, 40), (paper_recipes(32)[0], 1, 40),
    (dataclasses.replace(paper_recipes(96)[1], interpolation="bilinear", blur=0.5), 120, 90),
    (paper_recipes(9)[1], 33, 17),
    (dataclasses.replace(BUSY, noise=0.0), 32, 32), (dataclasses.replace(DRAWN, noise=0.0), 8, 8),
    (dataclasses.replace(DRAWN, noise=0.0, flip=0.5), 13, 10)])
def test_render_matches_torchvision_on_the_same_parameters(recipe: ViewRecipe, height: int, width: int) -> None:
    count = 40
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 40, (count, 3, height, width), generator=generator)
    images = (photograph(height, width) // 2 + noise).to(torch.uint8)
    params = draw(recipe, 0, 0, torch.arange(count), 0, height, width)
    views = inverse_normalise(render(images, params, recipe), recipe)
    expected = torch.stack([by_torchvision(images[row] / 255, params, row, recipe) for row in range(count)])
    apart = (views - inverse_normalise(expected, recipe)).abs()
    # A value within rounding of the threshold is inverted on one side only.
    assert apart.quantile(0.999) < 1e-3 and apart.mean() < 1e-5


Pipeline = Callable[[ViewRecipe, Tensor, int], Tensor]


def batched(recipe: ViewRecipe, image: Tensor, count: int) -> Tensor:
    params = draw(recipe, 0, 0, torch.arange(count), 0, *image.shape[1:])
    return render(image.expand(count, *image.shape), params, recipe)


def reference(recipe: ViewRecipe, image: Tensor, count: int) -> Tensor:
    torch.manual_seed(0)
    view, picture = cpu_view(recipe), F.to_pil_image(image)
    return torch.stack([view(picture) for _ in range(count)])


@pytest.mark.parametrize("field", ["flip", "jitter", "grey", "blur", "solarize"])
def test_the_reference_applies_each_operation_at_the_stated_rate(field: str) -> None:
    count, probability = 400, 0.1
    settings = {"hue": 0.5, "blur_kernel": 3, "blur_sigma": (1.0, 1.0), field: probability}
    recipe = ViewRecipe(8, **settings)  # type: ignore[arg-type]
    image = photograph(8, 8)
    plain = normalise(image[None].float() / 255, recipe)
    rate = ((reference(recipe, image, count) - plain).abs().amax((1, 2, 3)) > 1e-3).double().mean().item()
    assert abs(rate - probability) <= 4.5 * math.sqrt(probability * (1 - probability) / count)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, height, width", [(paper_recipes(16)[0], 20, 28), (paper_recipes(32)[1], 32, 32),
                                                   (DRAWN, 8, 8), (digits_recipes(8)[0], 8, 8)])
def test_both_pipelines_have_the_same_statistics(recipe: ViewRecipe, height: int, width: int) -> None:
    count, image = 1200, photograph(height, width)
    ours, theirs = batched(recipe, image, count), reference(recipe, image, count)
    for measure in (lambda v: v.mean((2, 3)), lambda v: v.std((2, 3)), lambda v: v[..., 0, :].mean(2),
                    lambda v: v[..., :, 0].mean(2), lambda v: v.diff(dim=3).abs().mean((2, 3))):
        for one, other in zip(measure(ours).unbind(1), measure(theirs).unbind(1)):
            assert same_distribution(one, other)
    error = ((ours.var(0) + theirs.var(0)) / count).sqrt() + 1e-3
    assert ((ours.mean(0) - theirs.mean(0)).abs() / error).max() < 5  # the mean picture, pixel by pixel


def test_both_pipelines_crop_alike() -> None:
    x, y = torch.arange(100).expand(80, 100), torch.arange(80).view(80, 1).expand(80, 100)
    ramps = torch.stack([2 * x, 2 * y, 0 * x]).to(torch.uint8)  # colours tell where a pixel came from
    recipe = ViewRecipe(24, crop_scale=(0.1, 0.9), crop_ratio=(0.5, 1.5))
    corners = [inverse_normalise(pipeline(recipe, ramps, 1500), recipe) * 127.5 for pipeline in (batched, reference)]
    boxes = [torch.stack([v[:, 0, :, 0].mean(1), v[:, 0, :, -1].mean(1), v[:, 1, 0].mean(1), v[:, 1, -1].mean(1)])
             for v in corners]
    for measure in (lambda b: b[0], lambda b: b[2], lambda b: b[1] - b[0], lambda b: b[3] - b[2],
                    lambda b: (b[1] - b[0]) / (b[3] - b[2]), lambda b: (b[1] - b[0]) * (b[3] - b[2])):
        assert same_distribution(measure(boxes[0]), measure(boxes[1]))


@pytest.mark.slow
def test_both_pipelines_rotate_zoom_shear_and_shift_alike() -> None:
    x = torch.arange(21).expand(21, 21)
    ramps = torch.stack([10 * x, 10 * x.T, 0 * x]).to(torch.uint8)
    recipe = ViewRecipe(21, rotate=20.0, zoom=(0.8, 1.2), shear=25.0, shift=0.1)

    def inverse_matrix(pipeline: Pipeline) -> Tensor:
        source = inverse_normalise(pipeline(recipe, ramps, 1500), recipe)[:, :2] * 25.5  # (1500, 2, 21, 21), in pixels
        return torch.cat([source[..., 10, 14] - source[..., 10, 6], source[..., 14, 10] - source[..., 6, 10],
                          (source[..., 10, 10] - 10)], dim=1)

    for ours, theirs in zip(inverse_matrix(batched).unbind(1), inverse_matrix(reference).unbind(1)):
        assert same_distribution(ours, theirs)


def test_a_view_does_not_depend_on_the_rest_of_the_batch() -> None:
    images = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(300) * 1000
    together = render(images, draw(BUSY, 0, 0, indices, 0, 32, 32), BUSY)
    for rows in (torch.tensor([3]), torch.tensor([11, 0, 255, 256, 299])):
        alone = render(images[rows], draw(BUSY, 0, 0, indices[rows], 0, 32, 32), BUSY)
        torch.testing.assert_close(alone, together[rows], atol=1e-4, rtol=0)


@pytest.mark.parametrize("height, width", [(33, 17), (1, 1), (1, 50), (50, 1), (5000, 1)])
@pytest.mark.parametrize("size", [1, 31])
def test_render_takes_images_of_any_shape(height: int, width: int, size: int) -> None:
    for recipe in (*paper_recipes(size), dataclasses.replace(DRAWN, size=size)):
        views = batched(recipe, photograph(height, width), 3)
        assert views.shape == (3, 3, size, size) and views.dtype == torch.float32 and views.isfinite().all()


def test_bytes_and_floats_give_the_same_view_and_stay_unchanged() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for recipe in (BUSY, ViewRecipe(32), ViewRecipe(32, noise=0.1, flip=0.5)):
        params = draw(recipe, 0, 0, torch.arange(8), 0, 32, 32)
        floats = images / 255
        before = images.clone(), floats.clone()
        torch.testing.assert_close(render(images, params, recipe), render(floats, params, recipe), atol=1e-4, rtol=0)
        assert torch.equal(images, before[0]) and torch.equal(floats, before[1])


def test_autocast_does_not_lower_the_precision_of_views() -> None:
    """And the same is rendered again, to the bit."""
    images = photograph(32, 32).expand(8, 3, 32, 32)
    params = draw(BUSY, 0, 0, torch.arange(8), 0, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        views = render(images, params, BUSY)
    assert torch.equal(views, render(images, params, BUSY))


def test_render_refuses_images_of_another_size_without_boxes() -> None:
    recipe = ViewRecipe(32)
    with pytest.raises(ValueError, match="40x32 pixels without boxes"):
        render(torch.rand(2, 3, 40, 32), draw(recipe, 0, 0, torch.arange(2), 0, 32, 32), recipe)


def pair(recipes: tuple[ViewRecipe, ViewRecipe], size: int) -> tuple[list[Tensor], list[ViewParams]]:
    """Images and parameters of two views, of 24 images and of 16."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator) for count in (24, 16)]
    return images, [draw(recipe, 7, 1, torch.arange(len(batch)), view, size, size)
                    for view, (recipe, batch) in enumerate(zip(recipes, images))]


BENT = dataclasses.replace(BUSY, elastic=0.05)
PAIRS = {"paper": paper_recipes(16), "every operation": (BENT, dataclasses.replace(BENT, flip=0.2, jitter=0.3, grey=0.9,
                                                                                   blur=0.9, solarize=0.9))}


@pytest.mark.parametrize("recipes", PAIRS.values(), ids=PAIRS)
def test_views_rendered_at_once_are_those_rendered_one_by_one(recipes: tuple[ViewRecipe, ViewRecipe]) -> None:
    images, params = pair(recipes, 40)
    expected = [render(*one) for one in zip(images, params, recipes)]
    for got in render_all(images, params, recipes), render_module._render_at_once(images, params, recipes[0]):
        for view, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(view, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ViewRecipe)])
def test_only_recipes_that_differ_in_how_often_things_happen_are_rendered_at_once(
        field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the "meta" device, an accelerator that every machine has."""
    value = getattr(BENT, field)
    if isinstance(value, str):
        changed: Any = "bilinear"
    elif isinstance(value, tuple):
        changed = tuple(0.9 * number for number in value)
    else:
        changed = value + 2 if isinstance(value, int) else 0.9 * value
    recipes = BENT, dataclasses.replace(BENT, **{field: changed})
    images, params = pair(recipes, 40)
    calls: list[int] = []
    monkeypatch.setattr(render_module, "render", lambda images, params, recipe: calls.append(len(images)) or images)
    render_all([batch.to("meta") for batch in images], params, recipes)
    assert recipes[0] != recipes[1]
    assert calls == ([40] if field in ("flip", "jitter", "grey", "blur", "solarize") else [24, 16])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [*paper_recipes(32), BUSY])
def test_a_gpu_renders_what_the_cpu_renders(recipe: ViewRecipe) -> None:
    images = torch.randint(0, 256, (64, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = draw(recipe, 0, 0, torch.arange(64), 0, 48, 40)
    apart = (render(images.cuda(), params, recipe).cpu() - render(images, params, recipe)).abs()
    assert apart.quantile(0.999) < 1e-2 and apart.mean() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("recipes", PAIRS.values(), ids=PAIRS)
def test_a_gpu_renders_both_views_as_it_renders_each(recipes: tuple[ViewRecipe, ViewRecipe]) -> None:
    images, params = pair(recipes, 40)
    images = [batch.cuda() for batch in images]
    for view, *one in zip(render_all(images, params, recipes), images, params, recipes, strict=True):
        torch.testing.assert_close(view, render(*one), rtol=0, atol=1e-4)


def test_bending_agrees_with_torchvisions_elastic_on_the_same_displacements() -> None:
    images = torch.rand(3, 3, 12, 9)
    displacements = 0.1 * torch.randn(3, 2, 3, 3)
    identity = torch.eye(2, 3).expand(3, 2, 3)
    ours = image_ops.affine(images, identity, displacements)
    field = torch.nn.functional.interpolate(2 * displacements, (12, 9), mode="bicubic", align_corners=True)
    for image, own, moved in zip(images, ours, field):
        expected = F.elastic(image, moved.permute(1, 2, 0).unsqueeze(0), InterpolationMode.BILINEAR)
        inside = (slice(None), slice(3, -3), slice(3, -3))  # at the border torchvision's fill darkens twice
        assert torch.allclose(own[inside], expected[inside], atol=1e-3)
    assert not torch.allclose(ours, images, atol=0.05)


@pytest.mark.parametrize("linear", [[[0.0, -1.0], [1.0, 0.0]], [[0.5, 0.0], [0.0, 0.5]]])
def test_bending_happens_before_the_affine_map_is_applied(linear: list[list[float]]) -> None:
    """A constant displacement by one pixel along x moves the fetched position by the first column of the map."""
    image = torch.rand(1, 3, 8, 8)
    matrix = torch.tensor([[linear[0] + [0.0], linear[1] + [0.0]]])
    shifted = matrix.clone()
    shifted[0, :, 2] = matrix[0, :, 0]
    displacement = torch.zeros(1, 2, 3, 3)
    displacement[:, 0] = 1 / 8
    assert torch.allclose(image_ops.affine(image, matrix, displacement), image_ops.affine(image, shifted), atol=1e-5)


def test_displacements_have_the_stated_spread_in_both_pipelines() -> None:
    recipe = ViewRecipe(8, elastic=0.06)
    drawn = draw(recipe, 0, 0, torch.arange(4000), 0, 8, 8).displacements
    assert drawn is not None and float(drawn.std()) == pytest.approx(0.06, rel=0.02)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.002)
    ramp = torch.arange(8.0).view(1, 1, 8).expand(3, 8, 8).mul(30).to(torch.uint8)
    centre = (slice(None), 0, slice(3, 5), slice(3, 5))
    ours, theirs = (float(pipeline(recipe, ramp, 600)[centre].std()) for pipeline in (batched, reference))
    assert ours == pytest.approx(theirs, rel=0.1)


def test_views_are_made_in_whole_float32_whatever_the_network_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    crop_resize = image_ops.crop_resize

    def spy(*arguments: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return crop_resize(*arguments)

    monkeypatch.setattr(image_ops, "crop_resize", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        recipe = ViewRecipe(8, crop_scale=(0.2, 1.0))
        render(torch.rand(2, 3, 16, 16), draw(recipe, 0, 0, torch.arange(2), 0, 16, 16), recipe)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
