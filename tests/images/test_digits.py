"""The embedded digits are real files with the source's pixels, written once."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from byol_core.images.digits import PLACE, write_digits
from byol_core.images.image_set import scan
from byol_core.run import command
from byol_core.run.options import TrainConfig, parse_config, with_sample
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


def test_the_sample_brings_its_recipe_and_a_folder_of_its_own_does_not(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    config = with_sample(TrainConfig())
    assert config.recipe == "digits" and Path(config.data[0]).is_dir() and config.eval_data is not None
    assert with_sample(TrainConfig(recipe="paper")).recipe == "paper"
    assert with_sample(TrainConfig(data=("./imgs",))) == TrainConfig(data=("./imgs",))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--recipe", "quadra", "--out", "there"]])
def test_the_commands_kept_in_the_run_folder_name_the_sample_as_it_was_asked_for(
        arguments: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    asked = ["--epochs", "0", "--no-eval", "--arch", "conv6", *arguments]
    assert command.main(asked) == 0
    kept = json.loads(Path("there" if arguments else "runs/digits", "config.json").read_text())["commands"]
    assert parse_config(shlex.split(kept["this"])[2:]) == parse_config(asked)
    assert parse_config(shlex.split(kept["elsewhere"])[2:]) == parse_config(asked[:-2] if "--out" in asked else asked)
