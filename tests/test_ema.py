"""ema_update: arithmetic, pairing, refusals, buffers, and agreement with other implementations."""

import ast
import copy
import gc
import inspect
import math
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import byol_core.ema
from byol_core.ema import ema_update

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


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


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(torch.nan_to_num(after[name]), torch.nan_to_num(tensor)), name


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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The arithmetic


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


# Pairing


def test_ema_update_pairs_by_name_when_the_order_differs() -> None:
    target = holder(a=torch.zeros(2), b=torch.zeros(2))
    online = holder(b=torch.full((2,), 2.0), a=torch.ones(2))
    ema_update(target, online, 0.0)
    assert target.a.tolist() == [1.0, 1.0] and target.b.tolist() == [2.0, 2.0]


def test_ema_update_lets_online_hold_more() -> None:
    target = nn.ModuleDict({"backbone": nn.Linear(2, 2, bias=False)})
    online = nn.ModuleDict({"backbone": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    ema_update(target, online, 0.0)
    assert torch.equal(target["backbone"].weight, online["backbone"].weight)


def test_ema_update_does_not_mind_a_predictor_that_is_not_initialized_yet() -> None:
    target, online = nn.Linear(2, 2), nn.Linear(2, 2)
    online.add_module("predictor", nn.LazyLinear(2))
    ema_update(target, online, 0.0)
    assert torch.equal(target.weight, online.weight)


def test_ema_update_ignores_children_without_tensors() -> None:
    target = nn.ModuleDict({"layer": nn.Linear(2, 2), "activation": nn.ReLU()})
    online = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    expected = (target["layer"].weight + online["layer"].weight).detach() / 2
    ema_update(target, online, 0.5)
    assert torch.allclose(target["layer"].weight, expected)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    return checkpoint_wrapper(module)


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    nn.DataParallel, compiled, nn.parallel.DistributedDataParallel, checkpointed,
    lambda module: compiled(nn.parallel.DistributedDataParallel(module)),
    lambda module: nn.parallel.DistributedDataParallel(compiled(module)),
]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPPERS, ids=["dp", "compile", "ddp", "checkpoint", "compile-ddp", "ddp-compile"])
@pytest.mark.parametrize("side", ["target", "online", "both", "inside"])
def test_ema_update_looks_through_wrappers(wrap: Callable[[nn.Module], nn.Module], side: str) -> None:
    target, online = net(), net()
    expected = [formula(p, q, 0.9).float() for p, q in zip(target.parameters(), online.parameters())]
    wrapped_target, wrapped_online = target, online
    if side in ("target", "both"):
        wrapped_target = wrap(target)
    if side in ("online", "both"):
        wrapped_online = wrap(online)
    if side == "inside":
        online[2] = wrap(online[2])
    ema_update(wrapped_target, wrapped_online, 0.9, buffers="average")
    for param, value in zip(target.parameters(), expected):
        torch.testing.assert_close(param.detach(), value)


def test_ema_update_keeps_a_real_module_named_module() -> None:
    """Wrappers are known by type: a user's own child called 'module' is a name like any other."""
    target, online = nn.ModuleDict({"module": nn.Linear(2, 2)}), nn.ModuleDict({"module": nn.Linear(2, 2)})
    ema_update(target, online, 0.0)
    assert torch.equal(target["module"].weight, online["module"].weight)


def tied() -> nn.Module:
    module = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    module["second"].weight = module["first"].weight
    return module


def test_ema_update_updates_tied_parameters_once() -> None:
    target, online = tied(), tied()
    expected = formula(target["first"].weight, online["first"].weight, 0.5).float()
    ema_update(target, online, 0.5)
    torch.testing.assert_close(target["second"].weight.detach(), expected)


def test_ema_update_updates_two_views_of_the_same_memory_once() -> None:
    memory, other = torch.zeros(4), torch.ones(4)
    target, online = holder(a=memory, b=memory.view(4)), holder(a=other, b=other.view(4))
    ema_update(target, online, 0.5)
    assert target.a.tolist() == [0.5] * 4


def test_ema_update_lets_online_tie_what_target_keeps_apart() -> None:
    target = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    online = tied()
    ema_update(target, online, 0.0)
    assert torch.equal(target["second"].weight, online["first"].weight)


def test_ema_update_refuses_a_tie_that_online_does_not_have() -> None:
    online = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    assert_refused(tied(), online, "target ties parameter 'first.weight' and parameter 'second.weight'")


