"""Everything at once: random kills, signals and damaged files, until the run is finished - as the run that nothing befell."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from byol_core.system.files import LAST, PREVIOUS, CheckpointError, read_checkpoint
from tests.helpers.children import SMALL, At, run_child
from tests.helpers.kills import STEP, assert_same_run

SESSIONS_AT_MOST = 60
SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143, "group SIGTERM": 143, "group SIGINT": 130}
PLACES = {STEP: 5, "byol_core.system.files:torch.save": 1, "byol_core.system.files:_keep_as": 1,
          "byol_core.system.files:os.replace": 9, "byol_core.system.files:os.fsync": 9}  # and up to which call of a session
OUT = Path("soaked")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def spoil_last() -> None:
    """Damage to one file of two whole ones; what damages both, nothing survives."""
    try:
        for name in (LAST, PREVIOUS):
            read_checkpoint(OUT / name)
    except CheckpointError:
        return
    if os.path.samefile(OUT / LAST, OUT / PREVIOUS):
        return
    data = bytearray((OUT / LAST).read_bytes())
    data[len(data) // 3] ^= 16
    with open(OUT / LAST, "r+b") as file:  # in place, as a disk does it
        file.write(data)


def tear_last() -> None:
    if (OUT / PREVIOUS).exists() and not os.path.samefile(OUT / LAST, OUT / PREVIOUS):
        try:
            read_checkpoint(OUT / PREVIOUS)
        except CheckpointError:
            return
        os.truncate(OUT / LAST, (OUT / LAST).stat().st_size // 2)


def leave_temporary_files() -> None:
    (OUT / ".last.pt.4194305.tmp").write_bytes(bytes(100))
    (OUT / ".summary.json.4194305.tmp").touch()


def tear_metrics() -> None:
    with open(OUT / "metrics.jsonl", "ab") as file:
        file.write(b"\0\0\0{\"update\": 1")


DAMAGE: list[Callable[[], None]] = [spoil_last, tear_last, leave_temporary_files, tear_metrics]


@pytest.mark.parametrize("seed, options", [(0, ["--views", "device", "--optimizer", "lars"]),
                                           (1, ["--views", "cpu", "--optimizer", "adamw", "--accum-steps", "2"])])
def test_a_run_that_much_befalls_ends_as_one_that_nothing_befell(image_folder: Callable[..., Path], tmp_path: Path,
                                                                 monkeypatch, seed: int, options: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(image_folder(classes=0, per_class=24)), "--epochs", "3", "--no-eval", *SMALL, *options]
    assert run_child([*words, "--workers", 0, "--out", "whole"]).code == 0
    chance = random.Random(seed)
    befallen: list[object] = []
    for _ in range(SESSIONS_AT_MOST):
        name = chance.choice(list(SIGNALS))
        place = chance.choice([STEP, *PLACES])
        moments = [At(place, chance.randint(1, PLACES[place]), name, after=chance.random() < 0.5)]
        if chance.random() < 0.2:
            moments.insert(0, At(STEP, chance.randint(1, 5), "tests.run.test_soak:spoil_last"))
        workers = chance.choice([0, 0, 2]) if name != "SIGKILL" else 0  # orphans take seconds to notice
        ended = run_child([*words, "--workers", workers, "--out", OUT, "--resume"], moments)
        befallen.append((moments, workers, ended))
        assert ended.code in (0, SIGNALS[name]), befallen
        if ended.code == 0:
            break
        if chance.random() < 0.5 and (OUT / LAST).exists():
            befallen.append(damage := chance.choice(DAMAGE))
            damage()
    assert ended.code == 0 and len(befallen) > 10, befallen
    assert_same_run("whole", str(OUT))
