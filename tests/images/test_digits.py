"""The embedded digits are real files with the source's pixels, written once."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from byol_core.images.digits import write_digits
from byol_core.images.image_set import scan
from byol_core.run import command
from byol_core.run.options import TrainConfig, parse_config, with_sample


def test_digits_are_split_by_class_into_1437_and_360(tmp_path: Path) -> None:
    train, test = map(scan, write_digits(tmp_path / "digits"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    names = {train.name(i) for i in range(1437)} | {test.name(i) for i in range(360)}
    assert len(names) == 1797  # no digit is in both


def test_pixels_are_the_sources(tmp_path: Path) -> None:
    train, _ = write_digits(tmp_path / "digits")
    digits = load_digits()
    path = next((train / "3").iterdir())
    number = int(path.stem)
    assert digits.target[number] == 3
    assert np.abs(np.asarray(Image.open(path)) / 255 * 16 - digits.images[number]).max() < 0.04


def test_an_existing_sample_is_left_alone(tmp_path: Path) -> None:
    train, _ = write_digits(tmp_path / "digits")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write_digits(tmp_path / "digits")[0] == train
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_sample_brings_its_recipe_and_a_folder_of_its_own_does_not(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = with_sample(TrainConfig())
    assert config.recipe == "digits" and Path(config.data[0]).is_dir() and config.eval_data is not None
    assert with_sample(TrainConfig(recipe="paper")).recipe == "paper"
    assert with_sample(TrainConfig(data=("./imgs",))) == TrainConfig(data=("./imgs",))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--recipe", "quadra", "--out", "there"]])
def test_the_commands_kept_in_the_run_folder_name_the_sample_as_it_was_asked_for(
        arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--epochs", "0", "--no-eval", "--arch", "conv6", *arguments]
    assert command.main(asked) == 0
    kept = json.loads(next(tmp_path.glob("**/config.json")).read_text())["commands"]
    assert parse_config(shlex.split(kept["this"])[2:]) == parse_config(asked)
    assert parse_config(shlex.split(kept["elsewhere"])[2:]) == parse_config(asked[:-2] if "--out" in asked else asked)
