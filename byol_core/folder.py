"""A folder of images: which files there are, in one order everywhere, and how one of them becomes upright RGB pixels."""

import difflib
import hashlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # what may lie behind a suffix; Pillow knows formats that start programs
MAX_PIXELS = 89_478_485  # a 24-bit image of 256 MiB; more is taken for a decompression bomb
SIZE_SAMPLE = 256  # files whose headers tell the typical image size


class BadImageError(ValueError):
    """An image file that cannot be used, with the reason."""


@dataclass(frozen=True)
class ImageSet:
    """The image files under `root`: relative names in byte order, and class labels where class sub-folders exist.

    names: the relative paths, '/'-separated and encoded, in one block; ends: (N,) where each name ends in it. labels:
    (N,) int64, positions in `classes`, or None. skipped_folders: those that could not be listed.
    """

    root: Path
    names: bytes = field(repr=False)
    ends: Tensor = field(repr=False)
    labels: Tensor | None = field(repr=False)
    classes: tuple[str, ...]
    skipped_folders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        """The path relative to the root, as the file system gave it (odd bytes as surrogates)."""
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.names[start:int(self.ends[index])])

    def path(self, index: int) -> Path:
        return self.root / self.name(index)

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or renamed."""
        return hashlib.blake2b(self.names, digest_size=16).hexdigest()


def printable(name: str) -> str:
    """`name` with everything that a terminal, JSON or HTML could stumble over written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def scan(root: str | Path, flag: str = "--data", leave_out: Sequence[Path] = ()) -> ImageSet:
    """Find the images under `root`, at any depth, following links to folders once.

    Hidden files and folders are left out, and the folders in leave_out, where they are below `root`.

    Labels are the first-level sub-folders, when every image lies in one and there are at least two.
    Raises: ValueError when `root` is no folder or holds no images, naming what is there instead.
    """
    if not str(root):
        raise ValueError(f"{flag} is empty - name a folder, or . for this one")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{flag} {root} is a file - give the folder it is in" if root.exists() else
                         f"no such folder: {root} - {_near_name(root) or f'check {flag}'}")
    names, others, unreadable = _walk(root, leave_out)
    if not names:
        found = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in others.most_common(3))
        raise ValueError(f"no images under {root}: looked for {' '.join(SUFFIXES)} there and in sub-folders"
                         f"{'; found ' + found if found else ''} - check {flag}")
    names.sort()
    labels, classes = _labels(names)
    ends = torch.tensor([len(name) for name in names]).cumsum(0)
    return ImageSet(root, b"".join(names), ends, labels, classes, tuple(unreadable))


def _near_name(root: Path) -> str:
    try:
        siblings = [entry.name for entry in root.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(root.name, siblings, n=1)
    return f"did you mean {root.parent / near[0]}?" if near else ""


def _walk(root: Path, leave_out: Sequence[Path]) -> tuple[list[bytes], "Counter[str]", list[str]]:
    names: list[bytes] = []
    others: Counter[str] = Counter()
    unreadable: list[str] = []
    pending = [(os.fsencode(root), b"")]
    seen = {_identity(folder) for folder in leave_out if folder.exists() and not folder.samefile(root)}
    while pending:
        folder, prefix = pending.pop()
        if _identity(folder) in seen:
            continue  # a second way into the same folder: a link, or a loop of them
        seen.add(_identity(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            unreadable.append(f"{printable(os.fsdecode(prefix or folder))}: {error.strerror}")
            continue
        for entry in entries:
            if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                continue
            if _is_folder(entry):
                pending.append((entry.path, prefix + entry.name + b"/"))
            elif os.fsdecode(entry.name).lower().endswith(SUFFIXES):
                if not _is_special(entry):
                    names.append(prefix + entry.name)
            else:
                others[os.path.splitext(os.fsdecode(entry.name))[1].lower()] += 1
    return names, others, unreadable


def _identity(folder: bytes | Path) -> tuple[int, int]:
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


def _labels(names: list[bytes]) -> tuple[Tensor | None, tuple[str, ...]]:
    tops = [name.split(b"/", 1)[0] if b"/" in name else None for name in names]
    classes = sorted({top for top in tops if top is not None})
    if None in tops or len(classes) < 2:
        return None, ()
    position = {top: number for number, top in enumerate(classes)}
    labels = torch.tensor([position[top] for top in tops if top is not None])
    return labels, tuple(printable(os.fsdecode(top)) for top in classes)


def typical_size(images: ImageSet) -> tuple[int, int, bool]:
    """(height, width, whether all that were looked at agree) from the headers of files spread evenly over the set.

    Raises: ValueError when none of them can be opened.
    """
    sizes = []
    for number in range(min(SIZE_SAMPLE, len(images))):
        try:
            with Image.open(images.path(number * len(images) // min(SIZE_SAMPLE, len(images))), formats=FORMATS) as image:
                sizes.append((image.height, image.width))
        except Exception:  # a broken file: the loader will name it
            continue
    if not sizes:
        raise ValueError(f"none of the images under {images.root} that were tried can be opened - check --data")
    sizes.sort(key=min)
    height, width = sizes[len(sizes) // 2]
    return height, width, len(set(sizes)) == 1


def decode(path: Path) -> Image.Image:
    """The first frame of an image file as 8-bit RGB, upright by its EXIF tag, transparent parts on white.

    16-bit and float images are scaled to 0..255 by their range (see `_to_8_bit`).
    Raises: BadImageError with the reason, for anything that cannot be decoded whole.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd palettes and metadata that do not matter here
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(f"{image.width}x{image.height} pixels, over the limit of {MAX_PIXELS}")
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except BadImageError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken input
        raise BadImageError(f"{type(error).__name__}: {error}".strip(": ")) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Integers by the smallest of 8, 10, 12, 14 and 16 bits that holds them, floats in [0, 1] times 255, else min to max."""
    import numpy as np

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadImageError("pixels are not finite")
    low, high = values.min(), values.max()
    if low >= 0 and high <= 65535 and (image.mode.startswith("I;16") or (image.mode.startswith("I") and high > 255)):
        values = values * (255 / next(limit for limit in (2**bits - 1 for bits in (8, 10, 12, 14, 16)) if high <= limit))
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low))
    return Image.fromarray(values.round().astype(np.uint8))


def decode_all(images: ImageSet, on_bad: Callable[[int, str], None]) -> Tensor | None:
    """Every image of a same-sized set as one uint8 tensor (N, 3, H, W), zeros for bad ones; None when sizes differ."""
    import numpy as np

    pixels: Tensor | None = None
    for index in range(len(images)):
        try:
            image = np.array(decode(images.path(index)))  # (H, W, 3)
        except BadImageError as error:
            on_bad(index, str(error))
            continue
        if pixels is None:
            pixels = torch.zeros(len(images), 3, *image.shape[:2], dtype=torch.uint8)
        if pixels.shape[2:] != image.shape[:2]:
            return None
        pixels[index] = torch.from_numpy(image).permute(2, 0, 1)
    return pixels
