"""The processes of a run under torchrun: who is who, what they agree on, and one message when one of them fails."""

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from byol_core.system.signals import Stopped
from byol_core.system.watch import Watch

MEETING_S = 120.0  # seconds in which all processes must have come
NO_LIMIT = timedelta(days=30)  # of one exchange: what takes too long is for `Watch` to judge
POLL_S = 0.02, 0.5  # seconds between looks at what another process has done: at first, and at most

T = TypeVar("T")


class Processes:
    """All processes of one run, seen from this one. Alone it needs no set-up, and every agreement is its own opinion.

    Every method but `fail` must be called by all processes, in the same order.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1,
                 watch: Watch | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.watch = watch
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
        with self._waiting():
            dist.all_reduce(total)
        return total / self.world_size

    def mean_values(self, values: Mapping[str, float]) -> dict[str, float]:
        if not self.several:
            return dict(values)
        means = self.mean(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
        return dict(zip(values, means))

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks; of plain types."""
        if not self.several:
            return [value]
        values: list[T] = [value] * self.world_size
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in every process; tensors arrive on the CPU."""
        if not self.several:
            return make()
        made = [self.on_first(make)]
        with self._waiting():
            dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Do `work` in the first process, while the others wait without limit; None in the others."""
        if not self.several:
            return work()
        with contextlib.nullcontext() if self.watch is None else self.watch.without_limit():
            result = work() if self.first else None
        with self._waiting():
            self._everyone_is_here()
        return result

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        """Around an exchange, so that whoever keeps the others waiting is found."""
        return contextlib.nullcontext() if self.watch is None else self.watch.waiting()

    def _everyone_is_here(self) -> None:
        """Wait for the others, so that a signal is answered all the while."""
        arrival = dist.all_reduce(torch.zeros(1), async_op=True)
        pause = POLL_S[0]
        while not arrival.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
        arrival.wait()

    def agree_on_stop(self, signal: int | None, now: bool) -> tuple[int, str] | None:
        """(signal, to whom it came) when a process was asked to stop, the same answer in all of them.

        Unless `now`, the answer is about the call before: by then it has arrived, and nobody waits for it.
        """
        if not self.several:
            return None if signal is None else (signal, "")
        opinion = torch.zeros(self.world_size, dtype=torch.int64)
        opinion[self.rank] = signal or 0
        before, self._opinions = self._opinions, (dist.all_reduce(opinion, async_op=True), opinion)
        for work, opinions in filter(None, (before, self._opinions if now else None)):
            if work is not None:
                with self._waiting():
                    work.wait()
            asked = opinions.nonzero().flatten().tolist()
            if asked:
                whom = "" if len(asked) == self.world_size else f" to rank {', '.join(map(str, asked))}"
                return int(opinions.max()), whom
        return None

    def fail(self, error: BaseException) -> tuple[str, bool]:
        """(why the run fails, whether this process is the one to say so), when `error` ends this process.

        The others learn of it and end, too.
        """
        return (str(error), True) if self.watch is None else self.watch.fail(error)

    def stopped(self, stop: Stopped) -> None:
        """A signal is about to end this process. Raises: ConnectionError in the first when it came because another is gone."""
        if self.watch is not None and self.watch.asked_to_stop(look=self.first and not stop.agreed):
            raise ConnectionError("connection closed by another process") from stop

    def leave(self) -> None:
        """The end of a run that went well in every process."""
        if self.watch is not None:
            if self._opinions is not None and self._opinions[0] is not None:
                self._opinions[0].wait()
            self._everyone_is_here()
            self.watch.end()
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
    local_rank, local_world_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", world_size)
    gpus = torch.cuda.device_count() if device == "auto" or device.startswith("cuda") else 0
    if gpus:
        if local_rank >= gpus:
            raise ValueError(f"{local_world_size} processes on this machine, but {gpus} GPUs - use --nproc-per-node {gpus}")
        torch.cuda.set_device(local_rank)
    store = _meet(rank, world_size)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=dist.PrefixStore("torch", store), rank=rank,
                            world_size=world_size, timeout=NO_LIMIT)
    watch = Watch(store, rank, world_size)
    watch.start()
    return Processes(rank, world_size, local_rank, local_world_size, watch)


def restarted() -> bool:
    """Whether torchrun has started this run again after a failure (--max-restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"{name} is {text!r}, which is no number - start with torchrun, or unset it") from None


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
