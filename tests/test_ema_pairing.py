"""What ema_update pairs: names, wrappers, ties, shared memory and buffers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from byol_core.ema import ema_update
from tests.helpers.modules import assert_refused, buffered, compiled, formula, holder, net, tied

pytestmark = pytest.mark.usefixtures("seeded")


def test_ema_update_pairs_by_name_when_the_order_differs() -> None:
    target = holder(a=torch.zeros(2), b=torch.zeros(2))
    online = holder(b=torch.full((2,), 2.0), a=torch.ones(2))
    ema_update(target, online, 0.0)
    assert target.a.tolist() == [1.0, 1.0] and target.b.tolist() == [2.0, 2.0]


def test_ema_update_lets_online_hold_more_and_ignores_modules_without_tensors() -> None:
    target = nn.ModuleDict({"backbone": nn.Linear(2, 2, bias=False), "activation": nn.ReLU()})
    online = nn.ModuleDict({"backbone": nn.Linear(2, 2), "predictor": nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))})
    ema_update(target, online, 0.0)
    assert torch.equal(target["backbone"].weight, online["backbone"].weight)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    return checkpoint_wrapper(module)


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    nn.DataParallel, checkpointed,
    lambda module: compiled(nn.parallel.DistributedDataParallel(module)),
    lambda module: nn.parallel.DistributedDataParallel(compiled(module)),
]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPPERS, ids=["dp", "checkpoint", "compile-ddp", "ddp-compile"])
@pytest.mark.parametrize("side", ["target", "online", "inside"])
def test_ema_update_looks_through_wrappers(wrap: Callable[[nn.Module], nn.Module], side: str) -> None:
    target, online = net(), net()
    expected = [formula(p, q, 0.9).float() for p, q in zip(target.parameters(), online.parameters())]
    if side == "inside":
        online[2] = wrap(online[2])
    ema_update(wrap(target) if side == "target" else target, wrap(online) if side == "online" else online, 0.9,
               buffers="average")
    for param, value in zip(target.parameters(), expected):
        torch.testing.assert_close(param.detach(), value)


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


def test_ema_update_serves_networks_that_live_side_by_side_in_one_flat_buffer() -> None:
    buffer = torch.cat([torch.zeros(8), torch.ones(8)])
    target, online = (holder(a=half[:2], b=half[2:6].view(2, 2), c=half[6:]) for half in buffer.split(8))
    ema_update(target, online, 0.75)
    assert buffer.tolist() == [0.25] * 8 + [1.0] * 8


def test_ema_update_keeps_buffers_by_default_even_unmatched_ones() -> None:
    target, online = net(), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), net()[2])
    buffers = {name: buffer.clone() for name, buffer in target.named_buffers()}
    ema_update(target, online, 0.5)
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in target.named_buffers())


def test_ema_update_averages_floating_buffers_and_copies_the_others() -> None:
    target = buffered(mean=torch.zeros(2), count=torch.tensor(1), mask=torch.tensor([True, False]))
    online = buffered(mean=torch.ones(2), count=torch.tensor(1000), mask=torch.tensor([False, True]))
    ema_update(target, online, 0.75, buffers="average")
    assert target.mean.tolist() == [0.25, 0.25]
    assert target.count.item() == 1000 and target.mask.tolist() == [False, True]


@pytest.mark.parametrize(("tau", "weight"), [(0.0, 0.0), (0.5, 2.0), (1.0, 4.0)])
def test_ema_update_copies_buffers_whatever_tau(tau: float, weight: float) -> None:
    target = buffered(mean=torch.zeros(2), count=torch.tensor(1))
    online = buffered(mean=torch.ones(2), count=torch.tensor(1000))
    target.weight.data.fill_(4.0)
    ema_update(target, online, tau, buffers="copy")
    assert target.mean.tolist() == [1.0, 1.0] and target.count.item() == 1000 and target.weight.item() == weight


def test_ema_update_copies_16_bit_buffers_but_does_not_average_them() -> None:
    target, online = (buffered(scale=torch.full((2,), value, dtype=torch.bfloat16)) for value in (0.0, 1.0))
    assert_refused(target, online, "buffer 'scale' is torch.bfloat16, in which small steps", buffers="average")
    ema_update(target, online, 0.5, buffers="copy")
    assert target.scale.tolist() == [1.0, 1.0]


def test_ema_update_refuses_a_shared_buffer_when_it_would_write_it() -> None:
    table = torch.arange(3.0)
    target, online = buffered(table=table), buffered(table=table)
    ema_update(target, online, 0.5)
    assert_refused(target, online, "share buffer 'table'", buffers="copy")


def test_ema_update_copies_buffers_of_a_target_without_parameters() -> None:
    target, online = nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2, affine=False)
    online.running_mean.fill_(3.0)
    ema_update(target, online, 0.5, buffers="copy")
    assert torch.equal(target.running_mean, torch.full((2,), 3.0))


def test_ema_update_does_not_mind_an_online_network_that_contains_itself() -> None:
    target, online = net(), net()
    online[2].add_module("parent", online)
    ema_update(target, online, 0.0)
    assert torch.equal(target[0].weight, online[0].weight)
