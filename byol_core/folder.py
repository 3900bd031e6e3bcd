"""A set of images: which there are, in one order everywhere, and how one of them becomes upright RGB pixels."""

import contextlib
import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from byol_core.listing import (SUFFIXES, Found, ScanProgress, below, common_folder, expand, identity, near_name, printable,
                               read_list, refuse_nested, walk)
from byol_core.shards import NO_LABEL, Member, ShardIndex, Shards, index_shards

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # what may lie behind a suffix; Pillow knows formats that start programs
MAX_PIXELS = 89_478_485  # a 24-bit image of 256 MiB; more is taken for a decompression bomb
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # TIFF tags: what 0 means, and whether integers have a sign
ORIENTATION = 274  # EXIF tag; from 5 on, width and height change places
SIZE_SAMPLE = 256  # files whose headers tell the typical image size
COMPRESSED = {".gz", ".tgz", ".bz2", ".xz", ".zst"}  # suffixes of tars that cannot be read image by image

T = TypeVar("T")


class BadImageError(ValueError):
    """An image file that cannot be used, with the reason."""


@dataclass(frozen=True)
class ImageSet:
    """The images of folders, a list or tar shards: names in byte order, and class labels where there are any.

    given: what was asked for, for messages. root: where the names begin. names: uint8, the paths relative to it,
    '/'-separated and encoded, in one block, those in a shard below the shard's own; ends: (N,) where each name ends in it.
    labels: (N,) int64, positions in `classes`, or None. remarks: what was found amiss. shards: where the images are tars'.
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

    def source(self, index: int) -> "Path | Member":
        """What `decode` reads image `index` from. Raises: BadImageError when its bytes cannot be had."""
        path = self.path(index)
        if self.shards is None:
            with contextlib.suppress(OSError):  # the decoder will say why
                if not stat.S_ISREG(path.stat().st_mode):
                    raise BadImageError("not a regular file")  # a pipe may never end
            return path
        try:
            return Member(self.shards.read(index), self.name(index))
        except OSError as error:
            raise BadImageError(f"{type(error).__name__}: {error}") from error

    def size(self, index: int) -> int:
        """Bytes of the image's file. Raises: OSError."""
        return self.path(index).stat().st_size if self.shards is None else self.shards.size(index)

    def read(self, index: int) -> bytes:
        """The image's file as it is. Raises: OSError."""
        return self.path(index).read_bytes() if self.shards is None else self.shards.read(index)

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
         kept_index: Path | None = None) -> ImageSet:
    """Find the images that `data` names: folders, one list (.txt), or shards (.tar, a pattern or folders of them).

    Folders are searched to any depth, links to folders followed once; hidden files and folders are left out, and the folders
    in leave_out, where they are below. kept_index: a file for the index of shards, so that it need not be made again.

    Labels are the first-level sub-folders, when every image lies in one and there are at least two; in a list what
    follows a tab; in shards the numbers in .cls members, where every image has one.
    Raises: ValueError when there is no such thing or no image in it, naming what is there instead.
    """
    asked = [str(part) for part in ([data] if isinstance(data, (str, Path)) else data)]
    if not asked or "" in asked:
        raise ValueError(f"{flag} is empty - name a folder, or . for this one")
    paths = [Path(name) for part in asked for name in expand(part, flag)]
    given, progress = ", ".join(str(Path(part)) for part in asked), ScanProgress()
    if all(path.is_dir() for path in paths):
        return _scan_folders(given, paths, flag, leave_out, kept_index, progress)
    for path in paths:
        _check_exists(path, flag, len(paths))
    if all(path.suffix == ".tar" and path.is_file() for path in paths):
        return _scan_shards(given, paths, flag, kept_index, progress, ())
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


