"""Runs on folders with files that are broken, odd, locked or gone: what is trained on, and what is told."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_core.images import image_set
from byol_core.run.run import Run
from byol_core.system.console import printable
from tests.helpers.pictures import Folder, png, saved, tiff
from tests.helpers.runs import SMALL, assert_same_state, checkpoint, metrics, run, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def odd_folder(root: Path, side: int | None = None) -> Path:
    """60 files, of all kinds that a folder may hold; 6 of them cannot be read. side: of all images, or None: as they come."""
    generator = np.random.default_rng(0)
    root.mkdir()
    for number in range(44):
        size = side or int(generator.integers(1, 40))
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / f"{number:02d}.png")
    size = side or 24
    image = Image.fromarray(generator.integers(0, 256, (size, size, 4), dtype=np.uint8))
    whole = saved(image, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 8
    row = bytes(generator.integers(0, 256, size, dtype=np.uint8))
    files = {
        "rgba.png": whole, "la.png": saved(image.convert("LA"), "PNG"), "bit.png": saved(image.convert("1"), "PNG"),
        "p.bmp": saved(image.convert("RGB").convert("P"), "BMP"),
        "cmyk.jpg": saved(image.convert("RGB").convert("CMYK"), "JPEG"),
        "turned.jpg": saved(image.convert("RGB"), "JPEG", exif=exif), "f.tif": saved(image.convert("F"), "TIFF"),
        "i.tif": saved(image.convert("I"), "TIFF"), "deep.tif": tiff(row * 2 * size, 16, (size, size)),
        "moving.webp": saved(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
        "torn.png": whole[:len(whole) // 2], "empty.jpg": b"", "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "bomb.png": png((20_000, 20_000), 8, 0, b""), "tga.png": saved(image, "TGA"),
        "nan.tif": tiff(b"\0\0\xc0\x7f" * size * size, 32, (size, size), kind=3)}
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


BAD = {"torn.png", "empty.jpg", "page.jpg", "bomb.png", "tga.png", "nan.tif"}


def listed(out: str | Path) -> set[str]:
    return {line.split("\t")[0] for line in (Path(out) / "bad_files.txt").read_text().splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("views", ["device", "cpu"])
def test_a_run_over_bad_files_resumes_to_the_same_result_bit_for_bit(stopped_after: Callable[..., None], views: str) -> None:
    """With any number of workers."""
    data = odd_folder(Path("odd"), side=16 if views == "device" else None)
    arguments = ["--data", data, "--epochs", 2, "--views", views, "--no-eval", *SMALL]
    assert run(*arguments, "--out", "whole") == 0
    stopped_after(8, *arguments, "--out", "parts", "--workers", 2)
    stopped_after(20, *arguments, "--out", "parts", "--resume", "--workers", 1)
    assert run(*arguments, "--out", "parts", "--resume") == 0
    assert_same_state(checkpoint("whole"), checkpoint("parts"))
    assert metrics("whole") == metrics("parts")
    for out in ("whole", "parts"):
        assert summary(out)["bad_files"] == 6 and listed(out) == BAD


def test_bad_files_met_before_an_interruption_are_told_after_it(image_folder: Folder, stopped_after: Callable[..., None],
                                                                capsys) -> None:
    data = image_folder(classes=0, per_class=24)
    arguments = ["--data", data, "--epochs", 1, "--out", "out", "--views", "cpu", "--no-eval", *SMALL]
    (data / "005.png").write_bytes(b"")
    stopped_after(5, *arguments)  # of 6
    assert summary("out")["bad_files"] == 1, "another file should be the broken one, for this order"
    capsys.readouterr()
    assert run(*arguments, "--resume") == 0
    printed = capsys.readouterr().out
    assert "skipped 005.png" not in printed and "skipped 1 of 24 images (bad_files.txt)" in printed
    assert summary("out")["bad_files"] == 1 and listed("out") == {"005.png"}


@pytest.mark.parametrize("views", ["device", "cpu"])
def test_a_tenth_of_bad_files_is_passed_over_and_one_more_is_not(image_folder: Folder, views: str, capsys) -> None:
    data = image_folder(classes=0, per_class=20)
    arguments = ["--data", data, "--epochs", 2, "--views", views, "--no-eval", *SMALL]
    for number in (3, 11):
        (data / f"{number:03d}.png").write_bytes(b"not an image")
    assert run(*arguments, "--out", "two") == 0
    assert summary("two")["bad_files"] == 2
    assert "003.png\tUnidentifiedImageError" in Path("two/bad_files.txt").read_text()
    assert capsys.readouterr().out.count("skipped 003.png") == 1  # in two epochs
    (data / "017.png").write_bytes(b"")
    assert run(*arguments, "--out", "three") == 1
    assert "3 of 20 images cannot be read, more than 10%" in capsys.readouterr().err
    assert listed("three") == {"003.png", "011.png", "017.png"}


def test_a_folder_of_nothing_but_bad_files_is_wrong_input(image_folder: Folder, capsys) -> None:
    data = image_folder(classes=0)
    for path in data.iterdir():
        path.write_bytes(b"")
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL) == 2
    said = capsys.readouterr().err
    assert "that were tried can be opened, such as 000.png - check --data\n" in said and said.count("\n") == 1
    assert not Path("out").exists()


def test_what_is_amiss_with_the_images_measured_on_is_told_and_listed_apart(image_folder: Folder, capsys) -> None:
    data, other = image_folder("a"), image_folder("b", classes=3)
    (other / "class2").rename(other / "unseen")
    shutil.rmtree(data / "class1")
    (data / "class1").symlink_to(other / "class1")
    (other / "class0" / "x.heic").touch()
    for path in (data / "class0" / "001.png", other / "unseen" / "002.png"):
        path.write_bytes(b"")
    assert run("--data", data, "--eval-data", other, "--epochs", 0, "--out", "out", *SMALL) == 0
    result, said = summary("out"), capsys.readouterr().out
    assert "warning: --eval-data: left out, as these formats are not read: 1 .heic\n" in said
    assert "warning: 8 of 24 images of --eval-data are in --data, too" in said
    assert "classes of --eval-data that --data does not have: unseen; their 8 images count as wrong" in said
    assert result["knn"] <= 16 / 23  # 7 of those that can be read are of the unseen class
    assert result["bad_files"] == result["bad_eval_files"] == 1 and "skipped unseen/002.png" in said
    assert listed("out") == {"class0/001.png", f"{other}/unseen/002.png"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse such names")
def test_odd_names_are_trained_on_and_shown_escaped(image_folder: Folder, capsys) -> None:
    data = image_folder(classes=2, per_class=12)
    odd = [b"\xff\xfe.png", b"new\nline.png", b"tab\t<b>&amp;\x1b[31m.png"]
    for path, name in zip(sorted((data / "class0").iterdir()), odd):
        os.rename(path, os.fsencode(data) + b"/class0/" + name)
    with open(os.fsencode(data) + b"/class0/" + odd[0], "wb"), open(os.fsencode(data) + b"/class0/" + odd[2], "wb"):
        pass  # emptied
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL) == 0
    expected = {printable("class0/" + os.fsdecode(name)) for name in (odd[0], odd[2])}
    assert listed("out") == expected == {"class0/\\udcff\\udcfe.png", "class0/tab\\t<b>&amp;\\x1b[31m.png"}
    printed, log = capsys.readouterr().out, Path("out/train.log").read_text("utf-8")
    assert all(f"skipped {name}" in text for name in expected for text in (printed, log)) and "\x1b" not in printed + log
    page = Path("out/report.html").read_text("utf-8")
    assert "class0/\\udcff\\udcfe.png" in page and "tab\\t&lt;b&gt;&amp;amp;\\x1b[31m.png" in page
    json.loads(Path("out/config.json").read_text("utf-8"))


def test_a_locked_file_is_passed_over(image_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a patch, as no file is locked for root."""
    data, opened = image_folder(classes=0, per_class=12), Image.open

    def refuse(path: Path, *arguments: object, **options: object) -> Image.Image:
        if getattr(path, "name", "") == "004.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(image_set.Image, "open", refuse)
    for views in ("device", "cpu"):
        assert run("--data", data, "--epochs", 1, "--out", views, "--views", views, "--no-eval", *SMALL) == 0
        assert (Path(views) / "bad_files.txt").read_text().startswith("004.png\tPermissionError")


