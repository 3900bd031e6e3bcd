"""Data workers that die, hang or lack memory: told in a line, nothing lost, nobody left."""

import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from byol_core.run.folder import open_run_folder
from byol_core.system.console import in_plain_words
from byol_core.system.signals import SIGNALS
from byol_core.views import batches, pixels, workers
from byol_core.views.batches import Order, WorkerBatches
from byol_core.views.pixels import choose_workers, plain_batches
from byol_core.views.workers import WorkerError, batches_from, new_loader
from tests.helpers.children import At
from tests.helpers.forking import PATIENCE_S
from tests.helpers.kills import STEP, arguments, assert_same_run, run
from tests.helpers.pictures import PLAIN, load
from tests.helpers.runs import checkpoint

pytestmark = [pytest.mark.usefixtures("in_a_folder_of_its_own"),
              pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
KILLED = "a data worker died (SIGKILL, often for lack of memory) - try --workers 1"


def new_batches(data: Path, workers: int = 2) -> WorkerBatches:
    return WorkerBatches(load(data, "cpu"), (PLAIN, PLAIN), Order(12, 4), workers)


def end_a_worker(number: int = signal.SIGKILL) -> None:
    worker = multiprocessing.active_children()[0]
    assert worker.pid is not None
    os.kill(worker.pid, number)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked yet


def end_a_worker_and_be_told_to_stop() -> None:
    end_a_worker()
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number, message", [
    (signal.SIGKILL, KILLED), (signal.SIGSEGV, "a data worker died (SIGSEGV) - try --workers 1"),
    (signal.SIGBUS, "a data worker died: shared memory (/dev/shm) is full - use --workers 0, or enlarge it"),
])
def test_a_worker_that_died_is_an_error_when_a_batch_is_waited_for_and_not_before(data: Path, number: int,
                                                                                  message: str) -> None:
    views = new_batches(data).epoch(0)
    next(views)
    end_a_worker(number)
    assert sum(range(1000)) == 499500  # what is computed in between goes on
    with pytest.raises(WorkerError) as error:
        next(views)
    assert str(error.value).startswith(message)
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_while_its_batch_is_waited_for_ends_the_waiting(data: Path, monkeypatch) -> None:
    monkeypatch.setattr(batches, "first_readable", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkerError, match="try --workers 0"):
        next(new_batches(data, workers=1).epoch(0))
    assert multiprocessing.active_children() == []


def test_workers_that_hang_are_an_error_after_a_while_and_are_killed(data: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "NO_BATCH_S", 1.0)
    monkeypatch.setattr(batches, "first_readable", lambda *_: threading.Event().wait())
    with pytest.raises(WorkerError, match="no batch for 1 s: the data workers hang - look at the disk or network"):
        next(new_batches(data).epoch(0))
    assert multiprocessing.active_children() == []


def sleep() -> None:
    time.sleep(60)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer"),
                                   RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")])
def test_a_worker_that_dies_while_a_batch_is_fetched_from_it_is_named(error: Exception, monkeypatch) -> None:
    """The system tells of its death only after its connection is gone."""
    monkeypatch.setattr(workers, "SPARE_S", PATIENCE_S)  # it ends with the worker
    worker = multiprocessing.get_context("fork").Process(target=sleep)
    worker.start()
    with pytest.raises(WorkerError, match=re.escape("a data worker died (SIGKILL, often for lack of memory)")):
        with workers._failures_raised([worker]):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            worker.kill()
            raise error


@pytest.mark.parametrize("told", [True, False])
def test_workers_that_are_frozen_are_killed_although_torch_waits_for_them_without_limit(told: bool, monkeypatch) -> None:
    """told: whether the signal's handler gets the exit code, or who waits for the worker has just taken it."""
    if not told:
        monkeypatch.setattr(workers, "_child_ended", lambda number=0, frame=None: None)
    monkeypatch.setattr(workers, "NO_BATCH_S", 0.5)
    monkeypatch.setattr(workers, "SPARE_S", 0.5)
    worker = multiprocessing.get_context("fork").Process(target=sleep)
    worker.start()
    os.kill(worker.pid, signal.SIGSTOP)  # type: ignore[arg-type]
    with pytest.raises(WorkerError, match="the data workers hang"), workers._failures_raised([worker]):
        worker.join(600)  # as torch fetches a batch from a thread of the worker
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("asked, processes, cpus, expected", [(None, 1, 4, 4), (None, 1, 64, 8), (None, 4, 16, 4),
                                                              (None, 8, 4, 1), (0, 4, 16, 0), (20, 4, 16, 20)])
