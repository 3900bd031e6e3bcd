"""What `draw` draws for views, against torchvision's own draws."""

import dataclasses
import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision import transforms

from byol_core.views.draw import ViewParams, draw, draw_boxes
from byol_core.views.recipes import ViewRecipe, paper_recipes
from tests.helpers.views import BUSY, DRAWN, same_distribution


def rows_of(params: ViewParams, rows: Tensor) -> dict[str, Tensor]:
    fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return {name: value[rows] for name, value in fields.items() if value is not None}


def test_draw_is_a_function_of_seed_epoch_index_and_view_alone() -> None:
    indices = torch.tensor([5, 3, 900_000, 0, 12, 7, 8])
    whole = draw(BUSY, 1, 2, indices, 0, 40, 50)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for rows in (torch.tensor([4]), torch.tensor([6, 2, 0]), torch.arange(6, -1, -1)):
        part = draw(BUSY, 1, 2, indices[rows], 0, 40, 50)
        for name, value in rows_of(whole, rows).items():
            assert torch.equal(value, getattr(part, name)), name
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("changed", ["seed", "epoch", "indices", "view"])
def test_draw_changes_with_each_part_of_its_key(changed: str) -> None:
    key = {"seed": 3, "epoch": 3, "indices": torch.arange(200), "view": 0}
    one = draw(BUSY, **key, heights=32, widths=32)  # type: ignore[arg-type]
    key[changed] = torch.arange(200, 400) if changed == "indices" else 1
    other = draw(BUSY, **key, heights=32, widths=32)  # type: ignore[arg-type]
    for name, value in rows_of(one, torch.arange(200)).items():
        different = (value != getattr(other, name)).view(200, -1).any(1).float().mean()
        assert different > (0.2 if value.dtype == torch.bool else 0.4), name


def test_switching_one_operation_off_leaves_the_other_draws_unchanged() -> None:
    indices = torch.arange(50)
    plain = dataclasses.replace(BUSY, flip=0.0, jitter=0.0, blur=0.0, noise=0.0, rotate=0.0)
    full, less = draw(BUSY, 0, 0, indices, 0, 40, 50), draw(plain, 0, 0, indices, 0, 40, 50)
    assert full.boxes is not None and less.boxes is not None
    assert torch.equal(full.boxes, less.boxes)
    assert torch.equal(full.order, less.order) and torch.equal(full.factors, less.factors)
    assert torch.equal(full.grey, less.grey) and torch.equal(full.solarize, less.solarize)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_each_operation_is_drawn_at_the_stated_rate(probability: float) -> None:
    count = 20_000
    for field in ("flip", "jitter", "grey", "blur", "solarize"):
        recipe = ViewRecipe(32, blur_kernel=3, **{field: probability})  # type: ignore[arg-type]
        params = draw(recipe, 0, 0, torch.arange(count), 0, 32, 32)
        for name in ("flip", "jitter", "grey", "sigma", "solarize"):
            rate = (getattr(params, name) > 0).double().mean().item()
            expected = probability if name == field or (field, name) == ("blur", "sigma") else 0.0
            assert abs(rate - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / count), (field, name)


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(375, 500), (9, 7), (20, 200), (1, 40), (40, 1)])
def test_crop_boxes_have_torchvisions_distribution(height: int, width: int) -> None:
    torch.manual_seed(0)
    count, image = 2000, torch.empty(3, height, width)
    boxes = draw(paper_recipes(32)[0], 0, 0, torch.arange(count), 0, height, width).boxes
    assert boxes is not None
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
                           for _ in range(count)])
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3],
                    lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0] + b[:, 2],
                    lambda b: b[:, 1] + b[:, 3]):
        assert same_distribution(measure(boxes), measure(theirs))
    assert boxes[:, 2:].min() >= 1 and boxes[:, :2].min() >= 0
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_crop_falls_back_to_the_centre_where_no_box_fits() -> None:
    recipe = ViewRecipe(8, crop_scale=(1.0, 1.0))  # a whole picture's area never fits into a strip at these ratios
    wide, tall = (draw(recipe, 0, 0, torch.arange(20), 0, *sides).boxes for sides in ((30, 300), (300, 30)))
    assert wide is not None and tall is not None
    assert wide.unique(dim=0).tolist() == [[0, 130, 30, 40]] and tall.unique(dim=0).tolist() == [[130, 0, 40, 30]]