def test_a_folder_that_is_locked_is_told(image_folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    data, real = image_folder(), os.scandir

    def scandir(path: object):  # type: ignore[no-untyped-def]
        if os.fsencode(path).endswith(b"class1"):  # type: ignore[arg-type]
            raise PermissionError(13, "Permission denied")
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    assert run("--data", data, "--epochs", 1, "--out", "out", "--no-eval", *SMALL) == 0
    assert "class1/: Permission denied" in capsys.readouterr().out and summary("out")["images"] == 8


@pytest.mark.slow
def test_a_file_that_goes_during_training_is_passed_over(image_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    data, original = image_folder(classes=0, per_class=12), Run.after_step

    def remove(self: Run, progress, step) -> None:
        (data / "007.png").unlink(missing_ok=True)
        original(self, progress, step)

    monkeypatch.setattr(Run, "after_step", remove)
    assert run("--data", data, "--epochs", 3, "--out", "out", "--views", "cpu", "--no-eval", *SMALL) == 0
    assert (Path("out") / "bad_files.txt").read_text().startswith("007.png\tFileNotFoundError")


@pytest.mark.slow
def test_nothing_is_written_beside_the_images(image_folder: Folder) -> None:
    data = image_folder()

    def tree() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [data, *data.rglob("*")]}

    before = tree()
    for path in [*data.iterdir(), data]:
        path.chmod(0o555)
    try:
        assert run("--data", data, "--eval-data", data, "--epochs", 1, "--out", "out", *SMALL) == 0
        assert run("--data", data, "--epochs", 1, "--out", "other", "--views", "cpu", "--check", *SMALL) == 0
    finally:
        for path in [data, *data.iterdir()]:
            path.chmod(0o755)
    assert tree() == before


@pytest.mark.slow
@pytest.mark.parametrize("views, size", [("device", (1, 1)), ("device", (1, 5000)), ("cpu", (1, 1)), ("cpu", (5000, 1))])
def test_images_of_one_pixel_and_of_one_line_are_trained_on(image_folder: Folder, views: str, size: tuple[int, int]) -> None:
    data = image_folder(classes=2, per_class=5, size=size)
    assert run("--data", data, "--epochs", 1, "--out", "out", "--views", views, *SMALL) == 0
    result = summary("out")
    assert result["bad_files"] == 0 and 0 < result["loss"] < 8 and result["linear"] is not None


@pytest.mark.slow
def test_labels_that_allow_no_measuring_stop_no_training(image_folder: Folder, capsys) -> None:
    arguments = ["--epochs", 1, "--eval-every", 1, *SMALL]
    assert run("--data", image_folder("single", classes=8, per_class=1), "--out", "out1", *arguments) == 0
    said = capsys.readouterr().out
    assert "no accuracy: measuring needs at least 2 classes of 2 images" in said and "no class folders, so" not in said
    assert "Not measured: the labels do not allow it" in Path("out1/report.html").read_text()
    assert run("--data", image_folder("one", classes=1, per_class=8), "--out", "out2", *arguments) == 0
    assert "no class folders, so no accuracy" in capsys.readouterr().out
    for out in ("out1", "out2"):
        assert summary(out)["status"] == "finished" and summary(out)["knn"] is None
        assert summary(out)["best_separation"] is not None


def test_images_under_a_link_are_found_once_and_a_broken_link_is_a_bad_file(image_folder: Folder) -> None:
    data = image_folder(classes=0, per_class=12)
    (data / "loop").symlink_to(data)
    (data / "broken.png").symlink_to("nowhere.png")
    assert run("--data", data, "--epochs", 1, "--out", "out", "--no-eval", *SMALL) == 0
    assert summary("out")["images"] == 13 and listed("out") == {"broken.png"}


@pytest.mark.parametrize("options", [["--views", "cpu"], []], ids=["from files", "in memory"])
def test_a_check_counts_what_cannot_be_read_and_what_is_there_twice(image_folder: Folder, monkeypatch: pytest.MonkeyPatch,
                                                                    options: list[str], capsys) -> None:
    data = image_folder(classes=2, per_class=12)
    for copy, first in (("class0/copy.png", "class0/003.png"), ("class1/a\nb.png", "class0/003.png")):
        (data / copy).write_bytes((data / first).read_bytes())
    (data / "class1/linked.png").symlink_to(data / "class1/011.png")
    for name in ("class0/007.png", "class1/002.png"):  # of one size and beginning, and of different content
        (data / name).write_bytes(bytes(5000) + name.encode())
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL, *options, "--check") == 0
    assert ("check: of 27 images tried 2 cannot be read (bad_files.txt); of all 27 3 are copies of others, byte for byte "
            "(copies.txt)\n") in capsys.readouterr().out
    assert listed("out-check") == {"class0/007.png", "class1/002.png"}
    assert sorted(Path("out-check/copies.txt").read_text().splitlines()) == [
        "class0/copy.png\tclass0/003.png", "class1/a\\nb.png\tclass0/003.png", "class1/linked.png\tclass1/011.png"]
    for name in ("class0/000.png", "class0/001.png", "class1/000.png"):
        (data / name).write_bytes(b"torn")
    assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL, *options, "--check") == 1
    said = capsys.readouterr()
    assert "check: of 27 images tried 5 cannot be read (bad_files.txt); of all 27 5 are copies" in said.out
    assert "error: 5 of 27 images cannot be read, more than 10%" in said.err and len(listed("out-check")) == 5
    if options:
        monkeypatch.setattr("byol_core.run.run.CHECK_IMAGES", 3)  # the first, and two from further on
        assert run("--data", data, "--epochs", 1, "--out", "out", *SMALL, *options, "--check") == 1
        assert "check: of 3 images tried 1 cannot be read" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_pipes_and_files_that_are_gone_are_no_copies_of_each_other(image_folder: Folder, capsys) -> None:
    data = image_folder(classes=0, per_class=40)
    os.mkfifo("1.png"), os.mkfifo("2.png"), Path("empty.png").touch()
    lines = [*(str(path) for path in sorted(data.iterdir())), "1.png", "2.png", "gone.png", "lost.png"]
    Path("list.txt").write_text("\n".join(lines))
    assert run("--data", "list.txt", "--epochs", 1, "--out", "out", *SMALL, "--check") == 0
    assert "check: of 44 images tried 4 cannot be read (bad_files.txt); of all 44 0 are copies" in capsys.readouterr().out


def test_a_check_leaves_the_folder_of_a_run_alone(short_run: Path, capsys) -> None:
    shutil.copytree(short_run, "x-check")
    before = {path: path.read_bytes() for path in Path("x-check").iterdir() if path.name != ".lock"}
    for more in ([], ["--resume"]):
        assert run("--data", short_run.parent / "imgs", "--epochs", 3, "--out", "x", *SMALL, "--check", *more) == 2
        assert "x-check already holds a run (epoch 1/1)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("x-check").iterdir() if path.name != ".lock"} == before
