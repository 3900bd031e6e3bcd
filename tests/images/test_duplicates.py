"""Which files are read to find copies."""

from pathlib import Path

from byol_core.images import duplicates
from byol_core.images.image_set import scan


def test_overlap_reads_only_files_whose_size_occurs_on_both_sides(tmp_path: Path, monkeypatch) -> None:
    for name, content in (("a", b"12"), ("b", b"345"), ("c", b"12"), ("d", b"34"), ("e", b"6789")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "list.txt").write_text("a\nb\nc\nd\ne\nf")  # f is missing
    read = []
    files = scan(tmp_path / "list.txt")
    monkeypatch.setattr(duplicates, "sha256", lambda path: read.append(path.name) or path.read_bytes().hex())
    assert duplicates.overlap(files, [0, 1, 5], files, [2, 3, 4]) == (0, 1)
    assert sorted(read) == ["a", "c", "d"]
