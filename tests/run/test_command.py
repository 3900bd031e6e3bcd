"""The command itself: files and keys of a run, what it measures and tells, and numbers that are not finite."""

import html
import json
import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
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


@pytest.mark.slow
def test_a_flat_folder_trains_without_labels(image_folder: Callable[..., Path]) -> None:
    assert run("--data", image_folder(classes=0, per_class=9), "--epochs", 1, "--out", "out", *SMALL) == 0
    result = summary("out")
    assert result["classes"] == 0 and result["updates"] == 2
    assert result["knn"] is None and result["linear"] is None and result["knn_untrained"] is None
    assert Path("out/neighbours.png").exists()


@pytest.mark.slow
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

    monkeypatch.setattr(results, "write_report", fail)
    monkeypatch.setattr(results, "read_run", fail)
    monkeypatch.setattr(results, "REPORT_EVERY", 0.0)
    assert run("--data", image_folder(), "--epochs", 3, "--no-eval", "--out", "out", *SMALL) == 0
    said = capsys.readouterr().out
    assert said.count("warning: no report for now: KeyError: 'plan' - the run goes on") == 1
    assert "\nwarning: KeyError: 'plan' - the run goes on" in said  # at the end
    assert summary("out")["status"] == "finished" and "warning: KeyError" in Path("out/train.log").read_text()


@pytest.mark.slow
def test_too_few_images_of_a_class_are_not_called_missing_folders(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--epochs", 1, "--eval-every", 1, *SMALL]
    assert run("--data", image_folder(classes=8, per_class=1), "--out", "out", *arguments) == 0
    said = capsys.readouterr().out
    assert "no accuracy: measuring needs" in said and "no class folders, so" not in said
    assert "\nbest: separation " in said and summary("out")["knn"] is None and summary("out")["separation"] is not None
    assert "Not measured: the labels do not allow it" in Path("out/report.html").read_text()
    assert run("--data", image_folder("flat", classes=0), "--out", "other", *arguments) == 0
    assert "no class folders, so no accuracy" in capsys.readouterr().out


@pytest.mark.slow
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


def test_worker_count_does_not_change_the_result(image_folder: Callable[..., Path]) -> None:
    data = image_folder(classes=0, per_class=8)
    for workers in (0, 2):
        assert run("--data", data, "--epochs", 1, "--views", "cpu", "--no-eval", *SMALL, "--workers", workers,
                   "--out", f"workers{workers}") == 0
    assert_same_state(checkpoint("workers0"), checkpoint("workers2"))


@pytest.mark.slow
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
                replace(recipe, mean=(3e38,) * 3, std=(1e-30,) * 3)
                for recipe in self.batches.batches.recipes)

    monkeypatch.setattr(Run, "_after_step", poison)
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


@pytest.mark.slow
def test_images_on_both_sides_are_told_before_training(image_folder: Callable[..., Path], capsys) -> None:
    data = image_folder()
    Path("link").symlink_to(data)
    assert run("--data", data, "--eval-data", "link", "--epochs", 1, "--out", "out", *SMALL) == 0
    assert "warning: 16 of 16 images of --eval-data are in --data, too" in capsys.readouterr().out


@pytest.mark.slow
def test_classes_that_only_the_images_measured_on_have_are_told(image_folder: Callable[..., Path], capsys) -> None:
    data, others = image_folder(), image_folder("others", classes=3)
    assert run("--data", data, "--eval-data", others, "--epochs", 1, "--out", "out", *SMALL) == 0
    assert "classes of --eval-data that --data does not have: class2; their 8 images count as wrong" in capsys.readouterr().out


def test_a_classifier_that_fails_or_does_not_converge_is_told(image_folder: Callable[..., Path], capsys) -> None:
    data = image_folder(per_class=4)
    assert run("--data", data, "--epochs", 0, "--out", "few", *SMALL, "--classifier", "knn") == 0
    assert "warning: the classifier failed, so there is no linear accuracy: " in capsys.readouterr().out


