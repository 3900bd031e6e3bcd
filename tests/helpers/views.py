"""Recipes in which everything happens, a picture for them, and a comparison of what is drawn by chance."""

import dataclasses

import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from byol_core.views.recipes import ViewRecipe, paper_recipes

BUSY = dataclasses.replace(paper_recipes(32)[1], rotate=20.0, zoom=(0.8, 1.2), shear=10.0, shift=0.2, noise=0.05,
                           blur=0.5)
DRAWN = ViewRecipe(8, rotate=20.0, zoom=(0.75, 1.25), shear=10.0, shift=0.25, interpolation="bilinear", jitter=1.0,
                   brightness=0.4, noise=0.05, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def photograph(height: int, width: int) -> Tensor:
    """(3, H, W) uint8 with smooth colours and some detail."""
    generator = torch.Generator().manual_seed(5)
    coarse = F.resize(torch.rand(3, 4, 4, generator=generator), [height, width], InterpolationMode.BICUBIC)
    noisy = coarse + 0.1 * torch.randn(3, height, width, generator=generator)
    return (noisy.clamp(0, 1) * 255).to(torch.uint8)


def same_distribution(ours: Tensor, theirs: Tensor) -> bool:
    return stats.ks_2samp(ours.double().numpy(), theirs.double().numpy()).pvalue > 1e-3
