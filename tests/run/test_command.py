"""The command itself: files and keys of a run, exact resume, wrong input, exit codes."""

import contextlib
import html
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from byol_core.evaluate import scoring
from byol_core.pretrained import load_pretrained
from byol_core.report import __main__ as report
from byol_core.run import command, plan
from byol_core.run.config import parse_config
from byol_core.run.results import Results
from byol_core.run.run import CHECK_STEPS, Run
from byol_core.runtime import Runtime
from byol_core.system.distributed import ALONE, Processes
from byol_core.views.recipes import normalise
from tests.helpers.children import REPOSITORY
from tests.helpers.runs import FILES, SMALL, assert_equal, assert_same_state, checkpoint, metrics, run, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

KEYS = {"images", "classes", "bad_files", "epochs", "updates", "seconds", "images_per_second", "wait_fraction", "loss",
        "spread", "knn", "linear", "knn_untrained", "linear_untrained", "world_size", "device", "amp", "status"}


@pytest.mark.parametrize("views", ["device", "cpu"])
def test_a_labelled_folder_gives_every_file_and_key(image_folder: Callable[..., Path], views: str, capsys) -> None:
    assert run("--data", image_folder(classes=2, per_class=10), "--epochs", 2, "--out", "out", "--views", views, *SMALL) == 0
    assert {path.name for path in Path("out").iterdir() if not path.name.startswith(".")} == FILES
    result = summary("out")
    assert KEYS <= result.keys()
    assert (result["images"], result["classes"], result["epochs"], result["updates"]) == (20, 2, 2, 10)
    assert result["status"] == "finished" and result["device"] == "cpu" and result["world_size"] == 1
    assert 0 <= result["knn"] <= 1 and 0 < result["loss"] < 8
    assert [record["update"] for record in metrics("out")] == [5, 10]
    printed = capsys.readouterr()
    assert "epoch 2/2  loss" in printed.err and "untrained" in printed.out and "backbone.load_state_dict" in printed.out


def test_a_flat_folder_trains_without_labels(image_folder: Callable[..., Path]) -> None:
    assert run("--data", image_folder(classes=0, per_class=9), "--epochs", 1, "--out", "out", *SMALL) == 0
    result = summary("out")
    assert result["classes"] == 0 and result["updates"] == 2
    assert result["knn"] is None and result["linear"] is None and result["knn_untrained"] is None
    assert Path("out/neighbours.png").exists()


def test_a_cuda_graph_that_cannot_be_is_said_to_be_left_out(image_folder: Callable[..., Path]) -> None:
    for number, (words, said) in enumerate((([], 0), (["--cuda-graph"], 1))):
        assert run("--data", image_folder(), "--epochs", 1, "--out", f"out{number}", "--no-eval", *words, *SMALL) == 0
        log = Path(f"out{number}/train.log").read_text()
        assert log.count("note: --cuda-graph is left out, as it is for one process on a CUDA device") == said


def test_a_run_under_way_says_so_in_its_summary(image_folder: Callable[..., Path], monkeypatch) -> None:
    seen = []
    original = Run._after_step

    def look(self: Run, progress, step) -> None:
        seen.append(summary("out"))
        assert Path("out/bad_files.txt").read_text().startswith("class0/005.png")
        assert report.main(["out"]) == 0
        original(self, progress, step)

    monkeypatch.setattr(Run, "_after_step", look)
    data = image_folder(per_class=12)
    (data / "class0" / "005.png").write_bytes(b"not an image")
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL) == 0
    assert {found["status"] for found in seen} == {"running"}
    assert seen[0]["knn"] is None and seen[0]["knn_untrained"] == summary("out")["knn_untrained"] is not None
    assert summary("out")["status"] == "finished"


def test_a_report_that_fails_stops_no_run(image_folder: Callable[..., Path], monkeypatch, capsys) -> None:
    def fail(folder: Path, under_way: bool = False) -> None:
        raise KeyError("plan")

    monkeypatch.setattr("byol_core.run.results.write_report", fail)
    monkeypatch.setattr("byol_core.run.results.read_run", fail)
    monkeypatch.setattr("byol_core.run.results.REPORT_EVERY", 0.0)
    assert run("--data", image_folder(), "--epochs", 3, "--no-eval", "--out", "out", *SMALL) == 0
    said = capsys.readouterr().out
    assert said.count("warning: no report for now: KeyError: 'plan' - the run goes on") == 1
    assert "\nwarning: KeyError: 'plan' - the run goes on" in said  # at the end
    assert summary("out")["status"] == "finished" and "warning: KeyError" in Path("out/train.log").read_text()


