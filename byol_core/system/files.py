"""Files that are either whole or absent: atomic writes, verified checkpoints, the exported backbone."""

import contextlib
import hashlib
import json
import os
import pickle
import pickletools
import re
import shutil
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, TypeGuard

import torch
from torch import Tensor

from byol_core.version import __version__

FORMAT = 1
KEYS = {"identity", "measured", "progress", "model", "optimizer", "scheduler", "scaler", "precision", "log", "scores"}
MORE_KEYS = {"format", "version", "torch", "device", "compiled", "world_size", "bad_files", "best"}  # not always there
BEFORE_1_6 = 0x1950a86a20f9469cfc6c  # with which torch's older files begin
WRAPPERS = ("module", "_orig_mod")  # children in which DataParallel, DDP and torch.compile keep a network
LAST, PREVIOUS = "last.pt", "previous.pt"
LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # what `atomic_write` writes to, by its name

# What a checkpoint holds: tensors and plain types only, so that weights_only=True loads it.
State = dict[str, object]


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint."""


class DamagedError(CheckpointError):
    """A file that may have been a checkpoint, and is none any more."""


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, size: int | None = None,
                 previous: Path | None = None) -> None:
    """Write a file beside `path`, flush it to the disk, and move it into place: a reader sees the old or the new file.

    size: bytes that it is about to take, for the message when they do not fit. previous: where to keep the old file; it gets
    that name only once the new one is whole, so that a failure costs neither of the two that were there.
    Raises: OSError with the path and the space left, the old files untouched and no other file left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep_as(path, previous)
        os.replace(beside, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if not isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as a RuntimeError about positions
            raise
        needs = "" if size is None else f"needs {size / 1e6:.0f} MB, "
        reason = next((reason for cause in (error, error.__context__) if (reason := getattr(cause, "strerror", None))),
                      "not all of it could be written, as on a full disk, or over a quota or ulimit -f")
        kept = " - the file before it is kept" if path.exists() else ""
        raise OSError(f"cannot write {path}: {reason} ({needs}{_free(path.parent)} free){kept}") from error


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB"
    except OSError:  # the folder itself is gone
        return "nothing"


def _keep_as(path: Path, name: Path) -> None:
    """Give the file in `path` a second name in the same folder, in place of what had that name."""
    beside = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        try:
            os.link(path, beside)
        except OSError:  # no hard links on this file system
            shutil.copyfile(path, beside)
        os.replace(beside, name)
    finally:
        beside.unlink(missing_ok=True)  # still there where both names were the same file: then replacing does nothing


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
        if LEFTOVER.fullmatch(leftover.name) and leftover.is_file():
            leftover.unlink(missing_ok=True)


def save_checkpoint(folder: Path, state: Mapping[str, object]) -> None:
    """Write last.pt and keep the one before as previous.pt; at every moment one of the two is whole."""
    atomic_write(folder / LAST, lambda file: torch.save({"format": FORMAT, **state}, file), size=tensor_bytes(state),
                 previous=folder / PREVIOUS)


def check_tensors(found: Mapping[object, object], like: Mapping[object, Tensor]) -> None:
    """Raises: CheckpointError unless every tensor in `found` is a plain one of the same shape as that of its name in `like`.

    An optimizer's kernels take that for granted, and would read and write beyond it. Numbers have no shape and pass.
    """
    for name, value in found.items():
        for tensor in value.values() if isinstance(value, Mapping) else [value]:
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                continue
            plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_complex())
            if name not in like or tensor.shape != like[name].shape or not plain \
                    or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CheckpointError(f"its tensor {name} is not that of this network")


def tensor_bytes(value: object) -> int:
    """What the tensors in nested dicts and sequences take on the disk, which is nearly all of a checkpoint."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def read_checkpoint(path: Path) -> State:
    """The checkpoint in `path`, on the CPU, after its checksums were verified; nothing in it is executed.

    Raises: CheckpointError saying what is wrong with the file.
    """
    state = read_verified(path)
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        if _are_weights(state):
            raise CheckpointError(f"{path} holds weights only - use --init-from to start from them")
        raise CheckpointError(f"{path} is not a byol_core checkpoint")
    if state["format"] > FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {state['format']}, this version reads up to {FORMAT} - "
                              "upgrade byol_core")
    missing, unknown = KEYS - state.keys(), state.keys() - KEYS - MORE_KEYS
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint: {', '.join(sorted(missing))} missing")
    if unknown:
        version, names = ([text[:40] for text in texts if isinstance(text, str) and text.isprintable()]
                          for texts in ([state.get("version")], unknown))  # of a hostile file it may be anything
        raise CheckpointError(f"{path} was written by byol_core {', '.join(version) or 'of no version'} and holds "
                              f"{', '.join(sorted(names)[:3]) or 'more'}, which this version ({__version__}) does not know - "
                              "upgrade byol_core")
    if _are_weights(state["model"]):
        state["model"] = _plain_names(state["model"])
    return state


def _plain_names(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of our own networks, of whose children none is called like a wrapper's."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): tensor for name, tensor in model.items()}
    return plain if len(plain) == len(model) else model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, such as backbone.pt, verified like a checkpoint."""
    state = read_verified(path)
    if not _are_weights(state):
        raise CheckpointError(f"{path} does not hold a network's weights - give a backbone.pt")
    return without_wrappers(state)


