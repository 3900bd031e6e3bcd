"""Small runs of the command in this process, and what they leave in their folders."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from byol_core.run import command
from byol_core.system.files import export_backbone, read_weights
from tests.helpers import children

SMALL = [*children.SMALL, "--workers", "0"]
FILES = {"config.json", "metrics.jsonl", "train.log", "last.pt", "previous.pt", "backbone.pt", "backbone.json", "views.png",
         "neighbours.png", "embedding.png", "report.html", "summary.json"}


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def summary(out: str | Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((Path(out) / "summary.json").read_text(), parse_constant=refuse)


def checkpoint(out: str | Path) -> dict:
    return torch.load(Path(out) / "last.pt", weights_only=True)


def assert_same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for part in ("model", "optimizer", "scheduler", "progress"):
        assert_equal(one[part], other[part], part)


def assert_equal(one: object, other: object, place: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, (a, b) in enumerate(zip(one, other)):
            assert_equal(a, b, f"{place}[{number}]")
    else:
        assert one == other, place


def metrics(out: str | Path) -> list[dict]:
    """The records without what the clock decides."""
    records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("images_per_second", "wait")} for record in records]


def changed_copy(trained: Path, place: Path, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of the exported backbone with other weights."""
    place.mkdir()
    weights = {name: change(tensor) if tensor.is_floating_point() else tensor
               for name, tensor in read_weights(trained / "backbone.pt").items()}
    export_backbone(place, weights, json.loads((trained / "backbone.json").read_text()))
    return place / "backbone.pt"