def test_too_few_images_of_a_class_are_not_called_missing_folders(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--epochs", 1, "--eval-every", 1, *SMALL]
    assert run("--data", image_folder(classes=8, per_class=1), "--out", "out", *arguments) == 0
    said = capsys.readouterr().out
    assert "no accuracy: measuring needs" in said and "no class folders, so" not in said
    assert "\nbest: separation " in said and summary("out")["knn"] is None and summary("out")["separation"] is not None
    assert "Not measured: the labels do not allow it" in Path("out/report.html").read_text()
    assert run("--data", image_folder("flat", classes=0), "--out", "other", *arguments) == 0
    assert "no class folders, so no accuracy" in capsys.readouterr().out


def test_exported_backbone_loads_into_torchvision_but_for_its_classifier(image_folder: Callable[..., Path]) -> None:
    from torchvision.models import resnet18
    assert run("--data", image_folder(size=(32, 32)), "--epochs", 1, "--out", "out", "--arch", "resnet18", "--no-small-stem",
               "--hidden-dim", 8, "--projection-dim", 4, "--batch-size", 8, "--workers", 0, "--no-eval") == 0
    snippet = (REPOSITORY / "README.md").read_text().split("```python\nimport json, torch, torchvision\n")[1].split("```")[0]
    shown: dict[str, Any] = {"json": json, "torch": torch, "torchvision": torchvision}
    exec(snippet.replace("runs/imgs", "out"), shown)
    pretrained, image = load_pretrained("out"), torch.rand(2, 3, 32, 32)
    expected = pretrained.backbone.eval()(normalise(image, pretrained.recipe))
    torch.testing.assert_close(shown["backbone"](shown["prepare"](image)), expected)
    model = resnet18()
    missing, unexpected = model.load_state_dict(torch.load("out/backbone.pt", weights_only=True), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    online = checkpoint("out")["model"]
    assert torch.equal(model.layer4[1].conv2.weight, online["online.backbone.layer4.1.conv2.weight"])


@pytest.mark.parametrize("views, options, stop_at", [
    ("device", [], 1), ("device", [], 3), ("device", [], 5), ("cpu", ["--optimizer", "lars"], 2),
    ("cpu", ["--optimizer", "lars"], 4), ("device", ["--recipe", "quadra"], 4), ("device", ["--amp", "fp16"], 1),
    ("device", ["--accum-steps", "2", "--optimizer", "adamw", "--scheduler", "constant"], 3),
])
def test_a_stopped_run_continues_to_the_same_result_bit_for_bit(image_folder: Callable[..., Path], monkeypatch, capsys,
                                                                views: str, options: list[str], stop_at: int) -> None:
    data = image_folder(classes=2, per_class=6)
    arguments = ["--data", data, "--epochs", 2, "--views", views, "--no-eval", *SMALL, *options]
    assert run(*arguments, "--out", "whole") == 0

    original = Run._after_step

    def terminate_at(self: Run, progress, step) -> None:
        if progress.updates == stop_at and self.setup.config.resume is None and step.applied:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, progress, step)

    monkeypatch.setattr(Run, "_after_step", terminate_at)
    assert run(*arguments, "--out", "parts") == 143
    stopped = checkpoint("parts")
    said = f"update {stop_at}; parts/last.pt has the weights of update {stop_at}; the same command with --resume goes on\n"
    assert capsys.readouterr().out.endswith(said)
    assert stopped["progress"]["updates"] == stop_at and summary("parts")["status"] == "stopped"
    assert run(*arguments, "--out", "parts", "--resume") == 0
    assert_same_state(checkpoint("whole"), checkpoint("parts"))
    assert metrics("whole") == metrics("parts")
    with pytest.raises(AssertionError):
        assert_same_state(checkpoint("whole"), stopped)  # the comparison can fail


def test_worker_count_does_not_change_the_result(image_folder: Callable[..., Path]) -> None:
    data = image_folder(classes=0, per_class=8)
    for workers in (0, 2):
        assert run("--data", data, "--epochs", 1, "--views", "cpu", "--no-eval", *SMALL, "--workers", workers,
                   "--out", f"workers{workers}") == 0
    assert_same_state(checkpoint("workers0"), checkpoint("workers2"))


def test_bad_files_are_skipped_counted_and_listed_on_both_paths(image_folder: Callable[..., Path], capsys) -> None:
    data = image_folder(classes=2, per_class=12)
    (data / "class0" / "005.png").write_bytes(b"not an image")
    for views in ("device", "cpu"):
        assert run("--data", data, "--epochs", 2, "--out", views, "--views", views, *SMALL) == 0
        assert summary(views)["bad_files"] == 1
        assert (Path(views) / "bad_files.txt").read_text().startswith("class0/005.png\tUnidentifiedImageError")
        assert capsys.readouterr().out.count("skipped class0/005.png") == 1


@pytest.mark.parametrize("views", ["device", "cpu"])
def test_too_many_bad_files_stop_the_run_with_the_list(image_folder: Callable[..., Path], views: str, capsys) -> None:
    data = image_folder(classes=0, per_class=12)
    for number in (1, 2, 3):
        (data / f"{number:03d}.png").write_bytes(b"")
    assert run("--data", data, "--epochs", 2, "--out", "out", "--views", views, *SMALL) == 1
    assert "of 12 images cannot be read, more than 10%" in capsys.readouterr().err
    assert Path("out/bad_files.txt").read_text().count("\n") == 2


def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_file(image_folder: Callable[..., Path], monkeypatch,
                                                                           capsys) -> None:
    original = Run._after_step

    def poison(self: Run, progress, step) -> None:
        original(self, progress, step)
        if progress.updates == 5:
            self.images.pixels = None
            self.batches.batches.recipes = tuple(
                __import__("dataclasses").replace(recipe, mean=(3e38,) * 3, std=(1e-30,) * 3)
                for recipe in self.batches.batches.recipes)

    monkeypatch.setattr(Run, "_after_step", poison)
    assert run("--data", image_folder(classes=0, per_class=16), "--epochs", 3, "--out", "out", "--no-eval", *SMALL) == 1
    assert "not finite at epoch 2, update" in capsys.readouterr().err
    state = checkpoint("out")
    assert state["progress"]["updates"] == 4 and summary("out")["status"] == "failed"
    assert all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())


def test_weights_or_statistics_that_are_not_finite_are_never_saved(image_folder: Callable[..., Path], capsys) -> None:
    """Huge but finite gradients: the statistics of batch norm overflow first, and no loss or gradient tells."""
    assert run("--data", image_folder(classes=0, per_class=40), "--epochs", 30, "--out", "out", "--no-eval", *SMALL,
               "--lr", 1e6, "--optimizer", "sgd", "--warmup-epochs", 0) == 1
    said = capsys.readouterr().err
    assert "not finite at epoch" in said and ", precision torch.float32)" in said
    if Path("out/last.pt").exists():
        assert all(torch.isfinite(value).all() for value in checkpoint("out")["model"].values() if value.is_floating_point())


