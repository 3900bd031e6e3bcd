"""Small networks and files of their weights, what ema_update must do to modules, and views for the loop."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from byol_core.ema import ema_update
from byol_core.pretrained import untrained_backbone
from byol_core.system.files import KEYS, export_backbone, save_checkpoint


def net(width: int = 3) -> nn.Sequential:
    """A small network with weights, biases, batch-norm buffers of both kinds, and a nested name."""
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Sequential(nn.ReLU(), nn.Linear(width, 2)))


def holder(**tensors: Tensor) -> nn.Module:
    """A module whose parameters are exactly these."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return module


def buffered(**tensors: Tensor) -> nn.Module:
    module = holder(weight=torch.zeros(1))
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def formula(target: Tensor, online: Tensor, tau: float) -> Tensor:
    """The update in float64 (of complex numbers in complex128), to compare with."""
    wide = torch.promote_types(target.dtype, torch.float64)
    return tau * target.detach().to(wide) + (1.0 - tau) * online.detach().to(wide)


def assert_refused(target: nn.Module, online: nn.Module, message: str, **options: object) -> None:
    tensors = {id(tensor): tensor for tensor in (*target.parameters(), *target.buffers())}
    readable = [tensor for tensor in tensors.values()
                if not nn.parameter.is_lazy(tensor) and not tensor.is_meta and tensor.layout is torch.strided]
    before = [tensor.detach().clone() for tensor in readable]
    with pytest.raises(ValueError, match=message):
        ema_update(target, online, **{"tau": 0.5, **options})  # type: ignore[arg-type]
    for tensor, value in zip(readable, before):
        assert tensor.equal(value)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def tied() -> nn.Module:
    module = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    module["second"].weight = module["first"].weight
    return module


def random_views(batches: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    views = torch.rand(batches, 2, 4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return [(view1, view2) for view1, view2 in views]


class Interrupted(Exception):
    pass


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


class Endless(torch.utils.data.IterableDataset):
    """Has no length, though its DataLoader has the method."""

    def __iter__(self):
        return iter(())


class Seekable:
    """Batches that depend on the epoch and can start anywhere."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start: int = 0):
        generator = torch.Generator().manual_seed(100 + epoch)
        views = [(torch.rand(4, 3, 8, 8, generator=generator), torch.rand(4, 3, 8, 8, generator=generator))
                 for _ in range(self.batches)]
        yield from views[start:]
