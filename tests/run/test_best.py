"""best.pt: the network that was best on the way, by kNN or else by separation, through stops and resumes; how to load it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from byol_core.evaluate import __main__ as evaluate_command
from byol_core.evaluate import separation
from byol_core.evaluate.scoring import Scorer
from byol_core.report.facts import read_run
from byol_core.report.page import write_report
from byol_core.run.results import Results
from byol_core.run.run import Run
from tests.helpers.forking import run_code
from tests.helpers.pictures import Folder
from tests.helpers.runs import SMALL, checkpoint, run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def script_scores(monkeypatch: pytest.MonkeyPatch, knn: dict[int, float], last: float) -> None:
    """Let kNN on the way and in the end be these, by epoch."""
    def on_the_way(self: Results) -> None:
        monkeypatch.setattr(Scorer, "quick", lambda scorer, backbone: knn[self.state.progress.epoch])
        original(self)

    original = Results.measure_on_the_way
    monkeypatch.setattr(Results, "measure_on_the_way", on_the_way)
    monkeypatch.setattr(Scorer, "measure", lambda scorer, backbone: {"knn": last, "linear": None})


def keep_weights(monkeypatch: pytest.MonkeyPatch, kept: dict[int, dict]) -> None:
    """Remember the backbone's weights after every epoch."""
    original = Run._after_step

    def remember(self: Run, progress, step) -> None:
        if progress.batch == 0:
            weights = self.state.backbone.state_dict()
            kept[progress.epoch] = {name: tensor.clone() for name, tensor in weights.items()}
        original(self, progress, step)

    monkeypatch.setattr(Run, "_after_step", remember)


def best(out: str) -> tuple[dict, dict]:
    """(weights, description)."""
    return torch.load(f"{out}/best.pt", weights_only=True), json.loads(Path(out, "best.json").read_text())


@pytest.mark.parametrize("knn, last, epoch", [({1: 0.5, 2: 0.75, 3: 0.75, 4: 0.5}, 0.5, 3), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in [
        ({1: 0.5, 2: 0.75, 3: 0.25, 4: 0.5}, 0.5, 2), ({1: 0.5, 2: 0.75, 3: 0.25, 4: 0.5}, 0.875, 4),
        ({1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0}, 0.0, 4)])])
def test_best_is_the_network_with_the_best_knn_and_of_equals_the_later(image_folder: Folder, monkeypatch, capsys, knn: dict,
                                                                       last: float, epoch: int) -> None:
    kept: dict[int, dict] = {}
    script_scores(monkeypatch, knn, last)
    keep_weights(monkeypatch, kept)
    assert run("--data", image_folder(), "--epochs", 4, "--eval-every", 1, "--out", "out", *SMALL) == 0
    weights, about = best("out")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in kept[epoch].items())
    assert not all(torch.equal(tensor, weights[name]) for name, tensor in kept[epoch % 4 + 1].items())
    summary = json.loads(Path("out/summary.json").read_text())
    score = max(*knn.values(), last)
    assert (summary["best_knn"], summary["best_epoch"]) == (about["knn"], about["epoch"]) == (score, epoch)
    write_report(Path("out"))
    told = f"{score:.1%}</b> after epoch {epoch}; that network is best.pt"
    assert told in Path("out/report.html").read_text()
    assert f"best: knn {score:.1%} after epoch {epoch}, in out/best.pt" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("save_every, stop_at", [(1, 2), (4, 3)])
