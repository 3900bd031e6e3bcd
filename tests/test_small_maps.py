"""Convolutions computed as products of matrices: they give what torch's own give, and only where that pays."""

import copy
import itertools
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from byol_core.backbones import build_backbone
from byol_core.networks import BYOL
from byol_core.runtime import Runtime
from byol_core.small_maps import FEWEST, MANY, SmallMapConv2d, use_products_for_small_maps


def converted(convolution: nn.Conv2d) -> nn.Conv2d:
    copied = copy.deepcopy(convolution)
    use_products_for_small_maps(copied)
    return copied


@pytest.mark.parametrize("kernel, stride, padding", list(itertools.product((1, 3, (4, 1)), (1, 2, (3, 1)), (0, 1, (2, 0)))))
def test_outputs_and_gradients_are_those_of_torch(kernel: int | tuple[int, int], stride: int | tuple[int, int],
                                                  padding: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    for height, width, bias in itertools.product((1, 2, 3, 5), (1, 2, 4), (True, False)):
        theirs = nn.Conv2d(FEWEST, 5, kernel, stride, padding, bias=bias).double()
        ours = converted(theirs)
        assert type(ours) is SmallMapConv2d and ours.state_dict().keys() == theirs.state_dict().keys()
        one = torch.randn(2, FEWEST, height, width, dtype=torch.float64, requires_grad=True)
        other = one.detach().clone().requires_grad_()
        try:
            expected = theirs(one)
        except RuntimeError:  # the kernel is larger than the image
            with pytest.raises(RuntimeError):
                ours(other)
            continue
        found = ours(other)
        gradient = torch.randn_like(expected)
        expected.backward(gradient)
        found.backward(gradient)
        weights = zip(ours.parameters(), theirs.parameters())
        for value, right in [(found, expected), (other.grad, one.grad), *((a.grad, b.grad) for a, b in weights)]:
            torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-10)


def products(ours: nn.Conv2d, images: Tensor) -> int:
    """How many times the module multiplies matrices instead of going torch's way."""
    with mock.patch.object(nn.functional, "linear", wraps=nn.functional.linear) as linear:
        ours(images)
    return linear.call_count


@pytest.mark.parametrize("channels, side", [(4, 2), (MANY // FEWEST - 1, 2), (MANY // FEWEST, 4)])
def test_only_small_maps_are_computed_so(channels: int, side: int) -> None:
    theirs = nn.Conv2d(FEWEST, channels, 3, padding=1)
    ours, images = converted(theirs), torch.randn(2, FEWEST, side, side)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert products(ours, images) == 1
    assert products(ours, torch.randn(2, FEWEST, side + 1, side)) == 0
    assert ours(torch.randn(FEWEST, 1, 1)).shape == (channels, 1, 1)  # one image without a batch


@pytest.mark.parametrize("convolution", [
    nn.Conv2d(FEWEST - 1, 8, 3), nn.Conv2d(FEWEST, 8, 3, groups=2), nn.Conv2d(FEWEST, 8, 3, dilation=2),
    nn.Conv2d(FEWEST, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(FEWEST, 8, 3, padding="same"),
    nn.ConvTranspose2d(FEWEST, 8, 3), type("Own", (nn.Conv2d,), {})(FEWEST, 8, 3),
], ids=["few channels", "groups", "dilation", "padding mode", "padding by name", "transposed", "a class of its own"])
def test_other_convolutions_stay_as_they_are(convolution: nn.Module) -> None:
    assert type(converted(convolution)) is type(convolution)  # type: ignore[arg-type]


def test_a_run_on_a_cpu_uses_them_in_both_networks() -> None:
    model = BYOL(*build_backbone("resnet18"), 8, 4)
    names = list(model.state_dict())
    Runtime("cpu").place_model(model)
    assert list(model.state_dict()) == names
    for network in (model.online, model.target):  # three of layer3, five of layer4
        assert sum(type(module) is SmallMapConv2d for module in network.modules()) == 8