def test_ema_update_serves_networks_that_live_in_one_flat_buffer_each() -> None:
    def flat(buffer: Tensor) -> nn.Module:
        return holder(a=buffer[:2], b=buffer[2:6].view(2, 2), c=buffer[6:])
    target, online = flat(torch.zeros(8)), flat(torch.ones(8))
    ema_update(target, online, 0.75)
    assert target.b.tolist() == [[0.25, 0.25], [0.25, 0.25]] and target.c.tolist() == [0.25, 0.25]


def test_ema_update_serves_both_networks_in_one_buffer_when_they_do_not_overlap() -> None:
    buffer = torch.tensor([0.0, 0.0, 1.0, 1.0])
    ema_update(holder(a=buffer[:2]), holder(a=buffer[2:]), 0.5)
    assert buffer.tolist() == [0.5, 0.5, 1.0, 1.0]


# Data types


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
    with pytest.raises(ValueError, match=f"parameter 'weight' is {dtype}, in which small steps round away.*float32"):
        ema_update(target, online, 0.999)


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


# Buffers


def test_ema_update_keeps_buffers_by_default_even_unmatched_ones() -> None:
    target, online = net(), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), net()[2])
    buffers = {name: buffer.clone() for name, buffer in target.named_buffers()}
    ema_update(target, online, 0.5)
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in target.named_buffers())


def test_ema_update_copies_counters_when_buffers_are_asked_for() -> None:
    target, online = net(), net()
    online[1].running_mean.fill_(4.0)
    online[1].num_batches_tracked.fill_(1000)
    ema_update(target, online, 0.75, buffers="copy")
    assert target[1].running_mean.tolist() == [4.0] * 3
    assert target[1].num_batches_tracked.item() == 1000


def test_ema_update_averages_floating_buffers_and_copies_the_others() -> None:
    target = buffered(mean=torch.zeros(2), count=torch.tensor(1), mask=torch.tensor([True, False]))
    online = buffered(mean=torch.ones(2), count=torch.tensor(1000), mask=torch.tensor([False, True]))
    ema_update(target, online, 0.75, buffers="average")
    assert target.mean.tolist() == [0.25, 0.25]
    assert target.count.item() == 1000 and target.mask.tolist() == [False, True]


@pytest.mark.parametrize(("tau", "weight"), [(0.0, 0.0), (0.5, 2.0), (1.0, 4.0)])
def test_ema_update_copies_buffers_whatever_tau(tau: float, weight: float) -> None:
    target, online = buffered(mean=torch.zeros(2)), buffered(mean=torch.ones(2))
    target.weight.data.fill_(4.0)
    ema_update(target, online, tau, buffers="copy")
    assert target.mean.tolist() == [1.0, 1.0] and target.weight.item() == weight


def test_ema_update_copies_16_bit_buffers_but_does_not_average_them() -> None:
    target, online = (buffered(scale=torch.full((2,), value, dtype=torch.bfloat16)) for value in (0.0, 1.0))
    assert_refused(target, online, "buffer 'scale' is torch.bfloat16, in which small steps", buffers="average")
    ema_update(target, online, 0.5, buffers="copy")
    assert target.scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_ema_update_refuses_unmatched_buffers_before_it_touches_parameters(buffers: str) -> None:
    online = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), net()[2])
    assert_refused(net(), online, "buffer '1.running_mean' has no partner", buffers=buffers)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_ema_update_refuses_misshapen_buffers(buffers: str) -> None:
    assert_refused(buffered(mean=torch.zeros(3)), buffered(mean=torch.ones(1)),
                   r"buffer 'mean' has shape \(3,\), online's \(1,\)", buffers=buffers)


def test_ema_update_refuses_a_shared_buffer_when_it_would_write_it() -> None:
    table = torch.arange(3.0)
    target, online = buffered(table=table), buffered(table=table)
    ema_update(target, online, 0.5)
    assert_refused(target, online, "share buffer 'table'", buffers="copy")


def test_ema_update_refuses_an_unknown_buffer_policy() -> None:
    assert_refused(net(), net(), "'keep', 'copy' or 'average', got 'mean'", buffers="mean")


# Refusals


@pytest.mark.parametrize("tau", [-0.5, 1.5, -1e-9, 1 + 1e-9, math.nan, math.inf, -math.inf])
def test_ema_update_refuses_tau_outside_0_1(tau: float) -> None:
    assert_refused(net(), net(), rf"tau must be in \[0, 1\], got {tau}", tau=tau)


