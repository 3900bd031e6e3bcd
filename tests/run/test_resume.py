"""Runs that go on: stopped and resumed equals never stopped; with what, from where and into what a run may go on."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from byol_core.evaluate import scoring
from byol_core.run import plan
from byol_core.run.results import Results
from byol_core.run.run import Run
from tests.helpers.runs import SMALL, assert_same_state, checkpoint, metrics, run, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.parametrize("views, options, stop_at", [("device", [], 3), ("cpu", ["--optimizer", "lars"], 4), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("device", [], 1), ("device", [], 5), ("cpu", ["--optimizer", "lars"], 2), ("device", ["--recipe", "quadra"], 4),
        ("device", ["--amp", "fp16"], 1),
        ("device", ["--accum-steps", "2", "--optimizer", "adamw", "--scheduler", "constant"], 3)])])
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


@pytest.mark.slow
def test_resuming_a_finished_run_touches_nothing(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 1, "--out", "out", *SMALL]
    assert run(*arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir() if path.name != ".lock"}
    assert run(*arguments, "--resume") == 0
    assert "already complete (1/1 epochs)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_checkpoint_can_be_repeated(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(classes=0, per_class=16), "--out", "out", "--no-eval", *SMALL, "--epochs", 2]
    assert run(*arguments, "--lr", "1e6", "--optimizer", "sgd", "--weight-decay", "1e6") == 1
    assert "nothing was saved yet" in capsys.readouterr().err
    assert run(*arguments) == 0
    assert [record["update"] for record in metrics("out")] == [4, 8]


@pytest.mark.slow
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
    assert summary("out")["resumed"] == [whole[-1]["update"]]


@pytest.mark.slow
def test_resuming_before_the_first_checkpoint_starts_clean(image_folder: Callable[..., Path], monkeypatch) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--out", "out", "--no-eval", *SMALL]

    def lost(self: Run) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", lost)
        assert run(*arguments) == 1
    assert run(*arguments, "--resume") == 0
    assert [record["update"] for record in metrics("out")] == [4, 8]


@pytest.mark.slow
def test_the_best_network_goes_along_into_another_folder(image_folder: Callable[..., Path], stopped_after: Callable[..., None],
                                                         monkeypatch) -> None:
    arguments = ["--data", image_folder(per_class=10), "--epochs", 3, "--eval-every", 1, *SMALL]
    knn = iter([0.9, 0.2, 0.3])
    monkeypatch.setattr(scoring.Scorer, "quick", lambda *_: next(knn))
    monkeypatch.setattr(scoring.Scorer, "measure", lambda *_: {"knn": 0.1, "linear": 0.1})
    stopped_after(5, *arguments, "--out", "one")  # at the end of epoch 1
    assert run(*arguments, "--out", "other", "--resume", "one/last.pt") == 0
    assert (summary("other")["best_knn"], summary("other")["best_epoch"]) == (0.9, 1)
    assert Path("other/best.pt").read_bytes() == Path("one/best.pt").read_bytes()


def test_a_run_resumed_into_another_folder_takes_its_records_along(image_folder: Callable[..., Path],
                                                                   stopped_after: Callable[..., None]) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--no-eval", *SMALL]
    stopped_after(4, *arguments, "--out", "one")  # at the end of epoch 1
    assert run(*arguments, "--out", "other", "--resume", "one/last.pt") == 0
    assert [record["update"] for record in metrics("other")] == [4, 8]
    assert [record["update"] for record in metrics("one")] == [4] and Path("other/views.png").exists()


def test_resume_does_not_make_a_foreign_folder_a_run_folder(image_folder: Callable[..., Path], capsys) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    assert run("--data", image_folder(), "--epochs", 1, "--out", "mine", "--resume", "--no-eval", *SMALL) == 2
    assert "mine is not empty (it holds thesis.txt)" in capsys.readouterr().err


@pytest.mark.slow
def test_scores_of_another_test_set_are_measured_again_after_resuming(image_folder: Callable[..., Path]) -> None:
    data, other = image_folder("a", per_class=10), image_folder("b", per_class=4)
    arguments = ["--data", data, "--epochs", 1, "--out", "out", *SMALL]
    assert run(*arguments) == 0
    Path("out/summary.json").unlink()
    assert run(*arguments, "--resume", "--eval-data", other) == 0
    assert summary("out")["measured_on"].startswith("8 images of ") and summary("out")["knn_untrained"] * 8 % 1 == 0


def test_a_used_run_folder_needs_resume(image_folder: Callable[..., Path], capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 1, "--no-eval", *SMALL]
    assert run(*arguments, "--out", "out") == 0
    assert run(*arguments, "--out", "out") == 2
    assert "out already holds a run (epoch 1/1) - add --resume to go on, or choose another --out" in capsys.readouterr().err
    Path("foreign").mkdir()
    Path("foreign/thesis.tex").touch()
    assert run(*arguments, "--out", "foreign") == 2
    assert "foreign is not empty (it holds thesis.tex)" in capsys.readouterr().err


@pytest.mark.slow
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


def another_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` chooses, and the views, as a later version might."""
    values = {"lr": 0.4, "tau_base": 0.5, "warmup_epochs": 0.0, "optimizer": "adamw", "weight_decay": 0.1, "hidden_dim": 24}
    auto, views = plan._auto, plan._views
    monkeypatch.setattr(plan, "_auto", lambda *about: [
        replace(choice, value=values.get(choice.name, choice.value)) for choice in auto(*about)])
    monkeypatch.setattr(plan, "_views", lambda *about: tuple(
        replace(view, crop_scale=(0.5, 1.0), hue=0.3) for view in views(*about)))
    monkeypatch.setattr(plan, "_batch", lambda *about: plan.Choice("batch_size", 2, "for a test"))


@pytest.mark.slow
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
    kept = [choice for choice in json.loads(Path("out/config.json").read_text())["choices"] if "began" in choice["reason"]]
    assert len(kept) > 10 and not any(choice["asked"] for choice in kept)
    assert "batch_size 8 (as this run began)" in said and "lr 0.009375 after scaling by the batch (as this run began)" in said
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


@pytest.mark.slow
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
