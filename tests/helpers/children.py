"""The command in processes of its own, killed, signalled or hindered at a chosen moment; not a test.

Children are forked by a server that has loaded torch and computed nothing, as loading it takes longer than a run.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).parents[2]
SMALL = ["--arch", "conv6", "--hidden-dim", "16", "--projection-dim", "8", "--image-size", "16", "--batch-size", "4",
         "--device", "cpu"]
ADDRESS, STARTED_BY = "BYOL_TESTS_FORK_AT", "BYOL_TESTS_STARTED_BY"  # variables of a process that forks: where, and its number
PATIENCE_S = 600.0  # seconds in which a child and all that it started must have ended


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
    reading, writing = os.pipe()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        child = Forked("tests.helpers.children:_train", [os.getcwd(), [str(argument) for argument in arguments],
                                                         [asdict(moment) for moment in moments], start_method],
                       nowhere, writing)
        os.close(writing)
        try:
            errors = _read_to_the_end(reading)
        finally:
            child.kill_session()
        return Ended(child.wait(), errors)
    finally:
        os.close(reading)
        os.close(nowhere)


class Forked:
    """A process that calls `function`, "module:name", with these arguments, in a session of its own.

    stdout, stderr: open files of this process, or their numbers.
    """

    def __init__(self, function: str, arguments: list[object], stdout: IO | int, stderr: IO | int) -> None:
        handles = [file if isinstance(file, int) else file.fileno() for file in (stdout, stderr)]
        self.server = _server()
        socket.send_fds(self.server, [json.dumps([function, arguments]).encode()], handles)
        self.pid = int(self.server.recv(100))

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, minus the signal for a killed process."""
        if not select.select([self.server], [], [], timeout)[0]:
            raise TimeoutError
        with self.server:
            return int(self.server.recv(100))

    def kill_session(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def in_processes(function: str, ranks: int, folder: Path, *arguments: str) -> None:
    """Calls `function`, "module:name", with a rank and these arguments in so many processes. Fails where one of them does."""
    with open(folder / "output", "w") as output:
        code = Forked("tests.helpers.children:_ranks", [function, ranks, arguments], output, output).wait(PATIENCE_S)
    assert code == 0, (folder / "output").read_text()


def _ranks(function: str, ranks: int, arguments: list[str]) -> None:
    import torch.multiprocessing

    torch.multiprocessing.start_processes(pkgutil.resolve_name(function), tuple(arguments), ranks, start_method="fork")


def _server() -> socket.socket:
    """A connection to what forks a child, once; all of it ends when the tests do.

    The processes of pytest-xdist share the server that the first of them has started, at an address that is no file.
    """
    tests = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    address = os.environ.get(ADDRESS, f"byol-tests-{tests}")
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            own = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # each answer comes by itself
            own.connect(f"\0{address}")
            return own
        assert ADDRESS not in os.environ, f"nobody forks at {address} any more"
        with contextlib.suppress(OSError), _listening(address) as listening:  # another was faster
            subprocess.Popen([sys.executable, "-m", "tests.helpers.children", str(listening.fileno()), str(tests)],
                             cwd=REPOSITORY, pass_fds=[listening.fileno()], start_new_session=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})