def _scan_folders(given: str, folders: list[Path], flag: str, leave_out: Sequence[Path], kept_index: Path | None,
                  progress: ScanProgress) -> ImageSet:
    refuse_nested(folders, flag)
    left_out = {identity(folder) for folder in leave_out if folder.exists()}
    seen = left_out - {identity(folder) for folder in folders}
    found = [walk(folder, seen, progress) for folder in folders]
    remarks = [f"cannot list {folder}" for part in found for folder in part.unreadable]
    tars = [folder / os.fsdecode(tar) for folder, part in zip(folders, found) for tar in part.tars]
    if not any(part.images for part in found) and tars:
        return _scan_shards(given, tars, flag, kept_index, progress, remarks)
    for folder, part in zip(folders, found):
        if not part.images:
            raise ValueError(_nothing_found(folder, part, flag))
    if tars:
        remarks.append(f"{len(tars)} tar files beside the images are not used: the first is {tars[0]}")
    root = common_folder(folders)
    parts = []
    for folder, part in zip(folders, found):
        names = sorted(part.images)
        parts.append(_Part(below(folder, root) + b"/" if len(folders) > 1 else b"", names, _first_folders(names)))
    return _assemble(given, folders[0] if len(folders) == 1 else root, parts, remarks)


def _nothing_found(folder: Path, found: Found, flag: str) -> str:
    others = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in found.others.most_common(3))
    hint = "decompress tars, or their images cannot be read one by one" if COMPRESSED & set(found.others) else f"check {flag}"
    return (f"no images under {folder}: looked for {' '.join(SUFFIXES)} there and in sub-folders"
            f"{'; found ' + others if others else ''} - {hint}")


def _scan_list(given: str, path: Path, flag: str) -> ImageSet:
    labels, remarks = read_list(path, flag)
    if not labels:
        raise ValueError(f"{flag} {path} lists no images - write one path per line")
    names = sorted(labels)
    classes = [labels[name] for name in names]
    if None in classes and any(classes):
        remarks.append(f"{classes.count(None)} of the {len(names)} lines of {path} have no label, so none is used")
    return _assemble(given, path.parent, [_Part(b"", names, classes)], remarks)


def _scan_shards(given: str, tars: list[Path], flag: str, kept_index: Path | None, progress: ScanProgress,
                 remarks: Sequence[str]) -> ImageSet:
    refuse_nested(tars, flag)
    root = common_folder([tar.parent for tar in tars])
    tars = sorted(tars, key=lambda tar: below(tar, root) + b"/")
    indices = index_shards(tars, flag, progress, kept_index)
    if not any(index.names for index in indices):
        raise ValueError(f"no images in the {len(tars)} shards of {flag} {given}: looked for {' '.join(SUFFIXES)}")
    numbers = _numbers(indices)
    parts = [_Part(below(tar, root) + b"/", index.names, _first_folders(index.names) if numbers is None else [])
             for tar, index in zip(tars, indices)]
    remarks = [*remarks, *(remark for index in indices for remark in index.remarks)]
    if numbers is None and any((index.labels != NO_LABEL).any() for index in indices):
        remarks.append("some images in the shards have no whole number in a .cls member, so these labels are not used")
    ends = torch.tensor([len(index.names) for index in indices]).cumsum(0).tolist()
    shards = Shards(tars, ends, torch.cat([index.places for index in indices]))
    return _assemble(given, root, parts, remarks, shards, numbers)


def _numbers(indices: Sequence[ShardIndex]) -> Tensor | None:
    labels = torch.cat([index.labels for index in indices])
    return None if (labels == NO_LABEL).any() else labels


def _assemble(given: str, root: Path, parts: list[_Part], remarks: Sequence[str], shards: Shards | None = None,
              numbers: Tensor | None = None) -> ImageSet:
    """One set of the parts, of whose prefixes none begins another: sorted by these, all names are sorted."""
    parts.sort(key=lambda part: part.prefix)
    names = [part.prefix + name for part in parts for name in part.names] if parts[0].prefix else parts[0].names
    labels, classes = _labels([name for part in parts for name in part.classes]) if numbers is None else _ranks(numbers)
    ends = torch.from_numpy(np.fromiter(map(len, names), np.int64, len(names))).cumsum(0)
    block = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)  # a tensor: processes share its memory
    return ImageSet(given, root, block, ends, labels, classes, tuple(remarks), shards)


def _first_folders(names: list[bytes]) -> list[bytes | None]:
    return [name[:end] if end > 0 else None for name in names for end in (name.find(b"/"),)]


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


