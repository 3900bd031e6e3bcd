"""What `--data` names: the image files and tars below a folder, the lines of a list, the numbers of a pattern."""

import difflib
import math
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product, zip_longest
from pathlib import Path

from byol_core.system.console import printable, show

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
IMAGE_ENDINGS = tuple(suffix.encode() for suffix in SUFFIXES)
# Pictures that are not read, so that nobody believes they were trained on.
UNREAD = {".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jpx", ".jxl", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
          ".psd", ".ico", ".svg", ".dng", ".cr2", ".nef", ".arw", ".dcm"}
TAR_ENDING = b".tar"
SHARDS_AT_MOST = 1_000_000  # named by one pattern
SHOW_AFTER, SHOW_EVERY = 3.0, 10.0  # seconds of scanning
SHOW_CHECKED = 1_000  # images after which the clock is looked at


def is_hidden(name: bytes) -> bool:
    """Whether a file or folder is left out for its name: hidden, or what archives of a Mac leave behind."""
    return name.startswith(b".") or name == b"__MACOSX"


def unread(others: "Counter[str]") -> list[str]:
    """A remark on pictures of formats that are not read. others: how many files there are by suffix, but for images."""
    told = ", ".join(f"{number} {suffix}" for suffix, number in sorted(others.items()) if suffix in UNREAD)
    return [f"left out, as these formats are not read: {told}"] if told else []


class ScanProgress:
    """A line on stderr now and then, for scans that take more than a few seconds."""

    def __init__(self) -> None:
        self.images = 0
        self.due = time.monotonic() + SHOW_AFTER

    def advance(self, images: int, place: bytes) -> None:
        self.images += images
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + SHOW_EVERY
            show(sys.stderr, f"scanning: {self.images:,} images so far, now in {printable(os.fsdecode(place))}\n")


@dataclass
class Found:
    """Below a folder, as paths relative to it: images, tars, and how many others by suffix; folders that cannot be listed."""

    images: list[bytes] = field(default_factory=list)
    tars: list[bytes] = field(default_factory=list)
    others: "Counter[str]" = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)


def walk(root: Path, seen: set[tuple[int, int]], progress: ScanProgress) -> Found:
    """The files below `root` at any depth, links to folders followed once; seen: (device, inode) of folders to leave out."""
    found = Found()
    pending = [(os.fsencode(root), b"")]
    while pending:
        folder, prefix = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue  # a second way into the same folder: a link, or a loop of them
            seen.add((status.st_dev, status.st_ino))
            pending += sorted(_sort_entries(folder, prefix, found, progress), reverse=True)
        except OSError as error:
            found.unreadable.append(f"{printable(os.fsdecode(prefix or folder))}: {error.strerror}")
    return found


def _sort_entries(folder: bytes, prefix: bytes, found: Found, progress: ScanProgress) -> list[tuple[bytes, bytes]]:
    """Add the files of one folder to `found`; its sub-folders, as (path, path relative to the root and a slash)."""
    folders, counted = [], len(found.images)
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if is_hidden(name):
                continue
            if not entry.is_file(follow_symlinks=False) and _is_folder(entry):
                folders.append((entry.path, prefix + name + b"/"))
                continue
            ending = name.lower()
            if ending.endswith(IMAGE_ENDINGS):
                if not _is_special(entry):
                    found.images.append(prefix + name)
                    if len(found.images) - counted == SHOW_CHECKED:
                        progress.advance(SHOW_CHECKED, folder)
                        counted = len(found.images)
                continue
            if ending.endswith(TAR_ENDING) and not _is_special(entry):
                found.tars.append(prefix + name)
            found.others[os.path.splitext(os.fsdecode(name))[1].lower()] += 1
    progress.advance(len(found.images) - counted, folder)
    return folders


def identity(folder: bytes | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _is_special(entry: "os.DirEntry[bytes]") -> bool:
    """Whether it is a pipe, a socket or a device, which may never end; a broken link is a file that cannot be read."""
    if entry.is_file(follow_symlinks=False):
        return False
    try:
        return not stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


def read_list(path: Path, flag: str) -> tuple[dict[bytes, bytes | None], list[str]]:
    """(label or None by path, remarks) from a text file of one `path` or `path<TAB>label` a line.

    Blank lines and those that begin with '#' are left out; a path that is there twice counts once.
    Raises: ValueError when it is no plain text, or names one path with two labels.
    """
    labels: dict[bytes, bytes | None] = {}
    values: dict[bytes, bytes] = {}  # each label once
    repeated = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
            if b"\0" in line:
                raise ValueError(f"{flag} {path} is no plain text - save it as UTF-8, one path per line")
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if not line.strip() or line.startswith(b"#"):
                continue
            name, _, label = line.partition(b"\t")
            name = b"/".join(part for i, part in enumerate(name.split(b"/")) if part != b"." and (part or i == 0))
            repeated += name in labels
            label = label.strip()
            value = values.setdefault(label, label) if label else None
            if labels.setdefault(name, value) != value:
                raise ValueError(f"{flag} {path}, line {number}: {printable(os.fsdecode(name))} has another label above - "
                                 "keep one of them")
    return labels, [f"{repeated} lines of {path} repeat a path, which is used once"] if repeated else []


def expand(pattern: str, flag: str) -> list[str]:
    """'a-{08..10}.tar' as a-08.tar, a-09.tar, a-10.tar; a name without braces, or one that exists, as it is.

    Raises: ValueError for more names than anyone has shards.
    """
    if os.path.exists(pattern):
        return [pattern]
    texts = re.split(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)  # text, low, high, text, low, high, text
    ranges = [(int(low), int(high), len(low)) for low, high in zip(texts[1::3], texts[2::3])]
    names = math.prod(max(high - low + 1, 0) for low, high, _ in ranges)
    if not 0 < names <= SHARDS_AT_MOST:
        raise ValueError(f"{flag} {pattern} stands for {names} names - use {{0000..0099}} with the lower number first")
    words = ([f"{number:0{width}d}" for number in range(low, high + 1)] for low, high, width in ranges)
    return ["".join(map("".join, zip_longest(texts[::3], chosen, fillvalue=""))) for chosen in product(*words)]


def common_folder(paths: Sequence[Path]) -> Path:
    """The innermost folder that all these paths are written to lie in, links and '..' left as they are."""
    if len({path.is_absolute() for path in paths}) > 1:
        paths = [path.absolute() for path in paths]
    return Path(os.path.commonpath(paths) if paths else "")


def below(path: Path, root: Path) -> bytes:
    """`path` relative to `root`, which it was written to lie in."""
    full = path.absolute() if root.is_absolute() else path
    return os.fsencode("/".join(full.parts[len(root.parts):]))


def refuse_nested(folders: Sequence[Path], flag: str) -> None:
    """Raises: ValueError when one of them is, or lies in, another, as each image is to be used once."""
    for written in (os.path.abspath, os.path.realpath):
        ordered = sorted((os.path.join(written(folder), ""), folder) for folder in folders)
        for (outer, first), (inner, second) in zip(ordered, ordered[1:]):
            if inner.startswith(outer):
                raise ValueError(f"{flag} names {second} {'twice' if inner == outer else f'and {first}, in which it lies'} - "
                                 "leave one of them out")


def near_name(path: Path) -> str:
    """A suggestion, where there is something of nearly the same name."""
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix in (".tar", ".txt")]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else ""
