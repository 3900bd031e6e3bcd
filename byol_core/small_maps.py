"""Convolutions whose output has a handful of pixels, computed as one product of matrices: on a CPU several times as fast."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST, LARGEST_OF_MANY = 4, 16  # pixels of the output; the latter between so many channels:
MANY = 256 * 512  # input channels x output channels
FEWEST = 256  # input channels; with fewer the weights are small, and a convolution's own way is as fast or faster


class SmallMapConv2d(nn.Conv2d):
    """`nn.Conv2d` with the same parameters and, but for rounding, the same results; larger maps go the usual way.

    The last layers of a ResNet-18 make maps of 2x2 pixels of an image of 64, the last of conv4 4x4 of an image of 32. There
    oneDNN spends most of its time on reordering the weights in every call.
    """

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        down, right = padding = cast(tuple[int, int], self.padding)
        size = [(pixels + 2 * pad - kernel) // step + 1 for pixels, pad, kernel, step in
                zip(images.shape[-2:], padding, self.kernel_size, self.stride)]
        largest = LARGEST_OF_MANY if self.in_channels * self.out_channels >= MANY else LARGEST
        if images.ndim != 4 or min(size) < 1 or size[0] * size[1] > largest:
            return super()._conv_forward(images, weight, bias)
        rows, columns = (_taps(*axis) for axis in zip(images.shape[2:], padding, self.kernel_size, self.stride, size))
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, right, right, down, down))  # (B, H, W, C)
        under = [padded[:, _seen(row, self.stride[0], size[0]), _seen(column, self.stride[1], size[1])]
                 for row in rows for column in columns]  # (B, *size, C) each: what this tap of the kernel sees
        used = weight[:, :, rows.start:rows.stop, columns.start:columns.stop].permute(0, 2, 3, 1)
        products = F.linear(torch.cat(under, 3).flatten(0, 2), used.reshape(len(weight), -1), bias)
        return products.view(-1, *size, len(weight)).permute(0, 3, 1, 2)


def _taps(pixels: int, padding: int, kernel: int, stride: int, size: int) -> range:
    """The places along one axis of the kernel that see a pixel, and not padding alone, from some place of the output."""
    sees = [tap for tap in range(kernel) if any(0 <= tap - padding + stride * place < pixels for place in range(size))]
    return range(sees[0], sees[-1] + 1) if sees else range(1)


def _seen(tap: int, stride: int, size: int) -> slice:
    return slice(tap, tap + stride * (size - 1) + 1, stride)


def use_products_for_small_maps(network: nn.Module) -> None:
    """Let the plain convolutions of `network` that have many channels compute small maps this way; nothing else changes."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.groups == 1 and module.in_channels >= FEWEST \
                and module.dilation == (1, 1) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = SmallMapConv2d
