"""The processes of a run under torchrun: who is who, what they agree on, and one message when one of them fails."""

import contextlib
import os
import platform
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from byol_core.system.signals import Stopped

MEETING_S = 120.0  # seconds in which all processes must have come
TIMEOUT_S = 600  # seconds that an exchange may take, unless BYOL_TIMEOUT_S says otherwise
NO_LIMIT = timedelta(days=30)  # of the wait for the first process, which may evaluate for hours
GRACE_S = 10.0  # seconds for a process that failed to say why, before others say that it is gone
POLL_S = 0.02, 0.5  # seconds between looks at what another process has done: at first, and at most
FAILED = "failed"  # the store's key for "RANK KIND why the run ends": the first process to write it is the one that says so
# How torch says that the other end of a connection is no longer there, or does not answer; it has no type of its own for that.
LOST = re.compile("connection (closed|reset|refused|timed out)|no route to host|network is unreachable|broken pipe|"
                  "remote process exit|communicator was aborted", re.IGNORECASE)
NO_ANSWER = re.compile("timed out|timeout", re.IGNORECASE)

T = TypeVar("T")


class NoAnswerError(Exception):
    """Another process did not come to an exchange in time."""


class Processes:
    """All processes of one run, seen from this one. Alone it needs no set-up, and every agreement is its own opinion.

    Every method but `fail` must be called by all processes, in the same order.

    store: what torchrun's processes share. patient: a process group whose exchanges may take any time; None: the default one.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_world_size: int = 1,
                 store: dist.Store | None = None, patient: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world_size, self.local_world_size = rank, world_size, local_world_size
        self._store, self._patient, self._launcher = store, patient, os.getppid()
        self._opinions: tuple[dist.Work | None, Tensor] | None = None  # those of the call before

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, writes and evaluates."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, on its device."""
        if not self.several:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def mean_values(self, values: Mapping[str, float]) -> dict[str, float]:
        means = self.mean(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
        return dict(zip(values, means))

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks; of plain types."""
        if not self.several:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in every process; tensors arrive on the CPU."""
        if not self.several:
            return make()
        made = [self.on_first(make)]
        dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Do `work` in the first process, while the others wait without limit; None in the others."""
        if not self.several:
            return work()
        result = work() if self.first else None
        self._everyone_is_here()
        return result

    def _everyone_is_here(self) -> None:
        """Wait for the first process as long as it takes, and, in that one, for the others; a signal is answered meanwhile."""
        arrival = dist.all_reduce(torch.zeros(1), group=self._patient, async_op=True)
        pause, until = POLL_S[0], time.monotonic() + _timeout().total_seconds()
        while not arrival.is_completed():
            if self.first and time.monotonic() > until:
                raise NoAnswerError("another process has not answered")
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
        arrival.wait()

    def agree_on_stop(self, asked: int | None, now: bool) -> tuple[int, str] | None:
        """(signal, to whom it came) when a process was asked to stop, the same answer in all of them.

        Unless `now`, the answer is about the call before: by then it has arrived, and nobody waits for it.
        asked: the number of the signal that this process got. One whose torchrun is gone stops as for SIGTERM.
        """
        if not self.several:
            return None if asked is None else (asked, "")
        if asked is None and os.getppid() != self._launcher:
            asked = signal.SIGTERM
        opinion = torch.zeros(self.world_size, dtype=torch.int64)
        opinion[self.rank] = asked or 0
        before, self._opinions = self._opinions, (dist.all_reduce(opinion, async_op=True), opinion)
        for work, opinions in filter(None, (before, self._opinions if now else None)):
            if work is not None:
                work.wait()
            ranks = opinions.nonzero().flatten().tolist()
            if ranks:
                whom = "" if len(ranks) == self.world_size else f" to rank {', '.join(map(str, ranks))}"
                return int(opinions.max()), whom
        return None

    def fail(self, error: BaseException, line: str | None = None) -> tuple[str, bool, bool]:
        """Tell the others, which lose their connection to it, why this process ends; the first one gives the reason for all.

        Returns: (that reason, whether this process prints it, whether the run was asked to stop). line: said for the error.
        """
        text, here = str(error) if line is None else line, f"rank {self.rank} of {self.world_size}"
        if self._store is None:
            return text, True, isinstance(error, Stopped)
        of_torch = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if of_torch and LOST.search(str(error)):
            with contextlib.suppress(RuntimeError):
                self._store.wait([FAILED], timedelta(seconds=GRACE_S))
            text = (f"another process is gone (noticed by {here}): killed, out of memory, or cut off; torchrun says how it "
                    "ended")
        elif isinstance(error, NoAnswerError) or of_torch and NO_ANSWER.search(str(error)):
            text = (f"another process has not answered for {_timeout().total_seconds():.0f} s (noticed by {here}): it hangs, "
                    "or its machine is cut off; BYOL_TIMEOUT_S sets these seconds")
        else:
            text = f"{here}: {text}"
        mine = f"{self.rank} {'stopped' if isinstance(error, Stopped) else 'failed'} {text}"
        try:
            agreed = self._store.compare_set(FAILED, "", mine).decode()
        except RuntimeError:  # the store is gone, with the launcher or the first machine
            agreed = mine
        if agreed == mine and "TORCHELASTIC_ERROR_FILE" in os.environ:
            with contextlib.suppress(OSError):  # on a full disk
                get_error_handler().record_exception(RuntimeError(text))  # for torchrun's table of failures
        _, kind, text = agreed.split(" ", 2)
        return text, agreed == mine, kind == "stopped"

    def leave(self) -> None:
        """The end of a run that went well in every process."""
        if self._store is not None:
            if self._opinions is not None and self._opinions[0] is not None:
                self._opinions[0].wait()
            self._everyone_is_here()
            dist.destroy_process_group()

    def end(self, code: int) -> int:
        """The exit code of a run, all of which is written; one that did not go well in several processes ends here.

        torch's threads still wait for the others, and may abort a tidy end ("terminate called without an active exception").
        """
        if self.several and code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


ALONE = Processes()


def join(device: str) -> Processes:
    """Meet the other processes that torchrun started; alone without it.

    device: as --device has it; "cpu" keeps even a machine with GPUs to gloo.
    Raises: ValueError when the environment names processes that do not come, or is not whole.
    """
    world_size = _number("WORLD_SIZE", 1)
    return ALONE if world_size == 1 else join_group(device, world_size)


def join_group(device: str, world_size: int) -> Processes:
    """`join` for a known number of processes: one alone makes a group, too."""
    rank = _number("RANK", -1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or not 0 <= rank < world_size:
        wrong = f"but {missing[0]} is not set" if missing else f"RANK {rank}"
        raise ValueError(f"WORLD_SIZE is {world_size}, {wrong} - start with torchrun, or unset WORLD_SIZE")
    timeout = _timeout()
    local_rank, local_world_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", world_size)
    gpus = torch.cuda.device_count() if device == "auto" or device.startswith("cuda") else 0
    if gpus:
        if local_rank >= gpus:
            raise ValueError(f"{local_world_size} processes on this machine, but {gpus} GPUs - use --nproc-per-node {gpus}")
        torch.cuda.set_device(local_rank)
    store = _meet(rank, world_size)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=dist.PrefixStore("torch", store), rank=rank,
                            world_size=world_size, timeout=timeout)
    patient = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=NO_LIMIT))
    return Processes(rank, world_size, local_world_size, store, patient)


def _timeout() -> timedelta:
    """Of one exchange."""
    seconds = _number("BYOL_TIMEOUT_S", TIMEOUT_S)
    if seconds < 1:
        raise ValueError(f"BYOL_TIMEOUT_S is {seconds} - use 1 or more seconds, or unset it")
    return timedelta(seconds=seconds)


def launch() -> str:
    """Which call of torchrun this process is of, by the folder where its attempts leave their errors; "" without torchrun."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return error_file and f"{platform.node()} {Path(*Path(error_file).parts[:-3])}"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"{name} is {text!r}, which is no whole number - start with torchrun, or unset it") from None


def _meet(rank: int, world_size: int) -> dist.Store:
    """The store that all processes share, once all of them are there."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    until = time.monotonic() + MEETING_S
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=MEETING_S)))
        store = dist.PrefixStore("byol_core", store)
        mine = meeting = uuid.uuid4().hex
        absent = list(range(1, world_size)) if rank == 0 else [0]
        if rank:
            store.set(f"here/{rank}", mine)
        while absent:
            if time.monotonic() > until:
                raise TimeoutError(f"rank {absent[0]} did not come")
            if rank == 0:  # one store serves all attempts, and machines count these differently: the first process names each
                for other in filter(lambda other: store.check([f"here/{other}"]), absent):
                    store.set(f"meeting of/{store.get(f'here/{other}').decode()}", meeting)
                absent = [other for other in absent if not store.check([f"{meeting}/{other}"])]
            elif store.check([f"meeting of/{mine}"]):
                meeting, absent = store.get(f"meeting of/{mine}").decode(), []
                store.set(f"{meeting}/{rank}", "")
            time.sleep(POLL_S[0])
        store = dist.PrefixStore(meeting, store)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"WORLD_SIZE is {world_size}, but after {MEETING_S:.0f} s the processes have not met at {place} "
                         f"({str(error).splitlines()[0]}) - start all of them with torchrun, or unset WORLD_SIZE") from error
    return store
