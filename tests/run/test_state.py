"""Optimizers and schedules are torch's own, over the right parameters, at the right rates."""

import dataclasses

import pytest
import torch

from byol_core.lars import LARS
from byol_core.networks import BYOL
from byol_core.run.options import TrainConfig
from byol_core.run.plan import Plan, make_plan
from byol_core.run.state import build_optimizer, build_scheduler
from byol_core.views.pixels import Facts

KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "lars": LARS}


def plan(**options: object) -> Plan:
    return make_plan(TrainConfig(batch_size=10, **options), Facts(100, 32))  # type: ignore[arg-type]


def rates(chosen: Plan, steps: int, small_byol: BYOL) -> list[float]:
    optimizer = build_optimizer(small_byol.online, dataclasses.replace(chosen, lr=1.0))
    scheduler = build_scheduler(optimizer, chosen)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", list(KINDS))
def test_every_online_parameter_is_trained_once_and_no_other(small_byol: BYOL, name: str) -> None:
    optimizer = build_optimizer(small_byol.online, plan(optimizer=name, weight_decay=0.3))
    assert isinstance(optimizer, KINDS[name])
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(small_byol.online.parameters()))
    for group in optimizer.param_groups:
        assert all(group["weight_decay"] == (0.3 if p.ndim > 1 else 0.0) for p in group["params"])


def test_the_predictor_has_its_own_rate(small_byol: BYOL) -> None:
    optimizer = build_optimizer(small_byol.online, dataclasses.replace(plan(), lr=0.5, predictor_lr=10.0))
    predictor = {id(p) for p in small_byol.online.predictor.parameters()}
    for group in optimizer.param_groups:
        assert all(group["lr"] == (5.0 if id(p) in predictor else 0.5) for p in group["params"])


def test_warm_up_cosine_by_step(small_byol: BYOL) -> None:
    chosen = plan(epochs=2, warmup_epochs=0.4, scheduler="cosine", scheduler_interval="step")  # 20 steps, 4 of warm-up
    seen = rates(chosen, 20, small_byol)
    assert seen[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0]) and seen[12] == pytest.approx(0.5)


def test_by_epoch_the_rate_is_that_of_the_epochs_middle(small_byol: BYOL) -> None:
    chosen = plan(epochs=6, warmup_epochs=2, scheduler="cosine", scheduler_interval="epoch")
    seen = rates(chosen, 6, small_byol)
    # by hand: 0.5/2, 1.5/2, then (1 + cos(pi (e + 0.5 - 2) / 4)) / 2
    assert seen == pytest.approx([0.25, 0.75, 0.961940, 0.691342, 0.308658, 0.038060], abs=1e-6)


def test_constant_stays_after_its_warm_up(small_byol: BYOL) -> None:
    chosen = plan(epochs=2, warmup_epochs=0.2, scheduler="constant")
    assert rates(chosen, 6, small_byol) == pytest.approx([0, 0.5, 1, 1, 1, 1])


def test_plateau_halves_after_thirty_epochs_without_progress(small_byol: BYOL) -> None:
    optimizer = build_optimizer(small_byol.online, plan(scheduler="plateau", lr=256 / 10))
    scheduler = build_scheduler(optimizer, plan(scheduler="plateau"))
    for _ in range(32):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