def _listening(address: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(f"\0{address}")
    listening.listen()
    return listening


def _serve_tests(listening: socket.socket, tests: int) -> int:
    import byol_core.run.run  # noqa: F401 - what takes seconds to load
    import train  # noqa: F401

    gc.freeze()  # or each child would copy all of this memory to tidy it up at its end
    return _listen(listening, tests)


def _listen(listening: socket.socket, served: int) -> int:
    """Serves each connection by a child of its own, for as long as there is a process `served`; it and they end together, so
    that what they have forked finds its parent gone."""
    children = set[int]()
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(served, 0)
            children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0]}
            if select.select([listening], [], [], 0.1)[0]:
                connection, _ = listening.accept()
                child = os.fork()
                if child == 0:
                    listening.close()
                    return _serve(connection)
                connection.close()
                children.add(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
    return 0


def _serve(connection: socket.socket) -> int:
    """Forks a child that calls the function asked for, and tells its number and then how it ended."""
    request, handles, _, _ = socket.recv_fds(connection, 2**17, 2)
    child = os.fork()
    if child == 0:
        connection.close()
        os.setsid()
        for number, handle in enumerate(handles, 1):
            os.dup2(handle, number)
            os.close(handle)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
        function, arguments = json.loads(request)
        return pkgutil.resolve_name(function)(*arguments)
    for handle in handles:
        os.close(handle)
    connection.send(str(child).encode())
    with contextlib.suppress(BrokenPipeError):  # who asked may have gone
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    return 0


class ForkedPython(Forked):
    """What torchrun and `subprocess.run` use of `subprocess.Popen`, for `python WORDS`, which begin with a script or -m."""

    def __init__(self, args: Sequence[str], env: dict[str, str], **_: Any) -> None:
        sys.stdout.flush()
        self.code: int | None = None
        words = [word for word in args[1:] if word != "-u"]
        super().__init__("tests.helpers.children:_python", [words, os.getcwd(), dict(env)], 1, 2)

    def poll(self) -> int | None:
        if self.code is None:
            with contextlib.suppress(TimeoutError):
                self.code = super().wait(0.0)
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            try:
                self.code = super().wait(timeout)
            except TimeoutError:
                raise subprocess.TimeoutExpired("", timeout or 0.0) from None
        return self.code


def _python(words: list[str], folder: str, environment: dict[str, str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return as_python(words)


def as_python(words: Sequence[str]) -> int:
    """The exit code of `python WORDS`, which begin with a script or -m. In this process, which does nothing after it."""
    as_module = words[0] == "-m"
    sys.argv = list(words[1:] if as_module else words)
    code: Any = 0
    try:
        if as_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code if isinstance(code, int) else 1


def fork_every_python() -> None:
    """From now on, where torchrun or `subprocess.run` would start a Python, one is forked.

    By a process that is made here, before this one has threads: a fork may find their locks held, and wait for ever.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.environ[ADDRESS] = address = f"byol-tests-{os.getpid()}"
    os.environ[STARTED_BY] = str(os.getpid())
    with _listening(address) as listening:
        if os.fork() == 0:
            os._exit(_listen(listening, os.getppid()))
    original = subprocess.run

    def run(command: Sequence[str], **options: Any) -> Any:
        if command[0] != sys.executable or options.keys() != {"check", "env"}:
            return original(command, **options)
        code = ForkedPython(command, options["env"]).wait(PATIENCE_S)
        if code:
            raise subprocess.CalledProcessError(code, list(command))

    subprocess_handler.Popen = ForkedPython  # type: ignore[misc, assignment]
    subprocess.run = run  # type: ignore[assignment]


def python(words: list[str], environment: dict[str, str]) -> int:
    """`python WORDS` in the repository, in a forked process that forks what it starts."""
    os.chdir(REPOSITORY)
    os.environ.update(environment)
    fork_every_python()
    return as_python(words)


def _read_to_the_end(pipe: int) -> str:
    """What is written until nobody is left who could write."""
    parts, until = list[bytes](), time.monotonic() + PATIENCE_S
    while True:
        ready = select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]
        assert ready, f"a process is still there after {PATIENCE_S:.0f} s; so far: {b''.join(parts)!r}"
        part = os.read(pipe, 65536)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


def _train(folder: str, arguments: list[str], moments: list[dict[str, Any]], start_method: str) -> int:
    import torch.multiprocessing

    import train
    from byol_core.run import log as metrics

    os.chdir(folder)
    torch.multiprocessing.set_start_method(start_method, force=True)
    metrics.RECORD_EVERY = 2  # not only at the ends of these short epochs
    for moment in moments:
        At(**moment).arrange()
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(_serve_tests(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))
