"""Processes that are forked by a server which has loaded torch and computed nothing, as loading it takes longer than a run.

For Linux alone, and a test that forks is skipped elsewhere: the server is found at an address that is no file, and processes
are waited for as files.
"""

import atexit
import contextlib
import errno
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 600.0  # seconds in which a child and all that it started must have ended
# Variables of a process that forks what it starts: the address at which that is done, and its own number.
ADDRESS, STARTED_BY = "BYOL_TESTS_FORK_AT", "BYOL_TESTS_STARTED_BY"
# The processes of pytest-xdist share a server, for as long as the process is there that has started them.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex
TESTS = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


class Forked:
    """A process that calls `function`, "module:name", with these arguments, in a session of its own.

    It is killed when nobody is left who could wait for it. stdout, stderr: open files of this process, or their numbers.
    """

    def __init__(self, function: str, arguments: list[Any], stdout: IO | int, stderr: IO | int) -> None:
        if sys.platform != "linux":
            importlib.import_module("pytest").skip("forks as Linux does")
        handles = [file if isinstance(file, int) else file.fileno() for file in (stdout, stderr)]
        self.server = _server()
        socket.send_fds(self.server, [json.dumps([function, arguments]).encode()], handles)
        self.pid = self._answer()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, minus the signal for a killed process."""
        if not select.select([self.server], [], [], timeout)[0]:
            raise TimeoutError
        with self.server:
            return self._answer()

    def _answer(self) -> int:
        answer = self.server.recv(100)
        assert answer, "the server that forks has ended"
        return int(answer)

    def kill_session(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def call(function: str, arguments: list[Any], output: Path) -> None:
    """Calls a function in a forked process, whose output goes to a file. Fails where that does, or takes too long."""
    with open(output, "w") as file:
        child = Forked(function, arguments, file, file)
    try:
        code: int | str = child.wait(PATIENCE_S)
    except TimeoutError:
        code = f"not done after {PATIENCE_S:.0f} s"
    finally:
        child.kill_session()
    assert code == 0, f"{code}: {output.read_text()}"


def run_code(code: str, folder: Path) -> str:
    """What some lines of Python print, run in a folder as by `python -c`. Fails where they do."""
    call(f"{__name__}:_python", [["-c", code], str(folder), dict(os.environ)], folder / "printed")
    return (folder / "printed").read_text()


def in_processes(function: str, ranks: int, folder: Path, *arguments: str) -> None:
    """Calls a function with a rank and these arguments in so many processes. Fails where one of them does."""
    call(f"{__name__}:_ranks", [function, ranks, arguments], folder / "output")


def _ranks(function: str, ranks: int, arguments: list[str]) -> None:
    import torch.multiprocessing

    torch.multiprocessing.start_processes(pkgutil.resolve_name(function), tuple(arguments), ranks, start_method="fork")


def _server() -> socket.socket:
    """A connection to what forks one child."""
    address = os.environ.get(ADDRESS, f"byol-tests-{RUN}")
    while True:
        own = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # each answer comes by itself
        try:
            own.connect(f"\0{address}")
            return own
        except ConnectionRefusedError:
            own.close()
            assert ADDRESS not in os.environ, f"nobody forks at {address} any more"
        try:
            listening = _listening(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue  # another was faster
        with listening:
            subprocess.Popen([sys.executable, "-m", __name__, str(listening.fileno()), str(TESTS)], cwd=REPOSITORY,
                             pass_fds=[listening.fileno()], start_new_session=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})


def _listening(address: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(f"\0{address}")
    listening.listen()
    return listening


def _main(listening: int, tests: int) -> int:
    import byol_core.run.run  # noqa: F401 - what takes seconds to load
    import train  # noqa: F401

    gc.freeze()  # or each child would copy all of this memory to tidy it up at its end
    return _listen(socket.socket(fileno=listening), tests, kill=True)


def _listen(listening: socket.socket, served: int, kill: bool) -> int:
    """Serves each connection by a child of its own, for as long as there is a process `served`. kill: see `_serve`."""
    try:
        gone = os.pidfd_open(served)
    except ProcessLookupError:
        return 0
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that have ended leave nothing
    while gone not in select.select([listening.fileno(), gone], [], [])[0]:
        connection, _ = listening.accept()
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.getuid() and os.fork() == 0:
            listening.close()
            _end(_serve(connection, kill))
        connection.close()
    return 0


def _serve(connection: socket.socket, kill: bool) -> int:
    """Forks a child that tells its number and calls the function asked for, and tells how it ended.

    kill: its session, once whoever has asked is gone; otherwise it goes on, and finds its parent gone.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, handles, _, _ = socket.recv_fds(connection, 2**17, 2)
    child = os.fork()
    if child == 0:
        os.setsid()
        connection.send(str(os.getpid()).encode())
        connection.close()
        for number, handle in enumerate(handles, 1):
            os.dup2(handle, number)
            os.close(handle)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
        function, arguments = json.loads(request)
        _end(pkgutil.resolve_name(function)(*arguments))
    for handle in handles:
        os.close(handle)
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection.fileno()], [], [])[0]:
        if not kill:
            return 0
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.send(str(code).encode())
    return 0


class ForkedPython(Forked):
    """What torchrun and `subprocess.run` use of `subprocess.Popen`, for `python WORDS`, which begin with a script or -m."""

    def __init__(self, args: Sequence[str], env: dict[str, str], **_: Any) -> None:
        sys.stdout.flush()
        self.code: int | None = None
        words = [word for word in args[1:] if word != "-u"]
        super().__init__(f"{__name__}:_python", [words, os.getcwd(), dict(env)], 1, 2)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
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
    """The exit code of `python WORDS`, which begin with a script, -m or -c. In this process, which does nothing after it."""
    sys.argv = list(words[words[0] in ("-m", "-c"):])
    code: Any = 0
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    return code if isinstance(code, int) else 1


def _end(code: int | None) -> NoReturn:
    """Ends as Python does, but leaves modules and C++ statics as they are: tearing them down takes longer than a small run."""
    threading._shutdown()  # type: ignore[attr-defined] # which waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def fork_every_python() -> None:
    """From now on, where torchrun or `subprocess.run` would start a Python, one is forked.

    By a process that is made here, before this one has threads: a fork may find their locks held, and wait for ever.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    os.environ[ADDRESS] = address = f"byol-tests-{os.getpid()}"
    os.environ[STARTED_BY] = str(os.getpid())
    with _listening(address) as listening:
        if os.fork() == 0:
            os._exit(_listen(listening, os.getppid(), kill=False))
    original = subprocess.run

    def run(command: Sequence[str], **options: Any) -> Any:
        if command[0] != sys.executable or options.keys() != {"check", "env"}:
            return original(command, **options)
        code = ForkedPython(command, options["env"]).wait(PATIENCE_S)
        if code:
            raise subprocess.CalledProcessError(code, list(command))

    subprocess_handler.Popen = ForkedPython  # type: ignore[misc, assignment]
    # torchrun names the calling function in its log, and reads the sources of all modules for that: most of its own time.
    dynamic_rendezvous.get_method_name = lambda depth=2: "no_method_name"
    subprocess.run = run  # type: ignore[assignment]


def python(words: list[str], environment: dict[str, str], folder: str = str(REPOSITORY)) -> int:
    """`python WORDS` in a folder, in a forked process that forks what it starts."""
    os.chdir(folder)
    os.environ.update(environment)
    fork_every_python()
    return as_python(words)


if __name__ == "__main__":
    sys.exit(_main(*map(int, sys.argv[1:])))
