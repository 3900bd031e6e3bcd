"""The embedded digits are real files with the source's pixels, written once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from byol_core.images.digits import PLACE, write_digits
from byol_core.images.image_set import scan
from tests.helpers.shards import names


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the sample is already."""
    folder = tmp_path_factory.mktemp("sample")
    write_digits(folder / PLACE)
    return folder


def test_the_sample_is_the_sources_digits_split_by_class_into_1437_and_360(place: Path) -> None:
    train, test = scan(place / PLACE / "train"), scan(place / PLACE / "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    assert len({*names(train), *names(test)}) == 1797  # no digit is in both
    digits, path = load_digits(), next((place / PLACE / "train" / "3").iterdir())
    number = int(path.stem)
    assert digits.target[number] == 3
    assert np.abs(np.asarray(Image.open(path)) / 255 * 16 - digits.images[number]).max() < 0.04


def test_an_existing_sample_is_left_alone(place: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (place / PLACE).rglob("*")}
    assert write_digits(place / PLACE) == (place / PLACE / "train", place / PLACE / "test")
    assert {path: path.stat().st_mtime_ns for path in (place / PLACE).rglob("*")} == before