def test_a_resumed_run_knows_the_best_and_does_not_overwrite_it(image_folder: Folder, monkeypatch, save_every: int,
                                                                stop_at: int) -> None:
    arguments = ["--data", image_folder(), "--epochs", 4, "--eval-every", 1, "--save-every", save_every, *SMALL]
    script_scores(monkeypatch, {1: 0.5, 2: 0.75, 3: 0.25, 4: 0.5}, 0.5)
    assert run(*arguments, "--out", "whole") == 0
    original = Run._after_step

    def terminate(self: Run, progress, step) -> None:
        if progress.epoch == stop_at and progress.batch == 1 and self.setup.config.resume is None:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, progress, step)

    monkeypatch.setattr(Run, "_after_step", terminate)
    assert run(*arguments, "--out", "parts") == 143
    assert checkpoint("parts")["best"] == {"knn": 0.75, "epoch": 2}
    assert run(*arguments, "--out", "parts", "--resume") == 0
    (weights, about), (whole, about_whole) = best("parts"), best("whole")
    assert {**about, "sha256": ""} == {**about_whole, "sha256": ""} and about["epoch"] == 2
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("before, after, epoch", [({2: 0.75, 4: 0.5}, {4: 0.5}, 2), ({2: 0.5, 4: 0.75}, {4: 0.25}, 4)],
                         ids=["that of the checkpoint", "a later one"])
def test_a_best_in_another_folder_is_that_of_the_checkpoint_or_not_claimed(image_folder: Folder, monkeypatch,
                                                                           before: dict, after: dict, epoch: int) -> None:
    arguments = ["--data", image_folder(), "--epochs", 4, "--eval-every", 2, *SMALL]
    script_scores(monkeypatch, before, 0.1)
    assert run(*arguments, "--out", "first") == 0
    script_scores(monkeypatch, after, 0.1)
    assert run(*arguments, "--out", "second", "--resume", "first/previous.pt") == 0
    assert best("second")[1]["epoch"] == json.loads(Path("second/summary.json").read_text())["best_epoch"] == epoch
    assert best("second")[1]["knn"] == json.loads(Path("second/summary.json").read_text())["best_knn"]


@pytest.mark.slow
def test_without_labels_the_best_goes_along_and_classes_of_one_image_are_none(image_folder: Folder, monkeypatch,
                                                                              capsys) -> None:
    """Resumed in the same folder and in another one: the best is known, and not measured by other means."""
    original = Run._after_step

    def terminate(self: Run, progress, step) -> None:
        if progress.epoch == 2 and progress.batch == 1 and self.setup.config.resume is None:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, progress, step)

    for classes, per_class in ((0, 16), (16, 1)):
        data, name = image_folder(f"{classes}", classes=classes, per_class=per_class), f"{classes}-classes"
        arguments = ["--data", data, "--epochs", 3, "--eval-every", 1, *SMALL]
        monkeypatch.setattr(Run, "_after_step", terminate)
        values = iter([1.0, 9.0, 8.0, 7.0, 7.0, 7.0, 7.0])  # before, after two epochs; then after the last one and in the end
        monkeypatch.setattr(separation, "separation", lambda features: torch.tensor(next(values)))
        assert run(*arguments, "--out", name) == 143
        assert run(*arguments, "--out", f"{name}-other", "--resume", name) == 0
        assert run(*arguments, "--out", name, "--resume") == 0
        for out in (name, f"{name}-other"):
            summary = json.loads(Path(out, "summary.json").read_text())
            assert (summary["best_separation"], summary["best_epoch"], summary["knn"]) == (9.0, 1, None)
            assert best(out)[1]["separation"] == 9.0 and "separation_pixels" not in summary
        assert capsys.readouterr().out.count("no accuracy: measuring") == (classes > 0)


@pytest.mark.slow
@pytest.mark.parametrize("separations, epoch", [([1.0, 3.0, 2.0, 2.5], 2), ([1.0, 3.0, 3.0, 2.0], 3),
                                                ([-3.0, -2.0, -4.0, -1.0], 4)])
