"""What `decode` makes of unusual images: expected pixels are worked out by hand from the formats' definitions."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_core.images import decoding
from byol_core.images.decoding import MAX_PIXELS, BadImageError, decode
from byol_core.images.image_set import scan
from byol_core.runtime import peak_memory
from tests.helpers.forking import call
from tests.helpers.pictures import CPU, chunk, png, saved, tiff
from tests.helpers.runs import SMALL, run

WHITE, BLACK = [255, 255, 255], [0, 0, 0]


def decoded(tmp_path: Path, content: bytes) -> list[list[int]]:
    """The pixels, row by row."""
    (tmp_path / "x.png").write_bytes(content)
    image = decode(tmp_path / "x.png")
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def greys(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


@pytest.mark.parametrize("bits, colour, row, key, expected", [
    (8, 0, bytes([0, 128, 255]), struct.pack(">H", 128), [BLACK, WHITE, WHITE]),
    (4, 0, bytes([0x05, 0xa0]), struct.pack(">H", 5), [BLACK, WHITE, [170] * 3]),  # 10 * 17
    (2, 0, bytes([0b00011000]), struct.pack(">H", 1), [BLACK, WHITE, [170] * 3]),  # 2 * 85
    (1, 0, bytes([0b01000000]), struct.pack(">H", 0), [WHITE, WHITE, WHITE]),
    (16, 0, struct.pack(">3H", 0, 0x8000, 0xffff), struct.pack(">H", 0x8000), [BLACK, WHITE, WHITE]),
    (16, 0, struct.pack(">3H", 257, 514, 0xffff), struct.pack(">H", 0xffff), [[1] * 3, [2] * 3, WHITE]),
    (8, 2, bytes([1, 2, 3, 4, 5, 6, 7, 8, 9]), struct.pack(">3H", 4, 5, 6), [[1, 2, 3], WHITE, [7, 8, 9]]),
    (16, 2, struct.pack(">9H", 0, 0x8000, 0xffff, 257, 514, 771, 0x1234, 0, 0), struct.pack(">3H", 0x1234, 0, 0),
     [[0, 128, 255], [1, 2, 3], WHITE]),
])
def test_a_png_colour_that_is_named_transparent_becomes_white(tmp_path: Path, bits: int, colour: int, row: bytes, key: bytes,
                                                              expected: list[list[int]]) -> None:
    assert decoded(tmp_path, png((3, 1), bits, colour, b"\0" + row, chunk(b"tRNS", key))) == expected


def test_a_palettes_alpha_is_mixed_with_white(tmp_path: Path) -> None:
    palette, alpha = bytes([9, 9, 9, 0, 100, 200, 7, 8, 9]), bytes([0, 51])  # 51 is a fifth: 0.2 * colour + 0.8 * 255
    found = decoded(tmp_path, png((3, 1), 8, 3, bytes([0, 0, 1, 2]), chunk(b"PLTE", palette), chunk(b"tRNS", alpha)))
    assert found[0] == WHITE and found[2] == [7, 8, 9]
    assert np.abs(np.array(found[1]) - [204, 224, 244]).max() <= 1
    one = png((3, 1), 8, 3, bytes([0, 0, 1, 2]), chunk(b"PLTE", palette), chunk(b"tRNS", bytes([0])))  # a colour, to Pillow
    assert decoded(tmp_path, one) == [WHITE, [0, 100, 200], [7, 8, 9]]


def test_deep_alpha_lies_on_white(tmp_path: Path) -> None:
    grey = struct.pack(">4H", 0x4040, 0xffff, 0x4040, 0)
    assert decoded(tmp_path, png((2, 1), 16, 4, b"\0" + grey)) == [[0x40] * 3, WHITE]
    rgba = struct.pack(">8H", 0x1010, 0x2020, 0x3030, 0xffff, 0x1010, 0x2020, 0x3030, 0)
    assert decoded(tmp_path, png((2, 1), 16, 6, b"\0" + rgba)) == [[16, 32, 48], WHITE]
    rgb = struct.pack(">6H", 0, 0x8000, 0xffff, 257, 514, 771)
    assert decoded(tmp_path, png((2, 1), 16, 2, b"\0" + rgb)) == [[0, 128, 255], [1, 2, 3]]


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_is_ink_on_white(tmp_path: Path, kind: str) -> None:
    """(255 - ink) (255 - black) / 255; Photoshop's JPEGs, and Pillow's, hold it turned over, which a tag tells."""
    image = Image.new("CMYK", (16, 16), (51, 102, 0, 51))
    found = decoded(tmp_path, saved(image, kind, **({"quality": 100} if kind == "JPEG" else {})))
    assert np.abs(np.array(found) - [163, 122, 204]).max() <= 1  # 204 * 204 / 255, 153 * 204 / 255, 204


def test_luma_and_chroma_become_colour(tmp_path: Path) -> None:
    """JFIF: R = Y + 1.402 (Cr - 128), G = Y - 0.344136 (Cb - 128) - 0.714136 (Cr - 128), B = Y + 1.772 (Cb - 128)."""
    found = decoded(tmp_path, saved(Image.new("YCbCr", (8, 8), (100, 90, 200)), "TIFF"))
    assert np.abs(np.array(found[0]) - [200.9, 61.7, 32.7]).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_deep_greys_are_scaled_whatever_the_byte_order(tmp_path: Path, order: str) -> None:
    def values(letter: str, *numbers: float) -> bytes:
        return struct.pack(f"{order}4{letter}", *numbers)

    expected = greys(0, 85, 170, 255)
    assert decoded(tmp_path, tiff(values("H", 0, 21845, 43690, 65535), 16, order=order)) == expected
    assert decoded(tmp_path, tiff(values("H", 0, 1365, 2730, 4095), 16, order=order)) == expected  # 12 bits in 16
    assert decoded(tmp_path, tiff(values("i", -3000, -1000, 1000, 3000), 32, kind=2, order=order)) == expected
    assert decoded(tmp_path, tiff(values("h", -300, -100, 100, 300), 16, kind=2, order=order)) == expected
    assert decoded(tmp_path, tiff(values("f", 0, 1 / 3, 2 / 3, 1), 32, kind=3, order=order)) == expected
    assert decoded(tmp_path, tiff(values("f", -6, -2, 2, 6), 32, kind=3, order=order)) == expected


def test_unsigned_32_bits_do_not_turn_negative(tmp_path: Path) -> None:
    values = struct.pack("<4I", 0, 0x55555555, 0xaaaaaaaa, 0xffffffff)
    assert decoded(tmp_path, tiff(values, 32, kind=1)) == greys(0, 85, 170, 255)


@pytest.mark.parametrize("bits, letter, top", [(8, "B", 255), (16, "H", 65535)])
def test_a_grey_tiff_in_which_0_is_white_is_turned_over(tmp_path: Path, bits: int, letter: str, top: int) -> None:
    values = struct.pack(f"<4{letter}", 0, top // 3, 2 * top // 3, top)
    assert decoded(tmp_path, tiff(values, bits, black=0)) == greys(255, 170, 85, 0)


# By the EXIF standard, where the first row and the first column of what is stored belong in what is seen.
CORNERS = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left", 5: "left top", 6: "right top",
           7: "right bottom", 8: "left bottom"}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_every_exif_orientation_is_undone(tmp_path: Path, kind: str, orientation: int) -> None:
    """Stored: 48 x 32 pixels, the top left 16 x 16 red, the rest of the top row green, all else blue."""
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :16, 0] = stored[:16, 16:, 1] = stored[16:, :, 2] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    (tmp_path / "x.png").write_bytes(saved(Image.fromarray(stored), kind, exif=exif, **lossless))
    seen = decode(tmp_path / "x.png")
    row_side, column_side = CORNERS[orientation].split()
    turned = row_side in ("left", "right")  # the stored rows are columns of what is seen
    assert seen.size == ((32, 48) if turned else (48, 32))
    pixels = np.asarray(seen).astype(int)
    vertical, horizontal = (column_side, row_side) if turned else (row_side, column_side)
    y, x = (8 if vertical == "top" else -8), (8 if horizontal == "left" else -8)
    far_along_the_row = pixels[-y, x] if turned else pixels[y, -x]
    far_down_the_column = pixels[y, -x] if turned else pixels[-y, x]
    for found, channel in ((pixels[y, x], 0), (far_along_the_row, 1), (far_down_the_column, 2)):
        assert found.argmax() == channel and found.max() > 200, (orientation, found)


def test_broken_exif_spoils_no_pixels(tmp_path: Path) -> None:
    content = saved(Image.new("RGB", (4, 2), (10, 20, 30)), "WEBP", lossless=True, exif=b"MM\0\0\0\0\0\x08")
    with Image.open(io.BytesIO(content)) as image, pytest.raises(SyntaxError):
        image.getexif()  # else this shows nothing
    assert decoded(tmp_path, content) == [[10, 20, 30]] * 8


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("TIFF", {}),
                                           ("TIFF", {"compression": "tiff_lzw"})])
def test_of_several_frames_the_first_is_taken(tmp_path: Path, kind: str, options: dict[str, object]) -> None:
    frames = [Image.new("RGB", (2, 1), colour) for colour in ((1, 2, 3), (250, 0, 0), (0, 250, 0))]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decoded(tmp_path, content) == [[1, 2, 3]] * 2
    assert scan(tmp_path).headers.several_frames == 1


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_files_of_several_frames_are_counted_once_and_said(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    (data / "000.png").write_bytes(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert run("--data", data, "--epochs", 0, "--no-eval", *SMALL, "--out", "out") == 0
    assert capsys.readouterr().out.count("note: 1 of the files looked at have several frames; of each file the first one") == 1


def test_a_format_behind_a_foreign_suffix_is_read_and_others_are_not(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    assert decoded(tmp_path, saved(image, "TIFF")) == [[1, 2, 3]] * 2
    for kind in ("EPS", "PDF", "PPM", "TGA", "ICO"):
        (tmp_path / "x.png").write_bytes(saved(image, kind))
        with pytest.raises(BadImageError):
            decode(tmp_path / "x.png")


def test_decoders_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    """libtiff writes to the process's own stderr, Pillow to its log and to Python's warnings."""
    deflated = bytearray(saved(Image.effect_noise((40, 40), 99), "TIFF", compression="tiff_adobe_deflate"))
    with Image.open(io.BytesIO(deflated)) as image:
        start = image.tag_v2[273][0]  # of the strip
    deflated[start + 20:start + 60] = bytes(40)
    files = {"deflate.tif": bytes(deflated), "samples.tif": tiff(bytes(4), 8, tag277=300_000_000),
             "large.png": png((9500, 9500), 8, 0, b"")}  # at which Pillow warns: it may be a bomb
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with Image.open(tmp_path / "deflate.tif") as image, pytest.raises(OSError):
        image.load()
    assert "ZIPDecode" in capfd.readouterr().err and not recwarn.list  # without silence
    images = scan(tmp_path)
    images.headers
    for index in range(len(images)):
        with pytest.raises(BadImageError):
            decode(images.path(index))
    os.write(2, b"still there\n")
    assert capfd.readouterr() == ("", "still there\n") and not recwarn.list


def bombs() -> dict[str, bytes]:
    """Small files that claim to be huge."""
    bmp, jpeg = bytearray(saved(Image.new("RGB", (8, 8)), "BMP")), bytearray(saved(Image.new("RGB", (8, 8)), "JPEG"))
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5:frame + 9] = struct.pack(">HH", 65_000, 65_000)
    webp = bytearray(saved(Image.new("RGB", (8, 8)), "WEBP", save_all=True, lossless=True,
                           append_images=[Image.new("RGB", (8, 8), "red")]))
    canvas = webp.index(b"VP8X") + 12
    webp[canvas:canvas + 6] = struct.pack("<I", 65_534)[:3] * 2
    text = zlib.compress(bytes(100_000_000))
    return {
        "10000.png": png((10_000, 10_000), 8, 0, b""), "20000.png": png((20_000, 20_000), 8, 0, b""),
        "2147483647.png": png((2**31 - 1, 2**31 - 1), 16, 6, b""), "claims.bmp": bytes(bmp), "claims.jpg": bytes(jpeg),
        "claims.webp": bytes(webp), "claims.tif": tiff(bytes(4), 8, size=(100_000, 100_000)),
        "deep.tif": tiff(bytes(4), 32, size=(10_000, 9_000), kind=3),
        "text.png": png((2, 1), 8, 0, bytes(3), chunk(b"zTXt", b"k\0\0" + text)),
        "profile.png": png((2, 1), 8, 0, bytes(3), chunk(b"iCCP", b"k\0\0" + text))}


def say_what_is_decoded(folder: str) -> int:
    images, before = scan(folder), peak_memory(CPU)
    images.headers
    for index in range(len(images)):
        try:
            print(images.name(index), decode(images.path(index)).size)
        except BadImageError as error:
            print(images.name(index), error)
    print("peak", peak_memory(CPU) - before)
    return 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no measure of the peak there")
def test_bombs_are_refused_with_bounded_memory(tmp_path: Path) -> None:
    contents = bombs()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert len(content) < 500_000
    call(f"{__name__}:say_what_is_decoded", [str(tmp_path)], tmp_path / "said")
    said = dict(line.split(" ", 1) for line in (tmp_path / "said").read_text().splitlines())
    assert said.keys() == {*contents, "peak"}
    assert all("limit" in said[name] for name in contents if name not in ("text.png", "profile.png")), said
    assert int(said["peak"]) < 150 * 2**20, said  # one of them decoded would be twice that


def test_the_limit_is_on_pixels_whatever_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 12)
    assert decoded(tmp_path, saved(Image.new("RGB", (12, 1)), "PNG")) == [BLACK] * 12
    with pytest.raises(BadImageError, match="13x1 pixels, over the limit of 12"):
        decoded(tmp_path, saved(Image.new("RGB", (13, 1)), "PNG"))
    assert MAX_PIXELS == 89_478_485  # where Pillow begins to warn
