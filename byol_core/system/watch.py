"""A thread beside each process of a run that notices when another one is dead, stuck or has failed, and ends this one."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from byol_core.system.console import show

FAILED = "failed"  # the store's key for "RANK why the run fails": the first process to write it is the one that says so
PUBLISH_S = 1.0  # seconds between two signs of life
LOOKS, LOOKS_UNASKED = 4, 10  # at the others' signs before a verdict: by one that waits for them, and by one that does not
STUCK_S, STUCK_STEPS, FIRST_STEP_S = 20.0, 10.0, 600.0  # what counts as stuck: see `Watch.limit`
GRACE_S = 3.0  # seconds for a process to end by itself once another one has failed
WORKING, WAITING, UNLIMITED = "working", "waiting", "unlimited"
# How torch says that the other end of a connection is no longer there; it has no type of its own for that.
LOST = re.compile("connection (closed|reset|refused)|broken pipe|timed out|socket|remote process exited|nccl", re.IGNORECASE)


@dataclass
class Sign:
    """A process's sign of life as the store holds it: which it is, what it does, and for how many seconds."""

    number: int = -1
    state: str = ""
    seconds: float = 0.0

    @classmethod
    def read(cls, text: str) -> "Sign":
        number, state, seconds = text.split()
        return cls(int(number), state, float(seconds))


class Watch(threading.Thread):
    """Publishes what this process does and for how long, and looks at the others when it waits for them too long.

    A process works (it computes, loads or sleeps), waits for others inside an exchange, or is somewhere without limit, as
    when the first one evaluates. One that works far longer than ever before while another waits for it is stuck.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        super().__init__(name="byol_core watch", daemon=True)
        self.store, self.rank, self.world_size = store, rank, world_size
        self.state, self.since = UNLIMITED, time.monotonic()
        self.longest: float | None = None  # seconds of the longest step so far
        self._step_began: float | None = None
        self.last_words: Callable[[str], None] = lambda reason: None  # called before the process is ended for `reason`
        self._ended = threading.Event()
        self._seen: deque[list[Sign]] = deque(maxlen=LOOKS_UNASKED)  # the others' signs in the latest seconds
        self._launcher = os.getppid()

    @property
    def limit(self) -> float:
        """Seconds of work after which a process is stuck: 20, or ten of the longest steps; 600 before the first is done."""
        return FIRST_STEP_S if self.longest is None else max(STUCK_S, STUCK_STEPS * self.longest)

    def enter(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()

    def step_begins(self) -> None:
        now = time.monotonic()
        if self._step_began is not None:
            self.longest = max(self.longest or 0.0, now - self._step_began)
        self._step_began = now
        self.enter(WORKING)

    @contextlib.contextmanager
    def without_limit(self) -> Iterator[None]:
        self.enter(UNLIMITED)
        yield  # an exception leaves it without limit: the process is about to end
        self._step_began = None
        self.enter(WORKING)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around an exchange with the others."""
        before = self.state
        self.enter(WAITING)
        yield
        self.enter(before)

    def end(self) -> None:
        self._ended.set()
        self.join()

    def fail(self, error: BaseException) -> tuple[str, bool]:
        """(why the run fails, whether this process is the one to say so), when `error` ends this process."""
        text = f"rank {self.rank} of {self.world_size}: {error}"
        with contextlib.suppress(RuntimeError):  # the store is gone, with the launcher or the first machine
            lost = LOST.search(str(error)) is not None
            if lost and not self._failed_within(GRACE_S):
                gone = self._silent()
                if gone:
                    text = f"{self._named(gone)} gone: killed, out of memory, or cut off"
            return self._have_the_word(text)
        return text, True

    def asked_to_stop(self, look: bool) -> bool:
        """A signal ends this process. look: whether to find out if it came because another process is gone.

        torchrun sends it to all others when one of them is killed; one that was asked to stop itself says so before it goes.
        """
        with contextlib.suppress(RuntimeError):  # the store is gone, with the launcher or the first machine
            self.store.set(f"asked/{self.rank}", "")
            return look and any(not self.store.check([f"asked/{rank}"]) for rank in self._silent())
        return False

    def _have_the_word(self, text: str) -> tuple[str, bool]:
        mine = f"{self.rank} {text}"  # another process may have come to the same words
        agreed = self.store.compare_set(FAILED, "", mine).decode()
        if agreed == mine:
            _tell_torchrun(text)
        return agreed.partition(" ")[2], agreed == mine

    def run(self) -> None:
        number = 0
        while not self._ended.wait(PUBLISH_S):
            number += 1
            try:
                waited = time.monotonic() - self.since
                self.store.set(f"sign/{self.rank}", f"{number} {self.state} {waited:.1f}")
                if self.store.check([FAILED]):
                    self._end_with_it()
                self._look_around(waited)
                if os.getppid() != self._launcher:
                    raise ConnectionError("the launcher is gone")
            except (RuntimeError, OSError):  # the store went with the launcher: save and stop, as for SIGTERM
                if not self._ended.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def _end_with_it(self) -> None:
        """Another process failed: this one may be inside an exchange with it that never ends."""
        if not self._ended.wait(GRACE_S):
            try:
                self.last_words(self.store.get(FAILED).decode().partition(" ")[2])
            finally:
                os._exit(1)

    def _look_around(self, waited: float) -> None:
        """Look at the others after so many seconds in one state: when waiting long, and when busy once training has begun."""
        waits, busy = self.state == WAITING, self.state == UNLIMITED and self.longest is not None
        if not busy and not (waits and waited > self.limit - LOOKS * PUBLISH_S):
            self._seen.clear()
            return
        self._seen.append(self._signs())
        looks = LOOKS if waits else LOOKS_UNASKED
        if len(self._seen) >= looks and (busy or waited > self.limit):
            self._judge(self._seen[-looks], self._seen[-1])

    def _judge(self, before: list[Sign], after: list[Sign]) -> None:
        """This process waits for others too long: say for which of them, unless one is busy without limit, as this may be."""
        silent = [rank for rank in range(self.world_size)
                  if after[rank].number == before[rank].number and not self.store.check([f"asked/{rank}"])]
        stuck = [rank for rank, sign in enumerate(after) if sign.state == WORKING and sign.seconds > self.limit]
        text = ""
        if silent:
            text = f"{self._named(silent)} silent: frozen, or cut off"
        elif any(sign.state == UNLIMITED for sign in after):
            return
        elif stuck:
            text = f"{self._named(stuck)} stuck: nothing has moved there for {after[stuck[0]].seconds:.0f} s"
        elif all(sign.state == WAITING and sign.seconds > max(FIRST_STEP_S, self.limit) for sign in after):
            text = f"all {self.world_size} processes have waited for each other for {after[self.rank].seconds:.0f} s"
        if text and self._have_the_word(text)[1]:
            show(sys.stderr, f"error: {text}\n")

    def _signs(self) -> list[Sign]:
        return [Sign.read(self.store.get(key).decode()) if self.store.check([key]) else Sign()
                for key in (f"sign/{rank}" for rank in range(self.world_size))]

    def _silent(self) -> list[int]:
        """The processes that give no sign of life any more."""
        before = self._signs()
        time.sleep(2.5 * PUBLISH_S)
        return [rank for rank, sign in enumerate(self._signs()) if sign.number == before[rank].number and rank != self.rank]

    def _failed_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.store.check([FAILED]):
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        return True

    def _named(self, ranks: list[int]) -> str:
        return f"rank {', '.join(map(str, ranks))} of {self.world_size} is"


def _tell_torchrun(text: str) -> None:
    """So that its summary of failures gives the reason, too."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(RuntimeError(text))
