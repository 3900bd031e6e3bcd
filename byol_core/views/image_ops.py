"""Image operations on a whole batch with one set of parameters per image, on any device.

Every operation takes images as (B, 3, H, W) float in [0, 1], returns a new tensor of that kind on the same device and
leaves its inputs unchanged; only `on_rows_` writes in place. Parameters are CPU tensors with one row per image, so that
rows can be chosen without waiting for an accelerator.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_UNCHANGED = (1.0, 1.0, 1.0, 0.0)  # the jitter parameters that leave an image as it is
_GREY_WEIGHTS = (0.2989, 0.587, 0.114)
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # 2**64 / golden ratio, the increment of splitmix64, as a signed integer


def crop_resize(images: Tensor, boxes: Tensor, size: int, flip: Tensor, interpolation: str = "bicubic") -> Tensor:
    """Cut one box out of each image, resize it to size x size with antialiasing, mirror it where asked.

    Two batched matrix products, with one weight matrix per image and axis.

    boxes: (B, 4) top, left, height, width in pixels; images smaller than H x W are padded at the right and the bottom.
    size: output edge in pixels, at least 1. flip: (B,) bool, True mirrors left to right. interpolation: "bicubic" or
    "bilinear"; the overshoot of the former is clipped to [0, 1].
    Returns: (B, 3, size, size).
    Raises: ValueError for an empty box or one that leaves the canvas, naming row and box.
    Source: torchvision `resized_crop` on float tensors with antialiasing; equal within 1e-4.
    """
    batch, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.unbind(1)
    bad = (top < 0) | (left < 0) | (boxes[:, 2:] < 1).any(1) | (top + box_height > height) | (left + box_width > width)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"crop_resize: box {boxes[row].tolist()} of row {row} is empty or leaves the {height}x{width} "
                         "canvas; give top, left, height, width in pixels")
    rows = _resize_weights(top, box_height, height, size, None, interpolation, images)
    columns = _resize_weights(left, box_width, width, size, flip, interpolation, images)
    images = torch.bmm(images.reshape(batch, channels * height, width), columns.transpose(1, 2))  # (B, 3H, size)
    images = torch.matmul(rows.unsqueeze(1), images.view(batch, channels, height, size))  # (B, 3, size, size)
    return images.clamp_(0, 1) if interpolation == "bicubic" else images


def _resize_weights(start: Tensor, extent: Tensor, length: int, size: int, flip: Tensor | None, interpolation: str,
                    images: Tensor) -> Tensor:
    """(B, size, length): the share of each input pixel in each output pixel along one axis; rows sum to 1."""
    scale = (extent.double() / size).unsqueeze(1)  # (B, 1), input pixels per output pixel
    output = torch.arange(size, dtype=torch.float64).add_(0.5).expand(len(start), size)
    if flip is not None:
        output = torch.where(flip.unsqueeze(1), size - output, output)
    centre = start.unsqueeze(1) + scale * output  # (B, size), in input pixels
    shrink = scale.clamp(min=1).reciprocal()  # the filter widens when the box is made smaller: antialiasing
    centre, shrink = _beside(images, centre.to(images.dtype), shrink.to(images.dtype))
    first, end = _beside(images, start.unsqueeze(1), (start + extent).unsqueeze(1))
    pixel = torch.arange(length, device=images.device)
    inside = ((pixel >= first) & (pixel < end)).to(images.dtype)  # (B, length)
    distance = (pixel + 0.5 - centre.unsqueeze(2)).mul_(shrink.unsqueeze(2)).abs_()  # (B, size, length)
    weights = _cubic(distance) if interpolation == "bicubic" else distance.neg_().add_(1).clamp_(min=0)
    weights.mul_(inside.unsqueeze(1))
    return weights.div_(weights.sum(2, keepdim=True))


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic filter, a = -1/2, at d >= 0: 1 - d^2 (2.5 - 1.5 d) up to 1, -(d - 1) (d - 2)^2 / 2 up to 2."""
    near = distance.clamp(max=1)
    weights = near.mul(1.5).sub_(2.5).mul_(near).mul_(near).add_(1)
    far = distance.clamp(1, 2)  # both parts are 0 outside their own range, so they add up without a choice
    return weights.addcmul_(far - 1, far.sub_(2).square_(), value=-0.5)


