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


@pytest.mark.parametrize("options, expected", [
    # 10 steps an epoch
    ({"epochs": 2, "warmup_epochs": 0.4, "scheduler": "cosine"}, {0: 0, 1: 0.25, 2: 0.5, 3: 0.75, 4: 1, 12: 0.5}),
    ({"epochs": 2, "warmup_epochs": 0.2, "scheduler": "constant"}, {0: 0, 1: 0.5, 2: 1, 3: 1, 4: 1, 5: 1}),
    # of an epoch's middle, by hand: 0.5/2, 1.5/2, then (1 + cos(pi (e + 0.5 - 2) / 4)) / 2
    ({"epochs": 6, "warmup_epochs": 2, "scheduler": "cosine", "scheduler_interval": "epoch"},
     {0: 0.25, 1: 0.75, 2: 0.961940, 3: 0.691342, 4: 0.308658, 5: 0.038060}),
])
def test_the_rate_follows_its_schedule(small_byol: BYOL, options: dict, expected: dict[int, float]) -> None:
    chosen = plan(**options)
    optimizer = build_optimizer(small_byol.online, dataclasses.replace(chosen, lr=1.0))
    scheduler, seen = build_scheduler(optimizer, chosen), []
    for _ in range(max(expected) + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert {step: seen[step] for step in expected} == pytest.approx(expected, abs=1e-6)


def test_plateau_halves_after_thirty_epochs_without_progress(small_byol: BYOL) -> None:
    optimizer = build_optimizer(small_byol.online, plan(scheduler="plateau", lr=256 / 10))
    scheduler = build_scheduler(optimizer, plan(scheduler="plateau"))
    for _ in range(32):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
