"""The command line's options, and the commands that are kept in a run folder."""

import json
import shlex
from pathlib import Path

import pytest

from byol_core.images.digits import PLACE, write_digits
from byol_core.run import command
from byol_core.run.options import TrainConfig, parse_config, with_sample


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the sample is already."""
    folder = tmp_path_factory.mktemp("sample")
    write_digits(folder / PLACE)
    return folder


def test_data_takes_several_paths_however_they_are_given() -> None:
    assert parse_config([]).data == ("digits",)
    assert parse_config(["--data", "a", "b", "--epochs", "1"]).data == ("a", "b")
    assert parse_config(["--data", "a", "--epochs", "1", "--data", "b", "c"]).data == ("a", "b", "c")


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
