"""The main job in several processes, of which one fails, dies, hangs or was started wrongly."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from byol_core.run.options import TrainConfig
from byol_core.run.plan import make_plan
from byol_core.views.pixels import Facts
from tests.helpers.runs import summary
from tests.helpers.torchrun import GONE, IMPATIENT, NO_ANSWER, SMALL, torchrun, trained

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault, processes, rank, update", [
    ("raises", 2, 0, 3), ("raises", 2, 1, 3), ("raises", 3, 2, 3), ("raises", 4, 1, 3),
    ("is killed", 2, 0, 3), ("is killed", 2, 1, 3), ("is killed", 3, 1, 3), ("is killed", 4, 3, 3),
    ("hangs", 2, 1, 3), ("hangs", 4, 1, 3), ("is frozen", 3, 1, 3),
    # After the last update, where the others wait for the first process as long as it takes, and it for them no longer.
    ("hangs", 2, 1, 4), ("hangs", 3, 1, 4)])
def test_a_process_that_fails_is_told_once_and_ends_the_run(fault: str, processes: int, rank: int, update: int, tmp_path: Path,
                                                            image_folder: Callable[..., Path]) -> None:
    done = trained(tmp_path, image_folder(per_class=12), processes=processes, fault=fault, rank=rank, update=update,
                   setup=IMPATIENT if fault == "is killed" else "",
                   env={"BYOL_TIMEOUT_S": "15"} if fault in ("hangs", "is frozen") else {},
                   forked=(fault, rank) != ("raises", 0))  # one ends as every Python does
    assert done.code == 1 and not done.orphans
    message = {"raises": f"error: rank {rank} of {processes}: the dog ate it", "is killed": GONE}.get(fault, NO_ANSWER)
    assert len(done.messages) == 1 and done.messages[0].startswith(message), done.err
    if fault != "raises":
        assert f" of {processes}): " in done.messages[0] and f"by rank {rank}" not in done.messages[0]
    if rank != 0:
        assert summary(tmp_path / "out")["status"] == "failed"
        assert done.messages[0].startswith(f"error: {summary(tmp_path / 'out')['reason']}")


def test_a_process_that_is_killed_is_told_although_torchrun_stops_the_others(image_folder: Callable[..., Path],
                                                                             tmp_path: Path) -> None:
    """While one that has noticed it still waits for its data workers to end."""
    slow = ("from byol_core.views.batches import DeviceBatches\nclose = DeviceBatches.close\n"
            "DeviceBatches.close = lambda views: ([time.sleep(0.01) for _ in iter(lambda: os.path.exists('stopped'), True)], "
            "close(views))\nfrom byol_core.system.signals import StopRequest\nhandle = StopRequest._handle\n"
            "StopRequest._handle = lambda *about: (open('stopped', 'w').close(), handle(*about))")
    done = trained(tmp_path, image_folder(per_class=12), fault="is killed", setup=f"{IMPATIENT}\n{slow}")
    assert done.code == 1 and len(done.messages) == 1 and not done.orphans, done.err
    assert done.messages[0].startswith(f"{GONE}0 of 2)")
    assert summary(tmp_path / "out")["status"] == "failed"


# The first process is busy, and so in no exchange; then, and not before, something happens to another.
BUSY = ("from byol_core.run.results import Results\n"
        "Results.finish = lambda results: (open('busy', 'w').close(), time.sleep(600))")
LATER = ("import threading; threading.Thread(daemon=True, target=lambda: ([time.sleep(0.05) for _ in iter(lambda: "
         "os.path.exists('busy'), True)], os.kill({}, signal.{}))).start()")
LOADED = """
load = Run.__init__
def loaded(run, *about):
    load(run, *about)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
Run.__init__ = loaded
"""


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_process_that_is_killed_while_images_are_loaded_ends_the_run(processes: int, image_folder: Callable[..., Path],
                                                                       tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(per_class=12), processes=processes, setup=IMPATIENT + LOADED)
    assert done.code == 1 and not done.orphans and re.search(r"rank +: 1 .*\n +exitcode +: -9", done.err), done.err
    assert len(done.messages) <= 1 and all(message.startswith(GONE) for message in done.messages)


MEASURES = """
from byol_core.run.results import Results
from byol_core.system.signals import StopRequest
handle = StopRequest._handle
StopRequest._handle = lambda *about: (open("stopped", "w").close(), handle(*about))
def measure(results):
    open("busy", "w").close()
    while not os.path.exists("stopped"):  # by torchrun, as another process is gone
        time.sleep(0.05)
