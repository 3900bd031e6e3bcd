"""That the checks of `python -m tests.bench.right` can fail, and what the benchmarks share."""

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from byol_core.run import log
from byol_core.run.run import Run
from tests.bench import right, table


@pytest.fixture
def check(image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs one of `tests.bench.right` in this process, on small networks."""
    images = image_folder(classes=2, per_class=24, size=(32, 32))
    monkeypatch.chdir(Path.cwd())  # the checks change both
    monkeypatch.setattr(log, "RECORD_EVERY", log.RECORD_EVERY)

    def run(name: str, *words: str) -> int:
        own = ["--images", str(images), "--arch", "conv6", "--case", "32", "--batch", "8", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["right", name, *own, *words])
        return right.main()

    return run


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
LOW = {"linear_5": 0.76, "knn": 0.92}


@pytest.mark.parametrize("scores, on_a_cpu, words, said", [
    ({}, {"knn_20": 0.96, "linear": 0.99}, [], ""),
    (LOW, {"knn_20": 0.92}, [], "wrong: linear_5, knn outside the CPU's band"),
    (LOW, {"knn_20": 0.92}, ["--epochs", "1"], ""),  # so few are not held against it
    ({}, {"knn_20": 0.94}, [], "wrong: the checkpoint gives"), ({}, {"linear": 0.94}, [], "wrong: the checkpoint gives")])
def test_digits_must_land_in_the_band_and_give_a_cpu_the_same(
        check, monkeypatch: pytest.MonkeyPatch, scores: dict[str, float], on_a_cpu: dict[str, float], words: list[str],
        said: str) -> None:
    """A run that ends with these scores, and gives others on a CPU."""
    def run_of(*words: str) -> None:
        Path("run").mkdir()
        known = {"amp": "float32", "peak_memory_mb": 1, "images_per_second": 1.0}
        Path("run", "summary.json").write_text(json.dumps(GOOD | scores | known))

    monkeypatch.setattr(right, "run_of", run_of)
    monkeypatch.setattr(right, "evaluated_on_a_cpu", lambda run: {"knn_20": 0.97, "linear": 0.98} | on_a_cpu)
    with pytest.raises(SystemExit, match=said) if said else contextlib.nullcontext():
        assert check("digits", *words) == 0


def test_compiled_code_that_computes_otherwise_is_found_wrong(check, monkeypatch: pytest.MonkeyPatch) -> None:
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
