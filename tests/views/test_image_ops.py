"""Every batched operation against torchvision's functional on one image at a time, with the same parameters."""

import math
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from byol_core.views import image_ops

COLOURS = [(image_ops.brightness, F.adjust_brightness), (image_ops.contrast, F.adjust_contrast),
           (image_ops.saturation, F.adjust_saturation), (image_ops.hue, F.adjust_hue)]


def awkward_images(height: int = 13, width: int = 10) -> Tensor:
    """(16, 3, H, W): noise, and rows whose hue, chroma or contrast is a special case."""
    images = torch.rand(16, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[0], images[1], images[2] = 0, 1, 0.5
    images[3] = images[3, :1]  # a grey picture
    images[4] = (2 * images[4]).round() / 2  # many equal channels
    images[5, 0] = images[5, 1]
    images[6, 1] = images[6, 2]
    images[7, 2] = images[7, 0]
    return images


def one_by_one(function: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    numbers = zip(*(parameter.tolist() for parameter in parameters))
    return torch.stack([function(image, *row) for image, row in zip(images, numbers)])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height, width, size", [(8, 8, 8), (32, 32, 32), (500, 375, 224), (33, 17, 9), (5, 1, 4),
                                                 (1, 50, 7), (1, 1, 3), (20, 30, 61), (40, 40, 1)])
def test_crop_resize_matches_torchvision_for_its_own_random_boxes(height: int, width: int, size: int,
                                                                  interpolation: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 3, height, width)
    boxes = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for image in images])
    flip = torch.tensor([True, False, True, False, False, True])
    views = image_ops.crop_resize(images, boxes, size, flip, interpolation)
    mode = InterpolationMode(interpolation)
    expected = one_by_one(lambda image, box: F.resized_crop(image, *box, [size, size], mode, antialias=True),
                          images, boxes)
    expected = torch.where(flip.view(-1, 1, 1, 1), F.horizontal_flip(expected), expected).clamp(0, 1)
    torch.testing.assert_close(views, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("box", [[-1, 0, 4, 4], [0, -1, 4, 4], [0, 0, 0, 4], [0, 0, 4, 0], [5, 0, 4, 4], [0, 7, 4, 4]])
def test_crop_resize_refuses_a_box_that_is_empty_or_leaves_the_canvas(box: list[int]) -> None:
    images = torch.rand(2, 3, 8, 10)
    boxes = torch.tensor([[0, 0, 8, 10], box])
    with pytest.raises(ValueError, match=rf"box \[{', '.join(map(str, box))}\] of row 1 .* 8x10"):
        image_ops.crop_resize(images, boxes, 4, torch.tensor([False, False]))


@pytest.mark.parametrize("operation, reference", COLOURS)
def test_colour_operation_matches_torchvision(operation: Callable[..., Tensor],
                                              reference: Callable[..., Tensor]) -> None:
    images = awkward_images()
    parameters = torch.linspace(-0.5, 0.5, 16) if operation is image_ops.hue else torch.linspace(0, 2, 16)
    expected = one_by_one(reference, images, parameters)
    torch.testing.assert_close(operation(images, parameters), expected, atol=1e-5, rtol=0)


def test_jitter_applies_the_operations_in_each_rows_own_order() -> None:
    orders = torch.tensor(list(permutations(range(4))))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(24, 3, 9, 7, generator=generator)
    factors = torch.rand(24, 4, generator=generator) * torch.tensor([1.6, 1.6, 1.6, 1.0])
    factors += torch.tensor([0.2, 0.2, 0.2, -0.5])

    def in_order(image: Tensor, numbers: list[float], order: list[int]) -> Tensor:
        for place in order:
            image = COLOURS[place][1](image, numbers[place])
        return image

    views = image_ops.jitter(images, factors, orders)
    torch.testing.assert_close(views, one_by_one(in_order, images, factors, orders), atol=1e-5, rtol=0)
    same_order = image_ops.jitter(images, factors, orders[:1].expand(24, 4))
    assert ((views - same_order).abs().amax((1, 2, 3)) > 1e-3).sum() >= 20


@pytest.mark.parametrize("place", range(4))
def test_jitter_with_one_operation_in_use_is_that_operation(place: int) -> None:
    images = awkward_images()
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(16, 1)
    factors[:, place] = torch.linspace(0.05, 0.45, 16)
    orders = torch.rand(16, 4).argsort(1)
    expected = one_by_one(COLOURS[place][1], images, factors[:, place])
    torch.testing.assert_close(image_ops.jitter(images, factors, orders), expected, atol=1e-5, rtol=0)


def test_grey_matches_torchvision() -> None:
    images = awkward_images()
    torch.testing.assert_close(image_ops.grey(images), F.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel, height, width", [(3, 32, 32), (23, 224, 224), (9, 13, 10), (1, 5, 5), (3, 2, 2),
                                                   (7, 4, 31)])
def test_gaussian_blur_matches_torchvision(kernel: int, height: int, width: int) -> None:
    images = torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 1.1, 2.0])
    expected = one_by_one(lambda image, s: F.gaussian_blur(image, [kernel, kernel], [s, s]), images, sigma)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        blurred = image_ops.gaussian_blur(images.contiguous(memory_format=memory_format), sigma, kernel)
        torch.testing.assert_close(blurred, expected, atol=1e-4, rtol=0)