def test_no_epochs_write_the_initial_weights(image_folder: Callable[..., Path]) -> None:
    assert run("--data", image_folder(), "--epochs", 0, "--out", "out", *SMALL) == 0
    assert checkpoint("out")["progress"]["updates"] == 0 and Path("out/backbone.pt").exists()


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


def test_unlabelled_images_can_be_measured_on_a_labelled_folder(image_folder: Callable[..., Path]) -> None:
    data, labelled = image_folder("flat", classes=0, per_class=8), image_folder("labelled", per_class=10)
    assert run("--data", data, "--eval-data", labelled, "--epochs", 1, "--out", "out", *SMALL) == 0
    assert summary("out")["knn"] is not None and summary("out")["classes"] == 0


@pytest.mark.slow
def test_a_run_folder_among_the_images_is_not_taken_for_images(image_folder: Callable[..., Path]) -> None:
    data = image_folder(classes=0, per_class=8)
    arguments = ["--data", data, "--epochs", 1, "--out", data / "run", *SMALL]
    assert run(*arguments) == 0
    Path(data / "run" / "summary.json").unlink()
    assert run(*arguments, "--resume") == 0
    assert summary(data / "run")["images"] == 8


@pytest.mark.parametrize("weights", ["backbone.pt", "last.pt"])
def test_init_from_starts_from_those_weights(image_folder: Callable[..., Path], weights: str) -> None:
    data = image_folder()
    assert run("--data", data, "--epochs", 1, "--out", "first", "--no-eval", *SMALL) == 0
    assert run("--data", data, "--epochs", 0, "--out", "second", "--init-from", f"first/{weights}", *SMALL) == 0
    assert_equal(torch.load("first/backbone.pt", weights_only=True), torch.load("second/backbone.pt", weights_only=True), "")


def test_any_scikit_learn_classifier_can_be_the_probe(image_folder: Callable[..., Path]) -> None:
    assert run("--data", image_folder(per_class=10), "--epochs", 0, "--out", "out", *SMALL,
               "--classifier", "sklearn.dummy.DummyClassifier") == 0
    assert summary("out")["linear"] == 0.5  # the constant guess, on a stratified fifth of two equal classes


@pytest.mark.slow
def test_eval_data_is_what_is_measured_on(image_folder: Callable[..., Path]) -> None:
    data, other = image_folder("a"), image_folder("b", classes=3)
    (other / "class2").rename(other / "unseen")
    assert run("--data", data, "--eval-data", other, "--epochs", 0, "--out", "out", *SMALL) == 0
    assert summary("out")["knn"] <= 2 / 3  # a third of it is of a class that the training folder does not have


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


@pytest.mark.slow
def test_console_summary_and_report_give_the_same_verdict(image_folder: Callable[..., Path], capsys) -> None:
    assert run("--data", image_folder(classes=2, per_class=130), "--epochs", 1, "--out", "out", *SMALL) == 0
    told = summary("out")
    assert told["verdict"] in ("learned", "learned little so far", "nothing learned", "worse than untrained", "undecided")
    line = f"{told['verdict']}: {told['verdict_why']}" + f" - {told['verdict_advice']}" * bool(told["verdict_advice"])
    assert line in capsys.readouterr().out
    page = html.unescape(Path("out/report.html").read_text())
    assert all(told[key].lower() in page.lower() for key in ("verdict", "verdict_why", "verdict_advice"))


@pytest.mark.parametrize("arguments", [
    [], ["--data", "a b", "--epochs", "7", "--lr", "0.1"], ["--no-eval", "--compile", "--no-small-stem"], ["--small-stem"],
    ["--data=-x", "--out", "a'b", "--tau-base", "0.5", "--workers", "0"], ["--data", "a", "b c"],
    ["--data=-x", "--data", "y"]])
def test_command_line_asks_for_the_same_run(arguments: list[str]) -> None:
    config = parse_config(arguments)
    assert parse_config(shlex.split(command_line(config))[2:]) == config
    assert command_line(config, 2) == command_line(config).replace("python", "torchrun --nproc-per-node=2", 1)
