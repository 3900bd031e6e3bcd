"""Small modules for ema_update, what it must do to them, and views for the loop."""

import pytest
import torch
from torch import Tensor, nn

from byol_core.ema import ema_update


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
    """The update in float64, to compare with."""
    return tau * target.detach().double() + (1.0 - tau) * online.detach().double()


def assert_refused(target: nn.Module, online: nn.Module, message: str, **options: object) -> None:
    tensors = {id(tensor): tensor for tensor in (*target.parameters(), *target.buffers())}
    readable = [tensor for tensor in tensors.values() if not tensor.is_meta and not nn.parameter.is_lazy(tensor)]
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
