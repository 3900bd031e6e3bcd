"""Tar shards: what is found in them, the bytes of one image, damage and malice, and training from them."""

import gzip
import io
import os
import pickle
import random
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

import byol_core.images.shards as shards_module
from byol_core.images.decoding import BadImageError, decode
from byol_core.images.duplicates import overlap
from byol_core.images.image_set import SHARD_INDEX, ImageSet, scan
from byol_core.run.run import Run
from byol_core.views.batches import DeviceBatches, Order, WorkerBatches
from byol_core.views.pixels import ImageData, load_images
from byol_core.views.recipes import paper_recipes
from tests.helpers.runs import SMALL, assert_same_state, checkpoint, metrics, run, summary

CPU = torch.device("cpu")
Folder = Callable[..., Path]


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
    from PIL import Image
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def names(images: ImageSet) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def value(images: ImageSet, index: int) -> int:
    return decode(images.source(index)).getpixel((0, 0))[0]


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
    index = shards_module.index_shard(tmp_path / "s.tar")
    assert [name.decode() for name in index.names] == sorted(expected, key=str.encode) and len(index.names) > 100
    for name, place in zip(index.names, index.places.tolist()):
        wanted = expected[name.decode()]
        assert place == wanted if wanted is not None else place[1] == shards_module.ELSEWHERE


def test_the_systems_own_tar_is_read(image_folder: Folder, tmp_path: Path) -> None:
    folder = image_folder(classes=2, per_class=3)
    subprocess.run(["tar", "cf", tmp_path / "s.tar", "-C", folder, "."], check=True)
    images, plain = scan(tmp_path / "s.tar"), scan(folder)
    assert names(images) == [f"s.tar/{name}" for name in names(plain)] and images.classes == plain.classes
    assert all(images.read(index) == plain.read(index) for index in range(6))


# What a hostile or broken tar may hold.

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


@pytest.mark.parametrize("size", [10_000, 2**33, 2**62, 2**80])
def test_a_member_that_claims_more_than_there_is_is_a_bad_image_and_takes_no_memory(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.png", png(1)), ("b.png", png(2))], tarfile.GNU_FORMAT)
    claim(path, 1, size)
    images = scan(path)
    assert names(images) == ["s.tar/a.png", "s.tar/b.png"] and value(images, 0) == 1
    with pytest.raises(BadImageError, match="cut off|over the limit"):
        images.source(1)


def test_an_image_file_over_the_limit_is_a_bad_image(tmp_path: Path, monkeypatch) -> None:
    images = scan(write_tar(tmp_path / "s.tar", [("a.png", png(1))]))
    monkeypatch.setattr(shards_module, "LARGEST", len(png(1)) - 1)
    with pytest.raises(BadImageError, match="over the limit"):
        images.source(0)


@pytest.mark.parametrize("size", [-512, -1024, -2**40])
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


def test_a_tar_cut_off_between_two_images_is_whole_as_far_as_anyone_can_tell(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(f"{key}.png", png(key)) for key in range(4)])
    os.truncate(path, 2 * 1024)
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


def test_tars_beside_images_are_left_alone_and_mentioned(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", png())])
    (tmp_path / "b.png").write_bytes(png())
    images = scan(tmp_path)
    assert names(images) == ["b.png"] and "1 tar files beside the images are not used" in images.remarks[0]


def test_an_image_that_cannot_be_decoded_is_called_by_its_name(tmp_path: Path) -> None:
    images = scan(write_tar(tmp_path / "s.tar", [("a.png", b"<html>")]))
    with pytest.raises(BadImageError, match="cannot identify image file$"):
        decode(images.source(0))
    (tmp_path / "s.tar").unlink()
    with pytest.raises(BadImageError, match="FileNotFoundError"):
        pickle.loads(pickle.dumps(images)).source(0)  # in a worker that has yet to open it


# Open files, the index that is kept, the fingerprint.

def test_few_files_stay_open_and_none_is_opened_before_it_is_needed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards_module, "OPEN_AT_MOST", 2)
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
    original = shards_module.index_shard

    def index_shard(path: Path, *rest: object):
        built.append(path.name)
        return original(path, *rest)

    monkeypatch.setattr(shards_module, "index_shard", index_shard)
    return built


def test_a_kept_index_is_used_while_size_and_time_of_a_tar_are_the_same(tmp_path: Path, monkeypatch) -> None:
    built = counted(monkeypatch)
    for number in range(3):
        write_tar(tmp_path / "data" / f"{number}.tar", [("x/a.png", png(number)), ("x/a.cls", b"%d" % number)])
    first = scan(tmp_path / "data", keep_in=tmp_path)
    assert sorted(built) == ["0.tar", "1.tar", "2.tar"]
    second = scan(tmp_path / "data", keep_in=tmp_path)
    assert len(built) == 3 and second.fingerprint() == first.fingerprint() and second.classes == ("0", "1", "2")
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
    before = scan(write_tar(tmp_path / "s.tar", [("0.png", a), ("1.png", b)])).fingerprint()
    assert scan(tmp_path).fingerprint() == before
    assert scan(write_tar(tmp_path / "s.tar", [("0.png", b), ("1.png", a)])).fingerprint() != before


