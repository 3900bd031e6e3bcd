"""Everything at once: random kills, signals and damaged files, until the run is finished - as the run that nothing befell."""

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from byol_core.system.files import LAST, PREVIOUS, CheckpointError, newest_checkpoint, read_checkpoint
from tests.helpers.children import SMALL, At, run_child
from tests.helpers.kills import STEP, assert_same_run
from tests.helpers.runs import summary
from tests.helpers.torchrun import IMPATIENT, trained

SESSIONS_AT_MOST = 60
SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143, "group SIGTERM": 143, "group SIGINT": 130}
PLACES = {STEP: 5, "byol_core.system.files:torch.save": 1, "byol_core.system.files:_keep_as": 1,
          "byol_core.system.files:os.replace": 9, "byol_core.system.files:os.fsync": 9}  # and up to which call of a session
OUT = Path("soaked")
OPTIONS = (["--views", "cpu", "--optimizer", "adamw", "--accum-steps", "2"], ["--views", "device", "--optimizer", "lars"])
ENDS = ("is killed", "gets SIGTERM", "raises")  # what befalls one of several processes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_a_folder_of_its_own")]


def both_are_whole() -> bool:
    """What damages both, nothing survives."""
    try:
        for name in (LAST, PREVIOUS):
            read_checkpoint(OUT / name)
    except CheckpointError:
        return False
    return not os.path.samefile(OUT / LAST, OUT / PREVIOUS)


def spoil_last() -> None:
    if both_are_whole():
        data = bytearray((OUT / LAST).read_bytes())
        data[len(data) // 3] ^= 16
        with open(OUT / LAST, "r+b") as file:  # in place, as a disk does it
            file.write(data)


def tear_last() -> None:
    if both_are_whole():
        os.truncate(OUT / LAST, (OUT / LAST).stat().st_size // 2)


def leave_temporary_files() -> None:
    (OUT / ".last.pt.4194305.tmp").write_bytes(bytes(100))
    (OUT / ".summary.json.4194305.tmp").touch()


def tear_metrics() -> None:
    with open(OUT / "metrics.jsonl", "ab") as file:
        file.write(b"\0\0\0{\"update\": 1")


DAMAGE: list[Callable[[], None]] = [spoil_last, tear_last, leave_temporary_files, tear_metrics]


def rounds(seed: int, folder: Path) -> Iterator[int]:
    """The seed of one round, in a folder of its own; with BYOL_SOAK_S of as many as begin within so many seconds."""
    until = time.monotonic() + float(os.environ.get("BYOL_SOAK_S", 0))
    for number in itertools.count(seed, 10):
        place = folder / str(number)
        place.mkdir()
        os.chdir(place)
        yield number
        if time.monotonic() >= until:
            return


def damage_at_random(chance: random.Random, befallen: list[object]) -> None:
    if chance.random() < 0.5 and (OUT / LAST).exists():
        befallen.append(damage := chance.choice(DAMAGE))
        damage()


def test_a_run_that_much_befalls_ends_as_one_that_nothing_befell(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images = image_folder(classes=0, per_class=24)
    for number in rounds(1, tmp_path):
        words = ["--data", str(images), "--epochs", "3", "--no-eval", *SMALL, *OPTIONS[number // 10 % 2]]
        chance = random.Random(number)
        assert run_child([*words, "--workers", 0, "--out", "whole"]).code == 0
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
            damage_at_random(chance, befallen)
        assert ended.code == 0 and len(befallen) > (10 if number == 1 else 0), befallen
        assert_same_run("whole", str(OUT))


def test_a_run_of_two_processes_that_much_befalls_ends_as_one_that_nothing_befell(image_folder: Callable[..., Path],
                                                                                  tmp_path: Path) -> None:
    """One of them is killed, stopped or fails; all end, and torchrun is started anew, or starts them anew by itself."""
    images = image_folder(per_class=36)  # 6 updates per epoch
    for number in rounds(4, tmp_path):
        chance, here = random.Random(number), Path.cwd()
        assert trained(here, images, "--epochs", 4, "--out", "whole").code == 0
        befallen: list[object] = []
        for _ in range(SESSIONS_AT_MOST):
            state, _ = newest_checkpoint(OUT) if OUT.exists() else (None, [])
            begun = state["progress"]["updates"] if state else 0  # type: ignore[index]
            fault, rank, update = chance.choice(ENDS), chance.randint(0, 1), begun + chance.randint(1, 5)
            restarts = chance.choice([0, 0, 0, 0, 1])
            done = trained(here, images, "--epochs", 4, "--out", OUT, "--resume", fault=fault, rank=rank, update=update,
                           setup=IMPATIENT if fault == "is killed" else "",
                           options=("--standalone", "--max-restarts", str(restarts)))
            befallen.append((fault, rank, update, restarts, done))
            assert not done.orphans and "Exception ignored" not in done.err, befallen
            if done.code == 0 and summary(OUT)["status"] == "finished":
                break
            assert done.code in (0, 1), befallen
            damage_at_random(chance, befallen)
        assert done.code == 0 and len(befallen) > (2 if number == 4 else 0), befallen
        assert_same_run("whole", str(OUT))