def test_workers_are_one_per_cpu_shared_by_the_processes(asked: int | None, processes: int, cpus: int, expected: int,
                                                         monkeypatch) -> None:
    monkeypatch.setattr(pixels, "usable_cpus", lambda: cpus)
    assert choose_workers(asked, processes) == expected


def test_more_workers_than_cpus_are_made_without_a_word(data: Path, recwarn: pytest.WarningsRecorder) -> None:
    new_loader(load(data, "cpu"), 1000)
    assert not recwarn.list


def little_shared_memory(worker: int) -> None:
    import resource  # shared memory is made of files, so that this limits it, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


def test_too_little_shared_memory_is_an_error_and_not_an_endless_wait(data: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "ignore_signals", little_shared_memory)
    source = new_batches(data)
    for _ in range(2):  # and again, with new workers
        with pytest.raises(WorkerError, match="shared memory .* is full - use --workers 0"):
            next(source.epoch(0))  # 4 x 3 x 16 x 16 floats: 12,288 bytes
    with pytest.raises(WorkerError, match="shared memory .* is full - use --workers 0"):
        list(plain_batches(load(data, "cpu"), PLAIN, torch.arange(12), workers=1))
    assert multiprocessing.active_children() == []


def test_what_a_worker_fails_at_is_one_line(data: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("a large image")

    monkeypatch.setattr(batches, "first_readable", fail)
    with pytest.raises(WorkerError) as error:
        next(new_batches(data).epoch(0))
    assert str(error.value) == "MemoryError: a large image"


class HandlerOfSigterm(Dataset[bool]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        return all(signal.getsignal(getattr(signal, name)) == signal.SIG_IGN for name in SIGNALS)


def test_workers_leave_signals_to_the_run() -> None:
    """Even where a process cannot be started with signals blocked."""
    assert [bool(value) for value in batches_from(new_loader(HandlerOfSigterm(), 1, batch_size=None))] == [True, True]


def lose_the_images() -> None:
    shutil.rmtree("imgs")


@pytest.mark.slow
def test_images_that_vanish_on_the_way_are_told_in_plain_words(data: Path, capsys) -> None:
    words = arguments(data, "--views", "cpu", "--workers", 1, "--epochs", 50)
    assert run(words, "out", At(STEP, 4, "tests.views.test_workers:lose_the_images")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: no readable image found in") and "the weights of update" in said


def test_workers_stay_between_epochs_until_they_are_closed(data: Path) -> None:
    source = new_batches(data)
    list(source.epoch(0))
    first = {worker.pid for worker in multiprocessing.active_children()}
    next(source.epoch(1))
    assert {worker.pid for worker in multiprocessing.active_children()} == first and len(first) == 2
    source.close()
    assert multiprocessing.active_children() == []
    assert len(list(source.epoch(2))) == 3
    source.close()


@pytest.mark.slow
def test_a_run_whose_worker_dies_saves_what_it_has_and_goes_on_exactly(data: Path, capsys) -> None:
    words = arguments(data, "--views", "cpu", "--workers", 2)
    assert run(words, "whole") == 0
    capsys.readouterr()
    assert run(words, "parts", At(STEP, 2, "tests.views.test_workers:end_a_worker", after=True)) == 1
    errors = capsys.readouterr().err
    assert errors == f"error: {KILLED}; parts/last.pt has the weights of update 2\n"
    assert multiprocessing.active_children() == []
    assert run(words, "parts") == 0
    assert_same_run("whole", "parts")


@pytest.mark.slow
def test_a_run_whose_worker_dies_within_an_update_keeps_the_last_checkpoint(data: Path, capsys) -> None:
    """Half an update cannot be saved: batch norm has seen its first micro-batch."""
    words = arguments(data, "--views", "cpu", "--workers", 2, "--accum-steps", 2)
    within = At("byol_core.networks:BYOL.forward", 9, "tests.views.test_workers:end_a_worker", after=True)  # of update 5
    assert run(words, "out", within) == 1
    assert "out/last.pt has the weights of update 3\n" in capsys.readouterr().err
    assert checkpoint("out")["progress"]["updates"] == 3


def test_a_run_that_is_told_to_stop_and_loses_its_workers_is_stopped_and_not_failed(data: Path, capsys) -> None:
    words = arguments(data, "--views", "cpu", "--workers", 2)
    moment = At("byol_core.networks:BYOL.forward", 3, "tests.views.test_workers:end_a_worker_and_be_told_to_stop", after=True)
    assert run([*words, "--accum-steps", "2"], "parts", moment) == 143
    assert capsys.readouterr().err == ""


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")


def test_out_of_memory_is_one_line_with_what_to_try_and_keeps_the_checkpoint(data: Path, capsys) -> None:
    words = arguments(data, "--workers", 0)
    assert run(words, "out", At("byol_core.networks:BYOL.forward", 5, "tests.views.test_workers:out_of_memory")) == 1
    assert capsys.readouterr().err == (
        "error: out of memory on cpu at batch 4 - try --batch-size 2, --accum-steps 2 (the same batch in smaller parts); "
        "out/last.pt has the weights of update 3\n")
    assert checkpoint("out")["progress"]["updates"] == 3


@pytest.mark.parametrize("error, options, line", [
    (RuntimeError("CUDA out of memory. Tried"), {"device": "cuda:0", "batch_size": 256},
     "out of memory on cuda:0 at batch 256 - try --batch-size 128, --accum-steps 2 (the same batch in smaller parts), "
     "--amp bf16"),
    (RuntimeError("MPS backend out of memory (MPS"),
     {"device": "mps", "batch_size": 256, "accum_steps": 4, "mixed_precision": True},
     "out of memory on mps at batch 256 - try --batch-size 128, --accum-steps 8 (the same batch in smaller parts)"),
    (MemoryError(), {"device": "cpu", "batch_size": 2},
     "out of memory on cpu at batch 2 - try --views cpu or a smaller --arch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), {"device": "auto"},
     "out of memory on the CPU before training - try a smaller --arch, --hidden-dim or --image-size, --views cpu"),
    (RuntimeError("CUDA out of memory. Tried"), {"device": "auto"},
     "out of memory on the device before training - try a smaller --arch, --hidden-dim or --image-size, --views cpu, or "
     "--device cpu"),
    (NotImplementedError("The operator 'aten::x' is not implemented for the MPS device. If you want this, comment on GitHub"),
     {"device": "mps"}, "The operator 'aten::x' is not implemented for the MPS device - use --device cpu"),
    (RuntimeError("shapes do not fit"), {"device": "cpu", "batch_size": 256}, "shapes do not fit"),
    (OSError("out of memory, says the disk"), {"device": "cpu", "batch_size": 256}, "out of memory, says the disk"),
])
def test_a_lack_of_memory_or_of_an_operator_is_put_into_other_words(error: Exception, options: dict, line: str) -> None:
    assert in_plain_words(error, **options) == line


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity there")
def test_a_process_held_to_one_cpu_has_one_worker() -> None:
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    try:
        assert choose_workers(None) == 1
    finally:
        os.sched_setaffinity(0, usable)


def linger(started: EventType, done: EventType) -> None:
    started.set()
    done.wait()


def test_a_worker_that_outlives_a_killed_run_does_not_keep_its_folder_locked(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    started, done = processes.Event(), processes.Event()
    with open_run_folder(tmp_path / "out", may_be_used=False):
        (tmp_path / "out" / "train.log").touch()  # or the folder would be cleared away
        worker = processes.Process(target=linger, args=(started, done), daemon=True)
        worker.start()
        assert started.wait(PATIENCE_S)
    with open_run_folder(tmp_path / "out", may_be_used=False):  # the worker is still there
        assert worker.is_alive()
    done.set()
    worker.join()