def test_without_labels_best_is_the_network_with_the_best_separation(image_folder: Folder, monkeypatch, capsys,
                                                                     separations: list[float], epoch: int) -> None:
    kept: dict[int, dict] = {}
    left = iter([0.5, *separations, separations[-1]])  # before, after each epoch, and in the end
    monkeypatch.setattr(separation, "separation", lambda features: torch.tensor(next(left)))
    keep_weights(monkeypatch, kept)
    assert run("--data", image_folder(classes=0, per_class=16), "--epochs", 4, "--eval-every", 1, "--out", "out", *SMALL) == 0
    weights, about = best("out")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in kept[epoch].items())
    summary, score = json.loads(Path("out/summary.json").read_text()), max(separations)
    assert (summary["best_separation"], summary["best_epoch"]) == (about["separation"], about["epoch"]) == (score, epoch)
    assert summary["separation_untrained"] == 0.5 and summary["separation"] == separations[-1] and summary["knn"] is None
    told = f"{score:.2f}</b> after epoch {epoch}; that network is best.pt"
    assert told in Path("out/report.html").read_text()
    assert f"best: separation {score:.2f} after epoch {epoch}, in out/best.pt" in capsys.readouterr().out
    assert read_run(Path("out")).points("separation") == list(zip(range(5), [0.5, *separations]))


@pytest.mark.slow
@pytest.mark.parametrize("views", ["device", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cpu", "crops"))])
def test_separation_is_measured_alike_before_a_stop_and_after_it(image_folder: Folder, monkeypatch, views: str) -> None:
    """Of views that are the same every time, whatever has been trained on in between."""
    data = image_folder(classes=0, per_class=20)
    if views == "crops":
        Image.new("RGB", (20, 20)).save(data / "other.png")  # of another size
    arguments = ["--data", data, "--epochs", 2, "--eval-every", 1, *SMALL, "--views", "cpu" if views == "cpu" else "auto"]
    assert run(*arguments, "--out", "whole") == 0
    original = Run._after_step

    def terminate(self: Run, progress, step) -> None:
        if progress.epoch == 1 and progress.batch == 1 and self.setup.config.resume is None:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, progress, step)

    monkeypatch.setattr(Run, "_after_step", terminate)
    assert run(*arguments, "--out", "parts") == 143 and run(*arguments, "--out", "parts", "--resume") == 0
    whole, parts = (read_run(Path(name)).points("separation") for name in ("whole", "parts"))
    assert whole == parts and len({value for _, value in whole}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("classes, options", [(0, []), (2, []),
                                              (2, ["--eval-every", "1", "--no-eval", "--eval-data", "nowhere"])])
def test_without_measurements_on_the_way_nothing_is_called_best(image_folder: Folder, classes: int, options: list[str],
                                                                capsys) -> None:
    data = image_folder(classes=classes, per_class=8)
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL, *options) == 0
    assert not Path("out/best.pt").exists() and not Path("out/best.json").exists()
    summary, said = read_run(Path("out")).summary, capsys.readouterr()
    assert summary["best_knn"] is summary["best_separation"] is summary["best_epoch"] is None
    for option in ("--eval-every 1", "--eval-data nowhere"):
        assert said.out.count(f"note: {option} has no effect with --no-eval\n") == ("--no-eval" in options)
    assert (summary.get("separation") is not None) == (classes == 0)
    assert (summary["knn"] is not None) == (not options and classes > 0)


@pytest.mark.slow
def test_best_is_accepted_wherever_a_backbone_is(image_folder: Folder, capsys) -> None:
    data = image_folder(per_class=10)
    assert run("--data", data, "--epochs", 2, "--eval-every", 1, "--out", "out", *SMALL) == 0
    assert read_run(Path("out")).summary["measured_images"] == 4  # a fifth of twenty
    assert evaluate_command.main(["--checkpoint", "out/best.pt", "--data", str(data), "--workers", "0", "--device", "cpu",
                                  "--json", "scores.json"]) == 0
    knn = [record["accuracy"] for record in json.loads(Path("scores.json").read_text())["results"]
           if record["network"] == "online" and record["metric"] == "knn_20"]
    assert knn == [json.loads(Path("out/summary.json").read_text())["best_knn"]]
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


@pytest.mark.slow
def test_no_word_of_an_evaluation_that_nobody_asked_for(tmp_path: Path, monkeypatch, capsys) -> None:
    """The sample brings a held-out part of its own."""
    monkeypatch.chdir(tmp_path)
    assert run("--epochs", 1, "--out", "out", "--no-eval", "--hidden-dim", 8, "--projection-dim", 4, "--batch-size", 512) == 0
    assert "has no effect" not in capsys.readouterr().out
