"""Runs in this process that are killed or signalled at a chosen moment, and go on at the next call."""

import signal
from pathlib import Path

import pytest

from byol_core.run import command, log
from tests.helpers.children import SMALL, At
from tests.helpers.runs import assert_same_state, checkpoint, metrics

STEP = "byol_core.run.run:Run.after_step"  # 12 images in batches of 4: 3 updates per epoch, 6 in all


class Killed(BaseException):
    """Stands for SIGKILL where a process of its own would take too long: nothing in the package catches it."""


def kill() -> None:
    raise Killed


def arguments(data: Path, *options: object) -> list[str]:
    return [str(word) for word in ("--data", data, "--epochs", 2, "--no-eval", *SMALL, *options)]


def run(words: list[str], out: str, *moments: At) -> int:
    """In this process: 137 when it was killed at one of the moments."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(log, "RECORD_EVERY", 2)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a run before this one has left ignored
        for moment in moments:
            moment.arrange(patched.setattr)
        try:
            return command.main([*words, "--out", out, *(["--resume"] if Path(out).exists() else [])])
        except Killed:
            return 137


def assert_same_run(one: str, other: str) -> None:
    assert_same_state(checkpoint(one), checkpoint(other))
    assert metrics(one) == metrics(other)
    updates = [record["update"] for record in metrics(other) if "loss" in record]
    assert updates == sorted(set(updates))  # no line twice
    assert not list(Path(other).glob(".*.tmp"))
