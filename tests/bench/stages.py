"""Runs commands of Python one after the other, each within a time limit of its own, and keeps what each has measured."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.forking import REPOSITORY

TO_END_S = 5.0  # seconds kept for ending what is still running, and for the last words
TO_TELL_S = 1.0  # for a process to write where it hangs, once it is told to
LONGEST = 2**16  # bytes of a line; a longer one is broken
LOGGED_BYTES = 10**6
POLL_S = 0.05  # between looks at what has ended or is late
MARK = "BYOL_STAGE"  # by this variable of their environment all processes of a stage are known
PASSED, FAILED, LATE, LEFT_OUT, INTERRUPTED = "passed", "failed", "ended at its limit", "left out", "interrupted"
Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A command of Python and its limit.

    command: its words after "python", for so many seconds; --json and a file for its numbers are added. limit: seconds; None
    is the rest of the time. least: seconds below which it is not begun. beside: whether it may run beside others of that
    kind, as it times nothing. missing: why it cannot be run here, if so. environment: variables that it gets.
    """

    group: str
    name: str
    command: Callable[[float], Sequence[object]]
    limit: float | None
    least: float = 10.0
    beside: bool = False
    missing: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Log:
    """What the stages print, line by line as it comes, each line with the name of its stage; of one LOGGED_BYTES at most.

    last: the last line that was not empty. written: bytes, by stage.
    """

    path: Path
    last: dict[str, str] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    def write(self, name: str, line: bytes) -> None:
        before = self.written.setdefault(name, 0)
        if before <= LOGGED_BYTES:
            text = f"[{name}] ".encode() + line + b"\n"
            self.written[name] += len(text)
            if self.written[name] > LOGGED_BYTES:
                text += f"[{name}] ... what else it prints is left out\n".encode()
            with self.path.open("ab", buffering=0) as file:  # in one call, as stages that run side by side are read at once
                file.write(text)
        if line.strip():
            self.last[name] = line.decode(errors="replace").strip()


class Running:
    """A stage whose process was started, and what it has written so far."""

    def __init__(self, stage: Stage, seconds: float, place: Path, log: Log, environment: dict[str, str]) -> None:
        self.stage, self.seconds, self.log = stage, seconds, log
        self.json = place / f"{stage.name}.jsonl"
        self.mark = f"{os.getpid()}-{stage.name}"
        words = [sys.executable, *map(str, stage.command(seconds)), "--json", str(self.json)]
        log.write(stage.name, f"+ {' '.join(words[1:])}".encode())
        self.began = time.monotonic()
        self.stopped: float | None = None  # when, if it was
        self.last_line: str | None = None  # before it was stopped
        self.process = subprocess.Popen(
            words, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment, **stage.environment, MARK: self.mark, "PYTHONFAULTHANDLER": "1",
                 "PYTHONUNBUFFERED": "1"})
        self.reader = threading.Thread(target=self._read, daemon=True)  # one that hangs may never close its output
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            while line := output.readline(LONGEST):
                with contextlib.suppress(OSError):  # on a full disk; the results, which are written there too, will tell
                    self.log.write(self.stage.name, line.removesuffix(b"\n"))

    @property
    def over(self) -> bool:
        return time.monotonic() - self.began > self.seconds

    def stop(self) -> None:
        """Tell all of its processes to write where they are, and to end."""
        self.stopped = time.monotonic()
        self.last_line = self.log.last.get(self.stage.name, "")  # what follows says where each thread is
        self._signal(signal.SIGABRT)

    def end(self, why: str) -> Result:
        """End what is left of its processes, and tell what it has measured. why: its status, if it was stopped."""
        if self.stopped is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.0, self.stopped + TO_TELL_S - time.monotonic()))
        seconds = time.monotonic() - self.began
        until = time.monotonic() + TO_TELL_S  # one may hang in the driver, where nothing can end it
        while self._signal(signal.SIGKILL) and time.monotonic() < until:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TO_TELL_S)
        self.reader.join(TO_TELL_S)
        code = self.process.returncode
        status = why if self.stopped is not None else PASSED if code == 0 else FAILED
        return {"status": status, "seconds": round(seconds, 1), "limit": round(self.seconds, 1), "exit_code": code,
                "last_line": self.log.last.get(self.stage.name, "") if self.last_line is None else self.last_line,
                **self.numbers()}

    def _signal(self, number: int) -> int:
        """How many processes of the stage there are; each gets the signal."""
        pids = set(marked(self.mark))
        if self.process.poll() is None:
            pids.add(self.process.pid)  # whatever it has made of its environment
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return len(pids)

    def numbers(self) -> dict[str, Any]:
        """All that its benchmark has written: values together, tables as a list of sections."""
        values: dict[str, Any] = {}
        sections: list[str] = []
        for line in self.json.read_text().splitlines() if self.json.exists() else []:
            with contextlib.suppress(ValueError):  # it was killed while writing
                found = json.loads(line)
                sections += [found.pop("section")] if "section" in found else []
                values |= found
        return {"numbers": values, "sections": sections}


def marked(mark: str) -> Iterator[int]:
    """The processes with this mark in their environment, whatever session they are in."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def run(todo: Sequence[Stage], keep: Callable[[Stage, Result], None], log: Log, seconds: float, place: Path, at_once: int,
        environment: dict[str, str]) -> None:
    """Run the stages in their order, and end whatever runs when the time is over.

    keep: takes a stage and its result, the moment it ends. place: folder for what they write. at_once: how many may run side
    by side. environment: variables that they get beside those of this process.
    """
    until = time.monotonic() + seconds - TO_END_S
    waiting, running = list(todo), list[Running]()
    try:
        while waiting or running:
            while waiting and may_start(waiting[0], [some.stage for some in running], at_once):
                stage, left = waiting.pop(0), until - time.monotonic()
                missing = stage.missing or (f"{max(left, 0):.0f} s are left" if left < stage.least else "")
                if missing:
                    keep(stage, {"status": LEFT_OUT, "last_line": missing})
                    continue
                limit = left if stage.limit is None else min(left, stage.limit)
                running.append(Running(stage, limit, place, log, environment))
            time.sleep(POLL_S)
            for some in running:
                if some.process.poll() is None and some.over:
                    some.stop()
            for some in [some for some in running if some.process.poll() is not None or some.stopped is not None]:
                result = some.end(LATE)
                running.remove(some)
                keep(some.stage, result)
    finally:
        for some in running:
            some.stop()
        for some in running:
            with contextlib.suppress(OSError):  # the disk may be full, and the others must be ended, too
                keep(some.stage, some.end(INTERRUPTED))


def may_start(stage: Stage, running: list[Stage], at_once: int) -> bool:
    return not running or (stage.beside and all(other.beside for other in running) and len(running) < at_once)
