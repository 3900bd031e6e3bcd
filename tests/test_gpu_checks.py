"""That the checks of `python -m tests.bench.right` can fail, and what the benchmarks share."""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from byol_core.run import log as metrics
from byol_core.run.run import Run
from tests.bench import right, table


@pytest.fixture
def check(image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs one of `tests.bench.right` in this process, on small networks."""
    folder, images = os.getcwd(), image_folder(classes=2, per_class=24, size=(32, 32))
    monkeypatch.setattr(metrics, "RECORD_EVERY", metrics.RECORD_EVERY)  # which the checks change

    def run(name: str, *words: str) -> int:
        own = ["--images", str(images), "--arch", "conv6", "--case", "32", "--batch", "8", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["right", name, *own, *words])
        return right.main()

    yield run
    os.chdir(folder)


@pytest.mark.slow
def test_a_resumed_run_that_forgets_its_place_is_found_wrong(check, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Run.resume

    def forgetful(self: Run) -> None:
        original(self)
        self.progress.batch = 0

    monkeypatch.setattr(Run, "resume", forgetful)
    with pytest.raises(SystemExit, match="wrong: resumed differs by .* from never stopped, which repeated differs by 0"):
        check("resume")


@pytest.mark.slow
def test_a_group_that_trains_otherwise_is_found_wrong(check, monkeypatch: pytest.MonkeyPatch) -> None:
    original = subprocess.run

    def other_seed(command: list[str], **options: Any) -> object:
        if "member" not in command:
            return original(command, **options)
        return right.run_of(*command[command.index("member") + 1:], "--seed", "7", "--lr", "9")

    monkeypatch.setattr(subprocess, "run", other_seed)
    with pytest.raises(SystemExit, match="wrong: the losses are"):
        check("torchrun")


GOOD = {"linear_5": 0.94, "knn": 0.97, "linear": 0.98, "spread": 0.87}  # of digits in the band


def landed(monkeypatch: pytest.MonkeyPatch, scores: dict[str, float], on_a_cpu: dict[str, float]) -> None:
    """Arranges a run on the digits that ends with these scores, and gives others on a CPU."""
    def run_of(*words: str) -> None:
        Path("run").mkdir()
        known = {"amp": "float32", "peak_memory_mb": 1, "images_per_second": 1.0}
        Path("run", "summary.json").write_text(json.dumps(scores | known))

    monkeypatch.setattr(right, "run_of", run_of)
    monkeypatch.setattr(right, "evaluated_on_a_cpu", lambda run: on_a_cpu)


def test_digits_in_the_band_are_right(check, monkeypatch: pytest.MonkeyPatch) -> None:
    landed(monkeypatch, GOOD, {"knn_20": 0.96, "linear": 0.99})
    assert check("digits") == 0


def test_digits_that_miss_the_band_are_found_wrong(check, monkeypatch: pytest.MonkeyPatch) -> None:
    landed(monkeypatch, GOOD | {"linear_5": 0.76, "knn": 0.92}, {"knn_20": 0.92, "linear": 0.98})
    with pytest.raises(SystemExit, match="wrong: linear_5, knn outside the CPU's band"):
        check("digits")
    assert check("digits", "--epochs", "1") == 0  # so few are not held against it


@pytest.mark.parametrize("name", ["knn_20", "linear"])
def test_a_checkpoint_that_gives_other_features_on_a_cpu_is_found_wrong(check, monkeypatch: pytest.MonkeyPatch,
                                                                        name: str) -> None:
    landed(monkeypatch, GOOD, {"knn_20": 0.97, "linear": 0.98, name: 0.94})
    with pytest.raises(SystemExit, match="wrong: the checkpoint gives"):
        check("digits")


@pytest.mark.slow
def test_compiled_code_that_computes_otherwise_is_found_wrong(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    assert check("compile") == 0

    def miscompile(module: nn.Module) -> None:
        module.register_forward_hook(lambda module, inputs, output: output + 1)

    monkeypatch.setattr(nn.Module, "compile", miscompile)
    with pytest.raises(SystemExit, match="wrong: compiled, the loss is"):
        check("compile")


def test_two_states_are_as_far_apart_as_their_parts() -> None:
    one = {"model": torch.tensor([3.0, 4.0]), "optimizer": torch.tensor([1.0])}
    assert right.furthest_apart(one, one) == 0
    assert right.furthest_apart(one, {**one, "model": torch.tensor([3.0, 4.5])}) == pytest.approx(0.1)
    assert right.furthest_apart(one, {"model": one["model"] + 0.1, "optimizer": torch.tensor([1.5])}) == pytest.approx(0.5)
    for part in one:
        assert math.isnan(right.furthest_apart({**one, "model": one["model"] + 1}, {**one, part: torch.full((1,), math.nan)}))


# What the benchmarks share


def test_rounds_end_with_the_seconds_and_one_is_always_made() -> None:
    calls: list[int] = []
    for seconds, rounds in ((0.0, 1), (float("inf"), 4)):
        calls.clear()
        found = table.side_by_side({"a": lambda: calls.append(1)}, "cpu", 4, warm_up=2, seconds=seconds)
        assert len(calls) == 2 + rounds and found["a"] >= 0


def test_sections_are_appended_to_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path / "RESULTS.md")
    lines = [{"stage": "begun"}, {"stage": "ema", "sections": ["## A\n\nx\n"]}, {"title": "B", "section": "## B\n\ny\n"}]
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path / "results.jsonl")])
    table.main()
    assert (tmp_path / "RESULTS.md").read_text() == "# Benchmarks, newest last\n\n## A\n\nx\n\n## B\n\ny\n"


def test_a_commit_is_named_where_there_is_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYOL_COMMIT", "abc123")
    assert table.commit() == "abc123" and "commit abc123" in table.environment("cpu")


@pytest.mark.gpu
def test_the_gpus_own_time_is_that_of_its_work() -> None:
    short, long = (table.milliseconds_on_gpu(lambda cycles=cycles: torch.cuda._sleep(cycles), "cuda", 5)
                   for cycles in (2_000_000, 80_000_000))
    assert 0 < short < long  # no closer: others may compute there, too
