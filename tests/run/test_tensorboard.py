"""--tensorboard: every record and picture, no step twice after a resume; nothing of it where it is not installed or fails."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from byol_core.run.run import Run
from byol_core.run.tensorboard import Board
from tests.helpers.forking import run_code
from tests.helpers.pictures import Folder
from tests.helpers.runs import SMALL, run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.slow
def test_events_hold_every_record_and_picture_and_none_twice_after_a_resume(image_folder: Folder, monkeypatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--data", image_folder(per_class=20), "--epochs", 4, "--out", "out", "--eval-every", 1, "--save-every", 2,
                 "--tensorboard", *SMALL]
    original = Run._after_step

    def cut(self: Run, progress, step) -> None:
        if progress.updates == 35:
            raise RuntimeError("power cut")  # update 30 was recorded, the checkpoint is that of update 20
        original(self, progress, step)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_after_step", cut)
        assert run(*arguments) == 1
    assert run(*arguments, "--resume") == 0
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


class Full:
    """A writer whose disk is full from its second record on."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.flushed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass

    def add_image(self, name: str, image: object, step: int, dataformats: str) -> None:
        pass

    def flush(self) -> None:
        self.flushed += 1
        if self.flushed > 1:
            raise OSError(28, "No space left on device")


def refuse(folder: str, purge_step: int) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.slow
@pytest.mark.parametrize("writer, reason", [(Full, "No space left"), (refuse, "Permission denied")])
def test_events_that_cannot_be_written_are_said_once_and_stop_nothing(image_folder: Folder, monkeypatch, capsys,
                                                                      writer: Callable, reason: str) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    assert run("--data", image_folder(), "--epochs", 3, "--out", "out", "--no-eval", "--tensorboard", *SMALL) == 0
    printed = capsys.readouterr().out
    assert printed.count("nothing more is written for TensorBoard") == 1 and reason in printed
    updates = [json.loads(line)["update"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert updates == [4, 8, 10, 12]


def test_texts_and_missing_pictures_are_left_out(monkeypatch, tmp_path: Path) -> None:
    added: list[tuple] = []
    writer = SimpleNamespace(add_scalar=lambda *what: added.append(what), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=lambda folder, purge_step: added.append((purge_step,)) or writer))
    board = Board(tmp_path, 7, added.append)
    board.scalars(8, {"loss": 0.5, "note": "text", "none": None})
    board.picture(8, tmp_path / "missing.png")
    assert added == [(8,), ("loss", 0.5, 8)]


@pytest.mark.slow
def test_a_run_without_it_loads_nothing_of_it(image_folder: Folder) -> None:
    arguments = ["--data", str(image_folder()), "--epochs", "1", "--no-eval", *SMALL]
    script = (f"import sys, train\ncode = train.main({arguments!r})\n"
              "sys.exit(code or any('tensorboard' in name and not name.startswith('byol_core') for name in sys.modules))")
    assert "\nreport: " in run_code(script, Path.cwd())