# Training from shards.

def load(data: Path, where: str) -> ImageData:
    return load_images(scan(data), where, CPU, lambda line: None)[0]


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_a_shard_gives_the_views_that_the_folder_it_is_made_of_gives(image_folder: Folder, tmp_path: Path,
                                                                     where: str) -> None:
    folder = image_folder(classes=2, per_class=6)
    (folder / "class0" / "004.png").write_bytes(b"torn")
    tar, order = pack(folder, tmp_path / "s.tar"), Order(12, 4, seed=1)
    both = [DeviceBatches(load(data, where), paper_recipes(16), order) if where == "device" else
            WorkerBatches(load(data, where), paper_recipes(16), order, 0) for data in (folder, tar)]
    for (a1, a2), (b1, b2) in zip(both[0].epoch(2), both[1].epoch(2), strict=True):
        assert torch.equal(a1, b1) and torch.equal(a2, b2)
    assert list(both[0].bad.reasons) == list(both[1].bad.reasons) == [4]


def test_images_of_a_shard_are_found_to_be_those_of_a_folder(image_folder: Folder, tmp_path: Path) -> None:
    folder = image_folder(classes=2, per_class=3)
    plain, packed = scan(folder), scan(pack(folder, tmp_path / "s.tar"))
    assert overlap(plain, [0, 1, 2, 3], packed, [2, 3, 4, 5]) == (0, 2)
    assert overlap(packed, [0, 1, 2, 3], packed, [3, 4]) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("views", ["device", "cpu"])
def test_a_run_on_shards_equals_one_on_the_folder_and_resumes_exactly(image_folder: Folder, tmp_path: Path, monkeypatch,
                                                                      views: str, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = image_folder(classes=2, per_class=6)
    files = sorted(folder.rglob("*.png"))
    for number in range(2):
        write_tar(tmp_path / "shards" / f"class{number}.tar", [(path.name, path.read_bytes()) for path in files
                                                               if path.parent.name == f"class{number}"])
    rest = ["--epochs", 2, "--views", views, "--no-eval", *SMALL]
    assert run("--data", folder, *rest, "--out", "plain") == 0
    assert run("--data", "shards", *rest, "--out", "whole") == 0
    assert_same_state(checkpoint("plain"), checkpoint("whole"))
    if views == "cpu":
        assert run("--data", "shards", *rest, "--workers", 2, "--out", "workers") == 0
        assert_same_state(checkpoint("plain"), checkpoint("workers"))

    original = Run._after_step

    def terminate_at(self: Run, progress, step) -> None:
        if progress.updates == 4 and self.setup.config.resume is None:  # the middle of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, progress, step)

    monkeypatch.setattr(Run, "_after_step", terminate_at)
    assert run("--data", "shards", *rest, "--out", "parts") == 143
    assert checkpoint("parts")["progress"]["updates"] == 4
    built = counted(monkeypatch)
    assert run("--data", "shards", *rest, "--out", "parts", "--resume") == 0
    assert built == []  # from the index in the run folder
    assert_same_state(checkpoint("whole"), checkpoint("parts"))
    assert metrics("whole") == metrics("parts")

    write_tar(tmp_path / "shards" / "class1.tar", [(path.name, path.read_bytes()) for path in files[::-1]
                                                   if path.parent.name == "class1"])
    assert run("--data", "shards", *rest, "--out", "parts", "--resume") == 2
    assert "the names of the image files" in capsys.readouterr().err


@pytest.mark.slow
def test_a_labelled_run_on_damaged_shards_says_so_and_measures(image_folder: Folder, tmp_path: Path, monkeypatch,
                                                               capsys) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(image_folder(classes=2, per_class=12).rglob("*.png"))
    for number in range(3):
        members = []
        for path in files[number::3]:
            key, label = f"{path.parent.name}-{path.stem}", path.parent.name.removeprefix("class")
            members += [(f"{key}.cls", label.encode()), (f"{key}.png", path.read_bytes())]
        write_tar(tmp_path / "shards" / f"{number}.tar", members)
    with tarfile.open("shards/2.tar") as archive:
        last = archive.getmembers()[-1]
    os.truncate("shards/2.tar", last.offset_data + 10)
    assert run("--data", "shards/{0..2}.tar", "--epochs", 1, "--out", "out", *SMALL) == 0
    result = summary("out")
    assert result["classes"] == 2 and result["knn"] is not None
    printed = capsys.readouterr()
    assert "warning: shards/2.tar is damaged at byte" in printed.out + printed.err
