"""Several folders, lists of files, patterns: what they name, in one order, each image once."""

import os
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from byol_core.images import listing
from byol_core.images.decoding import BadImageError, decode
from byol_core.images.image_set import scan
from byol_core.images.listing import expand
from tests.helpers import shards
from tests.helpers.pictures import touch

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def names(data: object, **options: object) -> list[str]:
    images = scan(data, **options)  # type: ignore[arg-type]
    assert all(images.path(index).is_file() for index in range(len(images)))
    return shards.names(images)


# Several folders.

def test_several_folders_are_one_set_named_from_the_folder_they_share() -> None:
    touch(Path("in/a/2.png"), Path("in/a/1.png"), Path("in/a-b/3.png"), Path("in/c/d/4.png"))
    assert names(["in/a", "in/c", "in/a-b"]) == ["a-b/3.png", "a/1.png", "a/2.png", "c/d/4.png"]
    assert names([Path("in/a").absolute(), "in/c"]) == ["a/1.png", "a/2.png", "c/d/4.png"]
    assert names(["in/../in/a", "./in/c"]) == ["../in/a/1.png", "../in/a/2.png", "c/d/4.png"]


@pytest.mark.parametrize("seed", range(20))
def test_names_of_several_folders_are_in_byte_order_whatever_they_are_called(seed: int) -> None:
    generator = random.Random(seed)
    folders = {"".join(generator.choices("a-.Z0 é", k=generator.randint(1, 3))).strip(". ") or "x" for _ in range(6)}
    for folder in folders:
        touch(*(Path("in", folder, f"{generator.choice('a-Z~')}{number}", "i.png") for number in range(3)))
    found = names([f"in/{folder}" for folder in folders])
    assert len(found) == 3 * len(folders) and found == sorted(found, key=os.fsencode)


def test_classes_of_several_folders_are_the_union_of_their_first_level() -> None:
    touch(Path("one/dog/1.png"), Path("one/cat/2.png"), Path("two/cat/3.png"), Path("two/eel/4.png"))
    images = scan(["two", "one"])
    assert images.classes == ("cat", "dog", "eel") and images.labels is not None
    assert dict(zip(names(["two", "one"]), images.labels.tolist())) == {
        "one/cat/2.png": 0, "one/dog/1.png": 1, "two/cat/3.png": 0, "two/eel/4.png": 2}
    touch(Path("two/5.png"))
    assert scan(["two", "one"]).labels is None


@pytest.mark.parametrize("data", [["a", "a"], ["a", "a/b"], ["a/b", "a"], ["a", "./a/"], ["a", "link"], ["link", "a/b"],
                                  ["a", "a/../a/b"], ["a", "a/away"]])
def test_folders_that_lie_in_one_another_are_refused(data: list[str]) -> None:
    touch(Path("a/1.png"), Path("a/b/2.png"))
    Path("link").symlink_to("a")
    touch(Path("elsewhere/3.png"))
    Path("a/away").symlink_to(Path("elsewhere").absolute())
    with pytest.raises(ValueError, match="--data names .* - leave one of them out"):
        scan(data)


def test_a_folder_to_leave_out_is_used_where_it_is_asked_for() -> None:
    touch(Path("runs/a/1.png"), Path("runs/b/2.png"))
    assert names(["runs/a", "runs/b"], leave_out=(Path("runs/b"), Path("runs"))) == ["a/1.png", "b/2.png"]


def test_a_folder_that_two_folders_link_to_is_used_once() -> None:
    touch(Path("one/1.png"), Path("two/2.png"), Path("shared/3.png"))
    for folder in ("one", "two"):
        Path(folder, "link").symlink_to(Path("shared").absolute())
    assert names(["two", "one"]) == ["one/1.png", "two/2.png", "two/link/3.png"]


def test_each_of_several_folders_must_exist_and_hold_images() -> None:
    touch(Path("a/1.png"), Path("b/x.txt"), Path("s.tar"), Path("l.txt"))
    with pytest.raises(ValueError, match="no images under b: .* found 1 .txt"):
        scan(["a", "b"])
    with pytest.raises(ValueError, match=r"no such folder: c \(one of 2\)"):
        scan(["a", "c"])
    for other in ("s.tar", "l.txt"):
        with pytest.raises(ValueError, match="give folders, or tar shards, or one list, not some of each"):
            scan(["a", other])
    with pytest.raises(ValueError, match="--data is empty"):
        scan(["a", ""])


def test_one_folder_is_fingerprinted_as_ever() -> None:
    """blake2b of the joined names: what runs begun before there were lists and shards have in their checkpoints."""
    import hashlib
    touch(Path("x/b/1.png"), Path("x/a.png"))
    assert scan("x").fingerprint == hashlib.blake2b(b"a.pngb/1.png", digest_size=16).hexdigest()
    assert scan("x").fingerprint == scan(Path("x").absolute()).fingerprint


def test_a_console_that_is_gone_hides_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(Path(f"in/{folder}/1.png") for folder in range(30)))
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(listing, "SHOW_AFTER", 0.0)
    monkeypatch.setattr(listing, "SHOW_EVERY", 0.0)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        assert len(scan("in")) == 30 and scan("in").remarks == ()


