"""The main job in several processes: one set of files, the same weights everywhere, stops and restarts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from byol_core.images.image_set import scan
from byol_core.system import distributed
from byol_core.system.files import save_checkpoint
from byol_core.views.batches import Order
from tests.helpers.runs import assert_same_state, checkpoint, metrics, run, summary
from tests.helpers.torchrun import GONE, IMPATIENT, SMALL, torchrun, trained

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_ends_with_one_set_of_files(processes: int, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--data", image_folder(), "--out", "out", "--epochs", 1, *SMALL, processes=processes,
                    forked=processes > 2)
    assert done.code == 0 and not done.orphans, done.err
    result = summary(tmp_path / "out")
    assert result["status"] == "finished" and result["world_size"] == processes and result["updates"] == 1
    assert result["knn"] is not None and done.out.count("data: 16 images") == 1 and done.out.count("\ntrained: knn") == 1
    assert [record["update"] for record in metrics(tmp_path / "out")] == [1]
    assert f"processes: {processes}, each with {12 // processes} images at a time" in done.out


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_sigterm_to_one_process_stops_all_after_the_same_update(
        processes: int, image_folder: Callable[..., Path], tmp_path: Path, undisturbed: Callable[[int], dict]) -> None:
    images, several = image_folder(per_class=24), f"processes: {processes}, each with {12 // processes} images at a time"
    done = trained(tmp_path, images, processes=processes, fault="gets SIGTERM", update=1)
    assert "SIGTERM to rank 1: stopped at epoch 0, update 3" in done.out and not done.messages and not done.orphans
    assert summary(tmp_path / "out")["status"] == "stopped" and checkpoint(tmp_path / "out")["world_size"] == processes
    assert f"<pre>torchrun --nproc-per-node={processes} train.py --data" in (tmp_path / "out" / "report.html").read_text()
    again = trained(tmp_path, images, "--resume", processes=processes)
    assert several in again.out and again.code == 0
    assert_same_state(undisturbed(processes), checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_process_that_stalls_is_waited_for(processes: int, image_folder: Callable[..., Path], tmp_path: Path,
                                             undisturbed: Callable[[int], dict]) -> None:
    """Two, longer than a process that failed would be given to say why."""
    seconds = distributed.GRACE_S + 2 if processes == 2 else 3
    done = trained(tmp_path, image_folder(per_class=24), processes=processes, fault=f"time.sleep({seconds})")
    assert done.code == 0 and not done.messages, done.err
    assert_same_state(undisturbed(processes), checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("fault, processes", [("pass", 2), ("gets SIGTERM", 2), ("pass", 3), ("gets SIGTERM", 4)])
def test_a_bad_file_that_one_process_meets_is_known_to_all(fault: str, processes: int, image_folder: Callable[..., Path],
                                                           tmp_path: Path) -> None:
    """At the end of the epoch, or where the run is stopped before it."""
    images = image_folder(per_class=24)
    # In the first update, of the last process, which writes nothing.
    index = int(Order(48, 12, rank=processes - 1, world_size=processes).epoch(0)[0, 0])
    name = scan(images).name(index)
    (images / name).write_bytes(b"torn")
    done = trained(tmp_path, images, "--views", "cpu", "--epochs", 1, processes=processes, update=1, fault=fault)
    assert done.code == (0 if fault == "pass" else 1), done.err
    assert name in (tmp_path / "out" / "bad_files.txt").read_text() and summary(tmp_path / "out")["bad_files"] == 1
    assert list(checkpoint(tmp_path / "out")["bad_files"]) == [index]


@pytest.mark.parametrize("name, processes", [("SIGTERM", 2), ("SIGINT", 2), ("SIGTERM", 3), ("SIGINT", 4)])
def test_a_signal_to_torchrun_saves_once(name: str, processes: int, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    """As from a terminal, whose Ctrl-C may reach the processes themselves, and then once more through torchrun."""
    fault = f"os.kill(os.getpid(), signal.{name}); os.kill(starter, signal.{name})"
    done = trained(tmp_path, image_folder(per_class=24), "--epochs", 4000, processes=processes, fault=fault)
    assert done.code == 1 and done.out.count(": stopped at epoch") == 1 and f"\n{name}" in done.out
    assert (tmp_path / "out" / "last.pt").exists() and not done.messages and not done.orphans
    assert summary(tmp_path / "out")["status"] == "stopped"


# With a name of its own for each call of torchrun, with one name for all of them, and with none.
CALLS = {"own name": ("--standalone",), "no name": ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
         "one name": ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "byol")}


@pytest.mark.parametrize("call, processes", [("own name", 2), ("own name", 3), ("no name", 3), ("one name", 3),
                                             ("own name", 4)])
def test_a_restart_by_torchrun_resumes_bit_for_bit(call: str, processes: int, image_folder: Callable[..., Path],
                                                   tmp_path: Path, undisturbed: Callable[[int], dict]) -> None:
    """With three processes sums depend on the places that DistributedDataParallel gives to gradients."""
    done = trained(tmp_path, image_folder(per_class=24), processes=processes, setup=IMPATIENT, fault="is killed", update=5,
                   options=(*CALLS[call], "--max-restarts", "3"))
    assert done.code == 0 and "resuming at epoch 1, update 4" in done.out, done.err
    assert len(done.messages) == 1 and done.messages[0].startswith(GONE), done.err
    assert_same_state(undisturbed(processes), checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("call, processes", [("own name", 2), ("no name", 2), ("one name", 2), ("own name", 3),
                                             ("own name", 4)])
def test_a_restart_by_torchrun_does_not_take_an_earlier_run_for_its_own(
        call: str, processes: int, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images, options = image_folder(per_class=12), CALLS[call]
    assert trained(tmp_path, images, "--epochs", 1, processes=processes, options=options).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = trained(tmp_path, images, processes=processes, options=(*options, "--max-restarts", "1"))
    assert done.code == 1 and "resuming" not in done.out
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert len(done.messages) == 2 and all("out already holds a run (epoch 1/1) - add --resume" in line
                                           for line in done.messages), done.err


def test_one_process_goes_on_with_a_run_of_two_and_says_so(image_folder: Callable[..., Path], tmp_path: Path, capsys,
                                                           stopped_after: Callable[..., None]) -> None:
    out = tmp_path / "out"
    arguments = ["--data", image_folder(per_class=12), "--out", out, "--epochs", 2, "--no-eval", *SMALL]
    stopped_after(3, *arguments)
    save_checkpoint(out, {**checkpoint(out), "world_size": 2})
    assert run(*arguments, "--resume") == 0
    assert "note: 2 -> 1 processes: every update uses the same images" in capsys.readouterr().out
    assert summary(out)["updates"] == 4 and summary(out)["world_size"] == 1


def test_check_ends_although_data_workers_live(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    done = trained(tmp_path, image_folder(), "--check", "--views", "cpu", "--workers", 1)
    assert done.code == 0 and done.out.count("nothing was trained") == 1 and not done.orphans
