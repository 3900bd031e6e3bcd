"""The loop against the paper, the source system's formulas, and itself after an interruption."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byol_core.networks import BYOL
from byol_core.runtime import Runtime
from byol_core.training import Progress, Scheduler, Step, train
from tests.helpers.modules import Endless, Interrupted, Seekable, random_views, small_backbone


def test_ten_updates_equal_the_source_systems_formulas_in_float64(small_byol: BYOL) -> None:
    """Adam, tau 0.9995 with cosine, rebinding average over parameters in order, loss of l2-normalised rows."""
    model = small_byol.double()
    student, predictor = nn.Sequential(copy.deepcopy(model.online.backbone), copy.deepcopy(model.online.projector)), \
        copy.deepcopy(model.online.predictor)
    teacher = nn.Sequential(copy.deepcopy(model.target.backbone), copy.deepcopy(model.target.projector))
    views = random_views(10, dtype=torch.float64)

    def regression(x: Tensor, y: Tensor) -> Tensor:
        return (2 - 2 * (F.normalize(x, dim=1) * F.normalize(y, dim=1)).sum(1)).mean()

    adam = torch.optim.Adam([*student.parameters(), *predictor.parameters()], lr=3e-4)
    for step, (view1, view2) in enumerate(views):
        p1, p2 = predictor(student(view1)), predictor(student(view2))
        with torch.no_grad():
            z1, z2 = teacher(view1), teacher(view2)
        adam.zero_grad()
        (regression(p1, z2) + regression(p2, z1)).backward()
        adam.step()
        tau = 1 - (1 - 0.9995) * (math.cos(math.pi * step / 10) + 1) / 2
        for theirs, ours in zip(teacher.parameters(), student.parameters()):
            theirs.data = tau * theirs.data + (1 - tau) * ours.data

    progress = train(model, views, epochs=1)

    assert progress.updates == 10
    for ours, theirs in (((model.online.backbone, model.online.projector), student),
                         ((model.target.backbone, model.target.projector), teacher)):
        for own, reference in zip(nn.Sequential(*ours).state_dict().values(), theirs.state_dict().values()):
            assert torch.allclose(own.double(), reference.double(), rtol=0, atol=1e-6)
    moved = max(float((a - b).abs().max()) for a, b in zip(model.target.parameters(), teacher.parameters()))
    assert moved < 1e-9  # far inside the bar: the comparison is not loose by accident


def test_constant_tau_stays_at_its_base(small_byol: BYOL) -> None:
    taus: list[float] = []
    train(small_byol, random_views(3), epochs=2, tau_base=0.7, tau_schedule="constant",
          after_step=lambda progress, step: taus.append(step.tau))
    assert taus == [0.7] * 6


def test_accumulation_counts_updates_not_micro_batches(small_byol: BYOL) -> None:
    taus: list[float] = []
    scheduled = []
    optimizer = torch.optim.SGD(small_byol.online.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scheduled.append(step) or 1.0)
    progress = train(small_byol, random_views(9), epochs=1, accum_steps=4, tau_base=0.5, optimizer=optimizer,
                     lr_scheduler=scheduler, lr_scheduler_interval="step",
                     after_step=lambda progress, step: taus.append(step.tau))
    assert progress.updates == 2  # the ninth micro-batch does not fill an update
    assert taus == pytest.approx([0.5, 0.75])  # cosine over 2 updates, not 8
    assert scheduled == [0, 1, 2]


def test_accumulated_micro_batches_equal_one_batch_without_batch_norm() -> None:
    def network() -> BYOL:
        torch.manual_seed(0)
        model = BYOL(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)), 5, hidden_dim=8, out_dim=6).double()
        for part in (model.online, model.target):
            part.projector[1] = nn.Identity()
        model.online.predictor[1] = nn.Identity()
        return model

    view1, view2 = (torch.cat(views) for views in zip(*random_views(4, dtype=torch.float64)))
    whole, parts = network(), network()
    for model, views, accum_steps in ((whole, [(view1, view2)], 1), (parts, list(zip(view1.split(4), view2.split(4))), 4)):
        optimizer = torch.optim.SGD(model.online.parameters(), lr=0.5)
        train(model, views, epochs=1, accum_steps=accum_steps, optimizer=optimizer)
    for one, other in zip(whole.parameters(), parts.parameters()):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_loss_is_the_sum_of_both_directions(small_byol: BYOL) -> None:
    steps: list[Step] = []
    train(small_byol, random_views(1), epochs=1, criterion=lambda p, z: (p * 0).sum() + 1.5,
          after_step=lambda progress, step: steps.append(step))
    assert float(steps[0].loss) == 3.0


def test_gradients_that_the_caller_has_left_are_none_of_the_first_updates(small_byol: BYOL) -> None:
    other = copy.deepcopy(small_byol)
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)  # of the target's, too
    train(small_byol, random_views(2), 1)
    train(other, random_views(2), 1)
    assert all(torch.equal(a, b) for a, b in zip(small_byol.parameters(), other.parameters()))


def test_what_a_loader_draws_is_left_to_the_caller(small_byol: BYOL) -> None:
    seen: list[float] = []

    class Drawn(list):
        def __iter__(self):
            return ((torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)) for _ in range(2))

    def remember(progress: Progress, step: Step) -> None:
        seen.append(float(torch.rand(())))

    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        train(copy.deepcopy(small_byol), Drawn([0, 0]), 2, after_step=remember)
    assert seen[:4] == seen[8:] and not set(seen[:4]) & set(seen[4:8])


def parts_of(interval: str) -> dict[str, Any]:
    """What `train` takes for 6 updates; the schedule is one by step or by epoch."""
    torch.manual_seed(0)
    model = BYOL(nn.Sequential(small_backbone(), nn.Dropout(0.3)), 4, hidden_dim=8, out_dim=6)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.online.parameters(), lr=0.01)
    scheduler: Scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    if interval == "step":
        optimizer = torch.optim.SGD(model.online.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    return {"model": model, "batches": Seekable(2), "epochs": 3, "optimizer": optimizer, "lr_scheduler": scheduler,
            "lr_scheduler_interval": interval, "tau_base": 0.6}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("cut", [1, 2, 3, 5, 6])
def test_a_continued_run_equals_the_uninterrupted_one_bit_for_bit(interval: str, cut: int, tmp_path) -> None:
    """It is stopped after `cut` updates, and continued by new objects from what was saved to a file."""
    whole, stopped, continued = (parts_of(interval) for _ in range(3))
    kept = "model", "optimizer", "lr_scheduler"

    def stop(progress: Progress, step: Step) -> None:
        if progress.updates == cut:
            state = {name: stopped[name].state_dict() for name in kept}
            torch.save({**state, "progress": progress.state_dict()}, tmp_path / "state.pt")
            raise Interrupted

    train(**whole)
    with pytest.raises(Interrupted):
        train(**stopped, after_step=stop)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(99)  # whatever else happened in the meantime
    for name in kept:
        continued[name].load_state_dict(saved[name])
    train(**continued, progress=Progress(**saved["progress"]))
    for (name, one), other in zip(whole["model"].state_dict().items(), continued["model"].state_dict().values()):
        assert torch.equal(one, other), name


def test_plateau_scheduler_sees_the_mean_loss_of_the_epoch(small_byol: BYOL) -> None:
    optimizer = torch.optim.SGD(small_byol.online.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    losses = iter([1.0, 1.0, 2.0, 2.0])  # two directions a step: 2 and 4
    train(small_byol, random_views(2), 1, optimizer=optimizer, lr_scheduler=scheduler,
          criterion=lambda p, z: (p * 0).sum() + next(losses))
    assert scheduler.best == 3.0


def test_by_default_the_rate_halves_after_thirty_epochs_of_the_same_loss(small_byol: BYOL) -> None:
    rates: list[float] = []
    train(small_byol, random_views(1), 33, criterion=lambda p, z: (p * 0).sum() + 1,
          after_step=lambda progress, step: rates.append(step.lr))
    assert rates == [3e-4] * 32 + [1.5e-4]


def test_batches_may_come_from_a_plain_loader_with_labels(small_byol: BYOL) -> None:
    views = random_views(6)
    samples = [((view1[0], view2[0]), 7) for view1, view2 in views]
    loader = torch.utils.data.DataLoader(samples, batch_size=2)  # type: ignore[arg-type]
    assert train(small_byol, loader, epochs=2).updates == 6


def test_no_epochs_leave_the_model_as_it_is(small_byol: BYOL) -> None:
    before = copy.deepcopy(small_byol.state_dict())
    assert train(small_byol, random_views(2), 0) == Progress()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), small_byol.state_dict().values()))


@pytest.mark.parametrize("options, message", [
    ({"epochs": -1}, "epochs must be 0 or more, got -1"),
    ({"accum_steps": 0}, r"accum_steps must be 1 or more, got 0"),
    ({"accum_steps": 4}, r"accum_steps must be in 1..3.*got 4"),
    ({"lr_scheduler_interval": "batch"}, "'step' or 'epoch', got 'batch'"),
    ({"tau_base": 1.5}, r"tau_base must be in \[0, 1\], got 1.5"),
    ({"tau_base": math.nan}, "got nan"),
    ({"tau_schedule": "linear"}, "'cosine' or 'constant', got 'linear'"),
    ({"progress": Progress(batch=3)}, "progress.batch is 3, where no update of an epoch of 3 batches"),
    ({"progress": Progress(batch=1), "accum_steps": 2}, "epoch of 2 batches with accum_steps 2 begins"),
    ({"runtime": Runtime("meta")}, r"the model is on cpu, runtime on meta - call runtime.place_model\(model\)"),
])
def test_unusable_arguments_are_refused_by_name(small_byol: BYOL, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(small_byol, random_views(3), **{"epochs": 1, **options})


@pytest.mark.parametrize("batches, message", [
    (iter([]), "must have a length"), (torch.utils.data.DataLoader(Endless()), "must have a length"),
    ([], "batches are empty"), ([torch.rand(4, 3, 8, 8)], r"got a tensor \(4, 3, 8, 8\)"),
    ([(torch.rand(4, 3, 8, 8), torch.zeros(4))], r"got \(a tensor \(4, 3, 8, 8\), a tensor \(4,\)\)"),
])
def test_batches_that_are_not_two_views_are_refused(small_byol: BYOL, batches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(small_byol, batches, 1)


def test_a_loader_shorter_than_its_length_is_named(small_byol: BYOL) -> None:
    class Short(list):
        def __len__(self) -> int:
            return 5

    with pytest.raises(ValueError, match="fewer batches than len"):
        train(small_byol, Short(random_views(2)), 1)


def test_a_scheduler_of_another_optimizer_is_refused(small_byol: BYOL) -> None:
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        train(small_byol, random_views(1), 1, lr_scheduler=torch.optim.lr_scheduler.ConstantLR(other))


def test_a_loaders_epoch_ends_before_the_next_one_begins(small_byol: BYOL) -> None:
    events: list[str] = []

    class Loader(list):
        def __iter__(self):
            events.append("begins")
            return self.views()

        def views(self):
            try:
                yield from [*list.__iter__(self), self[0]]  # one more than is taken
            finally:
                events.append("ends")

    train(small_byol, Loader(random_views(2)), epochs=2)
    assert events == ["begins", "ends"] * 2