def test_a_network_that_is_not_finite_is_not_saved(image_folder: Callable[..., Path], monkeypatch, capsys) -> None:
    original = Run._after_step

    def poison(self: Run, progress, step) -> None:
        if progress.updates == 4:
            self.state.model.online.predictor[1].running_var[0] = float("inf")
        original(self, progress, step)

    monkeypatch.setattr(Run, "_after_step", poison)
    assert run("--data", image_folder(classes=0, per_class=16), "--epochs", 3, "--out", "out", "--no-eval", *SMALL) == 1
    assert "error: a weight or a statistic of batch norm is not finite at epoch" in capsys.readouterr().err
    assert not Path("out/last.pt").exists() or checkpoint("out")["progress"]["updates"] < 4


def test_images_on_both_sides_are_told_before_training(image_folder: Callable[..., Path], capsys) -> None:
    data = image_folder()
    Path("link").symlink_to(data)
    assert run("--data", data, "--eval-data", "link", "--epochs", 1, "--out", "out", *SMALL) == 0
    assert "warning: 16 of 16 images of --eval-data are in --data, too" in capsys.readouterr().out


def test_classes_that_only_the_images_measured_on_have_are_told(image_folder: Callable[..., Path], capsys) -> None:
    data, others = image_folder(), image_folder("others", classes=3)
    assert run("--data", data, "--eval-data", others, "--epochs", 1, "--out", "out", *SMALL) == 0
    assert "warning: images of 1 classes that --data does not have count as wrong: class2" in capsys.readouterr().out


def test_a_classifier_that_fails_or_does_not_converge_is_told(image_folder: Callable[..., Path], capsys) -> None:
    data = image_folder(per_class=4)
    assert run("--data", data, "--epochs", 0, "--out", "few", *SMALL, "--classifier", "knn") == 0
    assert "warning: the classifier failed, so there is no linear accuracy: " in capsys.readouterr().out


def test_no_epochs_write_the_initial_weights(image_folder: Callable[..., Path]) -> None:
    assert run("--data", image_folder(), "--epochs", 0, "--out", "out", *SMALL) == 0
    assert checkpoint("out")["progress"]["updates"] == 0 and Path("out/backbone.pt").exists()


def test_resuming_a_finished_run_touches_nothing(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 1, "--out", "out", *SMALL]
    assert run(*arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir() if path.name != ".lock"}
    assert run(*arguments, "--resume") == 0
    assert "already complete (1/1 epochs)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_stopped_while_it_is_measured_is_finished_by_resuming(image_folder: Callable[..., Path], monkeypatch) -> None:
    arguments = ["--data", image_folder(per_class=10), "--epochs", 1, "--out", "out", *SMALL]
    original = Results.measure

    def interrupt(self: Results, name: str, backbone) -> None:
        if name == "trained":
            os.kill(os.getpid(), signal.SIGINT)
        original(self, name, backbone)

    with monkeypatch.context() as patched:
        patched.setattr(Results, "measure", interrupt)
        assert run(*arguments) == 130
    assert summary("out")["status"] == "stopped" and summary("out")["knn"] is None
    assert run(*arguments, "--resume") == 0
    assert summary("out")["status"] == "finished" and summary("out")["knn"] is not None


def test_check_trains_nothing_and_touches_no_run(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(per_class=20), "--out", "out", *SMALL]
    for _ in range(2):
        assert run(*arguments, "--epochs", 3, "--check") == 0
        assert "s per update" in capsys.readouterr().out
    picture = Path("out-check/views.png").read_bytes()
    assert run(*arguments, "--epochs", 3, "--check", "--seed", 7) == 0
    assert Path("out-check/views.png").read_bytes() != picture  # drawn anew
    assert not Path("out-check/last.pt").exists() and Path("out-check/views.png").exists() and not Path("out").exists()
    assert run(*arguments, "--epochs", 1) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert run(*arguments, "--epochs", 9, "--seed", 5, "--check") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == before


