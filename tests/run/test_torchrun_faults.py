"""The main job in several processes, of which one fails, dies, hangs or was started wrongly."""

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from byol_core.system.distributed import join
from tests.helpers.torchrun import REPOSITORY, SMALL, summary, torchrun, trained, watched

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault,message", [
    ("raises", "error: rank {rank} of 2: the dog ate it"),
    ("is killed", "error: another process is gone (noticed by rank {other} of 2): killed, out of memory, or cut off; "),
    ("hangs", "error: another process has not answered for 15 s (noticed by rank {other} of 2): it hangs, or "),
])
def test_a_process_that_fails_is_told_once_and_ends_the_run(fault: str, message: str, rank: int, tmp_path: Path,
                                                            image_folder: Callable[..., Path]) -> None:
    done = trained(tmp_path, image_folder(), fault=fault, rank=rank, env={"BYOL_TIMEOUT_S": "15"} if fault == "hangs" else {})
    assert done.code == 1 and not done.orphans
    assert len(done.messages) == 1 and done.messages[0].startswith(message.format(rank=rank, other=1 - rank)), done.err
    if rank == 1:
        assert summary(tmp_path)["status"] == "failed"
        assert done.messages[0].startswith(f"error: {summary(tmp_path)['reason']}")


def test_a_process_that_is_killed_is_told_although_torchrun_stops_the_others(image_folder: Callable[..., Path],
                                                                             tmp_path: Path) -> None:
    """While one that has noticed it still waits for its data workers to end."""
    slow = ("from byol_core.views.batches import TimedBatches\nclose = TimedBatches.close\n"
            "TimedBatches.close = lambda batches: ([time.sleep(0.01) for _ in iter(lambda: os.path.exists('stopped'), True)], "
            "close(batches))\nfrom byol_core.system.signals import StopRequest\nhandle = StopRequest._handle\n"
            "StopRequest._handle = lambda *about: (open('stopped', 'w').close(), handle(*about))")
    done = trained(tmp_path, image_folder(), fault="is killed", setup=slow)
    assert done.code == 1 and len(done.messages) == 1 and not done.orphans, done.err
    assert done.messages[0].startswith("error: another process is gone (noticed by rank 0 of 2)")
    assert summary(tmp_path)["status"] == "failed"


def test_the_first_process_waits_for_the_others_no_longer_than_they_may_take(image_folder: Callable[..., Path],
                                                                             tmp_path: Path) -> None:
    """After the last update, where they wait for it as long as it takes."""
    done = trained(tmp_path, image_folder(), fault="hangs", update=4, env={"BYOL_TIMEOUT_S": "15"})
    assert done.code == 1 and not done.orphans and len(done.messages) == 1
    assert done.messages[0].startswith("error: another process has not answered for 15 s (noticed by rank 0 of 2): ")
    assert summary(tmp_path)["status"] == "failed"


# The first process is busy, and so in no exchange; then, and not before, something happens to another.
BUSY = "from byol_core.run.results import Results\nResults.{} = lambda results: (open('busy', 'w').close(), time.sleep(600))"
LATER = ("import threading; threading.Thread(daemon=True, target=lambda: ([time.sleep(0.05) for _ in iter(lambda: "
         "os.path.exists('busy'), True)], os.kill({}, signal.{}))).start()")


def test_a_process_killed_at_the_end_stops_the_run(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """By torchrun, which names it in its table."""
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, update=2,
                    fault=LATER.format("os.getpid()", "SIGKILL"), setup=BUSY.format("finish"))
    assert done.code == 1 and not done.messages and not done.orphans, done.err
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", done.err), done.err
    assert done.out.count("SIGTERM: stopped at epoch 1") == 1 and summary(tmp_path)["status"] == "stopped"


def test_one_process_of_three_that_is_stopped_at_the_end_is_not_taken_for_dead(image_folder: Callable[..., Path],
                                                                               tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, "--batch-size", 12, update=1,
                    processes=3, fault=LATER.format("os.getpid()", "SIGTERM"), setup=BUSY.format("finish"))
    assert done.code == 1 and not done.messages and not done.orphans, done.err
    assert "signals.Stopped: SIGTERM" in done.err and summary(tmp_path)["status"] == "stopped"


def test_a_signal_to_all_while_the_first_one_is_busy_is_a_stop(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, update=2,
                    fault=LATER.format("starter", "SIGTERM"), setup=BUSY.format("finish"))
    assert done.code == 1 and not done.messages and not done.orphans, done.err
    assert done.out.count(": stopped at epoch 1") == 1 and summary(tmp_path)["status"] == "stopped"


def test_processes_with_different_images_are_refused(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    image_folder("rank0")
    (image_folder("rank1") / "class0" / "000.png").unlink()
    done = torchrun(tmp_path, "--out", "out", "--epochs", 1, *SMALL,
                    setup="sys.argv += ['--data', 'rank' + os.environ['RANK']]")
    assert done.code == 1 and "exitcode  : 2" in done.err and not done.orphans
    assert len(done.messages) == 1 and "images differ: 16 in rank 0, 15 in rank 1" in done.messages[0]


def test_a_batch_that_does_not_divide_is_refused_with_numbers(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(), "--batch-size", 7)
    assert done.code == 1 and len(done.messages) == 1
    assert re.search("rank [01] of 2: --batch-size 7 does not divide into 1 micro-batches on 2 processes", done.messages[0])


@pytest.mark.parametrize("rank", ["2", "-1", "one"])
def test_a_rank_that_cannot_be_is_refused(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", rank), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"RANK (is ')?{rank}"):
        join("cpu")


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "RANK", "nobody else comes"])
def test_a_stale_environment_ends_at_once_or_after_the_meeting_time(missing: str, image_folder: Callable[..., Path],
                                                                    tmp_path: Path) -> None:
    env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env.pop(missing, None)
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport train\n"
                      "from byol_core.system import distributed\n"
                      "distributed.MEETING_S = 1.0\nsys.exit(train.main(sys.argv[1:]))")
    done = watched([sys.executable, str(driver), "--data", str(image_folder()), "--out", "out", *SMALL], tmp_path, 60.0, env)
    assert done.code == 2 and len(done.err.splitlines()) == 1 and "unset WORLD_SIZE" in done.err


def test_processes_whose_torchrun_is_gone_save_and_stop(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(per_class=24), "--epochs", 4000, fault="os.kill(starter, signal.SIGKILL)")
    assert done.code == -signal.SIGKILL and not done.orphans
    assert summary(tmp_path)["status"] == "stopped" and (tmp_path / "out" / "last.pt").exists()
