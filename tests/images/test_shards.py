"""Tar shards: what is found in them, the bytes of one image, the index that is kept, and training from them."""

import io
import os
import pickle
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from byol_core.images import shards
from byol_core.images.duplicates import overlap
from byol_core.images.image_set import SHARD_INDEX, scan
from byol_core.views.batches import DeviceBatches, Order
from byol_core.views.recipes import paper_recipes
from tests.helpers.pictures import Folder, load
from tests.helpers.runs import SMALL, assert_same_state, checkpoint, metrics, run
from tests.helpers.shards import names, pack, png, value, write_tar


def test_images_of_a_shard_are_found_with_their_bytes_and_labels(tmp_path: Path) -> None:
    members = [("b.png", png(2)), ("b.cls", b"7\n"), ("a.x.png", png(1)), ("a.cls", b"-3"), ("a.json", b"{}")]
    images = scan(write_tar(tmp_path / "s.tar", members))
    assert names(images) == ["s.tar/a.x.png", "s.tar/b.png"] and images.classes == ("-3", "7")
    assert images.labels is not None and images.labels.tolist() == [0, 1] and not images.remarks
    assert [value(images, 0), value(images, 1)] == [1, 2]
    assert images.read(1) == png(2) and images.size(1) == len(png(2)) and images.headers[:3] == (3, 4, True)