def test_resuming_from_elsewhere_does_not_overwrite_another_run(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--no-eval", *SMALL]
    assert run(*arguments, "--out", "first") == 0
    assert run(*arguments, "--out", "second", "--seed", 3) == 0
    before = checkpoint("second")
    assert run(*arguments, "--out", "second", "--resume", "first/previous.pt") == 2
    assert "second already holds a run (epoch " in capsys.readouterr().err
    assert_same_state(checkpoint("second"), before)
    assert run(*arguments, "--out", "third", "--resume", "first/previous.pt") == 0
    assert_same_state(checkpoint("third"), checkpoint("first"))


def test_a_run_that_failed_before_its_first_checkpoint_can_be_repeated(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(classes=0, per_class=16), "--out", "out", "--no-eval", *SMALL, "--epochs", 2]
    assert run(*arguments, "--lr", "1e6", "--optimizer", "sgd", "--weight-decay", "1e6") == 1
    assert "nothing was saved yet" in capsys.readouterr().err
    assert run(*arguments) == 0
    assert [record["update"] for record in metrics("out")] == [4, 8]


def test_a_float16_run_whose_steps_are_all_skipped_at_first_goes_on(image_folder: Callable[..., Path]) -> None:
    """The scaler starts too high for some networks: an epoch may end before any step was applied."""
    assert run("--data", image_folder(classes=0, per_class=8), "--epochs", 1, "--out", "out", "--no-eval", *SMALL,
               "--batch-size", 8, "--amp", "fp16") == 0
    assert summary("out")["status"] == "finished"


def test_a_signal_while_images_are_decoded_stops_the_run_and_blames_no_file(image_folder: Callable[..., Path],
                                                                            monkeypatch) -> None:
    from byol_core.images import decoding
    real = decoding._to_rgb

    def interrupted(image):
        if Path("out/config.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(image)

    monkeypatch.setattr(decoding, "_to_rgb", interrupted)
    assert run("--data", image_folder(), "--epochs", 1, "--out", "out", "--views", "cpu", *SMALL) == 143
    assert not Path("out/bad_files.txt").exists() and summary("out")["bad_files"] == 0


def test_metrics_torn_by_a_power_cut_do_not_keep_a_run_from_going_on(image_folder: Callable[..., Path]) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--out", "out", "--no-eval", *SMALL]
    assert run(*arguments) == 0
    whole = metrics("out")
    Path("out/summary.json").unlink()
    with open("out/metrics.jsonl", "ab") as file:
        file.write(bytes(4) + b"\n" + b'{"upd')
    assert run(*arguments, "--resume") == 0
    assert metrics("out") == whole
    assert summary("out")["loss"] == whole[-1]["loss"]  # though no step was made after resuming


def test_resuming_before_the_first_checkpoint_starts_clean(image_folder: Callable[..., Path], monkeypatch) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--out", "out", "--no-eval", *SMALL]

    def lost(self: Run) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", lost)
        assert run(*arguments) == 1
    assert run(*arguments, "--resume") == 0
    assert [record["update"] for record in metrics("out")] == [4, 8]


def test_the_best_network_goes_along_into_another_folder(image_folder: Callable[..., Path], monkeypatch) -> None:
    arguments = ["--data", image_folder(per_class=10), "--epochs", 3, "--eval-every", 1, *SMALL]
    knn = iter([0.9, 0.2, 0.3])
    monkeypatch.setattr("byol_core.evaluate.scoring.Scorer.quick", lambda *_: next(knn))
    monkeypatch.setattr("byol_core.evaluate.scoring.Scorer.measure", lambda *_: {"knn": 0.1, "linear": 0.1})
    with monkeypatch.context() as patched:
        patched.setattr(Run, "_share_bad_files", lambda run: run.stop._handle(signal.SIGTERM, None))  # at the end of epoch 1
        assert run(*arguments, "--out", "one") == 143
    assert run(*arguments, "--out", "other", "--resume", "one/last.pt") == 0
    assert (summary("other")["best_knn"], summary("other")["best_epoch"]) == (0.9, 1)
    assert Path("other/best.pt").read_bytes() == Path("one/best.pt").read_bytes()


def test_a_check_of_a_run_that_stands_at_its_end_measures_too(image_folder: Callable[..., Path], monkeypatch, capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--no-eval", *SMALL]
    assert run(*arguments, "--out", "out") == 0
    capsys.readouterr()
    updates: list[int] = []
    original = Runtime.step
    monkeypatch.setattr(Runtime, "step", lambda self, *rest: updates.append(1) or original(self, *rest))
    assert run(*arguments, "--out", "other", "--check", "--resume", "out/last.pt") == 0
    assert "disk; " in capsys.readouterr().out and len(updates) > 1


def test_a_run_resumed_into_another_folder_takes_its_records_along(image_folder: Callable[..., Path], monkeypatch) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--no-eval", *SMALL]
    with monkeypatch.context() as patched:
        patched.setattr(Run, "_share_bad_files", lambda run: run.stop._handle(signal.SIGTERM, None))  # at the end of epoch 1
        assert run(*arguments, "--out", "one") == 143
    assert run(*arguments, "--out", "other", "--resume", "one/last.pt") == 0
    assert [record["update"] for record in metrics("other")] == [4, 8]
    assert [record["update"] for record in metrics("one")] == [4] and Path("other/views.png").exists()


def test_resume_does_not_make_a_foreign_folder_a_run_folder(image_folder: Callable[..., Path], capsys) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    assert run("--data", image_folder(), "--epochs", 1, "--out", "mine", "--resume", "--no-eval", *SMALL) == 2
    assert "mine is not empty (it holds thesis.txt)" in capsys.readouterr().err


def test_scores_of_another_test_set_are_measured_again_after_resuming(image_folder: Callable[..., Path]) -> None:
    data, other = image_folder("a", per_class=10), image_folder("b", per_class=4)
    arguments = ["--data", data, "--epochs", 1, "--out", "out", *SMALL]
    assert run(*arguments) == 0
    Path("out/summary.json").unlink()
    assert run(*arguments, "--resume", "--eval-data", other) == 0
    assert summary("out")["measured_on"].startswith("8 images of ") and summary("out")["knn_untrained"] * 8 % 1 == 0


def test_a_network_can_be_started_from_a_checkpoint_too(image_folder: Callable[..., Path]) -> None:
    data = image_folder()
    assert run("--data", data, "--epochs", 1, "--out", "first", "--no-eval", *SMALL) == 0
    assert run("--data", data, "--epochs", 0, "--out", "second", "--init-from", "first/last.pt", "--no-eval", *SMALL) == 0
    assert_equal(torch.load("first/backbone.pt", weights_only=True), torch.load("second/backbone.pt", weights_only=True), "")


def test_eval_data_without_a_class_in_common_is_refused(image_folder: Callable[..., Path], capsys) -> None:
    data, other = image_folder("a"), image_folder("b")
    for number in range(2):
        (other / f"class{number}").rename(other / f"strange{number}")
    assert run("--data", data, "--eval-data", other, "--epochs", 1, "--out", "out", *SMALL) == 2
    assert "no class folder of the same name" in capsys.readouterr().err


def test_unlabelled_images_can_be_measured_on_a_labelled_folder(image_folder: Callable[..., Path]) -> None:
    data, labelled = image_folder("flat", classes=0, per_class=8), image_folder("labelled", per_class=10)
    assert run("--data", data, "--eval-data", labelled, "--epochs", 1, "--out", "out", *SMALL) == 0
    assert summary("out")["knn"] is not None and summary("out")["classes"] == 0


def test_a_run_folder_among_the_images_is_not_taken_for_images(image_folder: Callable[..., Path]) -> None:
    data = image_folder(classes=0, per_class=8)
    arguments = ["--data", data, "--epochs", 1, "--out", data / "run", *SMALL]
    assert run(*arguments) == 0
    Path(data / "run" / "summary.json").unlink()
    assert run(*arguments, "--resume") == 0
    assert summary(data / "run")["images"] == 8


def test_init_from_starts_from_those_weights(image_folder: Callable[..., Path]) -> None:
    data = image_folder()
    assert run("--data", data, "--epochs", 1, "--out", "first", "--no-eval", *SMALL) == 0
    assert run("--data", data, "--epochs", 0, "--out", "second", "--init-from", "first/backbone.pt", *SMALL) == 0
    assert_equal(torch.load("first/backbone.pt", weights_only=True), torch.load("second/backbone.pt", weights_only=True), "")


def test_any_scikit_learn_classifier_can_be_the_probe(image_folder: Callable[..., Path]) -> None:
    assert run("--data", image_folder(per_class=10), "--epochs", 0, "--out", "out", *SMALL,
               "--classifier", "sklearn.dummy.DummyClassifier") == 0
    assert summary("out")["linear"] == 0.5  # the constant guess, on a stratified fifth of two equal classes


def test_eval_data_is_what_is_measured_on(image_folder: Callable[..., Path]) -> None:
    data, other = image_folder("a"), image_folder("b", classes=3)
    (other / "class2").rename(other / "unseen")
    assert run("--data", data, "--eval-data", other, "--epochs", 0, "--out", "out", *SMALL) == 0
    assert summary("out")["knn"] <= 2 / 3  # a third of it is of a class that the training folder does not have


WRONG = [
    (["--data", "imsg"], "no such folder: imsg - did you mean imgs?"),
    (["--data", "nowhere/at/all"], "no such folder: nowhere/at/all - check --data"),
    (["--data", "imgs/class0/000.png"], "is a file"),
    (["--data", "empty"], "no images under empty: looked for .jpg"),
    (["--batch-size", "17"], "16 images < --batch-size 17 - use --batch-size 16 or less"),
    (["--batch-size", "1"], "batch of 1"),
    (["--batch-size", "6", "--accum-steps", "4"], "use a multiple of 4"),
    (["--batch-size", "4", "--accum-steps", "4"], "batch of 1 per process and micro-batch"),
    (["--arch", "resnet19"], "unknown arch 'resnet19' - did you mean resnet18?"),
    (["--arch", "squeezenet1_0"], "arch 'squeezenet1_0' does not end in a linear layer"),
    (["--arch", "alexnet"], "the network cannot take 16-pixel images"),
    (["--arch", "vgg11", "--small-stem"], "--small-stem is for ResNets, not for vgg11"),
    (["--device", "cuda"], "use --device cpu"),
    (["--device", "abacus"], "--device abacus is not a device"),
    (["--classifier", "sklearn.svm.NoSuch"], "--classifier sklearn.svm.NoSuch"),
    (["--eval-data", "flat"], "--eval-data flat has fewer than 2 class sub-folders"),
    (["--eval-data", "gone"], "no such folder: gone - check --eval-data"),
    (["--resume", "gone.pt"], "no such file: gone.pt"),
    (["--init-from", "imgs/class0/000.png"], "damaged or not a checkpoint"),
    (["--small-stem"], "--small-stem is for ResNets"),
    (["--warmup-epochs", "1e308"], "is longer than the run"),
    (["--lr", "1e308"], "is no learning rate"),
    (["--scheduler", "plateau", "--warmup-epochs", "1"], "--warmup-epochs has no effect with --scheduler plateau"),
    (["--data", ""], "--data is empty"),
    (["--out", "imgs/class0/000.png"], "cannot write to imgs/class0/000.png"),
]


WRONG += [(["--out", ""], "--out is empty - name a folder, or . for this one"),
          (["--out", "o" * 300], "ooo: file name too long - choose another --out")]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
@pytest.mark.skipif(torch.cuda.is_available(), reason="--device cuda is right here")
def test_wrong_input_is_one_line_and_code_2_before_any_training(image_folder: Callable[..., Path], capsys,
                                                                arguments: list[str], message: str) -> None:
    data = image_folder()
    image_folder("flat", classes=0, per_class=3)
    Path("empty").mkdir()
    right = [] if "--data" in arguments else ["--data", data.name]
    assert run(*right, "--epochs", 1, "--out", "out", *SMALL, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path("out").exists()  # nothing was begun


@pytest.mark.parametrize("arguments, message", [
    (["--lr", "nan"], "argument --lr: must be a finite number above 0, got nan"),
    (["--lr", "-1"], "got -1"),
    (["--lr", "0"], "got 0"),
    (["--epochs", "-1"], "argument --epochs: must be a whole number from 0 to 1000000000, got -1"),
    (["--epochs", "9" * 401], "argument --epochs: must be a whole number from 0 to 1000000000, got 9999"),
    (["--workers", "1000000"], "argument --workers: must be auto or a whole number from 0 to 256, got 1000000"),
    (["--epochs", "1.5"], "got 1.5"),
    (["--image-size", "7"], "8 or more, got 7"),
    (["--weight-decay", "inf"], "got inf"),
    (["--tau-base", "1.5"], "must be a number in [0, 1], got 1.5"),
    (["--amp", "bf61"], "invalid choice: 'bf61'"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3 - did you mean --epochs?"),
])
def test_a_wrong_option_is_one_line_and_code_2(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_used_run_folder_needs_resume(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 1, "--no-eval", *SMALL]
    assert run(*arguments, "--out", "out") == 0
    assert run(*arguments, "--out", "out") == 2
    assert "out already holds a run (epoch 1/1) - add --resume to go on, or choose another --out" in capsys.readouterr().err
    Path("foreign").mkdir()
    Path("foreign/thesis.tex").touch()
    assert run(*arguments, "--out", "foreign") == 2
    assert "foreign is not empty (it holds thesis.tex)" in capsys.readouterr().err


@pytest.mark.parametrize("changed, named", [
    (["--epochs", "3"], "epochs 2 -> 3"), (["--batch-size", "8"], "batch_size 4 -> 8"), (["--seed", "1"], "seed 0 -> 1"),
    (["--arch", "resnet18"], "arch conv6 -> resnet18"), (["--views", "cpu"], "views made on the device -> on the cpu"),
])
def test_resuming_with_other_options_is_refused_by_name(image_folder: Callable[..., Path], capsys, changed: list[str],
                                                        named: str) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--out", "out", "--no-eval", *SMALL]
    assert run(*arguments) == 0
    Path("out/summary.json").unlink()
    assert run(*arguments, "--resume", *changed) == 2
    assert named in capsys.readouterr().err


def test_resuming_with_other_images_is_refused(image_folder: Callable[..., Path], capsys) -> None:
    data = image_folder()
    arguments = ["--data", data, "--epochs", 1, "--out", "out", "--no-eval", *SMALL]
    assert run(*arguments) == 0
    Image.new("RGB", (16, 16)).save(data / "class0" / "new.png")
    capsys.readouterr()
    assert run(*arguments, "--resume") == 2
    error = capsys.readouterr().err
    assert "images 16 -> 17; the names of the image files" in error and error.count("\n") == 1


def test_resume_in_an_empty_folder_starts_afresh(image_folder: Callable[..., Path], capsys) -> None:
    assert run("--data", image_folder(), "--epochs", 1, "--out", "out", "--resume", "--no-eval", *SMALL) == 0
    assert "nothing to resume in out: starting afresh" in capsys.readouterr().out


def test_resume_from_a_folder_without_a_checkpoint_is_refused(image_folder: Callable[..., Path], capsys) -> None:
    Path("elsewhere").mkdir()
    assert run("--data", image_folder(), "--epochs", 1, "--out", "out", "--resume", "elsewhere", "--no-eval", *SMALL) == 2
    assert capsys.readouterr().err == "error: no checkpoint in elsewhere\n"
    assert not Path("out").exists()


def test_a_damaged_checkpoint_is_told_and_the_one_before_gone_on_from(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--out", "out", "--no-eval", *SMALL]
    assert run(*arguments) == 0
    whole = checkpoint("out")
    Path("out/last.pt").write_bytes(Path("out/last.pt").read_bytes()[:-1])
    assert run(*arguments, "--resume") == 0
    assert ("warning: out/last.pt is damaged or not a checkpoint; using the checkpoint before it\n"
            in capsys.readouterr().out)
    assert_same_state(checkpoint("out"), whole)


def test_no_whole_checkpoint_is_wrong_input_and_never_a_fresh_start(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--out", "out", "--no-eval", *SMALL]
    assert run(*arguments) == 0
    for name in ("last.pt", "previous.pt"):
        Path("out", name).write_bytes(b"")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.suffix != ".log"}
    capsys.readouterr()
    assert run(*arguments, "--resume") == 2
    assert capsys.readouterr().err == (
        "error: out/last.pt is empty; out/previous.pt is empty - start a new run in another --out, or one from its network "
        "with --init-from out/backbone.pt\n")
    before.pop(".lock")
    assert all(Path("out", name).read_bytes() == content for name, content in before.items())


def test_a_folder_that_cannot_be_written_to_is_told_before_the_images_are_looked_for(image_folder: Callable[..., Path],
                                                                                     monkeypatch, capsys) -> None:
    monkeypatch.setattr("byol_core.images.image_set.walk", lambda *_: pytest.fail("it took a while for nothing"))
    data = image_folder()
    Path("out").touch()
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL) == 2
    assert "cannot write to out: file exists" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(image_folder: Callable[..., Path], capsys) -> None:
    from byol_core.run.folder import open_run_folder
    with open_run_folder(Path("out"), may_be_used=False):
        assert run("--data", image_folder(), "--epochs", 1, "--out", "out", *SMALL) == 2
    said = capsys.readouterr().err
    assert re.search(rf"another run \(pid {os.getpid()} on {platform.node()} since 2.+\) is using out", said)


def test_a_world_size_without_a_launcher_is_refused(image_folder: Callable[..., Path], monkeypatch, capsys) -> None:
    for size, message in (("2", "WORLD_SIZE is 2, but RANK is not set"), ("abc", "WORLD_SIZE is 'abc', which is no number")):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert run("--data", image_folder(), "--epochs", 1, "--out", "out", *SMALL) == 2
        assert message in capsys.readouterr().err


def test_help_and_a_mistyped_flag_do_not_load_torch(tmp_path: Path) -> None:
    script = ("import sys, runpy\nsys.argv = ['train.py', *sys.argv[1:]]\n"
              f"try:\n    runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')\n"
              "except SystemExit:\n    pass\n"
              "sys.stderr.write(str(sorted({'torch', 'torchvision', 'sklearn', 'numpy'} & set(sys.modules))))")
    for argument in ("--help", "--epoch"):
        done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, cwd=REPOSITORY)
        assert done.stderr.endswith("[]")


def test_recomputing_activations_changes_no_weight(image_folder: Callable[..., Path]) -> None:
    data = image_folder(size=(8, 8), per_class=4)
    small = ("--arch", "resnet18", "--epochs", 1, "--batch-size", 4, "--hidden-dim", 8, "--projection-dim", 4, "--no-eval",
             "--device", "cpu")
    assert run("--data", data, "--out", "kept", *small) == 0
    assert run("--data", data, "--out", "again", *small, "--grad-checkpoint") == 0
    kept, again = (torch.load(f"{name}/last.pt", weights_only=True)["model"] for name in ("kept", "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())


def test_a_graph_with_activations_computed_again_is_refused(image_folder: Callable[..., Path], capsys) -> None:
    assert run("--data", image_folder(), "--epochs", 1, "--out", "out", "--grad-checkpoint", "--cuda-graph", *SMALL) == 2
    assert "--cuda-graph: a graph cannot hold what --grad-checkpoint computes again" in capsys.readouterr().err


@pytest.mark.parametrize("graph, expected", [(False, (90 + 80 + 70 + 10 + 10) / 5), (True, 10)])
def test_a_check_times_updates_once_they_are_as_they_will_be(
        graph: bool, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first; with a CUDA graph those after it was recorded."""
    clock = [0.0]

    def train(progress: Any, after_step: Any) -> None:
        for seconds in [100, 90, 80, 70, *[10] * 20]:
            clock[0] += seconds
            after_step(progress, None)

    monkeypatch.setattr("byol_core.run.run.time.monotonic", lambda: clock[0])
    runtime = SimpleNamespace(cuda_graph=graph, confirm=lambda: None)
    run: Any = SimpleNamespace(setup=SimpleNamespace(runtime=runtime), _train=train)
    assert Run.seconds_per_update(run) == expected


def test_a_network_without_blocks_to_compute_again_is_named(image_folder: Callable[..., Path], capsys) -> None:
    assert run("--data", image_folder(), "--epochs", 1, "--out", "out", "--grad-checkpoint", *SMALL) == 2
    assert "--grad-checkpoint: conv6 has no repeated blocks" in capsys.readouterr().err
    assert run("--data", image_folder(), "--epochs", 1, "--out", "out", "--grad-checkpoint", "--compile", *SMALL) == 2
    assert "--compile: torch cannot compile what --grad-checkpoint computes again" in capsys.readouterr().err


RECIPE = ("lr", "tau_base", "warmup_epochs", "optimizer", "hidden_dim")


def another_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` chooses, and the views, as a later version might."""
    values = {"lr": 0.4, "tau_base": 0.5, "warmup_epochs": 0.0, "optimizer": "adamw", "weight_decay": 0.1, "hidden_dim": 24}
    auto, views = plan._auto, plan._views
    monkeypatch.setattr(plan, "_auto", lambda *about: [
        replace(choice, value=values.get(choice.name, choice.value)) for choice in auto(*about)])
    monkeypatch.setattr(plan, "_views", lambda *about: tuple(
        replace(view, crop_scale=(0.5, 1.0), hue=0.3) for view in views(*about)))
    monkeypatch.setattr(plan, "_batch", lambda *about: plan.Choice("batch_size", 2, "for a test"))


def test_a_run_goes_on_with_the_recipe_that_it_began_with(
        image_folder: Callable[..., Path], stopped_after: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
        capsys) -> None:
    data = image_folder()
    always = ["--data", data, "--epochs", 3, "--no-eval", "--workers", 0, "--device", "cpu"]
    begun = ["--arch", "conv6", "--image-size", 16, "--projection-dim", 8, "--lr", 0.3]
    assert run(*always, *begun, "--out", "whole") == 0
    stopped_after(2, *always, *begun, "--out", "out")
    another_recipe(monkeypatch)
    capsys.readouterr()
    assert run(*always, "--out", "out", "--resume") == 0
    said = capsys.readouterr().out
    assert_same_state(checkpoint("whole"), checkpoint("out"))
    assert "batch_size 8 (as this run began)" in said and "lr 0.3 x 8/256 = 0.009375 (as this run began)" in said
    whole, out = (json.loads(Path(name, "config.json").read_text())["plan"] for name in ("whole", "out"))
    assert whole == out
    assert run(*always, "--out", "new") == 0  # a new run has the new recipe
    assert json.loads(Path("new/config.json").read_text())["plan"]["optimizer"] == "adamw"


@pytest.mark.parametrize("asked, said", [
    (["--lr", 0.5], "lr 0.009375 -> 0.015625"), (["--recipe", "paper"], "optimizer sgd -> lars"),
    (["--image-size", 24], "image_size 16 -> 24"), (["--view-size", 12], "view_size 16 -> 12"),
    (["--batch-size", 4], "batch_size 8 -> 4"),
    (["--optimizer", "adamw"], "optimizer sgd -> adamw")])
def test_what_is_asked_for_must_be_as_the_run_began(image_folder: Callable[..., Path], stopped_after: Callable[..., None],
                                                    asked: list[object], said: str, capsys) -> None:
    always = ["--data", image_folder(), "--epochs", 3, "--no-eval", "--workers", 0, "--device", "cpu", "--out", "out"]
    stopped_after(2, *always, "--arch", "conv6", "--image-size", 16, "--projection-dim", 8, "--lr", 0.3)
    assert run(*always, *asked, "--resume") == 2
    assert said in capsys.readouterr().err


def test_training_sees_views_of_one_size_and_everything_else_images_of_another(
        image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, int]] = set()
    convolution = torch.nn.functional.conv2d

    def noted(images: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        if images.shape[1] == 3 and len(images) > 1:
            seen.add((torch.is_grad_enabled(), images.shape[-1]))
        return convolution(images, *rest, **more)

    data = image_folder(classes=2, per_class=10)
    options = ["--data", data, "--epochs", 1, "--workers", 0, "--device", "cpu", "--arch", "conv6", "--image-size", 16,
               "--view-size", 12, "--batch-size", 4, "--out", "out"]
    measured, embed_data = set(), scoring.embed_data
    monkeypatch.setattr(scoring, "embed_data", lambda backbone, data, recipe, *rest: (
        measured.add(recipe.size), embed_data(backbone, data, recipe, *rest))[1])
    monkeypatch.setattr(torch.nn.functional, "conv2d", noted)
    assert run(*options) == 0
    assert measured == {16}
    assert seen == {(True, 12), (False, 12), (False, 16)}  # online; target; what is measured, and pictured
    assert json.loads(Path("out/backbone.json").read_text())["image_size"] == 16
    for source, network in (("out/backbone.pt", "online"), ("out/last.pt", "online"), ("out/last.pt", "target")):
        assert load_pretrained(Path(source), network).recipe.size == 16


def test_a_run_from_before_views_could_be_smaller_goes_on_with_views_as_large_as_images(
        image_folder: Callable[..., Path], stopped_after: Callable[..., None]) -> None:
    always = ["--data", image_folder(), "--epochs", 3, "--no-eval", "--workers", 0, "--device", "cpu", "--arch", "conv4"]
    begun = ["--image-size", 16, "--view-size", 16]
    assert run(*always, *begun, "--out", "whole") == 0
    stopped_after(2, *always, *begun, "--out", "out")
    state = checkpoint("out")
    identity = json.loads(str(state["identity"]))
    assert identity.pop("view_size") == 16
    torch.save({**state, "identity": json.dumps(identity)}, "out/last.pt")
    assert run(*always, "--out", "out", "--resume") == 0
    assert_same_state(checkpoint("whole"), checkpoint("out"))


def timed(seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every update takes so long, by what a run measures; how often that was asked for."""
    asked: list[float] = []
    monkeypatch.setattr(Run, "seconds_per_update", lambda self, at_least=0.0: asked.append(at_least) or seconds)
    return asked


@pytest.mark.parametrize("seconds, epochs, updates", [(60.0, 1, 1), (30.0, 1, 2), (7.5, 3, 3), (2.0, 10, 3), (100.0, 1, 1)])
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


def test_a_run_of_minutes_that_was_stopped_is_as_long_as_it_was_to_be(
        image_folder: Callable[..., Path], stopped_after: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
        capsys) -> None:
    arguments = ["--data", image_folder(classes=2, per_class=6), "--minutes", 1, "--no-eval", *SMALL]
    timed(7.5, monkeypatch)
    assert run(*arguments, "--out", "whole") == 0
    stopped_after(3, *arguments, "--out", "out")
    asked = timed(1.0, monkeypatch)  # the machine has become faster
    assert run(*arguments, "--out", "out", "--resume") == 0
    assert not asked
    assert_same_state(checkpoint("whole"), checkpoint("out"))
    assert run(*arguments, "--out", "out", "--resume") == 0
    assert "already complete (3/3 epochs)" in capsys.readouterr().out


def test_minutes_of_a_recipe_that_is_asked_for_are_gone_on_with(
        image_folder: Callable[..., Path], stopped_after: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--data", image_folder(classes=2, per_class=6), "--minutes", 1, "--no-eval", "--recipe", "paper", "--out",
                 "out", *SMALL]
    timed(7.5, monkeypatch)
    stopped_after(3, *arguments)
    assert run(*arguments, "--resume") == 0 and summary("out")["updates"] == 9


def test_other_minutes_than_those_of_the_run_are_refused(
        image_folder: Callable[..., Path], stopped_after: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
        capsys) -> None:
    arguments = ["--data", image_folder(classes=2, per_class=6), "--no-eval", "--out", "out", *SMALL]
    timed(7.5, monkeypatch)
    stopped_after(3, *arguments, "--minutes", 1)
    assert run(*arguments, "--minutes", 2, "--resume") == 2 and "minutes 1.0 -> 2.0" in capsys.readouterr().err
    assert run(*arguments, "--epochs", 4, "--resume") == 2 and "epochs 3 -> 4" in capsys.readouterr().err


def test_the_first_process_says_how_many_updates_are_timed(image_folder: Callable[..., Path],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own clock, processes would stop at different updates, and wait for one another for ever."""
    said: list[object] = []
    real = Processes.from_first

    def from_first(self: Processes, make: Callable[[], object]) -> object:
        said.append(real(self, make))
        return 9 if isinstance(said[-1], int) and len(said) > 1 and said[-1] == 100 else said[-1]

    with contextlib.ExitStack() as stack:
        config = parse_config([str(word) for word in ["--data", image_folder(), "--epochs", 50, "--out", "out", *SMALL]])
        made = command.prepare(config, ALONE, stack)
        monkeypatch.setattr(Processes, "from_first", from_first)
        said.append(None)
        updates: list[int] = []
        train = made._train
        monkeypatch.setattr(made, "_train", lambda progress, after: train(
            progress, lambda progress, step: (updates.append(progress.updates), after(progress, step))))
        made.seconds_per_update(at_least=1e6)
    assert said[1:] == [100] and updates[-1] == 9 + 1  # the other process has said 9, and the first one is not timed


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


def test_minutes_and_epochs_are_one_too_many(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--minutes", 1, "--epochs=100")
    assert stopped.value.code == 2 and "--epochs and --minutes both say how long to train" in capsys.readouterr().err


def test_nothing_of_the_timing_is_left_in_a_run_of_minutes(image_folder: Callable[..., Path],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """The updates that are timed train networks that are thrown away."""
    data = image_folder(classes=2, per_class=6)
    monkeypatch.setattr(Run, "images_in", lambda self, minutes: (self.seconds_per_update(), 24)[1])
    assert run("--data", data, "--minutes", 1, "--out", "minutes", "--no-eval", *SMALL) == 0
    assert run("--data", data, "--epochs", 2, "--out", "epochs", "--no-eval", *SMALL) == 0
    assert_same_state(checkpoint("minutes"), checkpoint("epochs"))
    one, other = (Path(name, "metrics.jsonl").read_text().splitlines() for name in ("minutes", "epochs"))
    assert len(one) == len(other)


def test_console_summary_and_report_give_the_same_verdict(image_folder: Callable[..., Path], capsys) -> None:
    assert run("--data", image_folder(classes=2, per_class=130), "--epochs", 1, "--out", "out", *SMALL) == 0
    told = summary("out")
    assert told["verdict"] in ("learned", "learned little so far", "nothing learned", "worse than untrained", "undecided")
    line = f"{told['verdict']}: {told['verdict_why']}" + f" - {told['verdict_advice']}" * bool(told["verdict_advice"])
    assert line in capsys.readouterr().out
    page = html.unescape(Path("out/report.html").read_text())
    assert all(told[key].lower() in page.lower() for key in ("verdict", "verdict_why", "verdict_advice"))