def test_images_of_one_batch_may_differ_in_size() -> None:
    heights, widths = torch.tensor([20, 300, 1, 64]).repeat(50), torch.tensor([200, 40, 30, 64]).repeat(50)
    recipe, indices = paper_recipes(32)[0], torch.arange(200)
    together = draw(recipe, 0, 0, indices, 0, heights, widths).boxes
    assert together is not None
    for index in (0, 1, 2, 3, 101):
        alone = draw(recipe, 0, 0, indices[index:index + 1], 0, int(heights[index]), int(widths[index])).boxes
        assert alone is not None and torch.equal(together[index:index + 1], alone)


def test_draw_boxes_are_those_of_draw() -> None:
    recipe, indices = paper_recipes(32)[0], torch.tensor([4, 8, 15])
    boxes = draw(recipe, 7, 1, indices, 1, 100, 75).boxes
    assert boxes is not None and torch.equal(draw_boxes(recipe, 7, 1, indices, 1, 100, 75), boxes)
    with pytest.raises(ValueError, match="crop_scale=None"):
        draw_boxes(ViewRecipe(32), 7, 1, indices, 1, 100, 75)


def test_jitter_factors_and_blur_sigma_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    recipe = dataclasses.replace(paper_recipes(32)[0], contrast=1.5)  # factors reach down to 0, no further
    params = draw(recipe, 0, 0, torch.arange(3000), 0, 32, 32)
    theirs = [transforms.ColorJitter.get_params([0.6, 1.4], [0.0, 2.5], [0.8, 1.2], [-0.1, 0.1]) for _ in range(3000)]
    for place in range(4):
        assert same_distribution(params.factors[:, place], torch.tensor([draws[1 + place] for draws in theirs]))
    sigma = torch.tensor([transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(3000)])
    assert same_distribution(params.sigma, sigma)


def test_each_order_of_the_jitter_is_equally_likely() -> None:
    order = draw(paper_recipes(32)[0], 0, 0, torch.arange(24_000), 0, 32, 32).order
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(24_000, 4))
    counts = order.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_affine_matrices_have_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    matrices = draw(DRAWN, 0, 0, torch.arange(3000), 0, 16, 16).affine
    assert matrices is not None
    forward = matrices[:, :, :2].double().inverse()
    zoom = torch.linalg.det(forward).sqrt()
    angle = torch.atan2(forward[:, 1, 0], forward[:, 0, 0])
    upright = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    shear = -(upright @ forward)[:, 0, 1] / zoom
    shift = -(forward @ matrices[:, :, 2:].double()).squeeze(2)
    theirs = [transforms.RandomAffine.get_params([-20, 20], [0.25, 0.25], [0.75, 1.25], [-10, 10], [16, 16])
              for _ in range(3000)]
    assert same_distribution(angle.rad2deg(), torch.tensor([a for a, _, _, _ in theirs]))
    assert same_distribution(zoom, torch.tensor([z for _, _, z, _ in theirs]))
    assert same_distribution(shear.atan().rad2deg(), torch.tensor([s[0] for _, _, _, s in theirs]))
    for axis in range(2):
        assert same_distribution(shift[:, axis].round(), torch.tensor([t[axis] for _, t, _, _ in theirs]))
    assert (shift - shift.round()).abs().max() < 1e-4


def test_the_numbers_of_a_view_are_independent() -> None:
    count = 10_000
    params, other = (draw(BUSY, 0, 0, torch.arange(count), view, 500, 500) for view in (0, 1))
    columns = []
    for numbers in (params, other):
        assert numbers.affine is not None and numbers.boxes is not None
        room = 501 - numbers.boxes[:, 2:]
        columns += [numbers.flip, numbers.jitter, numbers.grey, numbers.sigma > 0, numbers.solarize,
                    *numbers.factors.unbind(1), numbers.order[:, 0], numbers.affine[:, 0, 1], numbers.affine[:, 1, 1],
                    numbers.boxes[:, 2] * numbers.boxes[:, 3], numbers.boxes[:, 0] / room[:, 0],
                    numbers.boxes[:, 1] / room[:, 1]]
    values = torch.stack([column.double() for column in columns])
    following = values.roll(1, dims=1)  # neighbouring images
    assert (torch.corrcoef(values) - torch.eye(len(values))).abs().max() < 5 / math.sqrt(count)
    between = torch.corrcoef(torch.cat([values, following]))[:len(values), len(values):]
    assert between.abs().max() < 5 / math.sqrt(count)


def test_draw_refuses_an_affine_recipe_for_images_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="images of one size"):
        draw(DRAWN, 0, 0, torch.arange(2), 0, torch.tensor([8, 9]), torch.tensor([8, 8]))