def read_backbone(path: Path) -> dict[str, Tensor]:
    """The online backbone's tensors from a weights file, or from a checkpoint of a run."""
    state = read_verified(path)
    if isinstance(state, dict) and "format" in state:
        return backbone_weights(read_checkpoint(path), "online", path)
    return read_weights(path)


def backbone_weights(state: State, network: str, path: Path) -> dict[str, Tensor]:
    """The tensors of one network's backbone in a checkpoint, under the backbone's own names. network: online or target."""
    weights = state["model"]
    if not _are_weights(weights):
        raise CheckpointError(f"{path} is not a whole checkpoint: its model is no network's weights")
    start = f"{network}.backbone."
    return {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}


def _are_weights(value: object) -> TypeGuard[dict[str, Tensor]]:
    return (isinstance(value, dict) and len(value) > 0
            and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()))


def without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the prefix that DataParallel, DDP or torch.compile puts before every name."""
    for wrapper in WRAPPERS:
        if weights and all(name.startswith(f"{wrapper}.") for name in weights):
            return without_wrappers({name.removeprefix(f"{wrapper}."): tensor for name, tensor in weights.items()})
    return weights


def read_verified(path: Path) -> object:
    """torch.load of plain data, checksums first: torch itself does not notice a flipped bit inside a tensor."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a checkpoint, but a {'folder' if path.is_dir() else 'pipe or a device'}")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise DamagedError(f"{path} is not a checkpoint: it is compressed, and may unpack to any size")
            damaged = archive.testzip()
        if damaged is not None:
            raise DamagedError(f"{path} is damaged (checksum mismatch in {damaged!r})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write; they are refused, or plain all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise _what_else(path) from error
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _holds_code(path, code[1] if code else "") from error
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except PermissionError:
        raise CheckpointError(f"cannot read {path}: permission denied") from None
    except Exception as error:  # unpicklers raise whatever they like on broken input
        raise _no_checkpoint(path) from error


def _what_else(path: Path) -> CheckpointError:
    """What is wrong with a file that is no archive: perhaps a bare pickle, of which a part is read and nothing carried out."""
    code, strings, whole, start = None, deque[str](maxlen=2), False, b""
    with contextlib.suppress(Exception), warnings.catch_warnings():  # on anything that is no pickle
        warnings.simplefilter("ignore")  # of odd escapes in a text
        with open(path, "rb") as file:
            start = file.read(2**20)
        for instruction, value, _ in pickletools.genops(start):
            if value == BEFORE_1_6:
                return CheckpointError(f"{path} is in the format of torch before 1.6 - torch.load it with weights_only=True, "
                                       "and torch.save it again")
            if instruction.name in ("GLOBAL", "INST"):
                code = code or str(value).replace(" ", ".")
            elif instruction.name == "STACK_GLOBAL":  # what is called stands in the strings before it, or somewhere else
                code = code or (".".join(strings) if len(strings) == 2 else "code")
            elif isinstance(value, str):
                strings.append(value)
            elif instruction.name not in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                strings.clear()
        whole = True
    if code is not None and (whole or start.startswith(pickle.PROTO)):  # or it is a text of which the beginning looks like it
        return _holds_code(path, code)
    return _no_checkpoint(path)


def _holds_code(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a byol_core checkpoint: it holds more than tensors and plain values"
                           f"{f' ({name[:80]})' if name and name.isprintable() else ''}, and nothing in it was run")


def _no_checkpoint(path: Path) -> DamagedError:
    return DamagedError(f"{path} is {'damaged or not a checkpoint' if path.stat().st_size else 'empty'}")


def newest_checkpoint(folder: Path) -> tuple[State | None, list[str]]:
    """(the newest whole checkpoint of a run folder or None where there never was one, a line per damaged file).

    Raises: CheckpointError when all of them are damaged, or when the newest is whole and still none to use.
    """
    present = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    damaged: list[str] = []
    for path in present:
        try:
            return read_checkpoint(path), damaged
        except DamagedError as error:
            damaged.append(str(error))
    if present:
        raise CheckpointError(f"{'; '.join(damaged)} - start a new run in another --out{_from_an_export(folder)}")
    return None, damaged


def _from_an_export(folder: Path) -> str:
    for name in ("best.pt", "backbone.pt"):
        with contextlib.suppress(CheckpointError):
            read_weights(folder / name)
            return f", or one from its network with --init-from {folder / name}"
    return ""


def replace_damaged(folder: Path) -> None:
    """Put the whole previous.pt in the place of a damaged last.pt, which the next save would else keep instead of it.

    Raises: CheckpointError where that cannot be done, as when last.pt is a folder.
    """
    try:
        _keep_as(folder / PREVIOUS, folder / LAST)
    except OSError as error:
        raise CheckpointError(f"cannot put {PREVIOUS} in the place of {folder / LAST}: {error.strerror} - move that away") \
            from error


def export_backbone(folder: Path, weights: Mapping[str, Tensor], about: Mapping[str, object], name: str = "backbone") -> None:
    """Write backbone.pt, bare tensors under torchvision's own names, and backbone.json, how to use them and their sha256.

    name: instead of backbone, such as best.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    path = folder / f"{name}.pt"
    atomic_write(path, lambda file: torch.save(plain, file))
    write_json(path.with_suffix(".json"), {**about, "sha256": sha256(path)})


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