def typical_size(images: ImageSet) -> tuple[int, int, bool]:
    """(height, width, whether all that were looked at agree) from the headers of files spread evenly over the set.

    Raises: ValueError when none of them can be opened.
    """
    sizes = _of_some(images, lambda image: (image.height, image.width))
    if not sizes:
        raise ValueError(f"none of the images of {images.given} that were tried can be opened - check --data")
    sizes.sort(key=min)
    height, width = sizes[len(sizes) // 2]
    return height, width, len(set(sizes)) == 1


def with_several_frames(images: ImageSet) -> int:
    """How many of the files that `typical_size` looks at are animations or have several pages."""
    return sum(_of_some(images, lambda image: getattr(image, "n_frames", 1) > 1))


def _of_some(images: ImageSet, look: Callable[[Image.Image], T]) -> list[T]:
    """What `look` finds in the headers of at most 256 files spread evenly over the set; broken ones are left out."""
    found = []
    for number in range(min(SIZE_SAMPLE, len(images))):
        try:
            source = images.source(number * len(images) // min(SIZE_SAMPLE, len(images)))
            with _in_silence(), Image.open(source, formats=FORMATS) as image:
                found.append(look(image))
        except Exception:  # the loader will name it
            continue
    return found


def decode(source: Path | Member, reduce: int = 1) -> Image.Image:
    """The first frame of an image file as 8-bit RGB, upright by its EXIF tag, transparent parts on white.

    16-bit and float images are scaled to 0..255 by their range (see `_to_8_bit`). reduce: a JPEG whose sides
    are multiples of 2, 4 or 8 is decoded at that part of them, which is faster; other images are decoded in full.
    Raises: BadImageError with the reason, for anything that cannot be decoded whole.
    """
    with _opened(source) as image:
        if image.width * image.height > MAX_PIXELS:
            raise BadImageError(f"{image.width}x{image.height} pixels, over the limit of {MAX_PIXELS}")
        _fit_transparent_colour(image)
        if reduce > 1 and image.format == "JPEG" and not (image.width % reduce or image.height % reduce):
            image.draft(None, (image.width // reduce, image.height // reduce))
        image.load()
        with contextlib.suppress(Exception):  # broken metadata spoils no pixels
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def upright_size(source: Path | Member) -> tuple[int, int]:
    """(height, width) that `decode` will give, by what the file says before its pixels; some say their orientation later.

    Raises: BadImageError with the reason.
    """
    with _opened(source) as image:
        turned = False
        with contextlib.suppress(Exception):
            turned = image.format == "JPEG" and image.getexif().get(ORIENTATION, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


@contextlib.contextmanager
def _opened(source: Path | Member) -> Iterator[Image.Image]:
    """The image of a file, whatever fails in the block being the file's fault."""
    try:
        with _in_silence(), Image.open(source, formats=FORMATS) as image:
            yield image
    except BadImageError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken input
        raise BadImageError(f"{type(error).__name__}: {error}".strip(": ")) from error


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Decoders say what they think of a file, and none of it matters: Pillow warns of odd palettes and metadata, and libtiff
    writes straight to the process's stderr, thousands of lines of it for some files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kept = os.dup(2)
        except OSError:  # stderr is closed
            yield
            return
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _fit_transparent_colour(image: Image.Image) -> None:
    """PNG names a transparent colour in the bits of the file; Pillow compares it with pixels that it has made 8-bit."""
    colour, bits = image.info.get("transparency"), next((tile[3] for tile in getattr(image, "tile", ())), None)
    if isinstance(colour, int) and bits in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if bits == "L;2" else 17)
    elif isinstance(colour, tuple) and bits == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bit(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Integers by the smallest of 8, 10, 12, 14 and 16 bits that holds them, floats in [0, 1] times 255, else min to max.

    A transparent grey becomes white.
    """
    import numpy as np

    pixels, tags = np.asarray(image), getattr(image, "tag_v2", {})  # the tags of a TIFF file
    if pixels.dtype == np.int32 and tags.get(SAMPLE_FORMAT) == (1,):
        pixels = pixels.view(np.uint32)
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise BadImageError("pixels are not finite")
    low, high = values.min(), values.max()
    if low >= 0 and high <= 65535 and (image.mode.startswith("I;16") or (image.mode.startswith("I") and high > 255)):
        values = values * (255 / next(limit for limit in (2**bits - 1 for bits in (8, 10, 12, 14, 16)) if high <= limit))
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low))
    if image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == 0:  # 0 is white: Pillow turns over 8-bit pixels alone
        values = 255 - values
    if isinstance(image.info.get("transparency"), int):
        values[pixels == image.info["transparency"]] = 255
    return Image.fromarray(values.round().astype(np.uint8))
