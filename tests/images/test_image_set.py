"""Which files a folder holds, and what their pixels are."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_core.images.decoding import BadImageError, decode
from byol_core.images.image_set import scan
from byol_core.system.console import printable
from byol_core.views.pixels import decode_all
from tests.helpers.pictures import png, tiff, touch
from tests.helpers.shards import names


def test_scan_is_recursive_sorted_and_knows_its_suffixes(tmp_path: Path) -> None:
    touch(tmp_path / "b" / "2.JPG", tmp_path / "b" / "10.jpeg", tmp_path / "a.png", tmp_path / "c" / "d" / "e.webp",
          tmp_path / "notes.txt", tmp_path / "b" / "x.gif", tmp_path / "b" / "x.heic", tmp_path / "x.HEIC", tmp_path / "x.tga")
    assert names(scan(tmp_path)) == ["a.png", "b/10.jpeg", "b/2.JPG", "b/x.gif", "c/d/e.webp"]
    assert scan(tmp_path).remarks == ("left out, as these formats are not read: 2 .heic, 1 .tga",)


def test_the_order_is_that_of_the_names_whatever_the_file_system_gives(tmp_path: Path, monkeypatch) -> None:
    touch(*(tmp_path / folder / name for folder in "cab" for name in ("3.png", "1.png", "2.png")))
    scandir = os.scandir

    @contextlib.contextmanager
    def turned(folder: bytes) -> Iterator[list["os.DirEntry[bytes]"]]:
        with scandir(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", turned)
    assert names(scan(tmp_path)) == [f"{folder}/{number}.png" for folder in "abc" for number in (1, 2, 3)]


def test_hidden_files_and_archive_leftovers_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / ".b.png", tmp_path / "._a.png", tmp_path / ".git" / "c.png",
          tmp_path / "__MACOSX" / "d.png")
    assert names(scan(tmp_path)) == ["a.png"]


def test_labels_are_first_level_sub_folders(tmp_path: Path) -> None:
    touch(tmp_path / "dog" / "1.png", tmp_path / "cat" / "2.png", tmp_path / "cat" / "young" / "3.png")
    images = scan(tmp_path)
    assert images.classes == ("cat", "dog") and images.labels is not None
    assert dict(zip(names(images), images.labels.tolist())) == {"cat/2.png": 0, "cat/young/3.png": 0, "dog/1.png": 1}


@pytest.mark.parametrize("files", [["1.png", "2.png"], ["1.png", "a/2.png", "b/3.png"], ["a/1.png", "a/2.png"]])
def test_flat_mixed_and_one_class_folders_have_no_labels(tmp_path: Path, files: list[str]) -> None:
    touch(*(tmp_path / file for file in files))
    assert scan(tmp_path).labels is None


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "data" / "a" / "1.png", tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "self").symlink_to("self")
    assert names(scan(tmp_path / "data")) == ["a/1.png", "again/2.png"]


def test_names_that_are_not_text_survive(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.jpg")
    touch(tmp_path / odd, tmp_path / "new\nline.jpg")
    images = scan(tmp_path)
    assert names(images) == ["new\nline.jpg", odd]
    assert all(images.path(index).exists() for index in range(2))
    assert printable("new\nline.jpg") == "new\\nline.jpg" and printable(odd) == "\\udcff\\udcfe.jpg"


def test_what_is_missing_is_named_with_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path / "imgs" / "a.txt", tmp_path / "imgs" / "b.txt", tmp_path / "file.png")
    with pytest.raises(ValueError, match="no such folder: .*imsg - did you mean .*imgs?"):
        scan(tmp_path / "imsg")
    with pytest.raises(ValueError, match="no images under .*imgs: looked for .jpg .* found 2 .txt - check --data"):
        scan(tmp_path / "imgs")
    with pytest.raises(ValueError, match="is a file"):
        scan(tmp_path / "file.png")


def save(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    image = decode(path)
    assert image.mode == "RGB"
    return np.asarray(image)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    assert (pixels(save(tmp_path / "1.png", RAMP > 100)) == np.where(RAMP > 100, 255, 0)[..., None]).all()


@pytest.mark.parametrize("alpha, expected", [(0, 255), (255, 40), (51, 212)])  # 40 * 0.2 + 255 * 0.8 = 212
def test_transparency_lies_on_white(tmp_path: Path, alpha: int, expected: int) -> None:
    rgba = np.full((4, 4, 4), 40, np.uint8)
    rgba[..., 3] = alpha
    for image in (rgba, rgba[..., 2:]):
        assert np.abs(pixels(save(tmp_path / "x.png", image)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_sixteen_bits_are_scaled_and_fewer_in_a_sixteen_bit_file_are_not_black(tmp_path: Path, bits: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16).reshape(16, 16)
    assert np.abs(pixels(save(tmp_path / "i.png", ramp)).astype(int) - RAMP[..., None]).max() <= 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_pipe_is_not_an_image_and_a_broken_link_is_a_bad_one(tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    assert names(scan(tmp_path)) == ["a.png", "broken.png"]


def test_folders_to_leave_out_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "run" / "views.png")
    assert names(scan(tmp_path, leave_out=(tmp_path / "run", tmp_path / "not there"))) == ["a.png"]


@pytest.mark.parametrize("value, grey", [(0.0, 0), (0.2, 51), (1.0, 255), (200.0, 200), (-3.0, 128), (1000.0, 128)])
def test_a_float_image_of_one_value_is_that_value_or_a_middle_grey(tmp_path: Path, value: float, grey: int) -> None:
    Image.new("F", (3, 2), value).save(tmp_path / "x.tif")
    assert (np.asarray(decode(tmp_path / "x.tif")) == grey).all()


@pytest.mark.parametrize("content, reason", [
    (b"", "UnidentifiedImageError"), (b"<html>404</html>", "UnidentifiedImageError"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "UnidentifiedImageError"), (png((20_000, 20_000), 8, 0, b""), "Decompression"),
    (png((10_000, 10_000), 8, 0, b""), "10000x10000 pixels, over the limit"),
    (tiff(b"\0\0\xc0\x7f" * 4, 32, kind=3), "not finite"), (None, "^FileNotFoundError: No such file or directory$")])
def test_what_is_no_image_is_refused_with_the_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BadImageError, match=reason) as refused:
        decode(tmp_path / "x.png")
    assert "x.png" not in str(refused.value)  # whoever tells of it names the file


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_half_an_image_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(BadImageError, match="truncated"):
        decode(path)


def test_decode_all_holds_every_image_and_zeros_for_bad_ones(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.png", np.full((2, 3, 3), number + 1, np.uint8))
    (tmp_path / "1.png").write_bytes(b"")
    bad: list[int] = []
    images = decode_all(scan(tmp_path), lambda index, reason: bad.append(index))
    assert images is not None and images.shape == (3, 3, 2, 3)
    assert [int(image.float().mean()) for image in images] == [1, 0, 3] and bad == [1]


def test_decode_all_gives_up_on_different_sizes(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((2, 3, 3), np.uint8))
    save(tmp_path / "b.png", np.zeros((3, 2, 3), np.uint8))
    for block in (1, 2):
        assert decode_all(scan(tmp_path), lambda index, reason: None, block=block) is None


def test_typical_size_is_the_median_and_says_whether_all_agree(tmp_path: Path) -> None:
    for number, side in enumerate((10, 20, 30)):
        save(tmp_path / f"{number}.png", np.zeros((side, side + 1, 3), np.uint8))
    assert scan(tmp_path).headers[:3] == (20, 21, False)


CORPUS = Path(__file__).parents[3] / "shared" / "data" / "odd-images.tar.xz"


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus of odd images is not beside this checkout")
def test_every_odd_image_is_decoded_or_refused_and_nothing_else(tmp_path: Path) -> None:
    import tarfile
    with tarfile.open(CORPUS) as archive:
        archive.extractall(tmp_path, filter="data")
    images = scan(tmp_path)
    refused = 0
    for index in range(len(images)):
        try:
            assert decode(images.path(index)).mode == "RGB"
        except BadImageError as error:
            assert str(error)
            refused += 1
    assert len(images) > 300 and refused < len(images) / 10
