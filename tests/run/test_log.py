"""metrics.jsonl, the progress line and the collapse warning."""

import fcntl
import json
import math
import os
import re
import select
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch

from byol_core.evaluate.health import judge
from byol_core.run.log import RunLog
from byol_core.training import Progress, Step
from tests.helpers.forking import PATIENCE_S
from tests.helpers.runs import metrics


def step(loss: float = 1.0, spread: float = 1.0, applied: bool = True) -> Step:
    generator = torch.Generator().manual_seed(0)
    rows = 1.0 + spread * 1000 * torch.randn(64, 8, generator=generator) if spread else torch.ones(64, 8)
    return Step(torch.tensor(loss), rows, rows, tau=0.99, lr=0.1, applied=applied)


def train_log(folder: Path, updates: int, losses: list[float]) -> RunLog:
    log = RunLog(folder, epochs=2, updates_per_epoch=25, batch_size=4)
    progress = Progress()
    log.start(progress)
    for number in range(updates):
        progress.updates += 1
        progress.batch += 1
        if progress.batch == 25:
            progress.start_epoch(progress.epoch + 1)
        log.step(progress, step(losses[number % len(losses)]), waited=0.0)
    log.close()
    return log


def test_records_come_every_ten_updates_and_at_the_end_of_an_epoch_with_means_since_the_last_one(tmp_path: Path) -> None:
    train_log(tmp_path, 50, [float(number) for number in range(50)])
    assert [record["update"] for record in metrics(tmp_path)] == [10, 20, 25, 30, 40, 50]
    assert [record["epoch"] for record in metrics(tmp_path)] == [0.4, 0.8, 1.0, 1.2, 1.6, 2.0]
    assert [record["loss"] for record in metrics(tmp_path)] == [4.5, 14.5, 22.0, 27.0, 34.5, 44.5]
    for record in metrics(tmp_path):
        assert {"spread", "rank", "rank_limit", "alignment", "uniformity", "cosine"} <= record.keys()
        assert record["rank_limit"] == 8 and record["alignment"] == 0.0  # both views are the same rows


def test_resumed_log_drops_what_will_be_done_again_and_goes_on(tmp_path: Path) -> None:
    log = train_log(tmp_path, 23, [1.0])
    state = log.state_dict()
    assert state["loss_count"] == 3  # updates 21 to 23 wait for their record
    train = RunLog(tmp_path, 2, 25, 4)
    train.resume({**state, "loss_sum": 6.0}, Progress(epoch=0, batch=13, updates=13), tmp_path)
    assert [record["update"] for record in metrics(tmp_path)] == [10]
    assert train.loss_count == 3 and train.loss_sum == 6.0 and train.last["loss"] == 1.0
    assert state["resumed"] == [] and train.state_dict()["resumed"] == [13]
    again = RunLog(tmp_path, 2, 25, 4)
    again.resume({**train.state_dict(), "resumed": ["x", 13, math.inf]}, Progress(updates=20), tmp_path)
    assert again.resumed == [13, 20]


def test_lines_torn_by_a_power_cut_are_dropped(tmp_path: Path) -> None:
    train_log(tmp_path, 10, [1.0])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(bytes(4) + b"\n" + b'{"update": 1')
    RunLog(tmp_path, 2, 25, 4).resume(RunLog(tmp_path, 2, 25, 4).state_dict(), Progress(updates=20), tmp_path)
    assert [record["update"] for record in metrics(tmp_path)] == [10]


def test_collapse_is_said_once_with_the_advice_of_the_end(tmp_path: Path, capsys) -> None:
    plan = {"tau_base": 0.5, "batch_size": 64, "choices": [{"name": "lr", "value": 9.0, "asked": True}]}
    log = RunLog(tmp_path, 2, 25, 4, plan=plan)
    for updates in (10, 20, 30):
        log.step(Progress(updates=updates, batch=10), step(spread=0.0), 0.0)
    advice = judge(metrics(tmp_path), 2, plan=plan).advice
    said = capsys.readouterr().out
    assert said.count("features are collapsing: spread 0.000") == said.count(f" - {advice}\n") == 1
    assert "raise --tau-base from 0.5" in advice


def test_collapse_is_judged_by_the_records_before_a_resume_too(tmp_path: Path, capsys) -> None:
    state = train_log(tmp_path, 20, [1.0]).state_dict()
    resumed = RunLog(tmp_path, 2, 25, 4)
    resumed.resume(json.loads(json.dumps(state)), Progress(updates=20, batch=20), tmp_path)
    resumed.step(Progress(updates=30, batch=5), step(spread=0.0), 0.0)
    assert "collapsing" not in capsys.readouterr().out  # one odd record after two healthy ones
    older = RunLog(tmp_path, 2, 25, 4)
    older.resume({key: value for key, value in state.items() if key != "recent"}, Progress(updates=20, batch=20), tmp_path)
    older.step(Progress(updates=30, batch=5), step(spread=0.0), 0.0)
    assert "collapsing" in capsys.readouterr().out


def test_a_skipped_step_is_counted_and_not_measured(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1, 2, 4)
    progress = Progress(updates=1, batch=1)
    log.step(progress, step(2.0), 0.0)
    progress.start_epoch(1)
    skipped = step(float("nan"), applied=False)
    skipped.projection1.fill_(float("nan"))
    log.step(progress, skipped, 0.0)
    record, = metrics(tmp_path)
    assert record["loss"] == 2.0 and record["spread"] > 0.5 and record["skipped"] == 1


def test_a_resumed_epoch_that_ends_with_a_skipped_step_waits_for_one_that_is_applied(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2, 2, 4)
    log.resume({**log.state_dict(), "loss_sum": 2.0, "loss_count": 1}, Progress(updates=1, batch=1), tmp_path)
    log.step(Progress(epoch=1, updates=1), step(float("nan"), applied=False), 0.0)
    assert not (tmp_path / "metrics.jsonl").exists()
    log.step(Progress(epoch=2, updates=2), step(4.0), 0.0)
    record, = metrics(tmp_path)
    assert record["loss"] == 3.0


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path: Path, capsys) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    train_log(tmp_path, 30, [1.0])
    assert capsys.readouterr().err.count("the run goes on") == 1


def test_progress_line_has_the_agreed_form(tmp_path: Path, capsys) -> None:
    train_log(tmp_path, 50, [0.4123])
    line = capsys.readouterr().err.splitlines()[-1]
    pattern = r"epoch 2/2  loss 0\.4123  spread \d\.\d\d  tau 0\.9900  lr 0\.1  \d+ img/s  wait 0%  eta 0:00:00"
    assert re.fullmatch(pattern, line), line


def test_numbers_that_are_not_json_do_not_reach_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        RunLog(tmp_path, 1, 1, 1).record(Progress(), loss=float("nan"))


def test_a_slow_run_shows_progress_before_its_first_record(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("byol_core.run.log.PLAIN_EVERY", 0.0)
    train_log(tmp_path, 3, [1.0])
    first, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("epoch 1/2  update 1/50") and "img/s" in first and "eta" in first


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
@pytest.mark.parametrize("columns", [0, 200])
def test_progress_is_shown_on_a_terminal_whether_or_not_it_tells_its_width(columns: int, tmp_path: Path, monkeypatch) -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", columns, columns, 0, 0))
    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train_log(tmp_path, 50, [1.0])
        shown = b""
        while b"loss 1.0" not in shown:
            assert select.select([leader], [], [], PATIENCE_S)[0], f"the terminal shows {shown!r} and no more"
            shown += os.read(leader, 65536)
    os.close(leader)