def test_a_folder_that_cannot_be_listed_or_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    touch(Path("in/locked/1.png"))

    def refuse(path: object, *_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="no images under in: .*; cannot list .*denied"):
        patched.setattr(listing.os, "scandir", refuse)
        scan("in")
    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ValueError, match="--data in/locked: permission denied - check the rights"):
        scan("in/locked")


# Lists.

def write_list(content: bytes, name: str = "list.txt") -> Path:
    Path("in").mkdir(exist_ok=True)
    Path("in", name).write_bytes(content)
    return Path("in", name)


def test_a_list_names_files_from_its_folder_or_from_the_root(tmp_path: Path) -> None:
    touch(Path("in/b.png"), Path("out/a.JPEG"), Path("in/#c.png"), Path("in/with space .png"))
    lines = ["b.png", f"{tmp_path}/out/a.JPEG", "", "# a remark", "   ", "./#c.png", "with space .png"]
    expected = sorted([f"{tmp_path}/out/a.JPEG", "b.png", "#c.png", "with space .png"])
    assert names(write_list("\n".join(lines).encode())) == expected
    assert names(write_list(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")) == expected
    assert scan("in/list.txt").labels is None and scan("in/list.txt").given == "in/list.txt"


def test_what_follows_a_tab_in_a_list_is_the_label() -> None:
    images = scan(write_list(b"b.png\tdog\na.png\tcat \nc.png\tdog\n"))
    assert images.classes == ("cat", "dog") and images.labels is not None and images.labels.tolist() == [0, 1, 1]
    images = scan(write_list(b"b.png\tdog\na.png\nc.png\tcat\nd.png\t\n"))
    assert images.labels is None
    assert images.remarks == ("2 of the 4 lines of in/list.txt have no label, so none is used",)
    with pytest.raises(ValueError, match="line 3: a.png has another label above"):
        scan(write_list(b"a.png\tcat\n\n./a.png\tdog\n"))


def test_a_path_that_is_listed_twice_counts_once() -> None:
    images = scan(write_list(b"a.png\nb.png\n./a.png\nsub//.//c.png\nsub/c.png\n"))
    assert shards.names(images) == ["a.png", "b.png", "sub/c.png"]
    assert images.remarks == ("2 lines of in/list.txt repeat a path, which is used once",)


def test_names_in_a_list_that_are_not_text_are_found() -> None:
    odd = os.fsdecode(b"in/\xff\xfe.png")
    touch(Path(odd))
    assert names(write_list(b"\xff\xfe.png\n")) == [os.fsdecode(b"\xff\xfe.png")]


@pytest.mark.parametrize("content, message", [
    (b"", "lists no images"), (b"# nothing\n\n", "lists no images"), ("a.png\n".encode("utf-16"), "is no plain text"),
    (b"a\0.png", "is no plain text")])
def test_a_list_of_nothing_or_in_another_encoding_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"--data in/list.txt {message}"):
        scan(write_list(content))
    with pytest.raises(ValueError, match="no such list: in/lost.txt - did you mean in/list.txt?"):
        scan("in/lost.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_what_a_list_names_and_is_missing_or_no_file_is_a_bad_image() -> None:
    Path("in").mkdir()
    os.mkfifo("in/pipe.png")
    Image.new("RGB", (5, 4)).save("in/good.png")
    images = scan(write_list(b"gone.png\npipe.png\n.\ngood.png\n"))
    reasons = {}
    for index in range(len(images)):
        try:
            decode(images.source(index))
        except BadImageError as error:
            reasons[images.name(index)] = str(error).split(":")[0]
    assert reasons == {"": "not a regular file", "gone.png": "FileNotFoundError", "pipe.png": "not a regular file"}
    assert images.headers[:3] == (4, 5, True)


# Patterns, the command line, the run folder, progress.

@pytest.mark.parametrize("pattern, expected", [
    ("a", ["a"]), ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]), ("{3..3}", ["3"]),
    ("{0..1}/{1..2}", ["0/1", "0/2", "1/1", "1/2"]), ("{a..c}", ["{a..c}"]), ("{1,2}", ["{1,2}"])])
def test_patterns_stand_for_their_numbers(pattern: str, expected: list[str]) -> None:
    assert expand(pattern, "--data") == expected


@pytest.mark.parametrize("pattern", ["{5..4}", "{0..999999999999}", "{0..9999}{0..9999}"])
def test_patterns_that_stand_for_nothing_or_for_too_much_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="--data .* stands for .* names"):
        expand(pattern, "--data")


def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder() -> None:
    touch(Path("{0..9}/a.png"))
    assert names("{0..9}") == ["a.png"]


def test_a_long_scan_says_how_far_it_is(monkeypatch, capsys) -> None:
    touch(*(Path(f"in/{number}/a.png") for number in range(5)))
    scan("in")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(listing, "SHOW_AFTER", 0.0)
    scan("in")
    assert capsys.readouterr().err == "scanning: 0 images so far, now in in\n"  # the next one would be 10 seconds later
