"""A set of images: which there are, in one order everywhere, and where each one is."""

import contextlib
import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from byol_core.images.decoding import FORMATS, BadImageError, in_silence, why
from byol_core.images.listing import (SUFFIXES, Found, ScanProgress, below, common_folder, expand, identity, near_name,
                                      read_list, refuse_nested, unread, walk)
from byol_core.images.shards import NO_LABEL, Shards, index_shards, pack
from byol_core.system.console import printable

SIZE_SAMPLE = 256  # files whose headers tell the typical image size
SHARD_INDEX = ".shards.pt"  # the file in which the index of shards is kept
COMPRESSED = {".gz", ".tgz", ".bz2", ".xz", ".zst"}  # suffixes of tars that cannot be read image by image


class Headers(NamedTuple):
    """Of the files that were looked at: the typical size, whether all agree, and how many have several frames or pages."""

    height: int
    width: int
    same_size: bool
    several_frames: int


@dataclass(frozen=True)
class ImageSet:
    """The images of folders, a list or tar shards: names in byte order, and class labels where there are any.

    given: what was asked for, for messages. root: where the names begin. names: uint8, the paths relative to it,
    '/'-separated and encoded, in one block, those in a shard below the shard's own; ends: (N,) where each name ends in it.
    labels: (N,) int64, positions in `classes`, or None. remarks: what was found amiss. shards: set when the
    images lie in tar files.
    """

    given: str
    root: Path
    names: Tensor = field(repr=False)
    ends: Tensor = field(repr=False)
    labels: Tensor | None = field(repr=False)
    classes: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    shards: Shards | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        """The path relative to the root, as the file system gave it (odd bytes as surrogates)."""
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.names[start:int(self.ends[index])].numpy().tobytes())

    def path(self, index: int) -> Path:
        """Where the image is; in a shard, a path that tells it from all others, though no file system knows it."""
        return self.root / self.name(index)

    def source(self, index: int) -> Path | IO[bytes]:
        """What `decode` reads image `index` from. Raises: BadImageError when its bytes cannot be had."""
        path = self.path(index)
        if self.shards is None:
            with contextlib.suppress(OSError):  # the decoder will say why
                if not stat.S_ISREG(path.stat().st_mode):
                    raise BadImageError("not a regular file")  # a pipe may never end
            return path
        try:
            return io.BytesIO(self.shards.read(index))
        except OSError as error:
            raise BadImageError(why(error)) from error

    def size(self, index: int) -> int:
        """Bytes of the image's file. Raises: OSError."""
        return self._regular(index).st_size if self.shards is None else self.shards.size(index)

    def read(self, index: int, most: int | None = None) -> bytes:
        """The image's file as it is, or its first `most` bytes. Raises: OSError."""
        if self.shards is not None:
            return self.shards.read(index, most)
        self._regular(index)
        with open(self.path(index), "rb") as file:
            return file.read(-1 if most is None else most)

    def _regular(self, index: int) -> os.stat_result:
        status = self.path(index).stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")  # a pipe may never end
        return status

    @cached_property
    def headers(self) -> "Headers":
        """What at most 256 files say of themselves, spread evenly over the set. Raises: ValueError when none can be opened."""
        sizes, several = [], 0
        for number in range(min(SIZE_SAMPLE, len(self))):
            try:
                source = self.source(number * len(self) // min(SIZE_SAMPLE, len(self)))
                with in_silence(), Image.open(source, formats=FORMATS) as image:
                    sizes.append((image.height, image.width))
                    several += getattr(image, "is_animated", False)
            except Exception:  # the loader will name it
                continue
        if not sizes:
            raise ValueError(f"none of the images of {self.given} that were tried can be opened, such as "
                             f"{printable(self.name(0))} - check --data")
        sizes.sort(key=min)
        return Headers(*sizes[len(sizes) // 2], len(set(sizes)) == 1, several)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when an image is added, removed or renamed, and when one moves within a shard."""
        digest = hashlib.blake2b(self.names.numpy().data, digest_size=16)
        if self.shards is not None:
            digest.update(self.shards.places.numpy().data)
        return digest.hexdigest()


@dataclass
class _Part:
    """The images of one folder, list or shard: their names below `prefix`, and where labels are taken from."""

    prefix: bytes
    names: list[bytes]
    classes: list[bytes | None]


def scan(data: str | Path | Sequence[str | Path], flag: str = "--data", leave_out: Sequence[Path] = (),
         keep_in: Path | None = None) -> ImageSet:
    """Find the images that `data` names: folders, one list (.txt), or shards (.tar, a pattern or folders of them).

    Folders are searched to any depth, links to folders followed once; hidden files and folders are left out, and the folders
    in leave_out, where they are below. keep_in: a folder for the index of shards, which need not be made again while they
    are the same.

    Labels are the first-level sub-folders, when every image lies in one and there are at least two; in a list what
    follows a tab; in shards the numbers in .cls members, where every image has one.
    Raises: ValueError when there is no such thing or no image in it, naming what is there instead.
    """
    asked = [str(part) for part in ([data] if isinstance(data, (str, Path)) else data)]
    if not asked or "" in asked:
        raise ValueError(f"{flag} is empty - name a folder, or . for this one")
    paths = [Path(name) for part in asked for name in expand(part, flag)]
    given, progress = ", ".join(str(Path(part)) for part in asked), ScanProgress()
    try:
        folders = all(path.is_dir() for path in paths)
    except PermissionError as error:
        raise ValueError(f"{flag} {error.filename}: permission denied - check the rights of the folders that it lies "
                         "in") from None
    if folders:
        return _scan_folders(given, paths, flag, leave_out, keep_in, progress)
    for path in paths:
        _check_exists(path, flag, len(paths))
    if all(path.suffix == ".tar" and path.is_file() for path in paths):
        return _scan_shards(given, paths, flag, keep_in, progress, ())
    if len(paths) == 1 and paths[0].suffix == ".txt":
        return _scan_list(given, paths[0], flag)
    odd = next(path for path in paths if not path.is_dir())
    if len(paths) > 1 and odd.suffix in (".tar", ".txt"):
        raise ValueError(f"{flag} {given}: give folders, or tar shards, or one list, not some of each")
    raise ValueError(f"{flag} {odd} is a file - give the folder it is in, a .txt list of paths, or .tar shards (not "
                     "compressed)")


def _check_exists(path: Path, flag: str, number: int) -> None:
    if not path.exists():
        kind = "list" if path.suffix == ".txt" else "shard" if path.suffix == ".tar" else "folder"
        one_of = f" (one of {number})" if number > 1 else ""
        raise ValueError(f"no such {kind}: {path}{one_of} - {near_name(path) or f'check {flag}'}")


def _scan_folders(given: str, folders: list[Path], flag: str, leave_out: Sequence[Path], keep_in: Path | None,
                  progress: ScanProgress) -> ImageSet:
    refuse_nested(folders, flag)
    root = folders[0] if len(folders) == 1 else common_folder(folders)
    left_out = {identity(folder) for folder in leave_out if folder.exists()}
    seen = left_out - {identity(folder) for folder in folders}
    found = [walk(folder, seen, progress) for folder in folders]
    remarks = [f"cannot list {folder}" for part in found for folder in part.unreadable]
    tars = [folder / os.fsdecode(tar) for folder, part in zip(folders, found) for tar in part.tars]
    if not any(part.images for part in found) and tars:
        return _scan_shards(given, tars, flag, keep_in, progress, remarks)
    for folder, part in zip(folders, found):
        if not part.images:
            raise ValueError(_nothing_found(folder, part, flag))
    remarks += unread(sum((part.others for part in found), Counter()))
    if tars:
        remarks.append(f"{len(tars)} tar files beside the images are not used: the first is {tars[0]}")
    parts = []
    for folder, part in zip(folders, found):
        names = sorted(part.images)
        parts.append(_Part(below(folder, root) + b"/" if len(folders) > 1 else b"", names, _first_folders(names)))
    return _assemble(given, root, parts, remarks)


def _nothing_found(folder: Path, found: Found, flag: str) -> str:
    others = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in found.others.most_common(3))
    hint = "decompress tars, or their images cannot be read one by one" if COMPRESSED & set(found.others) else f"check {flag}"
    return (f"no images under {folder}: looked for {' '.join(SUFFIXES)} there and in sub-folders"
            f"{'; found ' + others if others else ''}"
            f"{'; cannot list ' + found.unreadable[0] if found.unreadable else ''} - {hint}")


def _scan_list(given: str, path: Path, flag: str) -> ImageSet:
    labels, remarks = read_list(path, flag)
    if not labels:
        raise ValueError(f"{flag} {path} lists no images - write one path per line")
    names = sorted(labels)
    classes = [labels[name] for name in names]
    del labels  # a million are 80 MB
    if None in classes and any(classes):
        remarks.append(f"{classes.count(None)} of the {len(names)} lines of {path} have no label, so none is used")
    return _assemble(given, path.parent, [_Part(b"", names, classes)], remarks)


def _scan_shards(given: str, tars: list[Path], flag: str, keep_in: Path | None, progress: ScanProgress,
                 remarks: Sequence[str]) -> ImageSet:
    refuse_nested(tars, flag)
    root = common_folder([tar.parent for tar in tars])
    tars = sorted(tars, key=lambda tar: below(tar, root) + b"/")
    indices = index_shards(tars, flag, progress, None if keep_in is None else keep_in / SHARD_INDEX)
    if not any(index.names for index in indices):
        raise ValueError(f"no images in the {len(tars)} shards of {flag} {given}: looked for {' '.join(SUFFIXES)}")
    labels = torch.cat([index.labels for index in indices])
    numbers = None if (labels == NO_LABEL).any() else labels
    parts = [_Part(below(tar, root) + b"/", index.names, _first_folders(index.names) if numbers is None else [])
             for tar, index in zip(tars, indices)]
    remarks = [*remarks, *(remark for index in indices for remark in index.remarks)]
    if numbers is None and (labels != NO_LABEL).any():
        remarks.append("some images in the shards have no whole number in a .cls member, so these labels are not used")
    ends = torch.tensor([len(index.names) for index in indices]).cumsum(0).tolist()
    shards = Shards(tars, ends, torch.cat([index.places for index in indices]))
    return _assemble(given, root, parts, remarks, shards, numbers)


def _assemble(given: str, root: Path, parts: list[_Part], remarks: Sequence[str], shards: Shards | None = None,
              numbers: Tensor | None = None) -> ImageSet:
    """One set of the parts, of whose prefixes none begins another: sorted by these, all names are sorted."""
    parts.sort(key=lambda part: part.prefix)
    names = [part.prefix + name for part in parts for name in part.names] if parts[0].prefix else parts[0].names
    labels, classes = _labels([name for part in parts for name in part.classes]) if numbers is None else _ranks(numbers)
    return ImageSet(given, root, *pack(names), labels, classes, tuple(remarks), shards)


def _first_folders(names: list[bytes]) -> list[bytes | None]:
    once: dict[bytes | None, bytes | None] = {}
    return [once.setdefault(folder, folder) for name in names for end in (name.find(b"/"),)
            for folder in (name[:end] if end > 0 else None,)]


def _labels(names: list[bytes | None]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Names as positions in the sorted classes; none where one is missing, or all are the same."""
    classes = sorted({name for name in names if name is not None})
    if None in names or len(classes) < 2:
        return None, ()
    position = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([position[name] for name in names if name is not None])
    return labels, tuple(printable(os.fsdecode(name)) for name in classes)


def _ranks(numbers: Tensor) -> tuple[Tensor | None, tuple[str, ...]]:
    """Numbers as positions in the classes, which are the numbers that occur; none where all are the same."""
    classes, labels = numbers.unique(return_inverse=True)
    return (labels, tuple(map(str, classes.tolist()))) if len(classes) > 1 else (None, ())