def affine_matrices(angle: Tensor, zoom: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    """(B, 2, 3) from output to input position: the inverse of shearing along x, rotating, zooming, then shifting.

    angle, shear: (B,) radians. zoom: (B,) factor above 0. shift: (B, 2) pixels along x and y.
    Source: torchvision `affine`, whose conventions these are.
    """
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    linear = torch.stack([cos - sin * tan, sin + cos * tan, -sin, cos], dim=1) / zoom.unsqueeze(1)
    linear = linear.view(-1, 2, 2)
    return torch.cat([linear, -(linear @ shift.unsqueeze(2))], dim=2)


def affine(images: Tensor, matrices: Tensor, displacements: Tensor | None = None) -> Tensor:
    """Fetch every pixel from matrices @ (x, y, 1), bilinearly; what lies outside the image is black.

    matrices: (B, 2, 3), from output to input position in pixels, both measured from the centre of the image.
    displacements: (B, 2, h, w), by how much (x, y) is moved first, as a fraction of the sides, on a coarse grid whose
    corners are the image's; interpolated in between.
    Source: torchvision `affine` and, for displacements, `elastic`, on float tensors with bilinear interpolation and
    fill 0; equal within 1e-3.
    """
    height, width = images.shape[-2:]
    side = torch.tensor([[width], [height]])
    unit = torch.tensor([width, height, 2])  # positions count in half sides, as grid_sample wants them
    (theta,) = _beside(images, (matrices * unit / side).to(images.dtype))
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if displacements is not None:
        moved = smooth_field(_beside(images, displacements)[0], height, width)  # (B, H, W, 2)
        grid = grid + moved @ theta[:, :, :2].transpose(1, 2).unsqueeze(1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def smooth_field(displacements: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, h, w) fractions of the sides on a coarse grid -> (B, height, width, 2) in half sides, bicubic in between."""
    field = F.interpolate(2 * displacements, (height, width), mode="bicubic", align_corners=True)
    return field.permute(0, 2, 3, 1)


def grey(images: Tensor) -> Tensor:
    """0.2989 r + 0.587 g + 0.114 b in all three channels."""
    return _grey(images).repeat(1, 3, 1, 1)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return red.mul(_GREY_WEIGHTS[0]).add_(green, alpha=_GREY_WEIGHTS[1]).add_(blue, alpha=_GREY_WEIGHTS[2])


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """factor * image, clipped; factors: (B,) at least 0, 1 changes nothing."""
    (factors,) = _beside(images, factors.view(-1, 1, 1, 1))
    return (images * factors).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """factor * image + (1 - factor) * mean of the grey image, clipped; factors: (B,) at least 0, 1 changes nothing."""
    return _blend(images, factors, torch.full_like(factors, CONTRAST))


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """factor * image + (1 - factor) * grey image, clipped; factors: (B,) at least 0, 1 changes nothing."""
    return _blend(images, factors, torch.full_like(factors, SATURATION))


def _blend(images: Tensor, factors: Tensor, operation: Tensor) -> Tensor:
    """Brightness, contrast or saturation, chosen per image: the three differ only in what they blend the image with."""
    rest = 1 - factors
    shares = torch.stack([factors, rest * (operation == CONTRAST), rest * (operation == SATURATION)])
    image_share, mean_share, grey_share = _beside(images, shares.view(3, -1, 1, 1, 1))[0]
    plane = _grey(images)
    mean = plane.mean((2, 3), keepdim=True)
    return (images * image_share).add_(plane.mul_(grey_share).add_(mean * mean_share)).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue by a share of a full turn, keeping value and saturation.

    turns: (B,) in [-0.5, 0.5], 0 changes nothing.
    Source: the hexagonal HSV model, as in torchvision `adjust_hue`.
    """
    lowest = torch.tensor([3 / 6, 5 / 6, 1 / 6], dtype=images.dtype)  # the hues, in turns, at which r, g, b are lowest
    turns, lowest = _beside(images, turns.view(-1, 1, 1, 1), lowest.view(1, 3, 1, 1))
    red, green, blue = images.split(1, dim=1)  # (B, 1, H, W) each
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    from_green, from_blue = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    angle = torch.where(high == red, green - blue, torch.where(high == green, from_green, from_blue))
    angle.div_((6 * chroma).clamp_(min=1e-12)).add_(turns)  # greys have chroma 0, whatever their hue
    apart = angle - lowest  # (B, 3, H, W), in turns
    apart.sub_(apart.round()).abs_()  # around the circle, at most 1/2
    missing = apart.mul_(-6).add_(2).clamp_(0, 1)  # 1 where the channel is at its lowest, 0 where at its highest
    return high - missing.mul_(chroma)


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order.

    factors: (B, 4) the parameters of the four; 1, 1, 1, 0 change nothing. order: (B, 4) int64, each row a permutation
    of BRIGHTNESS, CONTRAST, SATURATION, HUE; the first is applied first.
    """
    used = (factors != torch.tensor(_UNCHANGED)).any(0).tolist()
    if sum(used) <= 1:  # the order is immaterial
        for wanted, operation, column in zip(used, (brightness, contrast, saturation, hue), factors.unbind(1)):
            images = operation(images, column) if wanted else images
        return images
    blends = order[order != HUE].view(-1, 3)  # each row's other three, in its order; a pass applies one of them to all
    place = (order == HUE).int().argmax(1)  # how many of them come before the hue shift
    images = images.clone()
    for step in range(4):
        if used[HUE]:
            images = on_rows_(images, place == step, hue, factors[:, HUE])
        if step < 3:
            images = _blend(images, factors.gather(1, blends[:, step:step + 1]).squeeze(1), blends[:, step])
    return images


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Blur each image with its own Gaussian, cut off at `kernel` taps, mirrored at the borders.

    sigma: (B,) standard deviations in pixels, above 0. kernel: odd number of taps, under twice the shorter side.
    Source: torchvision `gaussian_blur`; equal within 1e-4.
    """
    batch, channels, height, width = images.shape
    radius = kernel // 2
    offset = torch.arange(-radius, radius + 1)
    taps = (-0.5 * (offset / sigma.double().unsqueeze(1)) ** 2).softmax(1)  # (B, kernel)
    (taps,) = _beside(images, taps.to(images.dtype).repeat_interleave(channels, 0))
    padded = F.pad(images, [radius] * 4, mode="reflect")
    planes = padded.reshape(1, batch * channels, height + 2 * radius, width + 2 * radius)  # one group each
    planes = F.conv2d(planes, taps.view(-1, 1, 1, kernel), groups=batch * channels)
    return F.conv2d(planes, taps.view(-1, 1, kernel, 1), groups=batch * channels).reshape(images.shape)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """1 - image wherever the image is at least the threshold."""
    return torch.where(images >= threshold, 1 - images, images)


def add_noise(images: Tensor, std: float, keys: Tensor) -> Tensor:
    """image + std * standard normal noise, clipped; an image's noise is a function of its key alone.

    std: standard deviation, at least 0. keys: (B,) int64, one per image.
    """
    count = images[0].numel() if len(images) else 0
    normal = hashed_normals(_beside(images, keys)[0], count).to(images.dtype)
    return images.add(normal.reshape(images.shape), alpha=std).clamp_(0, 1)


def hashed_normals(keys: Tensor, count: int) -> Tensor:
    """(B, count) float32 standard normal numbers, a pure function of each key and the column; keys: (B,) int64.

    Source: the Box-Muller transform of counter-based bits.
    """
    bits = hashed_bits(keys, (count + 1) // 2)
    high, low = (bits >> 40) & 0xFFFFFF, bits & 0xFFFFFF  # 24 bits each, as many as float32 holds
    radius = (high + 1).float().mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = low.float().mul_(2 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def hashed_bits(keys: Tensor, count: int) -> Tensor:
    """(B, count) int64 pseudo-random bits, a pure function of each key and the column; keys: (B,) int64, on any device.

    Source: the splitmix64 generator: a counter passed through a mixing function, so that nothing depends on what was
    drawn before.
    """
    counter = torch.arange(1, count + 1, device=keys.device) * _GOLDEN_GAMMA
    return mix(keys.unsqueeze(1) + counter)


def mix(bits: Tensor) -> Tensor:
    """splitmix64's last step: a bijection of int64 in which every input bit changes about half of the output bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        logical = (bits >> shift) & ((1 << (64 - shift)) - 1)  # int64 shifts copy the sign; the mask drops the copies
        bits = (bits ^ logical) * factor
    return bits


def on_rows_(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """operation(images, *parameters) on the chosen rows only, which alone cost time.

    chosen: (B,) bool on the CPU. parameters: of all rows.
    Returns: the images, changed in place, or a new tensor where every row was chosen.
    """
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    if len(rows) == len(chosen):
        return operation(images, *parameters)
    (places,) = _beside(images, rows)
    changed = operation(images.index_select(0, places), *(parameter[rows] for parameter in parameters))
    return images.index_copy_(0, places, changed)


def _beside(images: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters on the device of the images, sent without waiting for it."""
    return tuple(parameter.to(images.device, non_blocking=images.is_cuda) for parameter in parameters)
