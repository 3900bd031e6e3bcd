"""The command in processes of its own, killed, signalled or hindered at a chosen moment; not a test.

Most children are forked by a server that has loaded torch and computed nothing, as loading it takes longer than a run.
"""

import contextlib
import functools
import gc
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
SMALL = ["--arch", "conv6", "--hidden-dim", "16", "--projection-dim", "8", "--image-size", "16", "--batch-size", "4",
         "--device", "cpu"]
PATIENCE_S = 60.0  # seconds in which a child and all that it started must have ended


@dataclass(frozen=True)
class At:
    """What happens at the `number`-th call (from 1) of `place`, "module:attribute", before it or after it.

    what: a signal's name, for the process itself; "group SIGTERM" and the like for all that it has started, too; or a
    function of no arguments, "module:attribute".
    """

    place: str
    number: int
    what: str
    after: bool = False

    def arrange(self, replace: Callable[[Any, str, Any], None] = setattr) -> None:
        module, _, path = self.place.partition(":")
        *owners, name = path.split(".")
        owner = pkgutil.resolve_name(f"{module}:{'.'.join(owners)}" if owners else module)
        original: Callable[..., Any] = getattr(owner, name)
        calls = 0

        @functools.wraps(original)
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.number and not self.after:
                self.happen()
            result = original(*args, **options)
            if calls == self.number and self.after:
                self.happen()
            return result

        replace(owner, name, counted)

    def happen(self) -> None:
        *group, name = self.what.split(" ")
        if ":" in name:
            pkgutil.resolve_name(name)()
        elif group:
            os.killpg(0, getattr(signal, name))
        else:
            os.kill(os.getpid(), getattr(signal, name))


@dataclass(frozen=True)
class Ended:
    """How a child ended; when it is there, nothing that the child started is left."""

    code: int
    errors: str

    def __post_init__(self) -> None:
        assert "Traceback" not in self.errors and "Exception ignored" not in self.errors, self.errors


def run_child(arguments: Sequence[object], moments: Sequence[At] = (), start_method: str = "fork") -> Ended:
    """Run train.py in the current folder, in a session of its own. start_method: of its data workers."""
    words = [str(argument) for argument in arguments]
    if start_method != "fork":
        command = [sys.executable, "-m", "tests.children", os.getcwd(), json.dumps(words),
                   json.dumps([asdict(moment) for moment in moments]), start_method]
        child = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True)
        try:
            _, errors = child.communicate(timeout=PATIENCE_S)  # until nobody has stderr open any more
        finally:
            _end_session(child.pid)
        return Ended(child.returncode, errors)
    request = json.dumps([os.getcwd(), words, [asdict(moment) for moment in moments]]).encode()
    reading, writing = os.pipe()
    try:
        socket.send_fds(_server(), [request], [writing])
        os.close(writing)
        leader = int(_server().recv(100))
        try:
            errors = _read_to_the_end(reading)
        finally:
            _end_session(leader)
        return Ended(int(_server().recv(100)), errors)
    finally:
        os.close(reading)


@functools.cache
def _server() -> socket.socket:
    """The connection to a process that forks children that run the command; it ends when this process does."""
    own, others = socket.socketpair()
    subprocess.Popen([sys.executable, "-m", "tests.children", "serve", str(others.fileno())], cwd=REPOSITORY,
                     pass_fds=[others.fileno()], start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    others.close()
    return own


def _serve(connection: socket.socket) -> int:
    import byol_core.run  # noqa: F401 - what takes seconds to load
    import train  # noqa: F401

    gc.freeze()  # or each child would copy all of this memory to tidy it up at its end
    while True:
        request, handles, _, _ = socket.recv_fds(connection, 2**16, 1)
        if not request:
            return 0
        errors, = handles
        child = os.fork()
        if child == 0:
            connection.close()
            os.setsid()
            os.dup2(errors, 2)
            os.close(errors)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
            folder, arguments, moments = json.loads(request)
            return _train(folder, arguments, [At(**moment) for moment in moments])
        os.close(errors)
        connection.send(str(child).encode())
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def _read_to_the_end(pipe: int) -> str:
    """What is written until nobody is left who could write."""
    parts, until = [], time.monotonic() + PATIENCE_S
    while True:
        ready = select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]
        assert ready, f"a process is still there after {PATIENCE_S:.0f} s; so far: {b''.join(parts)!r}"
        part = os.read(pipe, 65536)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


def _end_session(leader: int) -> None:
    """For when a test fails: no child makes a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _train(folder: str, arguments: list[str], moments: Sequence[At]) -> int:
    import train
    from byol_core import metrics

    os.chdir(folder)
    metrics.RECORD_EVERY = 2  # not only at the ends of these short epochs
    for moment in moments:
        moment.arrange()
    return train.main(arguments)


def main() -> int:
    if sys.argv[1] == "serve":
        return _serve(socket.socket(fileno=int(sys.argv[2])))
    folder, arguments, moments, start_method = sys.argv[1:]
    import torch.multiprocessing
    torch.multiprocessing.set_start_method(start_method)
    return _train(folder, json.loads(arguments), [At(**moment) for moment in json.loads(moments)])


if __name__ == "__main__":
    sys.exit(main())