def test_solarize_matches_torchvision() -> None:
    images = awkward_images()
    for threshold in (0.5, images.max().item()):  # the latter is a value of a pixel
        torch.testing.assert_close(image_ops.solarize(images, threshold), F.solarize(images, threshold), atol=0, rtol=0)


def inverse_affine(angle: float, shear: float, zoom: float, x: float, y: float) -> list[list[float]]:
    """The output-to-input matrix in float64, by inverting the forward one: shear, rotate, zoom, shift."""
    angle, shear = math.radians(angle), math.radians(shear)
    cos, sin = math.cos(angle), math.sin(angle)
    rotate = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    linear = zoom * rotate @ torch.tensor([[1, -math.tan(shear)], [0, 1]], dtype=torch.float64)
    forward = torch.eye(3, dtype=torch.float64)
    forward[:2, :2], forward[:2, 2] = linear, torch.tensor([x, y])
    return forward.inverse()[:2].tolist()


@pytest.mark.parametrize("height, width", [(8, 8), (13, 10), (32, 5), (1, 9)])
def test_affine_matches_torchvision(height: int, width: int) -> None:
    images = awkward_images(height, width)
    angle, shear = torch.linspace(-180, 180, 16), torch.linspace(25, -25, 16)
    zoom, shift_x, shift_y = torch.linspace(0.5, 1.5, 16), torch.arange(16) % 5 - 2, torch.arange(16) % 3 - 1
    numbers = [angle, shear, zoom, shift_x, shift_y]
    matrices = torch.tensor([inverse_affine(*row) for row in torch.stack(numbers, 1).tolist()])

    def reference(image: Tensor, angle: float, shear: float, zoom: float, x: int, y: int) -> Tensor:
        return F.affine(image, angle, [x, y], zoom, [shear, 0.0], InterpolationMode.BILINEAR)

    expected = one_by_one(reference, images, *numbers)
    torch.testing.assert_close(image_ops.affine(images, matrices), expected, atol=1e-3, rtol=0)


def test_hashed_bits_are_the_published_splitmix64_sequence() -> None:
    bits = image_ops.hashed_bits(torch.tensor([0, 1234567]), 3)
    published = [[0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
                 [6457827717110365317, 3203168211198807973, 9817491932198370423]]  # Vigna's code, seeds 0 and 1234567
    assert [[number % 2**64 for number in row] for row in bits.tolist()] == published


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    images = torch.full((40, 3, 9, 11), 0.5)
    noise = (image_ops.add_noise(images, 0.01, torch.arange(40)) - 0.5) / 0.01
    assert stats.kstest(noise.flatten()[:: 3].numpy(), "norm").pvalue > 1e-3
    count = noise[0].numel()
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(40)
    assert correlation.abs().max() < 5 / math.sqrt(count)
    between_halves = torch.corrcoef(torch.stack([noise.flatten(1)[:, :count // 2].flatten(),
                                                 noise.flatten(1)[:, -(count // 2):].flatten()]))[0, 1]
    assert abs(between_halves) < 5 / math.sqrt(20 * count)


def test_noise_is_clipped() -> None:
    noisy = image_ops.add_noise(torch.full((4, 3, 8, 8), 0.5), 5.0, torch.arange(4))
    assert noisy.min() == 0 and noisy.max() == 1


def test_on_rows_changes_the_chosen_rows_only() -> None:
    images, amounts = torch.zeros(5, 3, 2, 2), torch.arange(5.0)
    calls: list[int] = []

    def add(rows: Tensor, amount: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows + amount.view(-1, 1, 1, 1)

    assert image_ops.on_rows_(images, torch.zeros(5, dtype=torch.bool), add, amounts) is images and calls == []
    changed = image_ops.on_rows_(images, torch.tensor([False, True, False, True, True]), add, amounts)
    assert changed[:, 2, 1, 0].tolist() == [0, 1, 0, 3, 4] and calls == [3]


def test_operations_leave_their_inputs_unchanged() -> None:
    images, numbers = awkward_images(), torch.linspace(0.1, 0.5, 16)
    order, keys = torch.rand(16, 4).argsort(1), torch.arange(16)
    boxes, flip = torch.tensor([[1, 1, 9, 8]]).repeat(16, 1), torch.ones(16, dtype=torch.bool)
    matrices = torch.tensor([inverse_affine(10, 5, 1.1, 1, 0)] * 16)
    factors = torch.stack([numbers] * 4, dim=1)
    calls: dict[Callable[..., Tensor], tuple[object, ...]] = {
        image_ops.crop_resize: (boxes, 6, flip), image_ops.affine: (matrices,), image_ops.grey: (),
        image_ops.brightness: (numbers,), image_ops.contrast: (numbers,), image_ops.saturation: (numbers,),
        image_ops.hue: (numbers,), image_ops.jitter: (factors, order), image_ops.gaussian_blur: (numbers, 3),
        image_ops.solarize: (0.5,), image_ops.add_noise: (0.1, keys)}
    for operation, arguments in calls.items():
        before = [images.clone(), *(a.clone() for a in arguments if isinstance(a, Tensor))]
        operation(images, *arguments)
        after = [images, *(a for a in arguments if isinstance(a, Tensor))]
        assert all(torch.equal(x, y) for x, y in zip(before, after)), operation
