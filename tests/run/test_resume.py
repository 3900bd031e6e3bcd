"""Runs that go on: stopped and resumed equals never stopped; with what, from where and into what a run may go on."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from byol_core.run import plan
from byol_core.run.results import Results
from byol_core.run.run import Run
from byol_core.runtime import NonFiniteError
from tests.helpers.pictures import write_images
from tests.helpers.runs import SMALL, assert_same_state, checkpoint, metrics, run, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs of 4 updates, out/, and of its images, imgs/."""
    place = tmp_path_factory.mktemp("finished")
    data = write_images(place)
    assert run("--data", data, "--epochs", 2, "--out", place / "out", "--no-eval", *SMALL) == 0
    return place


@pytest.fixture
def again(finished: Path, in_a_folder_of_its_own: None) -> list[object]:
    """The command of that run but for --out, where a test has a copy of its folder."""
    shutil.copytree(finished, ".", dirs_exist_ok=True)
    return ["--data", "imgs", "--epochs", 2, "--no-eval", *SMALL]


@pytest.mark.parametrize("views, options, stop_at", [
    ("device", [], 3), ("cpu", ["--optimizer", "lars"], 4),
    pytest.param("device", ["--recipe", "quadra"], 4, marks=pytest.mark.slow),
    pytest.param("device", ["--amp", "fp16", "--image-size", "8"], 1, marks=pytest.mark.slow)])
def test_a_stopped_run_continues_to_the_same_result_bit_for_bit(image_folder: Callable[..., Path], monkeypatch, capsys,
                                                                views: str, options: list[str], stop_at: int) -> None:
    data = image_folder(classes=2, per_class=6)
    arguments = ["--data", data, "--epochs", 2, "--views", views, "--no-eval", *SMALL, *options]
    assert run(*arguments, "--out", "whole") == 0

    original = Run.after_step

    def terminate_at(self: Run, progress, step) -> None:
        if progress.updates == stop_at and self.setup.config.resume is None and step.applied:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, progress, step)

    monkeypatch.setattr(Run, "after_step", terminate_at)
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


def test_resuming_a_finished_run_touches_nothing(again: list[object], capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir() if path.name != ".lock"}
    assert run(*again, "--out", "out", "--resume") == 0
    assert "already complete (2/2 epochs)" in capsys.readouterr().out
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
    assert summary("out")["loss"] == metrics("out")[-1]["loss"]  # though no step was made after resuming
    assert summary("out")["resumed"] == [5]


def test_resuming_from_elsewhere_overwrites_no_other_run_and_takes_the_records_along(again: list[object], capsys) -> None:
    shutil.copytree("out", "other")
    before = {path: path.read_bytes() for path in Path("other").iterdir() if path.name != ".lock"}
    assert run(*again, "--out", "other", "--resume", "out/previous.pt") == 2
    assert "other already holds a run (epoch 2/2)" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run(*again, "--out", "new", "--resume", "out/previous.pt") == 0
    assert_same_state(checkpoint("new"), checkpoint("out"))
    assert metrics("new") == metrics("out") and [record["update"] for record in metrics("out")] == [4, 8]
    assert Path("new/views.png").exists()


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_run_that_failed_before_its_first_checkpoint_can_be_repeated(image_folder: Callable[..., Path], monkeypatch, capsys,
                                                                       more: list[str]) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--out", "out", "--no-eval", *SMALL]

    def lost(self: Run) -> None:
        raise NonFiniteError("a weight is not finite", late=True)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", lost)
        assert run(*arguments) == 1
    assert "nothing was saved yet - start again" in capsys.readouterr().err
    assert run(*arguments, *more) == 0
    assert [record["update"] for record in metrics("out")] == [4, 8]


@pytest.mark.slow
def test_scores_of_another_test_set_are_measured_again_after_resuming(image_folder: Callable[..., Path], capsys) -> None:
    data, other = image_folder("a", per_class=10), image_folder("b", per_class=4)
    arguments = ["--data", data, "--epochs", 1, "--out", "out", *SMALL, "--eval-data"]
    assert run(*arguments, other) == 0
    for images, test_set, measured in ((4, other, 0), (5, other, 1), (4, image_folder("c", per_class=4), 1)):
        image_folder("b", per_class=images)  # the same folder, unchanged or with more in it
        Path("out/summary.json").unlink()
        capsys.readouterr()
        assert run(*arguments, test_set, "--resume") == 0
        assert capsys.readouterr().out.count("untrained: knn") == measured
        assert summary("out")["measured_on"].endswith(f" images of {test_set}")


def test_a_used_run_folder_needs_resume(again: list[object], capsys) -> None:
    assert run(*again, "--out", "out") == 2
    assert "out already holds a run (epoch 2/2) - add --resume to go on, or choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("changed, named", [
    (["--epochs", "3"], "epochs 2 -> 3"), (["--batch-size", "8"], "batch_size 4 -> 8"), (["--seed", "1"], "seed 0 -> 1"),
    (["--arch", "resnet18"], "arch conv6 -> resnet18"), (["--views", "cpu"], "views made on the device -> on the cpu"),
])
def test_resuming_with_other_options_is_refused_by_name(again: list[object], capsys, changed: list[str], named: str) -> None:
    assert run(*again, "--out", "out", "--resume", *changed) == 2
    assert named in capsys.readouterr().err


def test_resuming_with_other_images_is_refused(again: list[object], capsys) -> None:
    Image.new("RGB", (16, 16)).save("imgs/class0/new.png")
    assert run(*again, "--out", "out", "--resume") == 2
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


def test_a_damaged_checkpoint_is_told_and_the_one_before_gone_on_from(again: list[object], finished: Path, capsys) -> None:
    Path("out/last.pt").write_bytes(Path("out/last.pt").read_bytes()[:-1])
    assert run(*again, "--out", "out", "--resume") == 0
    assert ("warning: out/last.pt is damaged or not a checkpoint; using the checkpoint before it\n"
            in capsys.readouterr().out)
    assert_same_state(checkpoint("out"), checkpoint(finished / "out"))


def test_no_whole_checkpoint_is_wrong_input_and_never_a_fresh_start(again: list[object], capsys) -> None:
    for name in ("last.pt", "previous.pt"):
        Path("out", name).write_bytes(b"")
    before = {path: path.read_bytes() for path in Path("out").iterdir() if path.name not in ("train.log", ".lock")}
    assert run(*again, "--out", "out", "--resume") == 2
    assert capsys.readouterr().err == (
        "error: out/last.pt is empty; out/previous.pt is empty - start a new run in another --out, or one from its network "
        "with --init-from out/backbone.pt\n")
    assert all(path.read_bytes() == content for path, content in before.items())


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


def test_what_is_asked_for_must_be_as_the_run_began(image_folder: Callable[..., Path], stopped_after: Callable[..., None],
                                                    capsys) -> None:
    always = ["--data", image_folder(), "--epochs", 3, "--no-eval", "--workers", 0, "--device", "cpu", "--out", "out"]
    stopped_after(2, *always, "--arch", "conv6", "--image-size", 16, "--projection-dim", 8, "--lr", 0.3)
    for asked, said in ((["--lr", 0.5], "lr 0.009375 -> 0.015625"), (["--recipe", "paper"], "optimizer sgd -> lars"),
                        (["--image-size", 24], "image_size 16 -> 24"), (["--view-size", 12], "view_size 16 -> 12"),
                        (["--batch-size", 4], "batch_size 8 -> 4"), (["--optimizer", "adamw"], "optimizer sgd -> adamw")):
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
