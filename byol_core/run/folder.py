"""A run's own folder: one run at a time, never overwritten by another."""

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from byol_core.report.facts import read_run, read_text
from byol_core.run.options import TrainConfig
from byol_core.system.files import LAST, PREVIOUS, remove_leftovers

RUNS = Path("runs")
CHECKPOINTS = 3  # checkpoints on the disk at the most: the last one, the one before, and the one being written
KEPT = {".lock", ".images.pt", ".shards.pt"}  # the lock, and what a scan keeps, or kept in earlier versions
LONGEST_NAME = 100  # characters
OWN_FILES = {"config.json", "metrics.jsonl", "train.log", "summary.json", "report.html", "bad_files.txt", "copies.txt",
             "views.png", "neighbours.png", "embedding.png", "backbone.pt", "backbone.json", "best.pt", "best.json"}
EVENTS = "events.out.tfevents."  # how TensorBoard's files begin


def choose_out(config: TrainConfig) -> Path:
    """--out, or a predictable place, so that the same command with --resume goes on; --check has a folder beside it.

    Raises: ValueError for an --out of nothing.
    """
    if config.out == "":
        raise ValueError("--out is empty - name a folder, or . for this one")
    folder = Path(config.out) if config.out is not None else RUNS / "+".join(map(_short_name, config.data))[:LONGEST_NAME]
    return Path(f"{folder.resolve()}-check") if config.check else folder


def _short_name(data: str) -> str:
    """Of a folder its name; of a list, a shard or a pattern of shards what comes before the suffix and the numbers."""
    path = Path(data)
    if path.suffix in (".txt", ".tar") and not path.is_dir():
        return path.stem.split("{")[0].rstrip("-_.") or path.resolve().parent.name or "root"
    return path.resolve().name or "root"


def goes_on_in_its_folder(config: TrainConfig) -> bool:
    """Whether --resume reads from the run folder itself."""
    if config.check:
        return False  # there is nothing to go on with, and what is not a check's is not to be touched
    if config.resume:
        source = Path(config.resume)
        return (source if source.is_dir() else source.parent).resolve() == choose_out(config).resolve()
    return config.resume is not None


@contextlib.contextmanager
def open_run_folder(folder: Path, may_be_used: bool, launch: str = "") -> Iterator[Path]:
    """The folder, made if need be and locked against a second run until the block ends.

    launch: which call of torchrun begins a run in it, for `launch_of`.
    Raises: ValueError when it cannot be written to, is in use, or holds something and may not be used.
    """
    try:
        was_there, lock_was_there = folder.is_dir(), (folder / ".lock").exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_lock(folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"cannot write to {folder}: {reason} - choose another --out") from None
    with lock:
        if hasattr(os, "register_at_fork"):  # or a data worker would hold the lock for a while after this process is killed
            os.register_at_fork(after_in_child=lock.close)
        try:
            _refuse_used(folder, may_be_used)
        except ValueError:
            if not lock_was_there:  # the folder stays as it was
                os.unlink(folder / ".lock")
            raise
        with contextlib.suppress(OSError):  # on a full disk
            os.ftruncate(lock.fileno(), 0)
            began = datetime.now().isoformat(" ", "minutes")
            os.write(lock.fileno(), f"pid {os.getpid()} on {platform.node()} since {began}\n{launch}".encode())
        remove_leftovers(folder)
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):  # as when the folder was deleted
                if {entry.name for entry in folder.iterdir()} <= KEPT:  # nothing came of it
                    shutil.rmtree(folder, ignore_errors=True)
                    if was_there:
                        folder.mkdir(exist_ok=True)


def _open_lock(folder: Path) -> TextIO:
    """.lock of the folder, locked: the file that has this name, and not one that another process has just removed."""
    while True:
        lock = open(folder / ".lock", "a+", encoding="utf-8")
        try:
            _lock(lock.fileno(), folder)
            status = os.fstat(lock.fileno())
            if (status.st_dev, status.st_ino) == lock_of(folder):
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: one run per folder is then up to the user
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = read_text(folder / ".lock").partition("\n")[0] or "another process"
        raise ValueError(f"another run ({holder}) is using {folder} - wait for it, or choose another --out") from None
    except OSError:  # a file system without locks: as on Windows
        return


def launch_of(folder: Path) -> str:
    """Which call of torchrun has begun the run in `folder`; "" where none has."""
    return read_text(folder / ".lock").partition("\n")[2]


def lock_of(folder: Path) -> tuple[int, int] | None:
    """Which file the lock of a run folder is; None where there is none."""
    try:
        status = os.stat(folder / ".lock")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def space_warning(folder: Path, checkpoint: int) -> str | None:
    """A line where the disk has less room than the checkpoints of a run need. checkpoint: bytes of one."""
    free = shutil.disk_usage(folder).free
    there = sum((folder / name).stat().st_size for name in (LAST, PREVIOUS) if (folder / name).exists())
    needed = CHECKPOINTS * checkpoint - there
    if free >= needed:
        return None
    return (f"warning: {free // 10**6} MB free in {folder}, but the {CHECKPOINTS} checkpoints that may be there at once need "
            f"{-(-needed // 10**6)} MB{' more' if there else ''} - free some space, or choose another --out")


def _refuse_used(folder: Path, may_be_used: bool) -> None:
    """What a run left that ended before its first checkpoint is cleared away; anything else is refused."""
    if (folder / LAST).exists() or (folder / PREVIOUS).exists():
        if may_be_used:
            return
        run = read_run(folder)
        raise ValueError(f"{folder} already holds a run (epoch {run.summary['epochs']}/{run.plan.get('epochs', '?')}) - add "
                         "--resume to go on, or choose another --out")
    visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    foreign = [entry.name for entry in visible if entry.name not in OWN_FILES and not entry.name.startswith(EVENTS)]
    if (folder / "backbone.pt").exists():  # of a finished run whose checkpoints were removed
        raise ValueError(f"{folder} already holds a finished run (backbone.pt) - choose another --out, or move it away")
    if foreign:
        raise ValueError(f"{folder} is not empty (it holds {foreign[0]}) - choose another --out")
    for entry in visible:
        if entry.name != "train.log":
            entry.unlink()
