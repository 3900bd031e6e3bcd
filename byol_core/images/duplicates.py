"""Images that are there more than once: the same file by two ways, or files of the same bytes."""

import functools
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from byol_core.images.image_set import ImageSet
from byol_core.images.listing import ScanProgress
from byol_core.system.files import sha256

HEAD = 4096  # bytes that tell most files of one size apart


def find_copies(files: ImageSet) -> list[tuple[int, int]]:
    """(place of an image, place of the first one of the same bytes) for every image that another one comes before.

    Only files of one size are read, and in full only those that begin alike.
    """
    groups = [list(range(len(files)))]
    for key in (_size, _head, _content):
        groups = _alike(files, groups, key)
    return sorted((row, rows[0]) for rows in groups for row in rows[1:])


def _alike(files: ImageSet, groups: Iterable[list[int]], key: Callable[[ImageSet, int], Hashable]) -> list[list[int]]:
    """The parts of each group whose images have the same key, but for parts of one."""
    found, progress = [], ScanProgress()
    for group in groups:
        by_key: dict[Hashable, list[int]] = defaultdict(list)
        for row in group:
            by_key[key(files, row)].append(row)
            progress.advance(1, os.fsencode(files.given))
        found += [rows for rows in by_key.values() if len(rows) > 1]
    return found


def same_paths(files: ImageSet, others: ImageSet) -> int:
    """How many files of `others` are among `files`, by the real paths of their folders: quick for a million files."""
    real_folder = functools.cache(os.path.realpath)

    def places(images: ImageSet) -> Iterator[tuple[str, str]]:
        return ((real_folder(path.parent), path.name) for path in map(images.path, range(len(images))))

    measured = set(places(files))
    return sum(place in measured for place in places(others))


def overlap(files: ImageSet, fit: Sequence[int], eval_files: ImageSet, test: Sequence[int]) -> tuple[int, int]:
    """How many images of `test` are in `fit` too: (as the same real path, as another file of the same content).

    Only files of a size that occurs on both sides are read.
    """
    real, sizes = {os.path.realpath(files.path(row)) for row in fit}, defaultdict(list)
    for row in fit:
        sizes[_size(files, row)].append(row)
    contents: dict[int, set[bytes]] = {}  # of the files to fit on, by size
    same_file = same_content = 0
    for row in test:
        size = _size(eval_files, row)
        if os.path.realpath(eval_files.path(row)) in real:
            same_file += 1
        elif size in sizes and size >= 0:
            if size not in contents:
                contents[size] = {_content(files, other) for other in sizes[size]}
            same_content += _content(eval_files, row) in contents[size]
    return same_file, same_content


def _size(files: ImageSet, row: int) -> int:
    try:
        return files.size(row)
    except OSError:  # decoding will name it
        return -1


def _head(files: ImageSet, row: int) -> bytes:
    return _or_path(files, row, lambda: hashlib.blake2b(files.read(row, HEAD)).digest())


def _content(files: ImageSet, row: int) -> bytes:
    """A checksum, for which the file is not held in memory; a member of a shard is, and is never too large for that."""
    return _or_path(files, row, lambda: (sha256(files.path(row)) if files.shards is None else
                                         hashlib.sha256(files.read(row)).hexdigest()).encode())


def _or_path(files: ImageSet, row: int, look: Callable[[], bytes]) -> bytes:
    """What `look` finds; of a file that cannot be read its path, which no other has."""
    try:
        return look()
    except OSError:
        return os.fsencode(files.path(row))
