"""What ema_update refuses, by name and before anything is written."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from byol_core.ema import ema_update
from tests.helpers.modules import assert_refused, buffered, compiled, holder, net, tied

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("tau", [-0.5, 1.5, -1e-9, 1 + 1e-9, math.nan, math.inf, -math.inf,
                                 "0.5", "x", None, 1j, [0.5], 10**400])
def test_ema_update_refuses_tau_outside_0_1_and_what_is_no_number(tau: object) -> None:
    assert_refused(net(), net(), re.escape(f"tau must be in [0, 1], got {tau!r}"), tau=tau)


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], str]] = {
    "unpaired layers": (lambda: (nn.Sequential(*net(), nn.Linear(2, 2)), net()),
                        "target parameter '3.weight' has no partner in online, whose first .* '0.weight'"),
    "a missing bias": (lambda: (nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), "'bias' has no partner"),
    "a parameter whose namesake is a buffer": (
        lambda: (holder(weight=torch.zeros(1), scale=torch.zeros(1)), buffered(scale=torch.ones(1))),
        "parameter 'scale' has no partner"),
    "a wrapper of unknown type around online": (
        lambda: (net(), nn.ModuleDict({"module": net()})),
        "'0.weight' has no partner in online, whose names all start with 'module.'; pass online.module"),
    "a wrapper of unknown type around target": (
        lambda: (nn.ModuleDict({"module": net()}), net()),
        "'module.0.weight' has no partner in online, which calls it '0.weight'; pass target.module"),
    "broadcastable shapes": (
        lambda: (holder(a=torch.zeros(2), weight=torch.zeros(8, 4)), holder(a=torch.ones(2), weight=torch.ones(1, 4))),
        r"parameter 'weight' has shape \(8, 4\), online's \(1, 4\)"),
    "the first difference": (lambda: (net(3), net(5)), "parameter '0.weight' has shape"),
    "a tie that online does not have": (
        lambda: (tied(), nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})),
        "target ties parameter 'first.weight' and parameter 'second.weight'"),
    "an expanded target": (lambda: (holder(a=torch.zeros(1).expand(4)), holder(a=torch.ones(4))), "is expanded"),
    "integers": (lambda: (holder(index=torch.zeros(2, dtype=torch.int64)), holder(index=torch.ones(2, dtype=torch.int64))),
                 "parameter 'index' is torch.int64, and integers cannot be averaged"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_ema_update_refuses_and_names(what: str) -> None:
    make, message = REFUSED[what]
    assert_refused(*make(), message)


def test_ema_update_refuses_the_same_module_twice() -> None:
    module = net()
    assert_refused(module, module, "same module; make target with copy.deepcopy")
    assert_refused(module, compiled(module), "same module")


def test_ema_update_refuses_a_shared_layer() -> None:
    target, online = net(), net()
    target[2] = online[2]
    assert_refused(target, online, "target and online share parameter '2.1.weight'")


def test_ema_update_names_the_first_shared_tensor() -> None:
    target, online = nn.Module(), net()
    for name, child in online.named_children():
        target.add_module(name, child)
    assert_refused(target, online, "share parameter '0.weight'")


def test_ema_update_refuses_a_layer_shared_under_another_name() -> None:
    target, online = holder(a=torch.zeros(2), b=torch.zeros(2)), holder(a=torch.ones(2), b=torch.ones(2))
    target.a = online.b
    assert_refused(target, online, "share parameter 'a'")


def test_ema_update_refuses_a_predictor_that_is_the_targets_projector() -> None:
    target = nn.ModuleDict({"projector": nn.Linear(2, 2)})
    online = nn.ModuleDict({"projector": nn.Linear(2, 2), "predictor": target["projector"]})
    assert_refused(target, online, "share parameter 'projector.weight'")


def test_ema_update_refuses_an_extra_online_parameter_in_the_targets_memory() -> None:
    target = holder(weight=torch.zeros(2))
    assert_refused(target, holder(weight=torch.ones(2), extra=target.weight.detach()), "share parameter 'weight'")


def test_ema_update_refuses_overlapping_views_of_one_storage() -> None:
    memory = torch.arange(6.0)
    assert_refused(holder(a=memory[:4]), holder(a=memory[2:]), "share parameter 'a'")
    assert_refused(holder(a=memory[:4], b=memory[2:]), holder(a=torch.ones(4), b=torch.ones(4)),
                   "parameter 'a' and parameter 'b' overlap")


@pytest.mark.parametrize("width", [2, 3])
def test_ema_update_refuses_a_transposed_tie(width: int) -> None:
    memory, other = torch.zeros(2, width), torch.ones(2, width)
    assert_refused(holder(a=memory, b=memory.T), holder(a=other, b=other.T), "overlap in memory")


@pytest.mark.parametrize("meta", ["target", "online", "both"])
def test_ema_update_refuses_meta_tensors(meta: str) -> None:
    target, online = net(), net()
    target = target.to("meta") if meta != "online" else target
    online = online.to("meta") if meta != "target" else online
    message = "is on the meta device" if meta == "both" else "is on .*, online's on "
    assert_refused(target, online, f"parameter '0.weight' {message}")


def test_ema_update_refuses_parameters_that_are_not_initialized_yet() -> None:
    assert_refused(nn.LazyLinear(3), nn.LazyLinear(3), "parameter 'weight' is not initialized")
    assert_refused(nn.LazyLinear(3), nn.Linear(4, 3), "parameter 'weight' is not initialized")


@pytest.mark.parametrize("side", ["target", "online"])
def test_ema_update_refuses_sparse_parameters(side: str) -> None:
    modules = {"target": holder(weight=torch.eye(2)), "online": holder(weight=torch.eye(2))}
    modules[side] = holder(weight=torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match="parameter 'weight' has layout torch.*sparse_coo"):
        ema_update(modules["target"], modules["online"], 0.5)


@pytest.mark.parametrize("empty", [nn.Identity(), nn.ReLU(), nn.Sequential()])
def test_ema_update_refuses_a_target_without_tensors(empty: nn.Module) -> None:
    assert_refused(empty, net(), "no tensors to update")


def test_ema_update_refuses_what_is_not_a_module() -> None:
    with pytest.raises(ValueError, match="online must be a torch.nn.Module, got OrderedDict"):
        ema_update(net(), net().state_dict(), 0.5)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_ema_update_refuses_different_devices() -> None:
    assert_refused(net().cuda(), net(), "parameter '0.weight' is on cuda:0, online's on cpu")


def test_ema_update_refuses_different_devices_told_apart_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rule with a stand-in: a parameter that says it lives elsewhere."""
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda", 1)  # type: ignore[assignment]
    target, online = holder(weight=torch.zeros(2)), nn.Module()
    online.register_parameter("weight", Elsewhere(torch.ones(2)))
    assert_refused(target, online, "parameter 'weight' is on cpu, online's on cuda:1")


