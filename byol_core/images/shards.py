"""Tar shards in the WebDataset convention: an index of the images in them, and the bytes of any one of these."""

import contextlib
import io
import os
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from byol_core.images.listing import IMAGE_ENDINGS, ScanProgress, is_hidden, unread
from byol_core.system.files import CheckpointError, atomic_write, read_verified

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512  # bytes; a tar is made of blocks
ELSEWHERE = -1  # in place of the size of a member whose bytes are not in one piece in the tar: links, sparse files
LARGEST = 2**30  # bytes of an image file that are read at once
NO_LABEL = torch.iinfo(torch.int64).min
OPEN_AT_MOST = 256  # shards that a process keeps open; systems allow 1024 files or more
LONGEST_LABEL = 32  # bytes of a .cls member
INDEXED_AT_ONCE = 16  # shards
INDEX_FORMAT = 2


@dataclass(frozen=True)
class ShardIndex:
    """The images of one tar, by the byte order of their names.

    places: (n, 2) int64, offset and size in bytes; labels: (n,) int64 from the .cls members, NO_LABEL where there is none.
    """

    names: list[bytes]
    places: Tensor
    labels: Tensor
    remarks: tuple[str, ...]


class Shards:
    """Random access to the images of several tars, which are opened when first read from, in every process.

    paths: the tars; ends: how many images there are up to the end of each; places: (N, 2) int64 of all of them.
    """

    def __init__(self, paths: Sequence[Path], ends: Sequence[int], places: Tensor) -> None:
        self.paths, self.ends, self.places = paths, ends, places
        self._opened: dict[int, int] = {}  # file descriptors; oldest first

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": {}}

    def __del__(self) -> None:
        for handle in self._opened.values():
            os.close(handle)

    def size(self, index: int) -> int:
        """Bytes of the image. Raises: OSError when it has none of its own."""
        size = int(self.places[index, 1])
        if size == ELSEWHERE:
            raise OSError("a link, a sparse or a special file, whose bytes are not in one piece in the tar")
        return size

    def read(self, index: int, most: int | None = None) -> bytes:
        """The bytes of the image, or its first `most`. Raises: OSError when they are not all there."""
        size, offset = self.size(index), int(self.places[index, 0])
        if size > LARGEST:
            raise OSError(f"{size} bytes, over the limit of {LARGEST}")
        handle = self._open(bisect_right(self.ends, index))
        if offset + size > os.fstat(handle).st_size:
            raise OSError("cut off: the tar ends before it does")
        # Without a file position, so that processes and threads may share the descriptor.
        return os.pread(handle, size if most is None else min(size, most), offset)

    def _open(self, shard: int) -> int:
        if shard not in self._opened:
            if len(self._opened) >= OPEN_AT_MOST:
                os.close(self._opened.pop(next(iter(self._opened))))
            self._opened[shard] = os.open(self.paths[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._opened[shard]


def index_shards(paths: Sequence[Path], flag: str, progress: ScanProgress, kept: Path | None = None) -> list[ShardIndex]:
    """An index of each tar. kept: a file with those made before, which count while size and time of a tar are the same.

    Raises: ValueError for a file that is no tar, or a compressed one.
    """
    known = {} if kept is None else _read_kept(kept)
    stamps = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, paths)]
    places = [os.path.realpath(path) for path in paths]

    def index(shard: int) -> ShardIndex:
        record = known.get(places[shard])
        if record is not None and record["stamp"] == stamps[shard]:
            return _from_record(record)
        return index_shard(paths[shard], flag, progress)

    with ThreadPoolExecutor(INDEXED_AT_ONCE) as pool:  # threads, as most of it is waiting for the disk
        indices = list(pool.map(index, range(len(paths))))
    fresh = {place: {"stamp": stamp, **_to_record(index)} for place, stamp, index in zip(places, stamps, indices)}
    if kept is not None and {place: record["stamp"] for place, record in known.items()} != dict(zip(places, stamps)):
        with contextlib.suppress(OSError):  # it is only slower the next time
            atomic_write(kept, lambda file: torch.save({"index": INDEX_FORMAT, "shards": fresh}, file))
    return indices


