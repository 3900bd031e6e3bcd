"""ema_update: arithmetic, data types, and agreement with other implementations; the file on its own."""

import ast
import copy
import inspect
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import byol_core.ema
from byol_core.ema import ema_update
from tests.helpers.modules import assert_refused, formula, holder, net

pytestmark = pytest.mark.usefixtures("seeded")


def test_ema_update_matches_values_computed_by_hand() -> None:
    target, online = holder(weight=torch.tensor([1.0, -2.0, 0.0])), holder(weight=torch.tensor([3.0, 2.0, 8.0]))
    ema_update(target, online, tau=0.75)  # 0.75 * 1 + 0.25 * 3, ...
    assert target.weight.tolist() == [1.5, -1.0, 2.0]
    assert online.weight.tolist() == [3.0, 2.0, 8.0]


@pytest.mark.parametrize("tau", [0.0, 1e-3, 0.3, 0.5, 0.9, 0.996, 0.9999, 1.0])
def test_ema_update_matches_the_float64_formula(tau: float) -> None:
    target, online = net(), net()
    expected = {name: formula(p, q, tau) for (name, p), q in zip(target.named_parameters(), online.parameters())}
    ema_update(target, online, tau)
    for name, param in target.named_parameters():
        torch.testing.assert_close(param.detach().double(), expected[name], rtol=2e-7, atol=2e-7)


def test_ema_update_after_many_steps_equals_the_closed_form() -> None:
    target, online = (holder(weight=torch.full((5,), value, dtype=torch.float64)) for value in (0.0, 1.0))
    for _ in range(200):
        ema_update(target, online, 0.99)
    torch.testing.assert_close(target.weight.detach(), torch.full((5,), 1 - 0.99 ** 200, dtype=torch.float64))


def test_ema_update_at_tau_zero_copies_exactly_even_over_nan() -> None:
    target, online = holder(weight=torch.tensor([math.nan, math.inf, 1.0, 1e38])), holder(weight=torch.randn(4))
    ema_update(target, online, 0.0)
    assert torch.equal(target.weight, online.weight)


def test_ema_update_at_tau_one_changes_nothing_even_for_infinite_weights() -> None:
    target, online = holder(weight=torch.tensor([1.0, math.inf])), holder(weight=torch.tensor([math.inf, math.nan]))
    ema_update(target, online, 1.0)
    assert target.weight.tolist() == [1.0, math.inf]


def test_ema_update_at_tau_one_still_refuses_unpaired_networks() -> None:
    assert_refused(net(), nn.Linear(4, 3), "no partner", tau=1.0)


def test_ema_update_leaves_equal_networks_exactly_equal() -> None:
    online = net()
    target = copy.deepcopy(online)
    for tau in (0.1, 0.5, 0.9, 0.999):
        ema_update(target, online, tau)
    for mine, theirs in zip(target.parameters(), online.parameters()):
        assert torch.equal(mine, theirs)


def test_ema_update_keeps_the_targets_storage_and_objects() -> None:
    target, online = net(), net()
    before = [(id(tensor), tensor.data_ptr()) for tensor in (*target.parameters(), *target.buffers())]
    for tau in (0.0, 0.5, 1.0):
        ema_update(target, online, tau, buffers="average")
    assert [(id(tensor), tensor.data_ptr()) for tensor in (*target.parameters(), *target.buffers())] == before


def test_ema_update_keeps_no_graph_and_no_flag() -> None:
    target, online = net(), net()
    target[0].requires_grad_(False)
    flags = [param.requires_grad for param in target.parameters()]
    ema_update(target, online, 0.5)
    assert all(param.grad_fn is None and param.is_leaf for param in target.parameters())
    assert [param.requires_grad for param in target.parameters()] == flags
    assert all(param.grad is None for param in online.parameters())


