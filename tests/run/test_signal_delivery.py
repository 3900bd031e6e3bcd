"""Signals as a machine sends them: to a process or all of its group, at any moment; saved, told in a line, nobody left."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from tests.helpers.children import SMALL, At, Ended, run_child
from tests.helpers.kills import STEP, arguments, assert_same_run, run
from tests.helpers.runs import checkpoint, summary

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143, "SIGHUP": 143}


def assert_stopped(ended: Ended, code: int, updates: int, out: str = "out") -> None:
    assert ended.code == code and ended.errors.count("\n") <= 3, ended.errors
    assert checkpoint(out)["progress"]["updates"] == updates and summary(out)["status"] == "stopped"
    assert not list(Path(out).glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("what, workers, start_method", [
    ("SIGTERM", 0, "fork"), ("SIGTERM", 2, "fork"), ("group SIGINT", 2, "fork"), ("group SIGUSR1", 2, "fork"),
    ("group SIGUSR1", 1, "spawn")])
def test_a_signal_is_answered_within_a_step(data: Path, what: str, workers: int, start_method: str) -> None:
    words = arguments(data, "--views", "cpu", "--workers", workers, "--out", "out")
    assert_stopped(run_child(words, [At(STEP, 2, what)], start_method), CODES[what.split()[-1]], updates=2)


@pytest.mark.slow
def test_workers_that_are_being_spawned_do_not_see_a_signal_either(data: Path) -> None:
    words = arguments(data, "--views", "cpu")
    assert run([*words, "--workers", "0"], "out", At(STEP, 3, "SIGTERM")) == 143
    starting = At("torch.utils.data.dataloader:_MultiProcessingDataLoaderIter.__init__", 1, "group SIGINT", after=True)
    ended = run_child([*words, "--workers", 2, "--out", "out", "--resume"], [starting], start_method="spawn")
    assert_stopped(ended, 130, updates=4)


@pytest.mark.slow
@pytest.mark.parametrize("second", [At("byol_core.run.run:Run.save", 1, "group SIGINT"),
                                    At("byol_core.system.files:torch.save", 1, "group SIGINT", after=True)],
                         ids=["before the save", "in the save"])
def test_a_second_interrupt_stops_at_once_and_leaves_nothing_torn(data: Path, second: At) -> None:
    words = arguments(data, "--views", "cpu", "--workers", 2, "--out", "out")
    ended = run_child(words, [At(STEP, 2, "group SIGINT"), second])
    assert ended.code == 130 and ended.errors.count("\n") <= 3, ended.errors
    assert not Path("out/last.pt").exists() and not list(Path("out").glob(".*.tmp")) and summary("out")["status"] == "stopped"


def test_a_signal_in_a_save_waits_for_it_and_for_a_step(data: Path) -> None:
    words = arguments(data, "--workers", 0)
    assert run(words, "whole") == 0
    assert run(words, "parts", At("byol_core.system.files:torch.save", 1, "SIGTERM", after=True)) == 143
    assert checkpoint("parts")["progress"]["updates"] == 4  # the save was that of update 3, the last of its epoch
    assert run(words, "parts") == 0
    assert_same_run("whole", "parts")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # all is written; an exception would only be noise now


@pytest.mark.slow
def test_a_signal_while_features_are_measured_on_the_way_is_answered_after_it(image_folder: Callable[..., Path]) -> None:
    words = ["--data", str(image_folder(per_class=10)), "--epochs", "2", "--eval-every", "1", "--workers", "0", *SMALL]
    assert run(words, "whole") == 0
    assert run(words, "parts", At("byol_core.evaluate.scoring:Scorer.quick", 1, "SIGTERM")) == 143
    assert checkpoint("parts")["progress"]["updates"] == 5 and summary("parts")["status"] == "stopped"
    assert run(words, "parts") == 0
    assert_same_run("whole", "parts")


@pytest.mark.slow
@pytest.mark.parametrize("number, updates", [(1, None), (2, 10)], ids=["untrained", "trained"])
def test_a_signal_while_a_network_is_measured_stops_at_once(image_folder: Callable[..., Path], number: int,
                                                            updates: int | None) -> None:
    words = ["--data", str(image_folder(per_class=10)), "--epochs", "2", "--workers", "0", *SMALL, "--image-size", "20"]
    assert run(words, "whole") == 0
    assert run(words, "parts", At("byol_core.evaluate.scoring:Scorer.measure", number, "SIGTERM")) == 143
    assert summary("parts")["status"] == "stopped" and Path("parts/last.pt").exists() == (updates is not None)
    assert run(words, "parts") == 0 and summary("parts")["status"] == "finished"
    assert_same_run("whole", "parts")


@pytest.mark.slow
def test_a_signal_to_a_group_whose_workers_decode_images_to_measure_leaves_nobody(image_folder: Callable[..., Path]) -> None:
    words = ["--data", str(image_folder(per_class=10)), "--epochs", "1", "--workers", "2", "--views", "cpu", "--out", "out",
             *SMALL]
    ended = run_child(words, [At("byol_core.evaluate.features:_features", 1, "group SIGTERM")])
    assert ended.code == 143 and ended.errors == "" and summary("out")["status"] == "stopped"


def swallow_a_signal() -> None:
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)


def be_broken_off() -> None:
    """As a library whose loading a signal breaks off: it says something else."""
    swallow_a_signal()
    raise ImportError("cannot import name 'x' from partially initialized module")


@pytest.mark.parametrize("what, code", [*CODES.items(), (f"{__name__}:swallow_a_signal", 143),
                                        (f"{__name__}:be_broken_off", 143)])
def test_a_signal_before_training_ends_with_its_code_and_leaves_no_folder(data: Path, capsys, what: str, code: int) -> None:
    assert run(arguments(data, "--workers", 0), "out", At("byol_core.run.plan:make_plan", 1, what)) == code
    assert capsys.readouterr().err == "" and not Path("out").exists()


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("module", ["argparse", "byol_core.run.options"])
def test_a_signal_while_the_command_itself_is_loaded_ends_it_without_a_word(module: str, name: str, code: int) -> None:
    script = ("import os, runpy, signal, sys\n"
              "class Finder:\n"
              "    def find_spec(self, name, *_):\n"
              f"        if name == {module!r}: os.kill(os.getpid(), signal.{name})\n"
              "sys.modules.pop('argparse', None)\nsys.meta_path.insert(0, Finder())\n"
              f"runpy.run_path({train.__file__!r}, run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(train.__file__).parent)
    assert done.returncode == code and done.stdout + done.stderr == ""


def test_a_signal_while_a_failure_is_written_down_does_not_hide_it(data: Path, capsys) -> None:
    words = arguments(data, "--workers", 0)
    failing = At("byol_core.run.run:Run.save", 1, f"{__name__}:fail")
    assert run(words, "out", failing, At("byol_core.run.run:Run.write_end", 1, "SIGTERM")) == 1
    assert capsys.readouterr().err.endswith("error: no luck\n") and summary("out")["status"] == "failed"


def fail() -> None:
    raise RuntimeError("no luck")
