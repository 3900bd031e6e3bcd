"""Files that are either whole or absent: atomic writes, verified checkpoints, the exported backbone."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

FORMAT = 1
KEYS = {"identity", "measured", "progress", "model", "optimizer", "scheduler", "scaler", "precision", "log", "scores"}
LAST, PREVIOUS = "last.pt", "previous.pt"

# What a checkpoint holds: tensors and plain types only, so that weights_only=True loads it.
State = dict[str, object]


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint."""


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside `path`, flush it to the disk, and move it into place: a reader sees the old or the new file.

    Raises: OSError with the path and the space left, the old file untouched and no other file left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError about positions
        with contextlib.suppress(OSError):
            beside.unlink()
        free = shutil.disk_usage(path.parent).free / 1e6
        reason = getattr(error, "strerror", None) or "not all of it could be written, as on a full disk"
        kept = " - the file before it is kept" if path.exists() else ""
        raise OSError(f"cannot write {path}: {reason} ({free:.0f} MB free){kept}") from error


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def save_checkpoint(folder: Path, state: Mapping[str, object]) -> None:
    """Write last.pt and keep the one before as previous.pt; at every moment one of the two is whole."""
    last = folder / LAST
    if last.exists():
        second_name = folder / f".{PREVIOUS}.{os.getpid()}.tmp"
        second_name.unlink(missing_ok=True)
        try:
            os.link(last, second_name)
        except OSError:  # no hard links on this file system
            shutil.copyfile(last, second_name)
        os.replace(second_name, folder / PREVIOUS)
    atomic_write(last, lambda file: torch.save({"format": FORMAT, **state}, file))


def read_checkpoint(path: Path) -> State:
    """The checkpoint in `path`, on the CPU, after its checksums were verified; nothing in it is executed.

    Raises: CheckpointError saying what is wrong with the file.
    """
    state = _read_verified(path)
    if not isinstance(state, dict) or "format" not in state:
        if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path} holds weights only - use --init-from to start from them")
        raise CheckpointError(f"{path} is not a byol_core checkpoint")
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {state['format']}, this version reads up to {FORMAT} - "
                              "upgrade byol_core")
    missing = KEYS - state.keys()
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint: {', '.join(sorted(missing))} missing")
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, such as backbone.pt, verified like a checkpoint."""
    state = _read_verified(path)
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise CheckpointError(f"{path} does not hold a network's weights - give a backbone.pt")
    return state


def read_backbone(path: Path) -> dict[str, Tensor]:
    """The online backbone's tensors from a weights file, or from a checkpoint of a run."""
    state = _read_verified(path)
    if isinstance(state, dict) and "format" in state:
        start = "online.backbone."
        model = read_checkpoint(path)["model"]
        assert isinstance(model, dict)
        return {name.removeprefix(start): tensor for name, tensor in model.items() if name.startswith(start)}
    return read_weights(path)


def _read_verified(path: Path) -> object:
    """torch.load of plain data, checksums first: torch itself does not notice a flipped bit inside a tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged (checksum mismatch in {damaged})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not a byol_core checkpoint: it holds more than tensors and plain values, "
                              "and nothing in it was run") from error
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        empty = path.is_file() and path.stat().st_size == 0
        raise CheckpointError(f"{path} is {'empty' if empty else 'damaged or not a checkpoint'}") from error


def newest_checkpoint(folder: Path) -> tuple[State | None, list[str]]:
    """(the newest whole checkpoint of a run folder or None where there never was one, a line per damaged file).

    Raises: CheckpointError when there are checkpoints and all of them are damaged.
    """
    present = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    damaged: list[str] = []
    for path in present:
        try:
            return read_checkpoint(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if present:
        raise CheckpointError("; ".join(damaged))
    return None, damaged


def export_backbone(folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write backbone.pt, bare tensors under torchvision's own names, and backbone.json, how to use them and their sha256."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    atomic_write(folder / "backbone.pt", lambda file: torch.save(plain, file))
    write_json(folder / "backbone.json", {**about, "sha256": sha256(folder / "backbone.pt")})


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
