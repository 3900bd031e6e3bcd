"""best.pt: the network that was best on the way, by kNN or else by separation, through stops and resumes; how to load it."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from byol_core.evaluate import __main__ as evaluate_command
from byol_core.evaluate import separation
from byol_core.evaluate.scoring import Scorer
from byol_core.report.facts import read_run
from byol_core.run.run import Run
from tests.helpers.forking import run_code
from tests.helpers.pictures import Folder
from tests.helpers.runs import SMALL, assert_equal, checkpoint, run, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def script_scores(monkeypatch: pytest.MonkeyPatch, knn: list[float], last: float) -> None:
    """Let kNN on the way be these, over and over, and in the end the last one."""
    values = itertools.cycle(knn)
    monkeypatch.setattr(Scorer, "quick", lambda *_: next(values))
    monkeypatch.setattr(Scorer, "measure", lambda *_: {"knn": last, "linear": None})


def best(out: str) -> tuple[dict, dict]:
    """(weights, description)."""
    return torch.load(f"{out}/best.pt", weights_only=True), json.loads(Path(out, "best.json").read_text())


@pytest.mark.parametrize("score, values, last, epoch", [("knn", [0.5, 0.75, 0.75, 0.5], 0.5, 3), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("knn", [0.5, 0.75, 0.25, 0.5], 0.875, 4), ("knn", [0.0, 0.0, 0.0, 0.0], 0.0, 4),
        ("separation", [1.0, 3.0, 3.0, 2.0], 2.0, 3), ("separation", [-3.0, -2.0, -4.0, -1.0], -1.0, 4)])])
def test_best_is_the_network_with_the_best_score_and_of_equals_the_later(image_folder: Folder, monkeypatch, capsys, score: str,
                                                                         values: list[float], last: float, epoch: int) -> None:
    """By kNN with labels, by separation without them."""
    kept: dict[int, dict] = {}  # the backbone's weights after every epoch
    original = Run.after_step

    def remember(self: Run, progress, step) -> None:
        if progress.batch == 0:
            weights = self.state.backbone.state_dict()
            kept[progress.epoch] = {name: tensor.clone() for name, tensor in weights.items()}
        original(self, progress, step)

    monkeypatch.setattr(Run, "after_step", remember)
    script_scores(monkeypatch, values, last)
    measured = iter([0.5, *values, last])  # before, after each epoch, and in the end
    monkeypatch.setattr(separation, "separation", lambda features: torch.tensor(next(measured)))
    data = image_folder(classes=2 * (score == "knn"), per_class=8)
    assert run("--data", data, "--epochs", 4, "--eval-every", 1, "--out", "out", *SMALL) == 0
    weights, about = best("out")
    assert_equal(weights, kept[epoch], "")
    assert not torch.equal(weights["conv1.weight"], kept[epoch % 4 + 1]["conv1.weight"])
    found, value = summary("out"), max(*values, last)
    assert (found[f"best_{score}"], found["best_epoch"]) == (about[score], about["epoch"]) == (value, epoch)
    shown = f"{value:.1%}" if score == "knn" else f"{value:.2f}"
    assert f"{shown}</b> after epoch {epoch}; that network is best.pt" in Path("out/report.html").read_text()
    assert f"best: {score} {shown} after epoch {epoch}, in out/best.pt" in capsys.readouterr().out
    if score == "separation":
        assert (found["separation_untrained"], found["separation"], found["knn"]) == (0.5, last, None)
        assert read_run(Path("out")).points(score) == list(zip(range(5), [0.5, *values]))


@pytest.mark.slow
@pytest.mark.parametrize("save_every, stop_at", [(1, 9), (4, 13)])  # of 16 updates, 4 of them an epoch
def test_a_resumed_run_knows_the_best_and_does_not_overwrite_it(image_folder: Folder, stopped_after: Callable[..., None],
                                                                monkeypatch, save_every: int, stop_at: int) -> None:
    arguments = ["--data", image_folder(), "--epochs", 4, "--eval-every", 1, "--save-every", save_every, *SMALL]
    script_scores(monkeypatch, [0.5, 0.75, 0.25, 0.5], 0.5)
    assert run(*arguments, "--out", "whole") == 0
    stopped_after(stop_at, *arguments, "--out", "parts")
    assert checkpoint("parts")["best"] == {"knn": 0.75, "epoch": 2}
    assert run(*arguments, "--out", "parts", "--resume") == 0
    (weights, about), (whole, about_whole) = best("parts"), best("whole")
    assert {**about, "sha256": ""} == {**about_whole, "sha256": ""} and about["epoch"] == 2
    assert_equal(weights, whole, "")


@pytest.mark.slow
@pytest.mark.parametrize("before, after, epoch", [([0.75, 0.5], [0.5], 2), ([0.5, 0.75], [0.25], 4)],
                         ids=["that of the checkpoint", "a later one"])
def test_a_best_in_another_folder_is_that_of_the_checkpoint_or_not_claimed(image_folder: Folder, monkeypatch,
                                                                           before: list[float], after: list[float],
                                                                           epoch: int) -> None:
    arguments = ["--data", image_folder(), "--epochs", 4, "--eval-every", 2, *SMALL]
    script_scores(monkeypatch, before, 0.1)
    assert run(*arguments, "--out", "first") == 0
    script_scores(monkeypatch, after, 0.1)
    assert run(*arguments, "--out", "second", "--resume", "first/previous.pt") == 0
    assert best("second")[1]["epoch"] == summary("second")["best_epoch"] == epoch
    assert best("second")[1]["knn"] == summary("second")["best_knn"]
    assert_equal(best("second")[0], best("first")[0], "")


@pytest.mark.slow
def test_without_labels_the_best_goes_along_and_classes_of_one_image_are_none(
        image_folder: Folder, stopped_after: Callable[..., None], monkeypatch, capsys) -> None:
    """Resumed in the same folder and in another one: the best is known, and not measured by other means."""
    for classes, per_class in ((0, 16), (16, 1)):
        data, name = image_folder(f"{classes}", classes=classes, per_class=per_class), f"{classes}-classes"
        arguments = ["--data", data, "--epochs", 3, "--eval-every", 1, *SMALL]
        values = iter([1.0, 9.0, 8.0, 7.0, 7.0, 7.0, 7.0])  # before, after two epochs; then after the last one and in the end
        monkeypatch.setattr(separation, "separation", lambda features: torch.tensor(next(values)))
        stopped_after(9, *arguments, "--out", name)
        assert run(*arguments, "--out", f"{name}-other", "--resume", name) == 0
        assert run(*arguments, "--out", name, "--resume") == 0
        for out in (name, f"{name}-other"):
            found = summary(out)
            assert (found["best_separation"], found["best_epoch"], found["knn"]) == (9.0, 1, None)
            assert best(out)[1]["separation"] == 9.0 and "separation_pixels" not in found
        assert capsys.readouterr().out.count("no accuracy: measuring") == (classes > 0)


@pytest.mark.slow
@pytest.mark.parametrize("views", ["device", "cpu", "crops"])
def test_separation_is_measured_alike_before_a_stop_and_after_it(image_folder: Folder, stopped_after: Callable[..., None],
                                                                 views: str) -> None:
    """Of views that are the same every time, whatever has been trained on in between."""
    data = image_folder(classes=0, per_class=20)
    if views == "crops":
        Image.new("RGB", (20, 20)).save(data / "other.png")  # of another size
    arguments = ["--data", data, "--epochs", 2, "--eval-every", 1, *SMALL, "--views", "cpu" if views == "cpu" else "auto"]
    assert run(*arguments, "--out", "whole") == 0
    stopped_after(6, *arguments, "--out", "parts")  # of 10
    assert run(*arguments, "--out", "parts", "--resume") == 0
    whole, parts = (read_run(Path(name)).points("separation") for name in ("whole", "parts"))
    assert whole == parts and len({value for _, value in whole}) == 3


@pytest.mark.slow
def test_best_is_accepted_wherever_a_backbone_is(image_folder: Folder, capsys) -> None:
    data = image_folder(per_class=10)
    assert run("--data", data, "--epochs", 2, "--eval-every", 1, "--out", "out", *SMALL) == 0
    assert summary("out")["measured_images"] == 4  # a fifth of twenty
    assert evaluate_command.main(["--checkpoint", "out/best.pt", "--data", str(data), "--workers", "0", "--device", "cpu",
                                  "--json", "scores.json"]) == 0
    knn = [record["accuracy"] for record in json.loads(Path("scores.json").read_text())["results"]
           if record["network"] == "online" and record["metric"] == "knn_20"]
    assert knn == [summary("out")["best_knn"]]
    assert run("--data", data, "--epochs", 0, "--out", "again", "--init-from", "out/best.pt", *SMALL) == 0
    assert torch.equal(best("out")[0]["conv1.weight"], torch.load("again/backbone.pt", weights_only=True)["conv1.weight"])


@pytest.mark.slow
def test_the_lines_that_load_the_backbone_run_as_printed(image_folder: Folder, capsys) -> None:
    assert run("--data", image_folder(), "--epochs", 1, "--no-eval", "--out", "a 'run'", *SMALL) == 0
    snippet = capsys.readouterr().out.split("\nuse it:\n")[1]
    assert snippet.count("\n") == 4 and snippet.endswith(
        "\n# images: RGB in [0, 1] of 16 pixels, less the mean (0.485, 0.456, 0.406), divided by the std (0.229, 0.224, 0.225)"
        "\n")
    script = f"{snippet}print(dim, float(backbone.conv1.weight.detach().sum()), backbone.training)"
    expected = float(torch.load("a 'run'/backbone.pt", weights_only=True)["conv1.weight"].sum())
    assert run_code(script, Path.cwd()) == f"128 {expected} False\n"
    assert "In evaluation mode, as here, features do not depend on the other images" in Path("a 'run'/report.html").read_text()


def test_options_of_an_evaluation_that_is_left_out_are_named(image_folder: Folder, capsys) -> None:
    options = ["--epochs", 0, "--no-eval", "--hidden-dim", 8, "--projection-dim", 4]
    trained = [*options, *SMALL, "--epochs", 1, "--out", "out"]
    assert run("--data", image_folder(), *trained, "--eval-every", 1, "--eval-data", "nowhere") == 0
    assert not Path("out/best.pt").exists()
    said = capsys.readouterr().out
    for option in ("--eval-every 1", "--eval-data nowhere"):
        assert said.count(f"note: {option} has no effect with --no-eval\n") == 1
    assert run("--out", "sample", *options) == 0  # which brings a held-out part of its own
    assert "has no effect" not in capsys.readouterr().out
