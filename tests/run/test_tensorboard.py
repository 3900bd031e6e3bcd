"""--tensorboard: every record and picture, no step twice after a resume; nothing of it where it is not installed or fails."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from byol_core.run.tensorboard import Board
from tests.helpers import kills
from tests.helpers.children import At
from tests.helpers.forking import run_code
from tests.helpers.pictures import Folder
from tests.helpers.runs import SMALL, run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.slow
def test_events_hold_every_record_and_picture_and_none_twice_after_a_resume(image_folder: Folder) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = ["--data", str(image_folder(per_class=20)), "--epochs", "4", "--eval-every", "1", "--save-every", "2",
             "--tensorboard", *SMALL]
    assert kills.run(words, "out", At(kills.STEP, 35, "tests.helpers.kills:kill")) == 137  # the checkpoint is of update 20
    assert kills.run(words, "out") == 0
    assert len(list(Path("out").glob("events.out.tfevents.*"))) == 2
    events = accumulator.EventAccumulator("out")
    events.Reload()
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert set(events.Tags()["scalars"]) == {key for record in records for key in record} - {"update", "epoch"}
    for name in events.Tags()["scalars"]:
        expected = [(record["update"], record[name]) for record in records if name in record]
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected], name
    assert {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]} == {
        "views": [0], "neighbours": [40], "embedding": [40]}


def test_without_the_package_it_is_one_line_and_code_2(image_folder: Folder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("--data", image_folder(), "--epochs", 1, "--out", "out", "--tensorboard", *SMALL) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --tensorboard: ") and error.count("\n") == 1
    assert "pip install tensorboard, or leave --tensorboard out" in error and not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fails, reason", [
    ({"return_value.flush.side_effect": [None, OSError(28, "No space left")]}, "No space left"),  # at the second record
    ({"side_effect": PermissionError(13, "Permission denied")}, "Permission denied")])
def test_events_that_cannot_be_written_are_said_once_and_stop_nothing(image_folder: Folder, monkeypatch, capsys, fails: dict,
                                                                      reason: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.Mock(SummaryWriter=mock.Mock(**fails)))
    assert run("--data", image_folder(), "--epochs", 3, "--out", "out", "--no-eval", "--tensorboard", *SMALL) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing more is written for TensorBoard") == 1 and reason in printed
    updates = [json.loads(line)["update"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert updates == [4, 8, 10, 12]


def test_texts_and_missing_pictures_are_left_out(monkeypatch, tmp_path: Path) -> None:
    package = mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    board = Board(tmp_path, 7, pytest.fail)
    board.scalars(8, {"loss": 0.5, "note": "text", "none": None})
    board.picture(8, tmp_path / "missing.png")
    assert package.mock_calls == [mock.call.SummaryWriter(str(tmp_path), purge_step=8),
                                  mock.call.SummaryWriter().add_scalar("loss", 0.5, 8), mock.call.SummaryWriter().flush()]


@pytest.mark.slow
def test_a_run_without_it_loads_nothing_of_it(image_folder: Folder) -> None:
    arguments = ["--data", str(image_folder()), "--epochs", "1", "--no-eval", *SMALL]
    script = (f"import sys, train\ncode = train.main({arguments!r})\n"
              "sys.exit(code or any('tensorboard' in name and not name.startswith('byol_core') for name in sys.modules))")
    assert "\nreport: " in run_code(script, Path.cwd())
