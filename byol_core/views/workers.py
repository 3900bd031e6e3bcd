"""Data workers: out of reach of the run's signals, their failures said in one line, none of them left behind."""

import contextlib
import errno
import multiprocessing
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from byol_core.system.signals import SIGNALS

NO_BATCH_S = 300.0  # seconds without a batch after which the workers count as hanging
SPARE_S = 2.0  # seconds more, for torch to notice that itself; and for a dead worker to be reported by the system
SHARED_MEMORY_IS_FULL = "shared memory (/dev/shm) is full - use --workers 0, or enlarge it (docker run --shm-size=8g)"
# How torch says that it got no shared memory; it has no type of its own for that.
SHARED_MEMORY_WORDS = ("shared memory", "file </torch_", "unable to mmap")

OWN_NAME = re.compile(r"^byol_core(\.\w+)+: ")  # that of an error of ours, at the end of a traceback

_waited_for: list[BaseProcess] = []  # workers whose batch is being waited for, here and now


class WorkerError(RuntimeError):
    """A data worker died, hangs, or failed at something that is not a bad image."""


def ignore_signals(worker: int) -> None:
    """Signals sent to the whole process group are the main process's to answer; it then shuts its workers down."""
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def new_loader(dataset: Any, workers: int, **options: Any) -> "DataLoader[Any]":
    """A DataLoader for `batches_from`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more than the machine has cores: as asked
        return DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals, timeout=NO_BATCH_S if workers else 0,
                          **options)


def shared(batch: Tensor) -> Tensor:
    """In a worker, `batch` in shared memory: where there is too little, torch, left to move it while sending, only hangs."""
    return batch if get_worker_info() is None else batch.share_memory_()


def batches_from(loader: "DataLoader[Any]", made: Callable[[Any], Any] = lambda batch: batch) -> Iterator[Any]:
    """The loader's batches, or what `made` makes of each. Persistent workers then wait for the next pass; others are ended.

    Raises: WorkerError, and only while a batch is waited for: what is computed in between is never interrupted.
    """
    before: Sequence[BaseProcess] = getattr(loader._iterator, "_workers", ())
    iterator: Any = None
    whole = False
    try:
        with _failures_raised(before), _shielded(starting=loader._iterator is None):
            iterator = iter(loader)
        while True:
            with _failures_raised(getattr(iterator, "_workers", ())):
                try:
                    batch = next(iterator)
                except StopIteration:
                    whole = True
                    return
            yield made(batch)
    except GeneratorExit:
        whole = True
        raise
    finally:
        if iterator is not None and not (whole and loader.persistent_workers):
            _stop(iterator)
            loader._iterator = None


def close(loader: "DataLoader[Any]") -> None:
    """Stop persistent workers."""
    if loader._iterator is not None:
        _stop(loader._iterator)
        loader._iterator = None


@contextlib.contextmanager
def _shielded(starting: bool) -> Iterator[None]:
    """Processes started in this block do not see the run's signals, not even before they can ignore them."""
    if not starting or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    ours = [getattr(signal, name) for name in SIGNALS]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # spawning would else start it, which lets signals through again
            signal.pthread_sigmask(signal.SIG_BLOCK, ours)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _failures_raised(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """A block that waits for workers: their death ends it at once, and every failure of theirs is a WorkerError."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, _child_ended)  # torch's own raises anywhere, as in the middle of an optimizer step
    _waited_for[:] = workers
    frozen = threading.Event()

    def kill() -> None:
        """They ignore SIGTERM, and torch's own limit does not hold where it fetches a batch from a thread of a worker."""
        frozen.set()
        for worker in workers:
            worker.kill()

    limit = threading.Timer(NO_BATCH_S + SPARE_S, kill)
    limit.daemon = True
    if workers:
        limit.start()
    try:
        _child_ended()  # one that died since the last time
        yield
        if frozen.is_set():  # whoever asked for their exit codes at that moment got them, and the signal's handler none
            raise WorkerError(_hang())
    except Exception as error:
        _waited_for.clear()
        if str(error).startswith("DataLoader timed out"):
            kill()
        words = _hang() if frozen.is_set() else None if isinstance(error, WorkerError) else _in_words(error, workers)
        if words is None:
            raise
        raise WorkerError(words) from error
    finally:
        _waited_for.clear()
        limit.cancel()


def _child_ended(number: int = 0, frame: FrameType | None = None) -> None:
    for worker in _waited_for:
        if worker.exitcode:
            raise WorkerError(_how_it_died(worker.exitcode, len(_waited_for)))


def _how_it_died(exitcode: int, workers: int) -> str:
    name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    if name == "SIGBUS":
        return f"a data worker died: {SHARED_MEMORY_IS_FULL}"
    why = " (SIGKILL, often for lack of memory)" if name == "SIGKILL" else f" ({name})"
    return f"a data worker died{why} - try --workers {1 if workers > 1 else 0}"


def _hang() -> str:
    return (f"no batch for {NO_BATCH_S:.0f} s: the data workers hang - look at the disk or network that the images are on, or "
            "try --workers 0")


def _in_words(error: Exception, workers: Sequence[BaseProcess]) -> str | None:
    """What a failure of a worker means for the person; None when it is no worker's."""
    text = str(error)
    if isinstance(error, RuntimeError) and any(words in text for words in SHARED_MEMORY_WORDS):
        return SHARED_MEMORY_IS_FULL
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS):  # from the semaphores of its queues
        return SHARED_MEMORY_IS_FULL
    # One that dies while a batch is fetched from it is noticed by what it was to send.
    if workers and (isinstance(error, (EOFError, ConnectionError)) or text.startswith("DataLoader worker")):
        until = time.monotonic() + SPARE_S
        while not any(worker.exitcode for worker in workers) and time.monotonic() < until:
            time.sleep(0.01)
        exitcodes = [worker.exitcode for worker in workers if worker.exitcode]
        if exitcodes:
            return _how_it_died(exitcodes[0], len(workers))
        if not isinstance(error, (EOFError, ConnectionError)):
            return f"a data worker died ({text}) - try --workers {1 if len(workers) > 1 else 0}"
    if text.startswith("Caught ") and " in DataLoader worker process " in text:  # torch puts the whole traceback into it
        return OWN_NAME.sub("", text.strip().splitlines()[-1])
    return None


def _stop(iterator: Any) -> None:
    workers: Sequence[BaseProcess] = getattr(iterator, "_workers", ())
    try:
        if workers:
            iterator._shutdown_workers()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
