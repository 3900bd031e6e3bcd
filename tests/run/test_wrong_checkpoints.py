"""Checkpoints and weights that are hostile, foreign or damaged, as every command that takes one sees them."""

import functools
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byol_core import __version__, embed
from byol_core.backbones import build_backbone
from byol_core.evaluate import __main__ as evaluate_command
from byol_core.pretrained import load_pretrained
from byol_core.system.files import CheckpointError, read_checkpoint
from tests.fuzz import Payload, fuzz
from tests.helpers.runs import SMALL, run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
COMMANDS = ["resume", "init-from", "evaluate", "embed", "baseline-weights"]


def give(command: str, file: Path, short_run: Path) -> int:
    """The exit code of a command that is given `file`."""
    data = ["--data", str(short_run.parent / "imgs")]
    if command in ("resume", "init-from"):
        return run(*data, "--epochs", 1, "--out", "out", *SMALL, f"--{command}", file)
    if command == "embed":
        return embed.main([*data, "--checkpoint", str(file), "--workers", "0", "--device", "cpu"])
    source = ["--checkpoint", str(short_run), "--baseline-weights", str(file)] if command.startswith("base") else [
        "--checkpoint", str(file)]
    return evaluate_command.main([*data, *source, "--workers", "0", "--device", "cpu"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_pipe_is_refused_and_not_waited_for(short_run: Path, command: str, capsys) -> None:
    os.mkfifo("pipe.pt")
    assert give(command, Path("pipe.pt"), short_run) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pipe.pt is not a checkpoint, but a pipe or a device" in said


def go_on(short_run: Path, epochs: int = 1) -> int:
    """The exit code of --resume in out/."""
    return run("--data", short_run.parent / "imgs", "--epochs", epochs, "--out", "out", *SMALL, "--resume")


def test_a_folder_in_the_place_of_the_checkpoint_is_named(short_run: Path, capsys) -> None:
    shutil.copytree(short_run, "out")
    Path("out/last.pt").rename("out/previous.pt")
    Path("out/last.pt").mkdir()
    Path("out/last.pt/mine").touch()
    assert go_on(short_run) == 2
    assert "out/last.pt is not a checkpoint, but a folder" in capsys.readouterr().err
    assert Path("out/last.pt/mine").exists()


@pytest.mark.parametrize("kind", ["in a checkpoint", "in weights", "bare pickle"])
@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_a_file_is_named_and_not_run_by_any_command(short_run: Path, command: str, kind: str, capsys) -> None:
    payload = Payload(Path("executed").absolute())
    if kind == "bare pickle":
        Path("evil.pt").write_bytes(pickle.dumps(payload))
    else:
        torch.save({"format": 1, "payload": payload} if kind == "in a checkpoint" else {"conv1.weight": payload}, "evil.pt")
    assert give(command, Path("evil.pt"), short_run) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and "evil.pt" in said
    assert not Path("executed").exists()
    assert "weights_only" not in said and "trust" not in said  # torch's own message advises to switch the guard off
    if command != "baseline-weights":
        assert f"it holds more than tensors and plain values ({os.name}.mkdir), and nothing in it was run" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_checkpoint_is_said_to_be_none_by_every_command(short_run: Path, command: str, capsys) -> None:
    Image.new("RGB", (8, 8)).save("image.pt", "PNG")
    Path("page.pt").write_text("<html>404</html>")
    Path("empty.pt").touch()
    np.savez("numpy", a=np.zeros(3))
    Path("numpy.npz").rename("numpy.pt")
    for name in ("image.pt", "page.pt", "empty.pt", "numpy.pt"):
        assert give(command, Path(name), short_run) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("error: ") and name in said


def test_weights_given_to_resume_are_pointed_to_init_from(short_run: Path, capsys) -> None:
    assert give("resume", short_run / "backbone.pt", short_run) == 2
    assert "backbone.pt holds weights only - use --init-from to start from them" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["resume", "init-from", "evaluate", "embed"])
def test_a_newer_format_asks_for_an_upgrade(short_run: Path, command: str, capsys) -> None:
    torch.save({**read_checkpoint(short_run / "last.pt"), "format": 2}, "newer.pt")
    assert give(command, Path("newer.pt"), short_run) == 2
    assert "has checkpoint format 2, this version reads up to 1 - upgrade byol_core" in capsys.readouterr().err


def test_a_key_of_a_newer_version_asks_for_an_upgrade(short_run: Path, capsys) -> None:
    torch.save({**read_checkpoint(short_run / "last.pt"), "version": "7.0", "queue": 3}, "newer.pt")
    assert give("resume", Path("newer.pt"), short_run) == 2
    assert (f"newer.pt was written by byol_core 7.0 and holds queue, which this version ({__version__}) does not know"
            in capsys.readouterr().err)


@pytest.mark.parametrize("change", [{"format": 2}, {"version": "7.0", "queue": 3}, {"precision": 3}])
def test_a_whole_file_that_cannot_be_used_is_not_taken_for_a_damaged_one(short_run: Path, change: dict, capsys) -> None:
    """Such as one that a newer version has written: it is not replaced by the one before it."""
    shutil.copytree(short_run, "out")
    shutil.copy("out/last.pt", "out/previous.pt")
    torch.save({**read_checkpoint(short_run / "last.pt"), **change}, "out/last.pt")
    before = Path("out/last.pt").read_bytes()
    assert go_on(short_run) == 2
    assert capsys.readouterr().err.count("\n") == 1 and Path("out/last.pt").read_bytes() == before


def test_a_damaged_file_is_not_replaced_by_a_run_that_is_refused(short_run: Path, capsys) -> None:
    shutil.copytree(short_run, "out")
    shutil.copy("out/last.pt", "out/previous.pt")
    Path("out/last.pt").write_bytes(b"torn")
    assert go_on(short_run, epochs=7) == 2
    assert "epochs 1 -> 7" in capsys.readouterr().err and Path("out/last.pt").read_bytes() == b"torn"


NESTED = functools.reduce(lambda inner, _: [inner, inner], range(40), ["x"])


@pytest.mark.slow
@pytest.mark.parametrize("key", ["version", "device", "precision", "compiled", "best"])
@pytest.mark.parametrize("value", [NESTED, "\x1b[31mred\nerror: a line of its own", 3], ids=["nested", "text", "number"])
def test_what_a_hostile_file_says_of_itself_is_not_shown(short_run: Path, key: str, value: object, capsys) -> None:
    """Nested lists of a few hundred bytes are longer than any memory when written out."""
    unknown = {"unknown": 1} if key == "version" else {}
    torch.save({**read_checkpoint(short_run / "last.pt"), key: value, **unknown}, "odd.pt")
    give("resume", Path("odd.pt"), short_run)
    said = capsys.readouterr()
    assert said.err.count("\n") <= 1 and "\x1b" not in said.out + said.err


@pytest.mark.parametrize("command", ["init-from", "evaluate", "embed"])
@pytest.mark.parametrize("model", [None, {}, {"online.backbone.conv1.weight": 3}, {1: torch.zeros(1)}, [torch.zeros(1)],
                                   {"online.backbone.conv1.weight": torch.zeros(1)}])
def test_a_checkpoint_without_a_networks_weights_is_refused(short_run: Path, command: str, model: object, capsys) -> None:
    torch.save({**read_checkpoint(short_run / "last.pt"), "model": model}, "odd.pt")
    assert give(command, Path("odd.pt"), short_run) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "odd.pt" in said


@pytest.mark.parametrize("identity", [None, "", "[]", "{}", '{"views": []}', '{"views": [{"size": "large"}]}', "3"])
def test_a_checkpoint_that_does_not_describe_its_network_is_refused(short_run: Path, identity: object) -> None:
    torch.save({**read_checkpoint(short_run / "last.pt"), "identity": identity}, "odd.pt")
    with pytest.raises(CheckpointError, match="odd.pt does not describe its network"):
        load_pretrained("odd.pt")


@pytest.mark.parametrize("key, value", [
    ("identity", "null"), ("identity", "[]"), ("progress", {"epoch": 0, "steps": 3}), ("progress", None), ("optimizer", {}),
    ("optimizer", None), ("scheduler", 3), ("model", {}), ("model", None), ("log", None), ("bad_files", 3),
    ("bad_files", {"x": 1}), ("bad_files", {index: "bad" for index in range(1000)}),
    ("progress", {"epoch": 10**9, "batch": 0, "updates": 4, "loss_sum": 0.0, "loss_count": 0}),
    ("progress", {"epoch": -3, "batch": 0, "updates": 4, "loss_sum": 0.0, "loss_count": 0}),
    ("progress", {"epoch": 0, "batch": 999, "updates": 4, "loss_sum": 0.0, "loss_count": 0})])
def test_a_checkpoint_of_another_make_is_refused_in_one_line(short_run: Path, key: str, value: object, capsys) -> None:
    torch.save({**read_checkpoint(short_run / "last.pt"), key: value}, "odd.pt")
    code = give("resume", Path("odd.pt"), short_run)
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("changed", [
    {"weight_decay": -1}, {"scheduler": "foo"}, {"tau_base": "x"}, {"batch_size": 0}, {"lr": 10**400}, {"lr": True},
    {"views": []}, {"hidden_dim": 10**12}, {"arch": 5}, {"image_size": 32.5}, {"image_size": 10**9},
    {"view_size": 10**9}, {"view_size": "x"}, {"view_size": None},
    {"warmup_epochs": 10**400}, {"small_stem": 1}, "nested"], ids=str)
def test_numbers_that_no_run_has_are_not_computed_with(short_run: Path, changed: object, capsys) -> None:
    """A resumed run takes over what it was begun with; the file that says so may have been made by anybody."""
    state = read_checkpoint(short_run / "last.pt")
    identity = "[" * 100_000 if changed == "nested" else json.dumps({**json.loads(str(state["identity"])), **changed})
    torch.save({**state, "identity": identity}, "odd.pt")
    data = ["--data", short_run.parent / "imgs", "--epochs", 1, "--workers", 0, "--device", "cpu"]
    assert run(*data, "--out", "other", "--resume", "odd.pt") == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and "updates of" not in told.out


OTHER_TENSORS = {
    "shape": lambda own: torch.zeros(7), "expanded": lambda own: torch.zeros(1).expand(10**6, 10**6),
    "meta": lambda own: torch.zeros(7, device="meta"), "sparse": lambda own: torch.zeros(2, 2).to_sparse(),
    "complex": lambda own: own * 1j, "text": lambda own: "text"}


@pytest.mark.parametrize("part, kind", [  # numbers and texts among an optimizer's state have no shape
    *(("model", kind) for kind in OTHER_TENSORS), *(("optimizer", kind) for kind in OTHER_TENSORS if kind != "text")])
def test_tensors_that_are_not_those_of_the_network_are_never_computed_with(short_run: Path, part: str, kind: str,
                                                                           capsys) -> None:
    """A fused optimizer trusts the shape of its momentum, and would write beyond it."""
    state: dict = read_checkpoint(short_run / "last.pt")
    places = [(state["model"], next(iter(state["model"])))] if part == "model" else [
        (values, "momentum_buffer") for values in state["optimizer"]["state"].values()]
    for values, name in places:
        values[name] = OTHER_TENSORS[kind](values[name])
    torch.save(state, "odd.pt")
    assert give("resume", Path("odd.pt"), short_run) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_a_compressed_file_is_not_unpacked(short_run: Path, capsys) -> None:
    with zipfile.ZipFile(short_run / "last.pt") as source, zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in source.namelist():
            bomb.writestr(member, source.read(member))
    assert give("resume", Path("bomb.pt"), short_run) == 2
    assert "bomb.pt is not a checkpoint: it is compressed, and may unpack to any size" in capsys.readouterr().err


def test_weights_of_another_network_are_refused_by_name(short_run: Path, capsys) -> None:
    torch.save(build_backbone("resnet18")[0].state_dict(), "resnet18.pt")
    assert give("init-from", Path("resnet18.pt"), short_run) == 2
    said = capsys.readouterr().err
    assert "--init-from resnet18.pt does not fit this network: '" in said and said.count("\n") == 1


@pytest.mark.parametrize("target, cases", [("decode", 400), ("checkpoint", 150), ("command", 300)])
def test_random_damage_breaks_no_promise(tmp_path: Path, target: str, cases: int) -> None:
    """The first cases of what `python -m tests.fuzz` runs by the thousand."""
    done, outcomes = fuzz(target, tmp_path, cases=cases)
    assert done == cases and outcomes