def test_ema_update_is_noticed_by_a_graph_that_saved_the_target() -> None:
    """Backward through weights that were overwritten since must fail, not use the new ones."""
    target, online = holder(weight=torch.ones(2)), holder(weight=torch.zeros(2))
    loss = (target.weight * target.weight).sum()
    ema_update(target, online, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ema_update_serves_frozen_networks() -> None:
    target, online = net().requires_grad_(False), net().requires_grad_(False)
    expected = formula(target[0].weight, online[0].weight, 0.9).float()
    ema_update(target, online, 0.9)
    torch.testing.assert_close(target[0].weight, expected)


@pytest.mark.parametrize("made_in_inference", [False, True])
@pytest.mark.parametrize("called_in_inference", [False, True])
def test_ema_update_works_in_and_out_of_inference_mode(made_in_inference: bool, called_in_inference: bool) -> None:
    online = net()
    with torch.inference_mode(made_in_inference):
        target = copy.deepcopy(online)
        target[0].weight.data.zero_()
    with torch.inference_mode(called_in_inference):
        ema_update(target, online, 0.5, buffers="average")
    torch.testing.assert_close(target[0].weight.detach(), online[0].weight.detach() / 2)


def test_ema_update_keeps_memory_formats() -> None:
    target, online = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Conv2d(3, 4, 3)
    expected = formula(target.weight, online.weight, 0.9).float()
    ema_update(target, online, 0.9)
    assert target.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(target.weight.detach(), expected)


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_ema_update_makes_one_fused_lerp_per_dtype_and_nothing_else() -> None:
    target = nn.ModuleDict({"narrow": net(), "wide": net().double()})
    online = nn.ModuleDict({"narrow": net(), "wide": net().double()})
    with Calls() as calls:
        ema_update(target, online, 0.9)
    assert calls.counts == {"aten._foreach_lerp_": 2}


def test_ema_update_makes_one_fused_copy_at_tau_zero_and_no_call_at_one() -> None:
    target, online = net(), net()
    with Calls() as calls:
        ema_update(target, online, 1.0)
        ema_update(target, online, 0.0)
    assert calls.counts == {"aten._foreach_copy_": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.0, 0.999])
def test_ema_update_moves_a_float32_target_towards_a_16_bit_network(dtype: torch.dtype, tau: float) -> None:
    target, online = net(), net().to(dtype)
    expected = formula(target[0].weight, online[0].weight, tau).float()
    ema_update(target, online, tau)
    assert target[0].weight.dtype == torch.float32
    torch.testing.assert_close(target[0].weight.detach(), expected, rtol=1e-6, atol=1e-7)


def test_ema_update_serves_networks_of_mixed_types() -> None:
    wide, narrow, half = torch.float64, torch.float32, torch.bfloat16
    types = {"a": (narrow, narrow), "b": (narrow, half), "c": (wide, half), "d": (wide, narrow), "e": (wide, wide)}
    target = holder(**{name: torch.zeros(2, dtype=mine) for name, (mine, _) in types.items()})
    online = holder(**{name: torch.ones(2, dtype=theirs) for name, (_, theirs) in types.items()})
    ema_update(target, online, 0.75)
    for name, (mine, _) in types.items():
        param = target.get_parameter(name)
        assert param.dtype == mine and param.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_ema_update_averages_wide_types(dtype: torch.dtype) -> None:
    target, online = holder(weight=torch.randn(5, dtype=dtype)), holder(weight=torch.randn(5, dtype=dtype))
    expected = 0.9 * target.weight.detach() + (1 - 0.9) * online.weight.detach()
    ema_update(target, online, 0.9)
    torch.testing.assert_close(target.weight.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_ema_update_refuses_a_16_bit_target_and_says_why(dtype: torch.dtype) -> None:
    target, online = holder(weight=torch.ones(2).to(dtype)), holder(weight=torch.ones(2).to(dtype))
    assert_refused(target, online, f"parameter 'weight' is {dtype}, in which small steps round away.*float32", tau=0.999)


def test_a_bfloat16_average_never_moves_at_tau_0_999() -> None:
    """The reason for the refusal above."""
    target, online = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0, dtype=torch.bfloat16)
    for _ in range(1000):
        target.lerp_(online, 1 - 0.999)
    assert target.item() == 1.0  # 1 + (1 - 0.999 ** 1000) = 1.63 in exact arithmetic


@pytest.mark.parametrize(("mine", "theirs"), [(torch.float32, torch.float64), (torch.float32, torch.complex64),
                                              (torch.complex64, torch.float32), (torch.float32, torch.int32)])
def test_ema_update_refuses_types_that_do_not_hold_the_online_values(mine: torch.dtype, theirs: torch.dtype) -> None:
    assert_refused(holder(weight=torch.ones(2, dtype=mine)), holder(weight=torch.ones(2, dtype=theirs)),
                   f"is {mine}, which does not hold online's {theirs}")


