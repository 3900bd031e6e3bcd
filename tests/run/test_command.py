"""The command itself: files and keys of a run, what it measures and tells, and numbers that are not finite."""

import html
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from byol_core.evaluate import scoring
from byol_core.pretrained import load_pretrained
from byol_core.report import __main__ as report
from byol_core.run import results
from byol_core.run.options import command_line, parse_config
from byol_core.run.run import Run
from byol_core.views.recipes import normalise
from tests.helpers.forking import REPOSITORY
from tests.helpers.runs import FILES, SMALL, assert_equal, assert_same_state, checkpoint, metrics, run, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
KEYS = {"images", "classes", "bad_files", "epochs", "updates", "seconds", "images_per_second", "wait_fraction", "loss",
        "spread", "knn", "linear", "knn_untrained", "linear_untrained", "world_size", "device", "amp", "status"}


def files_of(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir() if not path.name.startswith(".")}


def test_a_labelled_folder_gives_every_file_and_key_and_the_same_verdict_everywhere(image_folder: Callable[..., Path],
                                                                                    capsys) -> None:
    data = image_folder(classes=2, per_class=130)  # a fifth of them, 52, is measured on
    assert run("--data", data, "--epochs", 2, "--out", "out", *SMALL, "--batch-size", 20) == 0
    assert files_of("out") == FILES
    result = summary("out")
    assert KEYS <= result.keys()
    assert (result["images"], result["classes"], result["epochs"], result["updates"]) == (260, 2, 2, 26)
    assert result["status"] == "finished" and result["device"] == "cpu" and result["world_size"] == 1
    assert 0 <= result["knn"] <= 1 and 0 < result["loss"] < 8 and result.get("separation") is None
    assert result["best_knn"] is result["best_separation"] is result["best_epoch"] is None  # nothing measured on the way
    assert [record["update"] for record in metrics("out")] == [10, 13, 20, 26]
    printed = capsys.readouterr()
    assert "epoch 2/2  loss" in printed.err and "untrained" in printed.out and "backbone.load_state_dict" in printed.out
    assert result["verdict"] in ("learned", "learned little so far", "nothing learned", "worse than untrained", "undecided")
    line = f"{result['verdict']}: {result['verdict_why']}" + f" - {result['verdict_advice']}" * bool(result["verdict_advice"])
    assert line in printed.out
    page = html.unescape(Path("out/report.html").read_text())
    assert all(result[key].lower() in page.lower() for key in ("verdict", "verdict_why", "verdict_advice"))


@pytest.mark.slow
def test_a_flat_folder_trains_without_labels(image_folder: Callable[..., Path], capsys) -> None:
    data = image_folder(classes=0, per_class=9)
    assert run("--data", data, "--epochs", 2, "--out", "out", "--views", "cpu", *SMALL) == 0
    assert files_of("out") == FILES
    result = summary("out")
    assert result["classes"] == 0 and result["updates"] == 4 and result["separation"] is not None
    for key in ("knn", "linear", "knn_untrained", "best_knn", "best_separation", "best_epoch"):
        assert result[key] is None
    assert "no class folders, so no accuracy: look at neighbours.png, or pass a labelled folder as --eval-data" in (
        capsys.readouterr().out)


def test_a_cuda_graph_that_cannot_be_is_said_to_be_left_out(short_run: Path) -> None:
    assert run("--data", short_run.parent / "imgs", "--epochs", 0, "--out", "out", "--no-eval", "--cuda-graph", *SMALL) == 0
    note = "note: --cuda-graph is left out, as it is for one process on a CUDA device"
    assert [Path(folder, "train.log").read_text().count(note) for folder in ("out", short_run)] == [1, 0]


def test_a_run_under_way_says_so_in_its_summary(image_folder: Callable[..., Path], monkeypatch) -> None:
    seen = []
    original = Run.after_step

    def look(self: Run, progress, step) -> None:
        seen.append(summary("out"))
        assert Path("out/bad_files.txt").read_text().startswith("class0/005.png")
        assert report.main(["out"]) == 0
        original(self, progress, step)

    monkeypatch.setattr(Run, "after_step", look)
    data = image_folder(per_class=12)
    (data / "class0" / "005.png").write_bytes(b"not an image")
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL) == 0
    assert {found["status"] for found in seen} == {"running"}
    assert seen[0]["knn"] is None and seen[0]["knn_untrained"] == summary("out")["knn_untrained"] is not None
    assert summary("out")["status"] == "finished"


