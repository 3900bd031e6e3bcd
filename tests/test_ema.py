"""ema_update: arithmetic, data types, and agreement with other implementations; the file on its own."""

import ast
import copy
import inspect
import math
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import byol_core.ema
from byol_core.ema import ema_update
from tests.helpers.modules import assert_refused, formula, holder, net

pytestmark = pytest.mark.usefixtures("seeded")


F32, F64, C64, C128, BF16 = torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bfloat16
TYPES = [(F32, F32), (F32, BF16), (F32, torch.float16), (F64, BF16), (F64, F32), (F64, F64), (C64, C64), (C128, C64)]


@pytest.mark.parametrize("tau", [0.0, 1e-3, 0.3, 0.5, 0.9, 0.996, 0.9999, 1.0])
def test_ema_update_matches_the_float64_formula_in_networks_of_mixed_types(tau: float) -> None:
    target = holder(**{f"p{number}": torch.randn(5, dtype=mine) for number, (mine, _) in enumerate(TYPES)})
    online = holder(**{f"p{number}": torch.randn(5, dtype=theirs) for number, (_, theirs) in enumerate(TYPES)})
    expected = [formula(*pair, tau) for pair in zip(target.parameters(), online.parameters())]
    ema_update(target, online, tau)
    for param, value, (dtype, _) in zip(target.parameters(), expected, TYPES):
        tolerance = 8 * torch.finfo(dtype).eps
        assert param.dtype == dtype
        torch.testing.assert_close(param.detach().to(value.dtype), value, rtol=tolerance, atol=tolerance)


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


def test_ema_update_keeps_the_targets_tensors_their_memory_and_flags_and_no_graph() -> None:
    target, online = net(), net()
    target[0].requires_grad_(False)
    tensors = [*target.parameters(), *target.buffers()]
    before = [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
    for tau in (0.0, 0.5, 1.0):
        ema_update(target, online, tau, buffers="average")
    for tensor, now, place_and_flag in zip(tensors, (*target.parameters(), *target.buffers()), before):
        assert now is tensor and (now.data_ptr(), now.requires_grad) == place_and_flag
        assert now.grad_fn is None and now.is_leaf
    assert all(param.grad is None for param in online.parameters())


def test_ema_update_is_noticed_by_a_graph_that_saved_the_target() -> None:
    """Backward through weights that were overwritten since must fail, not use the new ones."""
    target, online = holder(weight=torch.ones(2)), holder(weight=torch.zeros(2))
    loss = (target.weight * target.weight).sum()
    ema_update(target, online, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


@pytest.mark.parametrize(("tau", "counts"), [
    (0.0, {"aten._foreach_copy_": 2}), (0.9, {"aten._foreach_lerp_": 2}), (1.0, {}),
])
def test_ema_update_makes_one_fused_call_per_dtype_and_nothing_else(tau: float, counts: dict[str, int]) -> None:
    target, online = (nn.ModuleDict({"narrow": net(), "wide": net().double()}) for _ in range(2))
    with Calls() as calls:
        ema_update(target, online, tau)
    assert calls.counts == counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_ema_update_refuses_a_16_bit_target_and_says_why(dtype: torch.dtype) -> None:
    target, online = holder(weight=torch.ones(2).to(dtype)), holder(weight=torch.ones(2).to(dtype))
    assert_refused(target, online, f"parameter 'weight' is {dtype}, in which small steps round away.*float32", tau=0.999)


@pytest.mark.parametrize(("mine", "theirs"), [(torch.float32, torch.float64), (torch.float32, torch.complex64),
                                              (torch.complex64, torch.float32), (torch.float32, torch.int32)])
def test_ema_update_refuses_types_that_do_not_hold_the_online_values(mine: torch.dtype, theirs: torch.dtype) -> None:
    assert_refused(holder(weight=torch.ones(2, dtype=mine)), holder(weight=torch.ones(2, dtype=theirs)),
                   f"is {mine}, which does not hold online's {theirs}")


def test_ema_file_imports_only_torch_and_the_standard_library() -> None:
    tree = ast.parse(inspect.getsource(byol_core.ema))
    imported = {(alias.name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
                for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert imported - sys.stdlib_module_names == {"torch"}


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


@pytest.mark.filterwarnings("ignore")  # the other packages' own
@pytest.mark.parametrize("other", [other_torch, other_timm, other_ema_pytorch, other_lightly, other_byol_pytorch])
def test_ema_update_equals_other_implementations(other: Callable[[nn.Module, nn.Module, float], nn.Module]) -> None:
    target, online, tau = net().requires_grad_(False), net().requires_grad_(False), 0.9
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
