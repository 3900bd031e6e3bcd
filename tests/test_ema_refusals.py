"""What ema_update refuses, by name and before anything is written."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from byol_core.ema import ema_update
from tests.helpers.modules import assert_refused, buffered, compiled, holder, net

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("tau", [-0.5, 1.5, -1e-9, 1 + 1e-9, math.nan, math.inf, -math.inf,
                                 "0.5", "x", None, 1j, [0.5], 10**400])
def test_ema_update_refuses_tau_outside_0_1_and_what_is_no_number(tau: object) -> None:
    assert_refused(net(), net(), re.escape(f"tau must be in [0, 1], got {tau!r}"), tau=tau)


def in_itself(module: nn.Sequential) -> nn.Module:
    module[2].add_module("parent", module)
    return module


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], str]] = {
    # What has no partner
    "unpaired layers": (lambda: (nn.Sequential(*net(), nn.Linear(2, 2)), net()),
                        "target parameter '3.weight' has no partner in online, whose first .* '0.weight'"),
    "a parameter whose namesake is a buffer": (
        lambda: (holder(weight=torch.zeros(1), scale=torch.zeros(1)), buffered(scale=torch.ones(1))),
        "parameter 'scale' has no partner"),
    "a wrapper of unknown type around online": (
        lambda: (net(), nn.ModuleDict({"module": net()})),
        "'0.weight' has no partner in online, whose names all start with 'module.'; pass online.module"),
    "a wrapper of unknown type around target": (
        lambda: (nn.ModuleDict({"module": net()}), net()),
        "'module.0.weight' has no partner in online, which calls it '0.weight'; pass target.module"),
    "a target without tensors": (lambda: (nn.Sequential(nn.ReLU()), net()), "no tensors to update"),
    "no module": (lambda: (net(), net().state_dict()), "online must be a torch.nn.Module, got OrderedDict"),
    "a module that contains itself": (lambda: (in_itself(net()), net()), "contains itself"),
    "two modules that contain themselves": (lambda: (in_itself(net()), in_itself(net())), "contains itself"),
    # Pairs that do not fit
    "broadcastable shapes": (
        lambda: (holder(a=torch.zeros(2), weight=torch.zeros(8, 4)), holder(a=torch.ones(2), weight=torch.ones(1, 4))),
        r"parameter 'weight' has shape \(8, 4\), online's \(1, 4\)"),
    "the first difference": (lambda: (net(3), net(5)), "parameter '0.weight' has shape"),
    "two networks without values": (lambda: (net().to("meta"), net().to("meta")), "'0.weight' is on the meta device"),
    "a target without values": (lambda: (net().to("meta"), net()), "'0.weight' is on meta, online's on cpu"),
    "sparse targets": (lambda: (holder(weight=torch.eye(2).to_sparse()), holder(weight=torch.eye(2))),
                       "parameter 'weight' has layout torch.sparse_coo"),
    "sparse onlines": (lambda: (holder(weight=torch.eye(2)), holder(weight=torch.eye(2).to_sparse())),
                       "parameter 'weight' has layout torch.strided, online's torch.sparse_coo"),
    "integers": (lambda: (holder(index=torch.zeros(2, dtype=torch.int64)), holder(index=torch.ones(2, dtype=torch.int64))),
                 "parameter 'index' is torch.int64, and integers cannot be averaged"),
    "a target not initialized yet": (lambda: (nn.LazyLinear(3), nn.Linear(4, 3)), "parameter 'weight' is not initialized"),
    "networks not initialized yet, behind parameters of their type": (
        lambda: tuple(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)) for _ in range(2)),
        "parameter '1.weight' is not initialized"),
    "a conjugate behind a complex parameter of its type": (
        lambda: (holder(a=torch.zeros(2) * 1j, b=(torch.zeros(2) * 1j).conj()),
                 holder(a=torch.ones(2) * 1j, b=torch.ones(2) * 1j)),
        "parameter 'b' is a lazy conjugate"),
    "a negative view behind a parameter of its type": (
        lambda: (holder(a=torch.zeros(2), b=torch._neg_view(torch.zeros(2))), holder(a=torch.ones(2), b=torch.ones(2))),
        "parameter 'b' is a lazy conjugate or negative"),
    # Memory that is shared
    "the same module": (lambda: ((module := net()), module), "same module; make target with copy.deepcopy"),
    "the same module, compiled": (lambda: ((module := net()), compiled(module)), "same module"),
    "layers of the same module": (lambda: (nn.Sequential(*(online := net())), online),
                                  "target and online share parameter '0.weight'"),
    "a parameter under another name": (
        lambda: (holder(a=(memory := torch.zeros(2)), b=torch.zeros(2)), holder(a=torch.ones(2), b=memory)),
        "share parameter 'a'"),
    "a predictor that is the target's projector": (
        lambda: (nn.ModuleDict({"projector": (head := nn.Linear(2, 2))}),
                 nn.ModuleDict({"projector": nn.Linear(2, 2), "predictor": head})),
        "share parameter 'projector.weight'"),
    "an extra online parameter in the target's memory": (
        lambda: (holder(weight=(memory := torch.zeros(2))), holder(weight=torch.ones(2), extra=memory)),
        "share parameter 'weight'"),
    "overlapping views of one storage": (lambda: (holder(a=(memory := torch.arange(6.0))[:4]), holder(a=memory[2:])),
                                         "share parameter 'a'"),
    "overlapping views in target": (
        lambda: (holder(a=(memory := torch.arange(6.0))[:4], b=memory[2:]), holder(a=torch.ones(4), b=torch.ones(4))),
        "parameter 'a' and parameter 'b' overlap"),
    "a transposed tie": (
        lambda: (holder(a=(memory := torch.zeros(2, 2)), b=memory.T), holder(a=(other := torch.ones(2, 2)), b=other.T)),
        "overlap in memory"),
    "elements that share memory however far apart": (
        lambda: (holder(a=torch.zeros(2), b=torch.zeros(20).as_strided((2, 3), (4, 2))),
                 holder(a=torch.ones(2), b=torch.ones(2, 3))),
        "parameter 'b' is expanded"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_ema_update_refuses_and_names(what: str) -> None:
    make, message = REFUSED[what]
    assert_refused(*make(), message)


REFUSED_BUFFERS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], str, str]] = {
    "unmatched": (lambda: (net(), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), net()[2])),
                  "copy", "buffer '1.running_mean' has no partner"),
    "misshapen": (lambda: (buffered(mean=torch.zeros(3)), buffered(mean=torch.ones(1))), "copy",
                  r"buffer 'mean' has shape \(3,\), online's \(1,\)"),
    "a type of smaller range": (lambda: (buffered(mean=torch.zeros(2).half()), buffered(mean=torch.zeros(2).bfloat16())),
                                "copy", "does not hold online's torch.bfloat16"),
    "an unknown policy": (lambda: (net(), net()), "mean", "'keep', 'copy' or 'average', got 'mean'"),
}


@pytest.mark.parametrize("what", REFUSED_BUFFERS)
def test_ema_update_refuses_buffers_before_it_touches_parameters(what: str) -> None:
    make, policy, message = REFUSED_BUFFERS[what]
    assert_refused(*make(), message, buffers=policy)


@pytest.mark.gpu
def test_ema_update_refuses_different_devices() -> None:
    assert_refused(net().cuda(), net(), "parameter '0.weight' is on cuda:0, online's on cpu")


def test_ema_update_serves_elements_spaced_apart() -> None:
    spaced = holder(a=torch.zeros(20).as_strided((2, 3), (6, 2)))
    ema_update(spaced, holder(a=torch.ones(2, 3)), 0.5)
    assert torch.equal(spaced.a, torch.full((2, 3), 0.5))