def test_a_report_that_fails_stops_no_run(image_folder: Callable[..., Path], monkeypatch, capsys) -> None:
    def fail(folder: Path, under_way: bool = False) -> None:
        raise KeyError("plan")

    monkeypatch.setattr(results, "write_report", fail)
    monkeypatch.setattr(results, "read_run", fail)
    monkeypatch.setattr(results, "REPORT_EVERY", 0.0)
    assert run("--data", image_folder(), "--epochs", 3, "--no-eval", "--out", "out", *SMALL) == 0
    said = capsys.readouterr().out
    assert said.count("warning: no report for now: KeyError: 'plan' - the run goes on") == 1
    assert "\nwarning: KeyError: 'plan' - the run goes on" in said  # at the end
    assert summary("out")["status"] == "finished" and "warning: KeyError" in Path("out/train.log").read_text()


@pytest.mark.slow
def test_exported_backbone_loads_into_torchvision_but_for_its_classifier(image_folder: Callable[..., Path]) -> None:
    assert run("--data", image_folder(size=(32, 32)), "--epochs", 1, "--out", "out", "--arch", "resnet18", "--no-small-stem",
               "--hidden-dim", 8, "--projection-dim", 4, "--batch-size", 8, "--workers", 0, "--no-eval") == 0
    snippet = (REPOSITORY / "README.md").read_text().split("```python\nimport json, torch, torchvision\n")[1].split("```")[0]
    shown: dict[str, Any] = {"json": json, "torch": torch, "torchvision": torchvision}
    exec(snippet.replace("runs/imgs", "out"), shown)
    pretrained, image = load_pretrained("out"), torch.rand(2, 3, 32, 32)
    expected = pretrained.backbone.eval()(normalise(image, pretrained.recipe))
    torch.testing.assert_close(shown["backbone"](shown["prepare"](image)), expected)
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(torch.load("out/backbone.pt", weights_only=True), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    online = checkpoint("out")["model"]
    assert torch.equal(model.layer4[1].conv2.weight, online["online.backbone.layer4.1.conv2.weight"])


def test_worker_count_does_not_change_the_result(image_folder: Callable[..., Path]) -> None:
    data = image_folder(classes=0, per_class=8)
    for workers in (0, 2):
        assert run("--data", data, "--epochs", 1, "--views", "cpu", "--no-eval", *SMALL, "--workers", workers,
                   "--out", f"workers{workers}") == 0
    assert_same_state(checkpoint("workers0"), checkpoint("workers2"))


def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_file(image_folder: Callable[..., Path], monkeypatch,
                                                                           capsys) -> None:
    original = Run.after_step

    def poison(self: Run, progress, step) -> None:
        original(self, progress, step)
        if progress.updates == 5:
            self.images.pixels = None
            self.data.views.recipes = tuple(
                replace(recipe, mean=(3e38,) * 3, std=(1e-30,) * 3)
                for recipe in self.data.views.recipes)

    monkeypatch.setattr(Run, "after_step", poison)
    assert run("--data", image_folder(classes=0, per_class=16), "--epochs", 3, "--out", "out", "--no-eval", *SMALL) == 1
    assert "not finite at epoch 2, update" in capsys.readouterr().err
    state = checkpoint("out")
    assert state["progress"]["updates"] == 4
    assert (summary("out")["status"], summary("out")["error"]) == ("failed", "NonFiniteError")
    assert all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())


def test_weights_or_statistics_that_are_not_finite_are_never_saved(image_folder: Callable[..., Path], capsys) -> None:
    """Huge but finite gradients: the statistics of batch norm overflow first, and no loss or gradient tells."""
    assert run("--data", image_folder(classes=0, per_class=40), "--epochs", 30, "--out", "out", "--no-eval", *SMALL,
               "--lr", 1e6, "--optimizer", "sgd", "--warmup-epochs", 0) == 1
    said = capsys.readouterr().err
    assert "not finite at epoch" in said and ", precision float32)" in said
    if Path("out/last.pt").exists():
        assert all(torch.isfinite(value).all() for value in checkpoint("out")["model"].values() if value.is_floating_point())


def test_a_network_that_is_not_finite_is_not_saved(image_folder: Callable[..., Path], monkeypatch, capsys) -> None:
    original = Run.after_step

    def poison(self: Run, progress, step) -> None:
        if progress.updates == 4:
            self.state.model.online.predictor[1].running_var[0] = float("inf")
        original(self, progress, step)

    monkeypatch.setattr(Run, "after_step", poison)
    assert run("--data", image_folder(classes=0, per_class=16), "--epochs", 3, "--out", "out", "--no-eval", *SMALL) == 1
    assert "error: a weight or a statistic of batch norm is not finite at epoch" in capsys.readouterr().err
    assert not Path("out/last.pt").exists() or checkpoint("out")["progress"]["updates"] < 4


