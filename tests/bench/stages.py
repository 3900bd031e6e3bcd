"""Runs commands of Python one after the other, each within a time limit of its own, and keeps what each has measured."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.forking import REPOSITORY

TO_END_S = 5.0  # seconds kept for ending what is still running, and for the last words
TO_TELL_S = 1.0  # for a process to write where it hangs, once it is told to
AT_ONCE = 2**16  # bytes that are read at once; a longer line is broken
LOGGED_BYTES = 10**6
PIPED = 32  # parts, more than a pipe holds
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

    rests: what was begun of a line. last: the last line that was not empty. written: bytes, by stage.
    """

    path: Path
    rests: dict[str, bytes] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    def write(self, name: str, part: bytes) -> None:
        *lines, rest = (self.rests.get(name, b"") + part).split(b"\n")
        if len(rest) > AT_ONCE:
            lines, rest = [*lines, rest], b""
        self.rests[name] = rest
        self._append(name, lines)

    def end(self, name: str) -> None:
        rest = self.rests.pop(name, b"")
        self._append(name, [rest] if rest else [])

    def _append(self, name: str, lines: list[bytes]) -> None:
        before = self.written.setdefault(name, 0)
        if lines and before <= LOGGED_BYTES:
            text = b"".join(f"[{name}] ".encode() + line + b"\n" for line in lines)
            self.written[name] += len(text)
            if self.written[name] > LOGGED_BYTES:
                text += f"[{name}] ... what else it prints is left out\n".encode()
            with self.path.open("ab") as file:
                file.write(text)
        self.last |= {name: line.decode(errors="replace").strip() for line in lines if line.strip()}


class Running:
    """A stage whose process was started, and what it has written so far."""

    def __init__(self, stage: Stage, seconds: float, place: Path, log: Log, environment: dict[str, str]) -> None:
        self.stage, self.seconds, self.log = stage, seconds, log
        self.json = place / f"{stage.name}.jsonl"
        self.mark = f"{os.getpid()}-{stage.name}"
        words = [sys.executable, *map(str, stage.command(seconds)), "--json", str(self.json)]
        log.write(stage.name, f"+ {' '.join(words[1:])}\n".encode())
        self.began = time.monotonic()
        self.stopped: float | None = None  # when, if it was
        self.last_line: str | None = None  # before it was stopped
        self.process = subprocess.Popen(
            words, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment, **stage.environment, MARK: self.mark, "PYTHONFAULTHANDLER": "1",
                 "PYTHONUNBUFFERED": "1"})
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.output, False)

    def read(self) -> bool:
        """Log some of what was printed; False at the end of it."""
        try:
            part = os.read(self.output, AT_ONCE)
        except BlockingIOError:  # nothing for now
            return True
        self.log.write(self.stage.name, part)
        return part != b""

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
        for _ in range(PIPED):  # what was still on its way; no more, as one that cannot be ended may go on
            if not self.read():
                break
        self.log.end(self.stage.name)
        os.close(self.output)
        self.process.stdout = None
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
    selector = selectors.DefaultSelector()
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
                selector.register(running[-1].output, selectors.EVENT_READ, running[-1])
            for key, _ in selector.select(timeout=0.1):
                if not key.data.read():
                    selector.unregister(key.fd)  # it has closed its output, and is about to end
            for some in running:
                if some.process.poll() is None and some.over:
                    some.stop()
            for some in [some for some in running if some.process.poll() is not None or some.stopped is not None]:
                with contextlib.suppress(KeyError):
                    selector.unregister(some.output)
                result = some.end(LATE)
                running.remove(some)
                keep(some.stage, result)
    finally:
        for some in running:
            some.stop()
        for some in running:
            with contextlib.suppress(OSError):  # it was being ended already
                keep(some.stage, some.end(INTERRUPTED))


def may_start(stage: Stage, running: list[Stage], at_once: int) -> bool:
    return not running or (stage.beside and all(other.beside for other in running) and len(running) < at_once)