@pytest.mark.parametrize("data", ["shards", "shards/t-{0..2}.tar", [f"shards/t-{number}.tar" for number in (2, 0, 1)]])
def test_folders_patterns_and_several_tars_are_one_set(tmp_path: Path, monkeypatch, data: str | list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        write_tar(Path("shards", f"t-{number}.tar"), [(f"{key}.png", png(10 * number + key)) for key in (1, 0)])
    images = scan(data)
    assert names(images) == [f"t-{number}.tar/{key}.png" for number in range(3) for key in range(2)]
    assert [value(images, index) for index in range(6)] == [0, 1, 10, 11, 20, 21]
    assert images.root == Path("shards") and images.labels is None


def test_pictures_of_a_shard_that_are_not_read_are_told(tmp_path: Path) -> None:
    members = [("a.png", png(1)), ("b.HEIC", b""), ("c.heic", b""), ("c.json", b"{}"), ("d.psd", b"")]
    tar = write_tar(tmp_path / "s.tar", members)
    assert scan(tar).remarks == (f"{tar}: left out, as these formats are not read: 2 .heic, 1 .psd",)


@pytest.mark.parametrize("cls, classes", [({"a", "b"}, ("5", "6")), ({"a"}, ("cat", "dog")), (set(), ("cat", "dog"))])
def test_labels_are_numbers_where_every_image_has_one_else_folders(tmp_path: Path, cls: set[str], classes) -> None:
    members = [("./cat/a.png", png()), ("dog/b.png", png())]
    numbers = [(f"{folder}/{key}.cls", number) for folder, key, number in (("cat", "a", b"6"), ("dog", "b", b"5"))
               if key in cls]
    images = scan(write_tar(tmp_path / "s.tar", [*members, *numbers]))
    assert images.classes == classes and images.labels is not None
    assert images.labels.tolist() == ([1, 0] if len(cls) == 2 else [0, 1])
    assert bool(images.remarks) == (len(cls) == 1)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_and_long_and_odd_names_are_read(tmp_path: Path, kind: int) -> None:
    long = "d" * 90 + "/" + "k" * 90 + ".png"
    members = [(long, png(1)), (os.fsdecode(b"\xff\xfe.png"), png(2)), ("\n.png", png(3))]
    images = scan(write_tar(tmp_path / "s.tar", members, kind))
    assert names(images) == ["s.tar/\n.png", f"s.tar/{long}", os.fsdecode(b"s.tar/\xff\xfe.png")]
    assert [value(images, index) for index in range(3)] == [3, 1, 2]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_tarfile_says(tmp_path: Path, kind: int) -> None:
    generator, expected = random.Random(kind), {}
    old = kind == tarfile.USTAR_FORMAT  # its names must fit into the header
    with tarfile.open(tmp_path / "s.tar", "w", format=kind) as archive:
        for number in range(200):
            folders = ["é" * generator.randint(1, 40 if old else 20) for _ in range(generator.randint(1, 2 if old else 9))]
            member = tarfile.TarInfo("/".join([*folders, f"{number}.png"]))
            kinds = [tarfile.REGTYPE] * 5 + [tarfile.DIRTYPE, tarfile.SYMTYPE] + [tarfile.AREGTYPE] * old
            member.type = generator.choice(kinds)
            member.size = generator.choice([0, 1, 511, 512, 513, 5000]) if member.isreg() else 0
            member.mtime = generator.choice([0, 2**35, -7]) * (not old)
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    with tarfile.open(tmp_path / "s.tar") as archive:
        for member in archive.getmembers():
            if not member.isdir():
                expected[member.name] = [member.offset_data, member.size] if member.isreg() else None
    index = shards.index_shard(tmp_path / "s.tar")
    assert [name.decode() for name in index.names] == sorted(expected, key=str.encode) and len(index.names) > 100
    for name, place in zip(index.names, index.places.tolist()):
        wanted = expected[name.decode()]
        assert place == wanted if wanted is not None else place[1] == shards.ELSEWHERE


def test_the_systems_own_tar_is_read(image_folder: Folder, tmp_path: Path) -> None:
    folder = image_folder(classes=2, per_class=3)
    subprocess.run(["tar", "cf", tmp_path / "s.tar", "-C", folder, "."], check=True)
    images, plain = scan(tmp_path / "s.tar"), scan(folder)
    assert names(images) == [f"s.tar/{name}" for name in names(plain)] and images.classes == plain.classes
    assert all(images.read(index) == plain.read(index) for index in range(6))


def test_tars_beside_images_are_left_alone_and_mentioned(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", png())])
    (tmp_path / "b.png").write_bytes(png())
    images = scan(tmp_path)
    assert names(images) == ["b.png"] and "1 tar files beside the images are not used" in images.remarks[0]


def test_few_files_stay_open_and_none_is_opened_before_it_is_needed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "OPEN_AT_MOST", 2)
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", [("a.png", png(number))])
    images = scan(tmp_path)
    assert images.shards is not None and not images.shards._opened
    open_before = len(os.listdir("/proc/self/fd"))
    for index in (0, 4, 3, 3, 1, 2, 0):
        assert value(images, index) == index
    assert list(images.shards._opened) == [2, 0] and len(os.listdir("/proc/self/fd")) == open_before + 2
    again = pickle.loads(pickle.dumps(images))
    assert again.shards is not None and not again.shards._opened and value(again, 3) == 3
    del images
    assert len(os.listdir("/proc/self/fd")) == open_before + 1  # that of `again`


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    built: list[str] = []
    original = shards.index_shard

    def index_shard(path: Path, *rest: object):
        built.append(path.name)
        return original(path, *rest)

    monkeypatch.setattr(shards, "index_shard", index_shard)
    return built


def test_a_kept_index_is_used_while_size_and_time_of_a_tar_are_the_same(tmp_path: Path, monkeypatch) -> None:
    built = counted(monkeypatch)
    for number in range(3):
        write_tar(tmp_path / "data" / f"{number}.tar", [("x/a.png", png(number)), ("x/a.cls", b"%d" % number)])
    first = scan(tmp_path / "data", keep_in=tmp_path)
    assert sorted(built) == ["0.tar", "1.tar", "2.tar"]
    second = scan(tmp_path / "data", keep_in=tmp_path)
    assert len(built) == 3 and second.fingerprint == first.fingerprint and second.classes == ("0", "1", "2")
    assert [value(second, index) for index in range(3)] == [0, 1, 2]

    stamp = (tmp_path / "data" / "1.tar").stat()
    write_tar(tmp_path / "data" / "1.tar", [("x/b.png", png(9)), ("x/b.cls", b"1")])
    os.utime(tmp_path / "data" / "1.tar", ns=(stamp.st_mtime_ns, stamp.st_mtime_ns + 1))
    third = scan(tmp_path / "data", keep_in=tmp_path)
    assert built[3:] == ["1.tar"] and third.name(1) == "1.tar/x/b.png" and value(third, 1) == 9


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"nonsense"), lambda path: path.write_bytes(b""),
                                   lambda path: torch.save({"index": 99}, path), lambda path: os.truncate(path, 500)])