def index_shard(path: Path, flag: str = "--data", progress: ScanProgress | None = None) -> ShardIndex:
    """Which images a tar holds, where. Of members of the same name the last counts, as when unpacking.

    A damaged tar is read up to the damage. Raises: ValueError for a file that is no tar at all, or a compressed one.
    """
    progress = progress or ScanProgress()
    places: dict[bytes, tuple[int, int]] = {}
    labels: dict[bytes, int] = {}
    others: Counter[str] = Counter()
    remarks: list[str] = []
    repeated = 0
    with open(path, "rb") as file:
        archive, handle = _open_tar(file, path, flag), file.fileno()
        try:
            for full_name, offset, size in _members(archive, handle):
                name = _plain_name(full_name)
                if name is not None and name.lower().endswith(IMAGE_ENDINGS):
                    repeated += name in places
                    places[name] = offset, min(size, 2**62)
                    progress.advance(1, os.fsencode(path))
                elif name is not None and name.endswith(b".cls") and size != ELSEWHERE:
                    labels[_key(name)] = _label(os.pread(handle, min(size, LONGEST_LABEL), offset))
                elif name is not None:
                    others[os.path.splitext(os.fsdecode(name))[1].lower()] += 1
            damage = "bad header" if os.pread(handle, BLOCK, archive.offset).strip(b"\0") else ""
        except Exception as error:  # tarfile raises whatever it likes on broken input
            damage = str(error) or type(error).__name__
        if damage:
            remarks.append(f"{path} is damaged at byte {archive.offset} ({damage}): "
                           f"only the {len(places)} images before it are used")
    if repeated:
        remarks.append(f"{path} holds {repeated} images twice by name: the last of each is used")
    remarks += [f"{path}: {remark}" for remark in unread(others)]
    names = sorted(places)
    return ShardIndex(names, torch.tensor([places[name] for name in names], dtype=torch.int64).view(-1, 2),
                      torch.tensor([labels.get(_key(name), NO_LABEL) for name in names], dtype=torch.int64), tuple(remarks))


def _open_tar(file: io.BufferedReader, path: Path, flag: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
    except Exception as error:
        start = os.pread(file.fileno(), 6, 0)
        for mark, kind in COMPRESSED.items():
            if start.startswith(mark):
                raise ValueError(f"{flag} {path} is compressed ({kind}): single images cannot be read from it - decompress it "
                                 "(images are compressed already)") from None
        raise ValueError(f"{flag} {path} is no tar file ({error}) - fetch it again, or leave it out") from error


def _members(archive: tarfile.TarFile, handle: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size or ELSEWHERE) of all that is no folder; ordinary headers are read here, five times as fast."""
    member = archive.next()
    while member is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep every one
        if member.size < 0:  # tarfile would go round in circles
            raise ValueError(f"a member of {member.size} bytes")
        if not member.isdir():
            whole = member.isreg() and not member.issparse()
            yield member.name.encode("utf-8", "surrogateescape"), member.offset_data, member.size if whole else ELSEWHERE
        while (plain := _plain_header(os.pread(handle, BLOCK, archive.offset))) is not None:
            name, size = plain
            yield name, archive.offset + BLOCK, size
            archive.offset += BLOCK + -(-size // BLOCK) * BLOCK
        member = archive.next()


def _plain_header(header: bytes) -> tuple[bytes, int] | None:
    """(name, size) of an ordinary file whose name fits into the header; None for all else, which is tarfile's to judge."""
    name = header[:100].split(b"\0", 1)[0]
    if header[156:157] not in (b"0", b"\0") or header[345:346] != b"\0" or not name or name.endswith(b"/"):
        return None
    try:
        size, checksum = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    return (name, size) if size >= 0 and checksum == sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) else None


def _plain_name(name: bytes) -> bytes | None:
    """The name without what leads out of the archive; None for hidden files. Nothing is ever written by that name."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")]
    return None if not parts or any(is_hidden(part) for part in parts) else b"/".join(parts)


def _key(name: bytes) -> bytes:
    """What the members of one sample have in common: the name up to the first dot after the folders."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.split(b".", 1)[0]


def _label(text: bytes) -> int:
    try:
        number = int(text)
    except ValueError:
        return NO_LABEL
    return number if abs(number) < 2**62 else NO_LABEL  # an int64 holds it


def pack(names: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Many names in two tensors, of which processes share the memory: all in one block, and where each one ends in it."""
    ends = torch.from_numpy(np.fromiter(map(len, names), np.int64, len(names))).cumsum(0)
    block = bytearray()
    for start in range(0, len(names), 10_000):  # joining takes 80 bytes more per name
        block += b"".join(names[start:start + 10_000])
    return torch.from_numpy(np.frombuffer(block, np.uint8)), ends


def unpack(block: Tensor, ends: Tensor) -> list[bytes]:
    whole, places = block.numpy().tobytes(), ends.tolist()
    return [whole[start:end] for start, end in zip([0, *places], places)]


def _to_record(index: ShardIndex) -> dict[str, object]:
    names, ends = pack(index.names)
    return {"names": names, "ends": ends, "places": index.places, "labels": index.labels, "remarks": list(index.remarks)}


def _from_record(record: dict[str, object]) -> ShardIndex:
    names, ends, places, labels = (record[key] for key in ("names", "ends", "places", "labels"))
    assert isinstance(names, Tensor) and isinstance(ends, Tensor)
    assert isinstance(places, Tensor) and isinstance(labels, Tensor)
    remarks = record["remarks"]
    assert isinstance(remarks, list)
    return ShardIndex(unpack(names, ends), places, labels, tuple(remarks))


def _read_kept(path: Path) -> dict[str, dict[str, object]]:
    """The records in the file; none where it does not exist, is damaged or was written in another format."""
    try:
        kept = read_verified(path)
    except CheckpointError:
        return {}
    return kept["shards"] if isinstance(kept, dict) and kept.get("index") == INDEX_FORMAT else {}