def test_ema_update_refuses_unpaired_layers_and_changes_nothing() -> None:
    target, online = net(), net()
    target.append(nn.Linear(2, 2))
    assert_refused(target, online, "target parameter '3.weight' has no partner in online, whose first .* '0.weight'")


def test_ema_update_refuses_a_missing_bias() -> None:
    assert_refused(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), "'bias' has no partner")


def test_ema_update_refuses_a_parameter_whose_namesake_is_a_buffer() -> None:
    assert_refused(holder(weight=torch.zeros(1), scale=torch.zeros(1)), buffered(scale=torch.ones(1)),
                   "parameter 'scale' has no partner")


def test_ema_update_hints_at_a_wrapper_of_unknown_type_around_online() -> None:
    assert_refused(net(), nn.ModuleDict({"module": net()}),
                   "'0.weight' has no partner in online, whose names all start with 'module.'; pass online.module")


def test_ema_update_hints_at_a_wrapper_of_unknown_type_around_target() -> None:
    assert_refused(nn.ModuleDict({"module": net()}), net(),
                   "'module.0.weight' has no partner in online, which calls it '0.weight'; pass target.module")


def test_ema_update_refuses_broadcastable_shapes() -> None:
    assert_refused(holder(a=torch.zeros(2), weight=torch.zeros(8, 4)), holder(a=torch.ones(2), weight=torch.ones(1, 4)),
                   r"parameter 'weight' has shape \(8, 4\), online's \(1, 4\)")


def test_ema_update_names_the_first_difference() -> None:
    target, online = net(3), net(5)
    assert_refused(target, online, "parameter '0.weight' has shape")


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


def test_ema_update_serves_empty_and_zero_dimensional_tensors() -> None:
    target = holder(a=torch.zeros(0, 3), b=torch.zeros(0, 3), c=torch.tensor(0.0))
    ema_update(target, holder(a=torch.ones(1, 3)[:0], b=torch.ones(1, 3)[:0], c=torch.tensor(1.0)), 0.75)
    assert target.c.item() == 0.25


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


def test_ema_update_refuses_an_expanded_target() -> None:
    assert_refused(holder(a=torch.zeros(1).expand(4)), holder(a=torch.ones(4)), "is expanded")


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


def test_ema_update_refuses_integer_parameters() -> None:
    assert_refused(holder(index=torch.zeros(2, dtype=torch.int64)), holder(index=torch.ones(2, dtype=torch.int64)),
                   "parameter 'index' is torch.int64, and integers cannot be averaged")


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
@needs_gpu
def test_ema_update_refuses_different_devices() -> None:
    assert_refused(net().cuda(), net(), "parameter '0.weight' is on cuda:0, online's on cpu")


