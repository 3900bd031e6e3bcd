"""Checkpoints of wrapped networks, other machines, options and versions: what they are taken for, and what is told."""

import functools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from byol_core import pretrained
from byol_core.backbones import build_backbone
from byol_core.pretrained import load_pretrained
from byol_core.run import setup
from byol_core.run.run import Run
from byol_core.system.files import read_backbone, read_checkpoint, read_weights, save_checkpoint
from tests.helpers import format1
from tests.helpers.pictures import Folder
from tests.helpers.runs import SMALL, assert_equal, assert_same_state, checkpoint, metrics, run, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
OLD_RUN = Path(__file__).parents[1] / "data" / "run_from_0.1.0"
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel, "compile": functools.partial(torch.compile, backend="eager"),
    "both": lambda module: nn.DataParallel(torch.compile(module, backend="eager"))}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_of_a_wrapped_network_are_accepted(short_run: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    backbone = build_backbone("conv6")[0]
    backbone.load_state_dict(read_weights(short_run / "backbone.pt"))
    wrapped = wrap(backbone).state_dict()
    assert all(name.startswith(("module.", "_orig_mod.")) for name in wrapped)
    torch.save(wrapped, "wrapped.pt")
    assert_equal(read_backbone(Path("wrapped.pt")), backbone.state_dict(), "")
    assert run("--data", short_run.parent / "imgs", "--epochs", 0, "--out", "begun", "--no-eval", "--init-from", "wrapped.pt",
               *SMALL) == 0


@pytest.mark.parametrize("place", ["", "online.", "online.backbone."])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_a_wrapped_network_is_accepted(short_run: Path, prefix: str, place: str) -> None:
    state = read_checkpoint(short_run / "last.pt")
    model = state["model"]
    assert isinstance(model, dict)
    renamed = {place + prefix + name.removeprefix(place) if name.startswith(place) else name: tensor
               for name, tensor in model.items()}
    save_checkpoint(Path(), {**state, "model": renamed})
    expected = {name: model[f"online.backbone.{name}"] for name in read_weights(short_run / "backbone.pt")}
    for found in (read_backbone(Path("last.pt")), load_pretrained("last.pt").backbone.state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_same_state(read_checkpoint(Path("last.pt")), state)  # as --resume reads it


def test_a_network_that_has_a_child_named_module_keeps_it() -> None:
    torch.save({"module.weight": torch.ones(1), "bias": torch.ones(1)}, "mixed.pt")
    assert read_weights(Path("mixed.pt")).keys() == {"module.weight", "bias"}


@pytest.mark.slow
def test_a_compiled_run_writes_plain_names(short_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    assert run("--data", short_run.parent / "imgs", "--epochs", 1, "--out", "compiled", "--no-eval", "--compile", *SMALL) == 0
    plain = torch.load(short_run / "backbone.pt", weights_only=True)
    assert torch.load("compiled/backbone.pt", weights_only=True).keys() == plain.keys()
    assert checkpoint("compiled")["model"].keys() == checkpoint(short_run)["model"].keys()


def test_a_checkpoint_from_a_gpu_loads_without_one(short_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save_checkpoint(Path(), read_checkpoint(short_run / "last.pt"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load("last.pt", weights_only=True)  # it is what it is meant to be
    model = read_checkpoint(Path("last.pt"))["model"]
    assert isinstance(model, dict) and all(tensor.device.type == "cpu" for tensor in model.values())
    assert_same_state(read_checkpoint(Path("last.pt")), read_checkpoint(short_run / "last.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("before, after, note", [("off", "fp16", "float32 -> float16"),
                                                 ("fp16", "bf16", "float16 -> bfloat16")])
def test_another_precision_is_noted_and_the_run_goes_on(image_folder: Folder, stopped_after: Callable[..., None], before: str,
                                                        after: str, note: str, capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--out", "out", "--no-eval", *SMALL, "--image-size", 8]
    stopped_after(2, *arguments, "--amp", before)
    assert bool(checkpoint("out")["scaler"]) == (before == "fp16")  # its scale and growth
    assert run(*arguments, "--amp", after, "--resume") == 0
    said = capsys.readouterr().out
    assert f"note: precision {note}, so this is not an exact resume" in said and "without effect" not in said
    assert summary("out")["status"] == "finished" and bool(checkpoint("out")["scaler"]) == (after == "fp16")


def test_another_device_is_noted(short_run: Path, capsys) -> None:
    save_checkpoint(Path(), {**read_checkpoint(short_run / "last.pt"), "device": "cuda", "compiled": True})
    assert run("--data", short_run.parent / "imgs", "--epochs", 1, "--out", "on", "--no-eval", *SMALL, "--resume",
               "last.pt") == 0
    said = capsys.readouterr().out
    assert "note: device cuda -> cpu, so this is not an exact resume" in said
    assert "note: compiled True -> False, so this is not an exact resume" in said


@pytest.mark.slow
def test_harmless_options_may_change_and_change_nothing(image_folder: Folder, stopped_after: Callable[..., None],
                                                        capsys) -> None:
    arguments = ["--data", image_folder(), "--epochs", 2, "--views", "cpu", *SMALL]
    assert run(*arguments, "--out", "whole") == 0
    stopped_after(3, *arguments, "--out", "parts")
    assert run(*arguments, "--out", "parts", "--resume", "--workers", 1, "--save-every", 2, "--eval-every", 1, "--classifier",
               "knn", "--debug") == 0
    assert_same_state(checkpoint("whole"), checkpoint("parts"))
    said = [line for line in capsys.readouterr().out.splitlines() if "changed, without effect on the result: " in line]
    assert len(said) == 1 and "eval_every 0 -> 1, save_every 1 -> 2" in said[0] and "workers 0 -> 1" in said[0]


def test_a_run_folder_of_version_0_1_goes_on_as_it_would_have_there(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """tests/data/run_from_0.1.0: four of six updates by the package before it had folders; ended/: that one's other two."""
    monkeypatch.setattr(setup, "build_backbone", format1.tiny_backbone)
    shutil.copytree(OLD_RUN, "out")
    ended = Path("out/ended").rename("ended")
    format1.write_images(Path("imgs"))
    assert run("--data", "imgs", "--out", "out", *format1.OPTIONS, "--eval-every", 1, "--resume") == 0
    said = capsys.readouterr().out
    assert "resuming at epoch 1, update 4" in said and "without effect" not in said and "untrained: " not in said
    expected, found = metrics(ended), metrics("out")
    assert found[:2] == expected[:2]  # of before it was stopped
    measured_here = ("images_per_second", "wait")
    for record in (*expected, *found):
        for name in measured_here:
            record.pop(name, None)
    assert [record.keys() for record in found] == [record.keys() for record in expected]
    for name in expected[2]:
        assert found[2][name] == pytest.approx(expected[2][name], rel=1e-3), name
    weights = read_weights(Path("out/backbone.pt"))
    torch.testing.assert_close(weights, read_weights(ended / "backbone.pt"), rtol=1e-3, atol=1e-4)
    facts = summary("out")
    assert facts["status"] == "finished" and facts["linear_1_untrained"] == 0.4 and facts["best_epoch"] == 2


def test_a_renamed_image_is_another_set_of_images(short_run: Path, capsys) -> None:
    shutil.copytree(short_run.parent, ".", dirs_exist_ok=True)
    arguments = ["--data", "imgs", "--epochs", 1, "--out", "run", "--no-eval", "--resume", *SMALL]
    before = Path("run/last.pt").read_bytes()
    Path("imgs/class0/00.png").rename("imgs/class0/renamed.png")
    assert run(*arguments) == 2
    assert "cannot resume exactly: the names of the image files - repeat" in capsys.readouterr().err
    Path("imgs/class0/renamed.png").unlink()
    assert run(*arguments) == 2
    assert "images 12 -> 11; the names of the image files" in capsys.readouterr().err
    assert Path("run/last.pt").read_bytes() == before


def test_the_checkpoint_of_format_1_loads_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/data/format1/last.pt, which stays as it is while the code changes."""
    monkeypatch.setattr(setup, "build_backbone", format1.tiny_backbone)
    state = read_checkpoint(format1.PLACE)
    assert state["format"] == 1 and state["progress"]["updates"] == format1.STOPPED_AT  # type: ignore[index]
    data = format1.write_images(Path("imgs"))
    restored: dict[str, object] = {}
    original = Run.train

    def spy(self: Run) -> None:
        restored.update(model=self.state.model.state_dict(), optimizer=self.state.optimizer.state_dict(),
                        scheduler=self.state.scheduler.state_dict(), progress=self.progress.state_dict())
        restored.update(pickle.loads(pickle.dumps(restored)))  # as they are now
        original(self)

    monkeypatch.setattr(Run, "train", spy)
    assert run("--data", data, "--out", "out", "--resume", format1.PLACE, *format1.OPTIONS) == 0
    assert_same_state({key: state[key] for key in restored}, restored)
    assert summary("out")["updates"] == format1.UPDATES and summary("out")["status"] == "finished"
    assert [record["update"] for record in metrics("out")] == [format1.UPDATES]
    assert not torch.equal(checkpoint("out")["model"]["online.backbone.conv1.weight"],
                           state["model"]["online.backbone.conv1.weight"])  # type: ignore[index]
    monkeypatch.setattr(pretrained, "build_backbone", format1.tiny_backbone)
    assert load_pretrained(format1.PLACE, "target").seed == json.loads(str(state["identity"]))["seed"]