def test_ema_update_serves_empty_and_zero_dimensional_tensors() -> None:
    target = holder(a=torch.zeros(0, 3), b=torch.zeros(0, 3), c=torch.tensor(0.0))
    ema_update(target, holder(a=torch.ones(1, 3)[:0], b=torch.ones(1, 3)[:0], c=torch.tensor(1.0)), 0.75)
    assert target.c.item() == 0.25


def test_ema_file_imports_only_torch_and_the_standard_library() -> None:
    tree = ast.parse(inspect.getsource(byol_core.ema))
    imported = {(alias.name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
                for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert imported - sys.stdlib_module_names == {"torch"}


@pytest.mark.slow
def test_ema_file_works_when_copied_elsewhere(tmp_path: Path) -> None:
    shutil.copy(str(byol_core.ema.__file__), tmp_path / "copied_ema.py")
    script = ("import sys, torch\nfrom copied_ema import ema_update\n"
              "a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)\nema_update(a, b, 0.0)\n"
              "assert a.weight.equal(b.weight) and not any(name.startswith('byol_core') for name in sys.modules)\n")
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, env={"PYTHONNOUSERSITE": "1"})


def other_torch(target: nn.Module, online: nn.Module, tau: float) -> nn.Module:
    averaged = torch.optim.swa_utils.AveragedModel(target, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(tau))
    averaged.n_averaged.fill_(1)  # the first call only copies
    averaged.update_parameters(online)
    return averaged.module


def other_timm(target: nn.Module, online: nn.Module, tau: float) -> nn.Module:
    averaged = pytest.importorskip("timm.utils").ModelEmaV3(target, decay=tau, exclude_buffers=True)
    averaged.update(online)
    return averaged.module


def other_ema_pytorch(target: nn.Module, online: nn.Module, tau: float) -> nn.Module:
    averaged = pytest.importorskip("ema_pytorch").EMA(online, ema_model=copy.deepcopy(target), beta=tau)
    averaged.update_moving_average(averaged.ema_model, online, tau)
    return averaged.ema_model


def other_lightly(target: nn.Module, online: nn.Module, tau: float) -> nn.Module:
    averaged = copy.deepcopy(target)
    pytest.importorskip("lightly.models.utils").update_momentum(online, averaged, m=tau)
    return averaged


def other_byol_pytorch(target: nn.Module, online: nn.Module, tau: float) -> nn.Module:
    module = pytest.importorskip("byol_pytorch.byol_pytorch")
    averaged = copy.deepcopy(target)
    module.update_moving_average(module.EMA(tau), averaged, online)
    return averaged


def other_rebinding(target: nn.Module, online: nn.Module, tau: float) -> nn.Module:
    averaged = copy.deepcopy(target)
    for mine, theirs in zip(averaged.parameters(), online.parameters()):
        mine.data = mine.data * tau + theirs.data * (1 - tau)
    return averaged


def other_deepmind(target: nn.Module, online: nn.Module, tau: float) -> nn.Module:
    averaged = copy.deepcopy(target)
    for mine, theirs in zip(averaged.parameters(), online.parameters()):
        mine.data = mine.data + (1 - tau) * (theirs.data - mine.data)
    return averaged


@pytest.mark.filterwarnings("ignore")  # the other packages' own
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.996, 1.0])
@pytest.mark.parametrize("other", [other_torch, other_timm, other_ema_pytorch, other_lightly, other_byol_pytorch,
                                   other_rebinding, other_deepmind])
def test_ema_update_equals_other_implementations(
        other: Callable[[nn.Module, nn.Module, float], nn.Module], tau: float) -> None:
    target, online = net().requires_grad_(False), net().requires_grad_(False)
    expected = other(target, online, tau)
    ema_update(target, online, tau)
    for mine, theirs in zip(target.parameters(), expected.parameters()):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_ema_update_runs_inside_a_captured_cuda_graph() -> None:
    target, online = net().cuda(), net().cuda()
    ema_update(copy.deepcopy(target), online, 0.9)  # warm up
    expected = formula(formula(target[0].weight, online[0].weight, 0.9), online[0].weight, 0.9).float()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update(target, online, 0.9)
    graph.replay()
    graph.replay()
    torch.testing.assert_close(target[0].weight.detach(), expected)


@pytest.mark.gpu
def test_ema_update_does_not_wait_for_the_gpu() -> None:
    target, online = net().cuda(), net().cuda()
    expected = formula(target[0].weight, online[0].weight, 0.9).float()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        ema_update(target, online, 0.9, buffers="average")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(target[0].weight.detach(), expected)
