"""How one image file becomes upright RGB pixels, or a reason why it cannot."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")  # behind whatever suffix; Pillow knows formats that start programs
MAX_PIXELS = 89_478_485  # a 24-bit image of 256 MiB; more is taken for a decompression bomb
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # TIFF tags: what 0 means, and whether integers have a sign
ORIENTATION = 274  # EXIF tag; from 5 on, width and height change places


class BadImageError(ValueError):
    """An image file that cannot be used, with the reason."""


def decode(source: Path | IO[bytes], reduce: int = 1) -> Image.Image:
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


def upright_size(source: Path | IO[bytes]) -> tuple[int, int]:
    """(height, width) that `decode` will give, by what the file says before its pixels; some say their orientation later.

    Raises: BadImageError with the reason.
    """
    with _opened(source) as image:
        turned = False
        with contextlib.suppress(Exception):
            turned = image.format == "JPEG" and image.getexif().get(ORIENTATION, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


@contextlib.contextmanager
def _opened(source: Path | IO[bytes]) -> Iterator[Image.Image]:
    """The image of a file, whatever fails in the block being the file's fault."""
    try:
        with in_silence(), Image.open(source, formats=FORMATS) as image:
            yield image
    except BadImageError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken input
        raise BadImageError(why(error)) from error


def why(error: Exception) -> str:
    """The kind of an error and its words, without the path of the file, which whoever tells of it names."""
    words = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else \
        error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"{type(error).__name__}: {words}".strip(": ")


@contextlib.contextmanager
def in_silence() -> Iterator[None]:
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

    One value that fits nowhere is a middle grey. A transparent grey becomes white.
    """
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
        values = (values - low) * (255 / (high - low)) if high > low else np.full_like(values, 128)
    if image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == 0:  # 0 is white: Pillow turns over 8-bit pixels alone
        values = 255 - values
    if isinstance(image.info.get("transparency"), int):
        values[pixels == image.info["transparency"]] = 255
    return Image.fromarray(values.round().astype(np.uint8))
