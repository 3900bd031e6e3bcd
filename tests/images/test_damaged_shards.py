"""Tar shards that are damaged, malicious, or no tar at all: what is used of them, and what is said."""

import gzip
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import pytest

from byol_core.images.decoding import BadImageError, decode
from byol_core.images.image_set import scan
from tests.helpers.shards import names, png, value, write_tar


def test_names_that_lead_out_of_the_tar_are_only_names(tmp_path: Path) -> None:
    members = [("../../etc/passwd", b"root"), ("../../x.png", png(1)), ("/tmp/y.png", png(2)), (".z.png", png(3))]
    images = scan(write_tar(tmp_path / "in" / "s.tar", members))
    assert names(images) == ["s.tar/tmp/y.png", "s.tar/x.png"] and [value(images, 0), value(images, 1)] == [2, 1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "s.tar"]


def test_links_sparse_and_special_members_are_bad_images(tmp_path: Path) -> None:
    (tmp_path / "holes.png").write_bytes(b"")
    os.truncate(tmp_path / "holes.png", 2**20)
    with open(tmp_path / "holes.png", "r+b") as file:
        file.seek(2**19)
        file.write(b"x")
    subprocess.run(["tar", "cSf", "s.tar", "holes.png"], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("link.png", tarfile.SYMTYPE), ("pipe.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    images = scan(tmp_path / "s.tar")
    assert names(images) == [f"s.tar/{name}.png" for name in ("hard", "holes", "link", "pipe")]
    for index in range(4):
        with pytest.raises(BadImageError, match="not in one piece in the tar"):
            images.source(index)


def test_of_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    images = scan(write_tar(tmp_path / "s.tar", [("a.png", png(1)), ("b.png", png(2)), ("./a.png", png(3))]))
    assert [value(images, index) for index in range(len(images))] == [3, 2]
    assert images.remarks == (f"{tmp_path / 's.tar'} holds 1 images twice by name: the last of each is used",)


def claim(path: Path, member: int, size: int) -> None:
    """Overwrite the size that the header of a one-block member claims, and its checksum."""
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(content[member * 1024:member * 1024 + 512]), "utf-8", "strict")
    if size >= 0:
        header.size = size
        content[member * 1024:member * 1024 + 512] = header.tobuf(tarfile.GNU_FORMAT)
    else:
        field = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        field[124:136] = size.to_bytes(12, "big", signed=True)
        field[148:156] = b"        "
        field[148:155] = f"{sum(field):06o}\0".encode()
        content[member * 1024:member * 1024 + 512] = field
    path.write_bytes(content)


@pytest.mark.parametrize("size, message", [(10_000, "cut off"), (2**33, "over the limit"), (2**80, "over the limit")])
def test_a_member_that_claims_more_than_there_is_is_a_bad_image_and_takes_no_memory(tmp_path: Path, size: int,
                                                                                    message: str) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.png", png(1)), ("b.png", png(2))], tarfile.GNU_FORMAT)
    claim(path, 1, size)
    images = scan(path)
    assert names(images) == ["s.tar/a.png", "s.tar/b.png"] and value(images, 0) == 1
    with pytest.raises(BadImageError, match=message):
        images.source(1)


@pytest.mark.parametrize("size", [-512, -2**40])
def test_a_negative_size_ends_the_tar_instead_of_going_round_in_it(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "s.tar", [(f"{key}.png", png(key)) for key in range(4)], tarfile.GNU_FORMAT)
    claim(path, 2, size)
    images = scan(path)
    assert names(images) == ["s.tar/0.png", "s.tar/1.png"]
    assert len(images.remarks) == 1 and "is damaged at byte" in images.remarks[0]


def test_a_truncated_tar_is_used_up_to_where_it_ends(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(f"{key}.png", png(key)) for key in range(4)])
    os.truncate(path, 2 * 1024 + 512 + 20)  # in the middle of the third image
    images = scan(path)
    assert [value(images, index) for index in range(2)] == [0, 1] and len(images) == 3
    with pytest.raises(BadImageError, match="cut off: the tar ends before it does"):
        images.source(2)
    assert "is damaged at byte 3072 (unexpected end of data): only the 3 images before it are used" in images.remarks[0]
    os.truncate(path, 2 * 1024)  # between two images, where it is whole as far as anyone can tell
    assert len(scan(path)) == 2 and scan(path).remarks == ()


def test_a_damaged_header_in_the_middle_is_reported_and_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(f"{key}.png", png(key)) for key in range(4)])
    with open(path, "r+b") as file:
        file.seek(2 * 1024 + 3)
        file.write(b"\xff")
    images = scan(path)
    assert len(images) == 2
    assert images.remarks == (f"{path} is damaged at byte 2048 (bad header): only the 2 images before it are used",)


@pytest.mark.parametrize("content, message", [
    (b"", "is no tar file"), (b"<html>404</html>" * 99, "is no tar file"),
    (gzip.compress(b"x", mtime=0), r"is compressed \(gzip\)"),
    (b"BZh9", r"is compressed \(bzip2\)"), (b"\xfd7zXZ\x00", r"is compressed \(xz\)"),
    (b"\x28\xb5\x2f\xfd", r"is compressed \(zstd\)")])
def test_what_is_no_tar_or_a_compressed_one_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", png())])
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(ValueError, match=f"--data .*b.tar {message}"):
        scan(tmp_path)


def test_an_empty_tar_adds_nothing_and_alone_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(ValueError, match="no images in the 1 shards of --data"):
        scan(tmp_path)
    write_tar(tmp_path / "b.tar", [("a.png", png())])
    assert names(scan(tmp_path)) == ["b.tar/a.png"]


def test_compressed_tars_in_a_folder_and_missing_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(ValueError, match="no images under .*found 1 .gz - decompress tars"):
        scan(tmp_path)
    write_tar(tmp_path / "t-0.tar", [("a.png", png())])
    with pytest.raises(ValueError, match=r"no such shard: .*t-1.tar \(one of 2\) - did you mean .*t-0.tar\?"):
        scan(tmp_path / "t-{0..1}.tar")
    (tmp_path / "again.tar").symlink_to("t-0.tar")
    with pytest.raises(ValueError, match="twice - leave one of them out"):
        scan([tmp_path / "t-0.tar", tmp_path / "again.tar"])


def test_an_image_that_cannot_be_decoded_or_read_is_a_bad_one(tmp_path: Path) -> None:
    images = scan(write_tar(tmp_path / "s.tar", [("a.png", b"<html>")]))
    with pytest.raises(BadImageError, match="cannot identify image file$"):
        decode(images.source(0))
    (tmp_path / "s.tar").unlink()
    with pytest.raises(BadImageError, match="FileNotFoundError"):
        pickle.loads(pickle.dumps(images)).source(0)  # in a worker that has yet to open it