def test_a_classifier_that_fails_or_does_not_converge_is_told(image_folder: Callable[..., Path], capsys) -> None:
    data = image_folder(per_class=4)
    assert run("--data", data, "--epochs", 0, "--out", "few", *SMALL, "--classifier", "knn") == 0
    assert "warning: the classifier failed, so there is no linear accuracy: " in capsys.readouterr().out


def test_a_float16_run_whose_steps_are_all_skipped_at_first_goes_on(image_folder: Callable[..., Path], monkeypatch) -> None:
    """The scaler starts too high for some networks, here for any: an epoch may end before any step was applied."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(scaler, "__init__", partialmethod(scaler.__init__, init_scale=2.0 ** 40))
    assert run("--data", image_folder(classes=0, per_class=8), "--epochs", 1, "--out", "out", "--no-eval", *SMALL,
               "--batch-size", 8, "--image-size", 8, "--amp", "fp16") == 0
    assert summary("out")["status"] == "finished" and not Path("out/metrics.jsonl").exists()  # no step was applied


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


def test_unlabelled_images_can_be_measured_on_a_labelled_folder(image_folder: Callable[..., Path]) -> None:
    data, labelled = image_folder("flat", classes=0, per_class=8), image_folder("labelled", per_class=10)
    assert run("--data", data, "--eval-data", labelled, "--epochs", 0, "--out", "out", *SMALL) == 0
    assert summary("out")["knn"] is not None and summary("out")["classes"] == 0


def test_a_run_folder_among_the_images_is_not_taken_for_images(short_run: Path) -> None:
    shutil.copytree(short_run.parent / "imgs", "imgs")
    arguments = ["--data", "imgs", "--epochs", 1, "--out", "imgs/run", "--no-eval", *SMALL]
    assert run(*arguments) == run(*arguments, "--resume") == 0  # with other images it would not go on
    assert summary("imgs/run")["images"] == 12 and Path("imgs/run/views.png").exists()


@pytest.mark.parametrize("weights", ["backbone.pt", "last.pt"])
def test_init_from_starts_from_those_weights_and_no_epochs_leave_them(short_run: Path, weights: str) -> None:
    data = short_run.parent / "imgs"
    assert run("--data", data, "--epochs", 0, "--out", "out", "--init-from", short_run / weights, "--no-eval",
               *SMALL) == 0
    before, after = (torch.load(folder / "backbone.pt", weights_only=True) for folder in (short_run, Path("out")))
    assert_equal(before, after, "")
    assert checkpoint("out")["progress"]["updates"] == 0


def test_any_scikit_learn_classifier_can_be_the_probe(image_folder: Callable[..., Path]) -> None:
    assert run("--data", image_folder(per_class=10), "--epochs", 0, "--out", "out", *SMALL,
               "--classifier", "sklearn.dummy.DummyClassifier") == 0
    assert summary("out")["linear"] == 0.5  # the constant guess, on a stratified fifth of two equal classes


@pytest.mark.slow
def test_training_sees_views_of_one_size_and_everything_else_images_of_another(
        image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, int]] = set()
    convolution = torch.nn.functional.conv2d

    def noted(images: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        if images.shape[1] == 3 and len(images) > 1:
            seen.add((torch.is_grad_enabled(), images.shape[-1]))
        return convolution(images, *rest, **more)

    data = image_folder(classes=2, per_class=10)
    measured, embed_data = set(), scoring.embed_data
    monkeypatch.setattr(scoring, "embed_data", lambda backbone, data, recipe, *rest: (
        measured.add(recipe.size), embed_data(backbone, data, recipe, *rest))[1])
    monkeypatch.setattr(torch.nn.functional, "conv2d", noted)
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL, "--view-size", 12) == 0
    assert measured == {16}
    assert seen == {(True, 12), (False, 12), (False, 16)}  # online; target; what is measured, and pictured
    assert json.loads(Path("out/backbone.json").read_text())["image_size"] == 16
    for source, network in (("out/backbone.pt", "online"), ("out/last.pt", "online"), ("out/last.pt", "target")):
        assert load_pretrained(Path(source), network).recipe.size == 16


@pytest.mark.parametrize("arguments", [
    [], ["--data", "a b", "--epochs", "7", "--lr", "0.1"], ["--no-eval", "--compile", "--no-small-stem"], ["--small-stem"],
    ["--data=-x", "--out", "a'b", "--tau-base", "0.5", "--workers", "0"], ["--data", "a", "b c"],
    ["--data=-x", "--data", "y"]])
def test_command_line_asks_for_the_same_run(arguments: list[str]) -> None:
    config = parse_config(arguments)
    assert parse_config(shlex.split(command_line(config))[2:]) == config
    assert command_line(config, 2) == command_line(config).replace("python", "torchrun --nproc-per-node=2", 1)
