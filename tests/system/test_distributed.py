"""What several gloo processes agree on, and that training in several equals training in one."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from byol_core.lars import LARS, parameter_groups
from byol_core.networks import BYOL
from byol_core.runtime import NonFiniteError, Runtime
from byol_core.system.distributed import ALONE, Processes
from byol_core.training import Progress, Step, train
from tests.helpers.forking import in_processes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]
BATCH, UPDATES = 36, 5


class Views:
    """Fixed float64 views: one epoch of updates, this rank's rows of each, in so many micro-batches."""

    def __init__(self, processes: Processes = ALONE, accum_steps: int = 1, broken: bool = False) -> None:
        self.processes, self.accum_steps, self.broken = processes, accum_steps, broken

    def __len__(self) -> int:
        return UPDATES * self.accum_steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        for update in range(UPDATES):
            views = torch.randn(2, BATCH, 3, 6, 6, generator=generator, dtype=torch.float64)
            if self.broken and update == 2 and self.processes.rank == self.processes.world_size - 1:
                views[0, -1] = torch.inf
            parts = views.view(2, self.accum_steps, self.processes.world_size, -1, 3, 6, 6)[:, :, self.processes.rank]
            for micro_batch in range(self.accum_steps):
                yield parts[0, micro_batch], parts[1, micro_batch]


def network(batch_norm: bool, dropout: float = 0.0) -> BYOL:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if batch_norm else nn.Identity(), nn.ReLU(), nn.Flatten(),
                             nn.Dropout(dropout))
    model = BYOL(backbone, 64, hidden_dim=8, out_dim=6)
    if not batch_norm:
        for head in (model.online.projector, model.online.predictor, model.target.projector):
            head[1] = nn.Identity()
    return model.double()


def trained(model: BYOL, views: Views, **more: object) -> BYOL:
    optimizer = LARS(parameter_groups(model.online, weight_decay=1e-4), lr=2.0)
    train(model, views, 2, optimizer=optimizer, tau_base=0.9, accum_steps=views.accum_steps,
          runtime=Runtime(processes=views.processes), lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
          lr_scheduler_interval="step", **more)  # type: ignore[arg-type]
    return model


def assert_same(model: BYOL, other: BYOL, tolerance: float = 1e-12) -> None:
    for (name, tensor), expected in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


def check_parts_equal_one_batch_without_batch_norm(processes: Processes) -> None:
    model = trained(network(batch_norm=False), Views(processes))
    assert_same(model, trained(network(batch_norm=False), Views()))
    start = network(batch_norm=False)
    assert (model.online.backbone[0].weight - start.online.backbone[0].weight).abs().max() > 1e-3


def check_with_batch_norm_processes_equal_micro_batches(processes: Processes) -> None:
    """Each takes statistics of its own part, as micro-batches of one process do; not those of the whole batch."""
    model = trained(network(batch_norm=True), Views(processes))
    assert_same(model, trained(network(batch_norm=True), Views(accum_steps=processes.world_size)))
    whole = trained(network(batch_norm=True), Views())
    assert (model.online.backbone[0].weight - whole.online.backbone[0].weight).abs().max() > 1e-4


def check_accumulation_exchanges_gradients_once_per_update(processes: Processes) -> None:
    no_sync = DistributedDataParallel.no_sync
    with mock.patch.object(DistributedDataParallel, "no_sync", autospec=True, side_effect=no_sync) as accumulating:
        model = trained(network(batch_norm=False), Views(processes, accum_steps=3))
    assert accumulating.call_count == 2 * UPDATES * 2  # epochs x updates x all but the last micro-batch
    assert_same(model, trained(network(batch_norm=False), Views()))


def check_target_is_the_same_on_every_rank_to_the_last_bit(processes: Processes) -> None:
    model = trained(network(batch_norm=True), Views(processes))
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.target.parameters())).hexdigest()
    assert processes.gather(digest) == [digest] * processes.world_size


def check_dropout_differs_between_ranks(processes: Processes) -> None:
    losses: list[float] = []
    projections: list[list[float]] = []

    def after_step(progress: Progress, step: Step) -> None:
        losses.append(float(step.loss))
        projections.append(step.projection1[0].tolist())

    class SameForAll(Views):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            return Views().epoch(epoch, start)

    trained(network(batch_norm=False, dropout=0.5), SameForAll(processes), after_step=after_step)
    assert processes.gather(losses) == [losses] * processes.world_size  # the loss is the mean over the processes
    assert len({tuple(shown[0]) for shown in processes.gather(projections)}) == processes.world_size


def check_infinity_in_one_process_stops_all_with_nothing_changed(processes: Processes) -> None:
    model, states = network(batch_norm=False), []

    def after_step(progress: Progress, step: Step) -> None:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    with pytest.raises(NonFiniteError):
        trained(model, Views(processes, broken=True), after_step=after_step)
    assert len(states) == 2
    assert all(torch.equal(tensor, states[-1][name]) for name, tensor in model.state_dict().items())


def check_stopping_is_agreed_one_call_later_or_now(processes: Processes) -> None:
    agree = processes.agree_on_stop
    assert agree(None, now=False) is None
    assert agree(15 if processes.rank == 1 else None, now=False) is None
    assert agree(None, now=False) == (15, " to rank 1")
    assert agree(2, now=True) == (2, "")


def check_values_are_shared(processes: Processes) -> None:
    middle = {2: 0.5, 3: 1.0, 4: 1.5}[processes.world_size]
    assert processes.mean(torch.tensor([1.0, processes.rank])).tolist() == [1.0, middle]
    assert processes.mean_values({"a": 2.0 * processes.rank}) == {"a": 2 * middle}
    assert processes.gather({"rank": processes.rank}) == [{"rank": rank} for rank in range(processes.world_size)]
    assert processes.from_first(lambda: {"weights": torch.full((2,), float(processes.rank))})["weights"].tolist() == [0.0, 0.0]
    assert processes.on_first(lambda: "done") == ("done" if processes.first else None)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def run_checks(rank: int, world_size: str, store: str, errors: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=int(world_size))
    failures = []
    for check in CHECKS:
        try:
            check(Processes(rank, int(world_size)))
        except Exception as error:  # a check that fails on one rank must not leave the other one waiting for the next
            failures.append(f"{check.__name__}: {type(error).__name__}: {error}")
    Path(f"{errors}{rank}").write_text("\n".join(failures))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3, 4])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """All checks in one start of so many processes; what failed, in any of them."""
    folder, world_size = tmp_path_factory.mktemp("processes"), request.param
    in_processes(f"{__name__}:run_checks", world_size, folder, str(world_size), str(folder / "store"), str(folder / "errors"))
    return "\n".join((folder / f"errors{rank}").read_text() for rank in range(world_size))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_in_processes(check: Callable[[Processes], None], outcome: str) -> None:
    assert check.__name__ not in outcome, outcome