def test_ema_update_refuses_different_devices_told_apart_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rule with a stand-in: a parameter that says it lives elsewhere."""
    class Elsewhere(nn.Parameter):
        device = torch.device("cuda", 1)  # type: ignore[assignment]
    target, online = holder(weight=torch.zeros(2)), nn.Module()
    online.register_parameter("weight", Elsewhere(torch.ones(2)))
    assert_refused(target, online, "parameter 'weight' is on cpu, online's on cuda:1")


# The file on its own


def test_ema_file_imports_only_torch_and_the_standard_library() -> None:
    tree = ast.parse(inspect.getsource(byol_core.ema))
    imported = {(alias.name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
                for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert imported - sys.stdlib_module_names == {"torch"}


def test_ema_file_works_when_copied_elsewhere(tmp_path: Path) -> None:
    shutil.copy(str(byol_core.ema.__file__), tmp_path / "copied_ema.py")
    script = ("import sys, torch\nfrom copied_ema import ema_update\n"
              "a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)\nema_update(a, b, 0.0)\n"
              "assert a.weight.equal(b.weight) and not any(name.startswith('byol_core') for name in sys.modules)\n")
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, env={"PYTHONNOUSERSITE": "1"})


# Other implementations; each must come to the same values within float32 rounding


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


# On a GPU


@pytest.mark.gpu
@needs_gpu
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
@needs_gpu
def test_ema_update_does_not_wait_for_the_gpu() -> None:
    target, online = net().cuda(), net().cuda()
    expected = formula(target[0].weight, online[0].weight, 0.9).float()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        ema_update(target, online, 0.9, buffers="average")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(target[0].weight.detach(), expected)


@pytest.mark.parametrize("tau", ["0.5", "x", None, 1j, [0.5], 10**400])
def test_ema_update_refuses_what_is_no_number(tau: object) -> None:
    target, online = nn.Linear(2, 2), nn.Linear(2, 2)
    before = target.weight.detach().clone()
    with pytest.raises(ValueError, match="tau must be in"):
        ema_update(target, online, tau)  # type: ignore[arg-type]
    assert torch.equal(target.weight, before)


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
    with pytest.raises(ValueError, match="does not hold online's torch.bfloat16"):
        ema_update(target, online, 0.5, buffers="copy")


def test_ema_update_copies_buffers_of_a_target_without_parameters() -> None:
    target, online = nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2, affine=False)
    online.running_mean.fill_(3.0)
    ema_update(target, online, 0.5, buffers="copy")
    assert torch.equal(target.running_mean, torch.full((2,), 3.0))


@pytest.mark.parametrize("side", ["target", "both"])
def test_ema_update_refuses_a_module_that_contains_itself(side: str) -> None:
    target, online = net(), net()
    for module in (target, online) if side == "both" else (target,):
        module[2].add_module("parent", module)
    before = target[0].weight.detach().clone()
    with pytest.raises(ValueError, match="contains itself"):
        ema_update(target, online, 0.5)
    assert torch.equal(target[0].weight, before)


def test_ema_update_does_not_mind_an_online_network_that_contains_itself() -> None:
    target, online = net(), net()
    online[2].add_module("parent", online)
    ema_update(target, online, 0.0)
    assert torch.equal(target[0].weight, online[0].weight)


def test_ema_update_refuses_a_parameter_not_initialized_yet_behind_others_of_its_type() -> None:
    target, online = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    before = target[0].weight.detach().clone()
    with pytest.raises(ValueError, match="parameter '1.weight' is not initialized"):
        ema_update(target, online, 0.5)
    assert torch.equal(target[0].weight, before)


def test_ema_update_refuses_a_conjugate_behind_a_complex_parameter_of_its_type() -> None:
    target, online = (holder(a=torch.zeros(2, dtype=torch.complex64), b=torch.zeros(2, dtype=torch.complex64))
                      for _ in range(2))
    target.b = nn.Parameter(target.b.detach().conj())
    assert_refused(target, online, "parameter 'b' is a lazy conjugate")


def test_ema_update_refuses_a_negative_view_behind_a_parameter_of_its_type() -> None:
    target, online = (holder(a=torch.zeros(2), b=torch.ones(2)) for _ in range(2))
    target.b = nn.Parameter(torch._neg_view(target.b.detach()))
    assert_refused(target, online, "parameter 'b' is a lazy conjugate or negative")


# What the caller changes between two calls. Nothing may be remembered from the first to the second.


def swap_data(target: nn.Module, online: nn.Module) -> None:
    target[0].weight.data = torch.full((3, 4), 5.0)
    online[0].weight.data = torch.full((3, 4), 7.0)


def replace_module(target: nn.Module, online: nn.Module) -> None:
    target[2][1], online[0] = nn.Linear(3, 2), nn.Linear(4, 3)


def replace_parameter(target: nn.Module, online: nn.Module) -> None:
    del online[0].weight
    online[0].weight = nn.Parameter(torch.full((3, 4), 7.0))
    target[0]._parameters["bias"] = nn.Parameter(torch.full((3,), 7.0))


def replace_dictionary(target: nn.Module, online: nn.Module) -> None:
    online[0]._parameters = {name: nn.Parameter(param + 1.0) for name, param in reversed(online[0]._parameters.items())}


def exchange_layers(target: nn.Module, online: nn.Module) -> None:
    """The same tensors under each other's names."""
    online[0].bias, online[1].bias = online[1].bias, online[0].bias


def freeze(target: nn.Module, online: nn.Module) -> None:
    online.requires_grad_(False)
    target[0].requires_grad_(False)


def widen(target: nn.Module, online: nn.Module) -> None:
    target.double()


def narrow(target: nn.Module, online: nn.Module) -> None:
    online.bfloat16()


def assign(target: nn.Module, online: nn.Module) -> None:
    target.load_state_dict(net().state_dict(), assign=True)


def move_storage(target: nn.Module, online: nn.Module) -> None:
    with torch.no_grad():
        online[0].weight.set_(torch.full((40,), 3.0).untyped_storage(), 5, (3, 4), (4, 1))


def resize_both(target: nn.Module, online: nn.Module) -> None:
    for module in (target, online):
        module[0].weight.requires_grad_(False).resize_(2, 4)


def tie_both(target: nn.Module, online: nn.Module) -> None:
    for module in (target, online):
        module[1].bias = module[0].bias