def pair_of(first: nn.Parameter, second: nn.Parameter) -> tuple[nn.Module, nn.Module]:
    """Target and online of two parameters, the first of which could be averaged."""
    target, online = nn.Module(), nn.Module()
    target.a, online.a = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    target.b, online.b = first, second
    return target, online


@pytest.mark.parametrize("view", [lambda z: z.conj(), lambda z: z.conj().imag])
def test_ema_update_refuses_lazy_views_before_anything_is_written(view) -> None:
    numbers = torch.randn(3, dtype=torch.complex64)
    values = torch.randn(3, dtype=torch.complex64)
    target, online = pair_of(nn.Parameter(view(numbers)), nn.Parameter(view(values).clone()))
    with pytest.raises(ValueError, match="parameter 'b' is a lazy conjugate or negative"):
        ema_update(target, online, 0.5)
    assert torch.equal(target.a, torch.zeros(2))


def test_ema_update_refuses_elements_that_share_memory_however_far_apart() -> None:
    target, online = pair_of(nn.Parameter(torch.zeros(20).as_strided((2, 3), (4, 2))), nn.Parameter(torch.ones(2, 3)))
    with pytest.raises(ValueError, match="parameter 'b' is expanded"):
        ema_update(target, online, 0.5)
    spaced, online = pair_of(nn.Parameter(torch.zeros(20).as_strided((2, 3), (6, 2))), nn.Parameter(torch.ones(2, 3)))
    ema_update(spaced, online, 0.5)
    assert torch.equal(spaced.b, torch.full((2, 3), 0.5))


def test_ema_update_refuses_freed_memory() -> None:
    target, online = nn.Linear(3, 3), nn.Linear(3, 3)
    online.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="'weight' or online's holds no memory"):
        ema_update(target, online, 0.5)


def test_ema_update_refuses_to_copy_into_a_type_of_smaller_range() -> None:
    target, online = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    target.running_mean, online.running_mean = torch.zeros(2).half(), torch.full((2,), 1e30).bfloat16()
    assert_refused(target, online, "does not hold online's torch.bfloat16", buffers="copy")


@pytest.mark.parametrize("side", ["target", "both"])
def test_ema_update_refuses_a_module_that_contains_itself(side: str) -> None:
    target, online = net(), net()
    for module in (target, online) if side == "both" else (target,):
        module[2].add_module("parent", module)
    before = target[0].weight.detach().clone()
    with pytest.raises(ValueError, match="contains itself"):
        ema_update(target, online, 0.5)
    assert torch.equal(target[0].weight, before)


def test_ema_update_refuses_a_parameter_not_initialized_yet_behind_others_of_its_type() -> None:
    target, online = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    assert_refused(target, online, "parameter '1.weight' is not initialized")


def test_ema_update_refuses_a_conjugate_behind_a_complex_parameter_of_its_type() -> None:
    target, online = (holder(a=torch.zeros(2, dtype=torch.complex64), b=torch.zeros(2, dtype=torch.complex64))
                      for _ in range(2))
    target.b = nn.Parameter(target.b.detach().conj())
    assert_refused(target, online, "parameter 'b' is a lazy conjugate")


def test_ema_update_refuses_a_negative_view_behind_a_parameter_of_its_type() -> None:
    target, online = (holder(a=torch.zeros(2), b=torch.ones(2)) for _ in range(2))
    target.b = nn.Parameter(torch._neg_view(target.b.detach()))
    assert_refused(target, online, "parameter 'b' is a lazy conjugate or negative")
