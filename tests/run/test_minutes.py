"""--minutes and --check: how long updates take, and how many of them a run has by that."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byol_core.run import command
from byol_core.run.options import parse_config
from byol_core.run.run import CHECK_STEPS, Run
from byol_core.runtime import Runtime
from byol_core.system.distributed import ALONE
from tests.helpers.kills import assert_same_run
from tests.helpers.runs import SMALL, assert_same_state, checkpoint, run, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.slow
def test_check_trains_nothing_and_touches_no_run(image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
                                                 capsys) -> None:
    arguments = ["--data", image_folder(per_class=20), *SMALL]
    assert run(*arguments, "--out", "out", "--check") == 0
    assert "s per update" in capsys.readouterr().out
    picture = Path("out-check/views.png").read_bytes()
    assert run(*arguments, "--out", "out", "--check", "--seed", 7) == 0
    assert Path("out-check/views.png").read_bytes() != picture  # drawn anew
    assert not Path("out-check/last.pt").exists() and not Path("out").exists()
    assert run(*arguments, "--out", "out", "--epochs", 1, "--no-eval") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert run(*arguments, "--out", "out", "--check", "--seed", 5) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before
    capsys.readouterr()
    updates: list[int] = []
    original = Runtime.step
    monkeypatch.setattr(Runtime, "step", lambda self, *rest: updates.append(1) or original(self, *rest))
    assert run(*arguments, "--out", "other", "--epochs", 1, "--no-eval", "--check", "--resume", "out/last.pt") == 0
    assert "disk; " in capsys.readouterr().out and len(updates) > 1  # though that run stands at its end


def measured(monkeypatch: pytest.MonkeyPatch, graph: bool = False, at_least: float = 0.0,
             first_says: int | None = None) -> tuple[float, int]:
    """(seconds of an update as a run measures them, how many it makes for that).

    first_says: how many another process says, if that is the first one.
    """
    made: list[int] = []
    agreed: list[int] = []  # seconds that this took the processes, which is no part of an update

    def from_first(make: Callable[[], int]) -> int:
        agreed.append(1000)
        return first_says or make()

    def train(progress: Any, after_step: Any) -> None:
        for seconds in [100, 90, 80, 70, *[10] * 200]:
            made.append(seconds)
            after_step(progress, None)

    monkeypatch.setattr(time, "monotonic", lambda: sum(made) + sum(agreed))
    run: Any = SimpleNamespace(
        setup=SimpleNamespace(runtime=SimpleNamespace(cuda_graph=graph, confirm=lambda: None)), _train=train,
        processes=SimpleNamespace(from_first=from_first))
    return Run.seconds_per_update(run, at_least), len(made)


@pytest.mark.parametrize("graph, expected", [(False, (90 + 80 + 70 + 10 + 10) / 5), (True, 10)])
def test_a_check_times_updates_once_they_are_as_they_will_be(
        graph: bool, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first; with a CUDA graph those after it was recorded."""
    assert measured(monkeypatch, graph)[0] == expected


