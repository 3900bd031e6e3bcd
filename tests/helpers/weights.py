"""A small backbone, and small files of weights."""

from pathlib import Path

import torch
from torch import nn

from byol_core.pretrained import untrained_backbone
from byol_core.system.files import KEYS, export_backbone, save_checkpoint


def small_backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def write_backbone(folder: Path, factor: float = 1.0) -> Path:
    """An exported conv6 with random weights, in a folder of its own."""
    folder.mkdir()
    weights = {name: tensor * factor if tensor.is_floating_point() else tensor
               for name, tensor in untrained_backbone("conv6", False, 16, seed=0)[0].state_dict().items()}
    export_backbone(folder, weights, {
        "arch": "conv6", "small_stem": False, "image_size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "seed": 0,
        "whole_image": False, "interpolation": "bicubic", "network": "online"})
    return folder / "backbone.pt"


def save(folder: Path, number: int) -> None:
    """A checkpoint that can be told from others by its number."""
    save_checkpoint(folder, {**dict.fromkeys(KEYS), "progress": number, "scores": torch.full((1000,), float(number))})
