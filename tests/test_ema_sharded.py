"""ema_update on networks sharded by FSDP2 over two gloo processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from byol_core.ema import ema_update
from tests.helpers.forking import in_processes
from tests.helpers.modules import formula

pytestmark = pytest.mark.slow
PROCESSES = 2


def net(seed: int) -> nn.Sequential:
    """Odd sizes, so that the two shards of a tensor differ in size and some are empty."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Sequential(nn.Linear(7, 1)))


def sharded(seed: int, mesh: DeviceMesh) -> nn.Sequential:
    module = net(seed)
    fully_shard(module[2], mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def full(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.full_tensor().detach() if isinstance(param, DTensor) else param.detach().clone()
            for name, param in module.named_parameters()}


def expected(tau: float) -> dict[str, Tensor]:
    return {name: formula(target, online, tau).float()
            for (name, target), online in zip(net(0).named_parameters(), net(1).parameters())}


def assert_refused(target: nn.Module, online: nn.Module, message: str) -> None:
    before = full(target)
    with pytest.raises(ValueError, match=message):
        ema_update(target, online, 0.5)
    for name, tensor in full(target).items():
        assert torch.equal(tensor, before[name])


def check_matches_one_process(mesh: DeviceMesh) -> None:
    """Also with a predictor that only online has, and buffers."""
    target, online = sharded(0, mesh), net(1)
    online.add_module("predictor", nn.Linear(1, 3))
    online[1].running_mean.fill_(8.0)
    fully_shard(online[2], mesh=mesh)
    fully_shard(online, mesh=mesh)
    shards = [param.to_local().data_ptr() for param in target.parameters()]  # type: ignore[attr-defined]
    ema_update(target, online, 0.75, buffers="average")
    assert [param.to_local().data_ptr() for param in target.parameters()] == shards  # type: ignore[attr-defined]
    torch.testing.assert_close(full(target), expected(0.75))
    assert target[1].running_mean.tolist() == [2.0] * 7


def check_training_goes_on_between_updates(mesh: DeviceMesh) -> None:
    """After a forward pass the root shows gathered copies; the update must reach the shards and the next forward."""
    target, online = sharded(0, mesh), sharded(1, mesh)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    averages = full(target)
    for _ in range(3):
        with torch.no_grad():
            target(torch.randn(4, 5))
        online(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            online(torch.randn(4, 5))
        averages = {name: 0.75 * averages[name] + 0.25 * param for name, param in full(online).items()}
        ema_update(target, online, 0.75)
    torch.testing.assert_close(full(target), averages)
    plain, images = net(0), torch.randn(4, 5)
    plain.load_state_dict(averages, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(target(images), plain(images))


def check_refuses_a_plain_partner(mesh: DeviceMesh) -> None:
    assert_refused(sharded(0, mesh), net(1), "parameter '0.weight' is .*a plain tensor.*shard both networks alike")
    assert_refused(net(0), sharded(1, mesh), "parameter '0.weight' is a plain tensor")


def check_refuses_other_placements(mesh: DeviceMesh) -> None:
    def placed(seed: int, dim: int) -> nn.Module:
        module = nn.Linear(4, 4, bias=False)
        module.weight = nn.Parameter(distribute_tensor(net(seed)[0].weight.detach()[:4, :4], mesh, [Shard(dim)]))
        return module
    assert_refused(placed(0, 0), placed(1, 1), "parameter 'weight' is .*shard both networks alike")


def check_refuses_other_global_shapes(mesh: DeviceMesh) -> None:
    """Shards of two rows each on either side, of tensors said to have four rows and three."""
    def placed(value: float, rows: int) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(DTensor.from_local(torch.full((2, 2), value), mesh, [Shard(0)], run_check=False,
                                                        shape=torch.Size((rows, 2)), stride=(2, 1)))
        return module
    target, online = placed(0.0, 4), placed(1.0, 3)
    with pytest.raises(ValueError, match=r"'weight' is .* of shape \(4, 2\), online's is .* of shape \(3, 2\)"):
        ema_update(target, online, 0.5)
    assert target.weight.to_local().tolist() == [[0.0, 0.0], [0.0, 0.0]]


def check_refuses_the_same_shards(mesh: DeviceMesh) -> None:
    target, online = sharded(0, mesh), nn.Module()
    for name, child in target.named_children():
        online.add_module(name, child)
    assert_refused(target, online, "share parameter '0.weight'")


CHECKS: list[Callable[[DeviceMesh], None]] = [
    check_matches_one_process, check_refuses_a_plain_partner, check_refuses_other_placements,
    check_refuses_other_global_shapes, check_refuses_the_same_shards,
]
if hasattr(torch.cpu.Stream, "record_event"):  # without it, as in torch 2.6, FSDP2's own forward pass fails on a CPU
    CHECKS += [check_training_goes_on_between_updates]


def worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for check in CHECKS:
        try:
            check(mesh)
        except Exception as error:
            raise AssertionError(f"{check.__name__} failed on rank {rank}") from error
    Path(f"{store}.{rank}").write_text(f"{len(CHECKS)} checks")
    dist.destroy_process_group()


def test_ema_update_on_fsdp2_shards_equals_one_process(tmp_path: Path) -> None:
    in_processes(f"{__name__}:worker", PROCESSES, tmp_path, str(tmp_path / "store"))
    assert [(tmp_path / f"store.{rank}").read_text() for rank in range(PROCESSES)] == [f"{len(CHECKS)} checks"] * PROCESSES