@pytest.mark.parametrize("first_says, updates", [(9, 9), (None, 100)])
def test_the_first_process_says_how_many_updates_are_timed(first_says: int | None, updates: int,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own clock, processes would stop at different updates, and wait for one another for ever."""
    seconds, made = measured(monkeypatch, at_least=1e6, first_says=first_says)
    assert made == 1 + updates  # the first one is not timed
    assert seconds == pytest.approx((90 + 80 + 70 + 10 * (updates - 3)) / updates)  # without the time that agreeing took


def timed(seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every update takes so long, by what a run measures; how often that was asked for."""
    asked: list[float] = []
    monkeypatch.setattr(Run, "seconds_per_update", lambda self, at_least=0.0: asked.append(at_least) or seconds)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("seconds, epochs, updates", [(30.0, 1, 2), (7.5, 3, 3), (100.0, 1, 1)])
def test_minutes_become_a_number_of_updates(image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys,
                                            seconds: float, epochs: int, updates: int) -> None:
    """Of 12 images, 3 updates fill an epoch: one minute holds 8 updates of 7.5 seconds, and 3 epochs of 3 come close."""
    asked = timed(seconds, monkeypatch)
    data = image_folder(classes=2, per_class=6)
    assert run("--data", data, "--minutes", 1, "--out", "out", "--no-eval", *SMALL) == 0
    assert len(asked) == 1 and asked[0] >= 5
    told = json.loads(Path("out/config.json").read_text())["plan"]
    assert (told["epochs"], told["updates_per_epoch"]) == (epochs, updates)
    assert summary("out")["updates"] == epochs * updates and summary("out")["status"] == "finished"
    assert f"length: {epochs} epochs of {updates} updates take about 1 minutes of training here" in capsys.readouterr().out
    assert checkpoint("out")["scheduler"]["_last_lr"][0] == pytest.approx(0, abs=1e-12)  # the schedule has come to its end


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["auto", "paper"])
def test_a_run_of_minutes_that_was_stopped_is_as_long_as_it_was_to_be(
        image_folder: Callable[..., Path], stopped_after: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys,
        recipe: str) -> None:
    options = ["--data", image_folder(classes=2, per_class=6), "--no-eval", "--recipe", recipe, *SMALL]
    arguments = [*options, "--minutes", 1]
    timed(7.5, monkeypatch)
    assert run(*arguments, "--out", "whole") == 0
    stopped_after(3, *arguments, "--out", "out")
    for other, said in ((["--minutes", 2], "minutes 1.0 -> 2.0"), (["--epochs", 4], "epochs 3 -> 4")):
        assert run(*options, *other, "--out", "out", "--resume") == 2 and said in capsys.readouterr().err
    asked = timed(1.0, monkeypatch)  # the machine has become faster
    assert run(*arguments, "--out", "out", "--resume") == 0
    assert not asked
    assert_same_state(checkpoint("whole"), checkpoint("out"))
    assert run(*arguments, "--out", "out", "--resume") == 0
    assert "already complete (3/3 epochs)" in capsys.readouterr().out


@pytest.mark.parametrize("minutes, network, batch", [(1e-4, "conv4", 8), (1e6, "resnet18", 8)])
def test_minutes_are_measured_with_the_network_that_is_trained(
        image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, minutes: float, network: str, batch: int) -> None:
    """16 images are two updates an epoch: fewer than are timed."""
    tried: list[tuple[str, int]] = []
    monkeypatch.setattr(Run, "images_in", lambda self, minutes: tried.append(
        (self.setup.plan.arch, self.setup.plan.total_updates)) or int(60 * minutes / 0.5) * 8 or 8)
    config = parse_config([str(word) for word in ["--data", image_folder(), "--minutes", minutes, "--out", "out", "--device",
                                                  "cpu", "--workers", 0]])
    with contextlib.ExitStack() as stack:
        made = command.prepare(config, ALONE, stack).setup.plan
    assert (made.arch, made.batch_size) == (network, batch) and tried[-1][0] == network
    assert [arch for arch, _ in tried] == (["resnet18", "conv4"] if network == "conv4" else ["resnet18"])
    assert all(updates > CHECK_STEPS for _, updates in tried) and made.total_updates == max(1, int(120 * minutes))


@pytest.mark.slow
def test_nothing_of_the_timing_is_left_in_a_run_of_minutes(image_folder: Callable[..., Path],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """The updates that are timed train networks that are thrown away."""
    data = image_folder(classes=2, per_class=6)
    monkeypatch.setattr(Run, "images_in", lambda self, minutes: (self.seconds_per_update(), 24)[1])
    assert run("--data", data, "--minutes", 1, "--out", "minutes", "--no-eval", *SMALL) == 0
    assert run("--data", data, "--epochs", 2, "--out", "epochs", "--no-eval", *SMALL) == 0
    assert_same_run("minutes", "epochs")