Results.measure_on_the_way = measure
"""


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_process_that_is_killed_while_the_first_one_measures_is_told_afterwards(
        processes: int, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--data", image_folder(per_class=12), "--out", "out", "--epochs", 2, "--eval-every", 1, *SMALL,
                    update=1, processes=processes, fault=LATER.format("os.getpid()", "SIGKILL"), setup=IMPATIENT + MEASURES)
    assert done.code == 1 and len(done.messages) == 1 and done.messages[0].startswith(GONE), done.err
    assert summary(tmp_path / "out")["status"] == "failed" and not done.orphans


@pytest.mark.parametrize("whom, name, processes, said", [
    ("os.getpid()", "SIGKILL", 2, r"rank +: 1 .*\n +exitcode +: -9"),  # by torchrun, in its table
    ("os.getpid()", "SIGKILL", 4, r"rank +: 1 .*\n +exitcode +: -9"),
    ("os.getpid()", "SIGTERM", 3, "signals.Stopped: SIGTERM"),  # it is not taken for dead
    ("starter", "SIGTERM", 2, ""), ("starter", "SIGTERM", 3, ""), ("starter", "SIGTERM", 4, "")])
def test_a_signal_to_another_process_while_the_first_one_is_busy_at_the_end_is_a_stop(
        whom: str, name: str, processes: int, said: str, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, update=1, processes=processes,
                    fault=LATER.format(whom, name), setup=BUSY)
    assert done.code == 1 and not done.messages and not done.orphans, done.err
    assert re.search(said, done.err), done.err
    assert done.out.count("SIGTERM: stopped at epoch 1") == 1 and summary(tmp_path / "out")["status"] == "stopped"


FAILS_LATER = """
finish = Run.finish
def failing(run):
    if os.environ["RANK"] != "1":
        return finish(run)
    while not os.path.exists("busy"):
        time.sleep(0.05)
    raise RuntimeError("the dog ate it")
Run.finish = failing
"""


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_process_that_fails_while_the_first_one_is_busy_is_why_the_run_failed(
        processes: int, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The first one has only the signal by which torchrun answers it."""
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, processes=processes,
                    setup=BUSY + FAILS_LATER)
    reason = f"rank 1 of {processes}: the dog ate it"
    assert done.code == 1 and done.messages == [f"error: {reason}"] and not done.orphans, done.err
    found = summary(tmp_path / "out")
    assert found["status"] == "failed" and found["reason"] == reason


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_with_different_images_are_refused(processes: int, image_folder: Callable[..., Path],
                                                     tmp_path: Path) -> None:
    for rank in range(processes):
        images = image_folder(f"rank{rank}")
    (images / "class0" / "000.png").unlink()
    done = torchrun(tmp_path, "--out", "out", "--epochs", 1, *SMALL, processes=processes,
                    setup="sys.argv += ['--data', 'rank' + os.environ['RANK']]")
    assert done.code == 1 and "exitcode  : 2" in done.err and not done.orphans
    assert len(done.messages) == 1 and f"images differ: 16 in rank 0, 15 in rank {processes - 1}" in done.messages[0]


def test_a_batch_that_does_not_divide_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match="--batch-size 7 does not divide into 1 micro-batches on 2 processes"):
        make_plan(TrainConfig(batch_size=7), Facts(16, 16), 2)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_whose_torchrun_is_gone_save_and_stop(processes: int, image_folder: Callable[..., Path],
                                                        tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(per_class=24), "--epochs", 4000, processes=processes,
                   fault="os.kill(starter, signal.SIGKILL)")
    assert done.code == -signal.SIGKILL and not done.orphans
    assert summary(tmp_path / "out")["status"] == "stopped" and (tmp_path / "out" / "last.pt").exists()