def grow_both(target: nn.Module, online: nn.Module) -> None:
    for module in (target, online):
        module.append(nn.Linear(2, 2))


def wrap_inside(target: nn.Module, online: nn.Module) -> None:
    online[2] = nn.DataParallel(online[2])


def transpose_both(target: nn.Module, online: nn.Module) -> None:
    for module in (target, online):
        module[0].weight.data = module[0].weight.data.T


CHANGES = [swap_data, replace_module, replace_parameter, replace_dictionary, exchange_layers, freeze, widen, narrow,
           assign, move_storage, resize_both, tie_both, grow_both, wrap_inside, transpose_both]


def paired(target: nn.Module, online: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Target's tensors with online's of the same name, by torch's own listing."""
    partners = {name.replace("module.", ""): param for name, param in online.named_parameters(remove_duplicate=False)}
    return [(param, partners[name]) for name, param in target.named_parameters()]


@pytest.mark.parametrize("change", CHANGES)
def test_ema_update_sees_what_changed_between_two_calls(change: Callable[[nn.Module, nn.Module], None]) -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5)
    change(target, online)
    expected = [formula(mine, theirs, 0.5) for mine, theirs in paired(target, online)]
    ema_update(target, online, 0.5)
    for (mine, _), value in zip(paired(target, online), expected):
        torch.testing.assert_close(mine.detach().double(), value, rtol=1e-6, atol=1e-6)


def share_data(target: nn.Module, online: nn.Module) -> None:
    target[0].weight.data = online[0].weight.data


def share_module(target: nn.Module, online: nn.Module) -> None:
    target[2] = online[2]


def reshape_one(target: nn.Module, online: nn.Module) -> None:
    online[0].weight.data = online[0].weight.data.view(4, 3)


def resize_one(target: nn.Module, online: nn.Module) -> None:
    online[0].weight.requires_grad_(False).resize_(2, 4)


def free_one(target: nn.Module, online: nn.Module) -> None:
    online[0].weight.untyped_storage().resize_(0)


def narrow_target(target: nn.Module, online: nn.Module) -> None:
    target.bfloat16()


def widen_online(target: nn.Module, online: nn.Module) -> None:
    online.double()


def move_away(target: nn.Module, online: nn.Module) -> None:
    online.to("meta")


def expand_target(target: nn.Module, online: nn.Module) -> None:
    target[0].weight.data = torch.zeros(4).expand(3, 4)


def tie_target(target: nn.Module, online: nn.Module) -> None:
    target[1].bias = target[0].bias


def drop_one(target: nn.Module, online: nn.Module) -> None:
    online[0].register_parameter("bias", None)


def wrap_unknown(target: nn.Module, online: nn.Module) -> None:
    online[2] = nn.ModuleDict({"inner": online[2]})


@pytest.mark.parametrize(("change", "message"), [
    (share_data, "share parameter '0.weight'"), (share_module, "share parameter '2.1.weight'"),
    (reshape_one, "'0.weight' has shape"), (resize_one, "'0.weight' has shape"), (free_one, "holds no memory"),
    (narrow_target, "small steps round away"), (widen_online, "does not hold"), (move_away, "online's on meta"),
    (expand_target, "is expanded"), (tie_target, "target ties parameter '0.bias'"),
    (drop_one, "'0.bias' has no partner"), (wrap_unknown, "'2.1.weight' has no partner"),
])
def test_ema_update_refuses_what_stopped_fitting_between_two_calls(
        change: Callable[[nn.Module, nn.Module], None], message: str) -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5)
    change(target, online)
    assert_refused(target, online, message)


def test_ema_update_keeps_no_network_alive() -> None:
    target, online = net(), net()
    ema_update(target, online, 0.5, buffers="average")
    watched = [weakref.ref(thing) for thing in (target, online, target[0].weight, online[2][1].weight)]
    del target, online
    gc.collect()
    assert all(reference() is None for reference in watched)


def test_ema_update_leaves_the_networks_as_copyable_and_picklable_as_before() -> None:
    target, online = net(), net()
    attributes = [set(vars(module)) for module in (*target.modules(), *online.modules())]
    ema_update(target, online, 0.5)
    assert [set(vars(module)) for module in (*target.modules(), *online.modules())] == attributes
    twin = copy.deepcopy(target)
    expected = formula(target[0].weight, online[0].weight, 0.5).float()
    ema_update(twin, online, 0.5)
    torch.testing.assert_close(twin[0].weight.detach(), expected)
    assert not torch.equal(target[0].weight, twin[0].weight)
