"""A disk that is full or nearly so, and files that are damaged: one line, both checkpoints kept, nothing half-written left."""

import errno
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from byol_core.run.folder import space_warning
from byol_core.system import files
from byol_core.system.files import KEYS, newest_checkpoint, read_checkpoint, save_checkpoint, tensor_bytes
from byol_core.system.signals import Stopped
from tests.helpers.children import At, run_child
from tests.helpers.kills import STEP, arguments, assert_same_run, run
from tests.helpers.modules import save
from tests.helpers.runs import checkpoint

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

Usage = namedtuple("Usage", ["total", "used", "free"])


def nothing_larger_than_100_kb() -> None:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def no_file_at_all() -> None:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.slow
def test_a_run_whose_disk_is_full_says_so_in_a_line_and_goes_on_once_there_is_room(data: Path) -> None:
    words = arguments(data, "--workers", 0)
    assert run(words, "whole") == 0
    for out in ("nothing_larger_than_100_kb", "no_file_at_all"):
        ended = run_child([*words, "--out", out], [At(STEP, 4, f"tests.run.test_full_disk:{out}")])
        lines = ended.errors.splitlines()
        assert ended.code == 1 and len(lines) <= 3
        assert lines[-1].startswith(f"error: cannot write {out}/last.pt: ")
        assert lines[-1].endswith(" MB free) - the file before it is kept")
        assert checkpoint(out)["progress"]["updates"] == 3 and not list(Path(out).glob(".*.tmp"))
        assert run(words, out) == 0
        assert_same_run("whole", out)


def everything_to_a_full_device(path: Path, mode: str):
    path.touch()  # a full disk makes the file, and takes nothing into it
    return open("/dev/full", mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device there")
def test_no_space_left_names_what_is_needed_and_free_and_costs_neither_checkpoint(tmp_path: Path, monkeypatch) -> None:
    for number in (1, 2):
        save(tmp_path, number)
    monkeypatch.setattr(files, "open", everything_to_a_full_device, raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 12_300_000))
    state = {**dict.fromkeys(KEYS), "scores": torch.zeros(2_000_000), "progress": 3}  # 8 MB
    with pytest.raises(OSError) as error:
        save_checkpoint(tmp_path, state)
    assert str(error.value).startswith(f"cannot write {tmp_path / 'last.pt'}: ")
    assert str(error.value).endswith("(needs 8 MB, 12 MB free) - the file before it is kept")
    assert [read_checkpoint(tmp_path / name)["progress"] for name in ("last.pt", "previous.pt")] == [2, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    with pytest.raises(OSError, match="cannot write .*x.json: No space left on device"):
        files.write_text(tmp_path / "x.json", "{}")


def test_bytes_of_tensors_are_counted_wherever_they_are() -> None:
    state = {"model": {"w": torch.zeros(3, 4)}, "optimizer": {"state": {0: {"m": torch.zeros(5, dtype=torch.float64)}}},
             "list": [torch.zeros(2, dtype=torch.bool), "text"], "number": 1}
    assert tensor_bytes(state) == 3 * 4 * 4 + 5 * 8 + 2


@pytest.mark.slow
def test_a_run_on_a_disk_with_too_little_room_is_warned_with_sizes(data: Path, monkeypatch, capsys) -> None:
    words = arguments(data, "--workers", 0, "--optimizer", "adam")
    assert run(words, "first") == 0
    size = tensor_bytes(checkpoint("first"))
    for out, room, warned in (("little", 0.9, True), ("enough", 1.1, False)):
        capsys.readouterr()
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, int(3 * size * room)))
        assert run([*words, "--epochs", "0"], out) == 0
        line = (f"warning: {int(3 * size * room / 1e6)} MB free in {out}, but the 3 checkpoints that may be there at once "
                f"need {math.ceil(3 * size / 1e6)} MB - free some space, or choose another --out\n")
        assert (line in capsys.readouterr().out) == warned


def test_checkpoints_that_are_there_already_need_no_more_room(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "last.pt").write_bytes(bytes(900_000))
    (tmp_path / "previous.pt").write_bytes(bytes(800_000))
    for free, warned in ((1_300_000, False), (1_299_999, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
        assert space_warning(tmp_path, 1_000_000) == (
            f"warning: 1 MB free in {tmp_path}, but the 3 checkpoints that may be there at once need 2 MB more - free some "
            "space, or choose another --out" if warned else None)


def test_a_write_that_is_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(file) -> None:
        file.write(b"half")
        raise Stopped(2)

    with pytest.raises(Stopped):
        files.atomic_write(tmp_path / "file", interrupted)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_the_old_file_is_copied_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    """Where there are no hard links, the old file is copied."""
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def no_space(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    for number in (1, 2):
        save(tmp_path, number)
    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", no_space)
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert newest_checkpoint(tmp_path)[0]["progress"] == 2
    save(tmp_path, 3)
    assert [read_checkpoint(tmp_path / name)["progress"] for name in ("last.pt", "previous.pt")] == [3, 2]


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_damaged_file_is_not_kept_in_place_of_a_whole_one(data: Path) -> None:
    """Killed at the worst moment of the first save after the damage, there still is a checkpoint to go on from."""
    words = arguments(data, "--workers", 0, "--epochs", 4)
    assert run(words, "whole") == 0
    assert run(words, "parts", At(STEP, 8, "SIGTERM")) == 143
    Path("parts/last.pt").write_bytes(b"")
    assert newest_checkpoint(Path("parts"))[0]["progress"]["updates"] == 6
    with pytest.raises(KeyboardInterrupt):
        run(words, "parts", At("byol_core.system.files:_keep_as", 2, "tests.run.test_full_disk:stop", after=True))
    assert newest_checkpoint(Path("parts"))[0]["progress"]["updates"] == 6
    assert run(words, "parts") == 0
    assert_same_run("whole", "parts")


def test_what_is_kept_twice_leaves_no_third_name(tmp_path: Path) -> None:
    """As after a kill between keeping the old file and replacing it: both names are then the same file."""
    save(tmp_path, 1)
    os.link(tmp_path / "last.pt", tmp_path / "previous.pt")
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
