"""Images: folders of them, files written byte by byte, and how they are loaded."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from byol_core.images.image_set import scan
from byol_core.views.pixels import ImageData, load_images
from byol_core.views.recipes import ViewRecipe

CPU = torch.device("cpu")
Folder = Callable[..., Path]  # the fixture `image_folder`
PLAIN = ViewRecipe(16)  # no augmentation: a view is the image


def write_images(place: Path, name: str = "imgs", classes: int = 2, per_class: int = 8,
                 size: tuple[int, int] = (16, 16)) -> Path:
    """A folder of random images: `classes` sub-folders (0: flat) of `per_class` images each."""
    generator = np.random.default_rng(0)
    for label in range(max(classes, 1)):
        folder = place / name / (f"class{label}" if classes else "")
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            pixels[..., label % 3] //= 4  # so that classes can be told apart
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return place / name


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG by its specification; colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA. rows: with filter bytes."""
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)),
                     chunk(b"IEND", b"")])


def tiff(values: bytes, bits: int, size: tuple[int, int] = (4, 1), kind: int = 1, black: int = 1, order: str = "<",
         **more: int) -> bytes:
    """An uncompressed grey TIFF by its specification. kind: 1 unsigned, 2 signed, 3 float; black: 1 if 0 is black, else 0."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: black, 273: 0, 277: 1, 278: size[1], 279: len(values),
            339: kind, **{int(tag.removeprefix("tag")): value for tag, value in more.items()}}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    fields = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(tags))
    return start + fields + bytes(4) + values


def load(root: Path, where: str) -> ImageData:
    return load_images(scan(root), where, CPU, lambda line: None)[0]