def test_a_kept_index_that_cannot_be_used_is_made_again(tmp_path: Path, monkeypatch, spoil) -> None:
    built = counted(monkeypatch)
    write_tar(tmp_path / "a.tar", [("a.png", png(1))])
    scan(tmp_path, keep_in=tmp_path)
    spoil(tmp_path / SHARD_INDEX)
    assert value(scan(tmp_path, keep_in=tmp_path), 0) == 1 and built == ["a.tar"] * 2
    scan(tmp_path, keep_in=tmp_path / "no such folder")


def test_fingerprint_changes_when_images_swap_their_places(tmp_path: Path) -> None:
    a, b = png(1), png(2, (400, 3))
    before = scan(write_tar(tmp_path / "s.tar", [("0.png", a), ("1.png", b)])).fingerprint
    assert scan(tmp_path).fingerprint == before
    assert scan(write_tar(tmp_path / "s.tar", [("0.png", b), ("1.png", a)])).fingerprint != before


def test_a_shard_gives_the_views_that_the_folder_it_is_made_of_gives(image_folder: Folder, tmp_path: Path) -> None:
    folder = image_folder(classes=2, per_class=6)
    (folder / "class0" / "004.png").write_bytes(b"torn")
    both = [DeviceBatches(load(data, "device"), paper_recipes(16), Order(12, 4, seed=1))
            for data in (folder, pack(folder, tmp_path / "s.tar"))]
    for (a1, a2), (b1, b2) in zip(both[0].epoch(2), both[1].epoch(2), strict=True):
        assert torch.equal(a1, b1) and torch.equal(a2, b2)
    assert list(both[0].bad.reasons) == list(both[1].bad.reasons) == [4]


def test_images_of_a_shard_are_found_to_be_those_of_a_folder(image_folder: Folder, tmp_path: Path) -> None:
    folder = image_folder(classes=2, per_class=3)
    plain, packed = scan(folder), scan(pack(folder, tmp_path / "s.tar"))
    assert overlap(plain, [0, 1, 2, 3], packed, [2, 3, 4, 5]) == (0, 2)
    assert overlap(packed, [0, 1, 2, 3], packed, [3, 4]) == (1, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_run_on_shards_equals_one_on_the_folder_and_resumes_exactly(
        image_folder: Folder, stopped_after: Callable[..., None], monkeypatch, capsys) -> None:
    folder = image_folder(classes=2, per_class=6)
    for label in ("class0", "class1"):
        pack(folder / label, Path(f"shards/{label}.tar"))
    rest = ["--epochs", 2, "--views", "cpu", "--no-eval", *SMALL]
    assert run("--data", folder, *rest, "--out", "plain") == 0
    assert run("--data", "shards", *rest, "--workers", 2, "--out", "whole") == 0
    assert_same_state(checkpoint("plain"), checkpoint("whole"))

    stopped_after(4, "--data", "shards", *rest, "--out", "parts")  # in the middle of the second epoch
    built = counted(monkeypatch)
    assert run("--data", "shards", *rest, "--out", "parts", "--resume") == 0
    assert built == []  # from the index in the run folder
    assert_same_state(checkpoint("whole"), checkpoint("parts"))
    assert metrics("whole") == metrics("parts")

    swapped = sorted((folder / "class1").iterdir(), reverse=True)
    write_tar(Path("shards/class1.tar"), [(path.name, path.read_bytes()) for path in swapped])
    assert run("--data", "shards", *rest, "--out", "parts", "--resume") == 2
    assert "the names of the image files" in capsys.readouterr().err
