"""Files are whole or absent, damage is noticed, and nothing in a file is ever run."""

import itertools
import multiprocessing
import os
import pickle
import random
import sys
import time
import zipfile
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import pytest
import torch

from byol_core.system.files import (CheckpointError, atomic_write, newest_checkpoint, read_checkpoint, read_weights,
                                    remove_leftovers, save_checkpoint, write_json)
from tests.fuzz import Payload
from tests.helpers.forking import PATIENCE_S
from tests.helpers.modules import save

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_save_ends(tmp_path: Path, monkeypatch) -> None:
    """Or a power cut leaves an empty file under the right name."""
    calls: list[tuple[str, int]] = []  # what is flushed, by inode, and what is renamed
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(("fsync", os.fstat(handle).st_ino)), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(("replace", os.stat(old).st_ino)), replace(old, new)))
    atomic_write(tmp_path / "file", lambda file: file.write(b"content"))
    inode = (tmp_path / "file").stat().st_ino
    assert calls == [("fsync", inode), ("replace", inode), ("fsync", tmp_path.stat().st_ino)]


def save_for_ever(folder: Path, saved: EventType) -> None:
    for number in itertools.count():
        save(folder, number)
        saved.set()


def die_before_last_is_replaced(folder: Path) -> None:
    replace = os.replace
    os.replace = lambda old, new: os._exit(9) if Path(new).name == "last.pt" else replace(old, new)
    save(folder, 2)


@needs_fork
def test_save_interrupted_before_replace_leaves_the_old_file_loadable(tmp_path: Path) -> None:
    save(tmp_path, 1)
    child = multiprocessing.get_context("fork").Process(target=die_before_last_is_replaced, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert read_checkpoint(tmp_path / "last.pt")["progress"] == 1
    assert list(tmp_path.glob(".*.tmp"))
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
@needs_fork
def test_a_hundred_kills_during_saves_leave_a_hundred_good_files(tmp_path: Path) -> None:
    processes, generator = multiprocessing.get_context("fork"), random.Random(0)
    for _ in range(100):
        saved = processes.Event()
        child = processes.Process(target=save_for_ever, args=(tmp_path, saved))
        child.start()
        assert saved.wait(PATIENCE_S)
        time.sleep(generator.uniform(0.0, 0.02))
        child.kill()
        child.join()
        state = read_checkpoint(tmp_path / "last.pt")
        assert bool((state["scores"] == state["progress"]).all())
    assert newest_checkpoint(tmp_path)[1] == []
    assert list(tmp_path.glob(".last.pt.*.tmp"))  # kills came within a save


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: bytes(len(data)), lambda data: data[:-1], lambda data: data[:len(data) // 2],
    lambda data: b"<html>404</html>",
])
def test_a_damaged_file_is_noticed_and_the_one_before_used(tmp_path: Path, damage) -> None:
    for number in (2, 3):
        save(tmp_path, number)
    path = tmp_path / "last.pt"
    path.write_bytes(damage(path.read_bytes()))
    state, lines = newest_checkpoint(tmp_path)
    assert state is not None and state["progress"] == 2
    assert len(lines) == 1 and "last.pt is " in lines[0]


def test_one_flipped_byte_is_noticed_though_torch_does_not(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 3)
    path = tmp_path / "last.pt"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    data[member.header_offset + 2000] ^= 1
    path.write_bytes(data)
    assert not bool((torch.load(path, weights_only=True)["scores"] == 3.0).all())  # wrong, silently
    with pytest.raises(CheckpointError, match="checksum mismatch in .*data/0"):
        read_checkpoint(path)
    assert newest_checkpoint(tmp_path)[0]["progress"] == 2


def test_all_checkpoints_damaged_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    for number in (2, 3):
        save(tmp_path, number)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    advice = "last.pt is empty.*previous.pt is empty - start a new run in another --out"
    with pytest.raises(CheckpointError, match=f"{advice}$"):
        newest_checkpoint(tmp_path)
    for name in ("backbone.pt", "best.pt"):
        torch.save({"conv1.weight": torch.ones(1)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{advice}, or one from its network with --init-from .*/{name}$"):
            newest_checkpoint(tmp_path)
    (tmp_path / "best.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="--init-from .*/backbone.pt$"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("protocol", [None, *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, protocol: int | None) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    if protocol is None:
        torch.save({"format": 1, "payload": Payload(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(marker), protocol))
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert not marker.exists() and "weights_only" not in str(error.value)
    name = f"{os.name}.mkdir"  # of the module in which Python has it
    assert str(error.value) == (f"{path} is not a byol_core checkpoint: it holds more than tensors and plain values ({name}), "
                                "and nothing in it was run")


TEXTS = {"csv": b"class,score\ncat,1\n", "yaml": b"config:\n  lr: .1\n", "lines": b"class\ncat\ndog\n", "marks": b"(" * 2**22,
         "no end of a line": b"c" * 2**22, "a length beyond all": b"\x8e" + (2**62).to_bytes(8, "little") + b"x",
         "numpy": b"\x93NUMPY\x01\x00v", "an odd escape": b"S'\\\xb8'\n"}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_a_text_is_not_taken_for_code_and_read_no_further_than_need_be(tmp_path: Path, content: bytes, recwarn) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.pt is damaged or not a checkpoint$"):
        read_checkpoint(tmp_path / "x.pt")
    assert not recwarn.list


@pytest.mark.parametrize("content, name", [
    (b"(S'touch marker'\nios\nsystem\n.", "os.system"),
    (b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x8c\x05torch\x94\x8c\x05Float\x94h\x00h\x01\x93.", "code")])
def test_code_in_a_bare_pickle_is_named_where_its_name_is_sure(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"than tensors and plain values \({name}\), and nothing in it was run$"):
        read_checkpoint(tmp_path / "x.pt")


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="holds weights only - use --init-from"):
        read_checkpoint(tmp_path / "weights.pt")
    assert list(read_weights(tmp_path / "weights.pt")) == ["conv1.weight"]
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="old.pt is in the format of torch before 1.6 - torch.load it with"):
        read_weights(tmp_path / "old.pt")
    torch.save({"format": 2}, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="format 2, this version reads up to 1 - upgrade"):
        read_checkpoint(tmp_path / "newer.pt")
    torch.save({"format": 1, "model": {}}, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match="not a whole checkpoint: identity, log, "):
        read_checkpoint(tmp_path / "part.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="is not a byol_core checkpoint"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_checkpoint(tmp_path)
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not hold a network's weights"):
        read_weights(tmp_path / "last.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits there")
def test_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    import resource
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write .*last.pt: .* MB free"):
            save_checkpoint(tmp_path, {"tensor": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_checkpoint(tmp_path / "last.pt")["progress"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_numbers_that_are_not_json_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()
