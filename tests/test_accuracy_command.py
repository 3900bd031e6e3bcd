"""`python -m tests.bench.accuracy`: what was measured is kept, and told with where and on what it was measured."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import accuracy
from tests.bench.accuracy import Result


def test_a_result_is_made_once_but_a_failed_one_again(tmp_path: Path) -> None:
    made: list[Result] = []

    def make(accuracies: dict[str, float | None]) -> Result:
        made.append(Result("seed 0", accuracies, 3, 0.5, 100.0, begun="a1", measured="b2"))
        return made[-1]

    file = tmp_path / "measured.json"
    assert accuracy.once(file, lambda: make({})) == made[0] and not file.exists()
    first = accuracy.once(file, lambda: make({"linear, last": 0.5, "5 labels": None}))
    assert accuracy.once(file, lambda: make({"linear, last": 0.7})) == first == made[1] and len(made) == 2


@pytest.mark.parametrize("begun, commits, epochs, shown", [
    ("a1", "a1, measured at b2", 10, "10"), ("b2", "b2", 3300, "3300"), ("", "b2", 0.81818, "0.81818"), ("", "b2", None, "-")])
def test_a_row_names_the_commits_of_training_and_of_measuring_and_parts_of_an_epoch(
        begun: str, commits: str, epochs: float | None, shown: str) -> None:
    assert Result("seed 0", {}, epochs, begun=begun, measured="b2").cells()[1:3] == (commits, shown)


def test_runs_on_other_images_are_other_runs(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    for part in ("train", "test"):
        image_folder(f"set/{part}", 2, 3)
    images = tmp_path / "set"
    linked = tmp_path / "linked"
    for folder in images.glob("*/*"):
        link = linked / folder.relative_to(images)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
    before = accuracy.checksum(images)
    assert accuracy.checksum(linked) == before
    (images / "unrelated.txt").write_text("x")
    assert accuracy.checksum(images) == before
    image = next((images / "test").rglob("*.png"))
    image.rename(image.with_name("other.png"))
    moved = accuracy.checksum(images)
    image.with_name("other.png").write_bytes(b"x")
    assert len({before, moved, accuracy.checksum(images)}) == 3


def test_a_mean_is_of_what_was_measured() -> None:
    results = [Result(f"seed {seed}", {"linear, last": 0.5 + 0.1 * seed, "1 label": None}, 10 + seed, 1.0, 100.0)
               for seed in range(3)]
    row = dict(zip(("run", *accuracy.COLUMNS), accuracy.mean_row(results)))
    assert row["epochs"] == "11 ± 1" and row["linear, last"] == "60.00 ± 10.00"
    assert row["linear, best"] == row["1 label"] == "-"
