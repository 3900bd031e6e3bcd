"""Tar files of images, written for tests, and what is found in them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from byol_core.images.decoding import decode
from byol_core.images.image_set import ImageSet
from tests.helpers.pictures import saved


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind, errors="surrogateescape") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pack(folder: Path, tar: Path) -> Path:
    return write_tar(tar, [(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob("*.png"))])


def png(value: int = 0, size: tuple[int, int] = (4, 3)) -> bytes:
    return saved(Image.new("RGB", size, (value, value, value)), "PNG")


def names(images: ImageSet) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def value(images: ImageSet, index: int) -> int:
    return decode(images.source(index)).getpixel((0, 0))[0]
