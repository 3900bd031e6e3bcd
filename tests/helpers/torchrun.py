"""Runs of the main job under torchrun, with a fault in one process; for the tests."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import runs
from tests.helpers.forking import PATIENCE_S, REPOSITORY, STARTED_BY, Forked, python

SMALL = (*runs.SMALL, "--batch-size", "12")  # which two, three and four processes share
GONE = "error: another process is gone (noticed by rank "
NO_ANSWER = "error: another process has not answered for 15 s (noticed by rank "
# For processes of which one is killed: it will not say why, so the others need not wait ten seconds for its reason.
IMPATIENT = "from byol_core.system import distributed\ndistributed.GRACE_S = 1.0"
# What one process does after its third update, by name; `rank` is its rank, `attempt` counts torchrun's restarts, and
# `starter` is torchrun's process.
FAULTS = {
    "raises": "raise RuntimeError('the dog ate it')",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "gets SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "hangs": "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(600)",  # or torchrun would wait 30 s to kill it
    # Killed by a child of its own once another process has said so; torchrun would take 30 s more.
    "is frozen": "os.fork() or ([time.sleep(0.1) for _ in iter(lambda: 'error: ' in open('stderr').read(), True)], "
                 "os.kill(os.getppid(), signal.SIGKILL), os._exit(0)); os.kill(os.getpid(), signal.SIGSTOP)",
}
DRIVER = """
import os, signal, sys, time
sys.path.insert(0, {repository!r})
import train
from byol_core.run.run import Run
{setup}
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
starter = int(os.environ.get({started_by!r}, os.getppid()))
after_step = Run.after_step
def faulty(run, progress, step):
    after_step(run, progress, step)
    if progress.updates == {update} and rank == {rank} and attempt == 0:
        {fault}
Run.after_step = faulty
sys.exit(train.main(sys.argv[1:]))
"""


@dataclass
class Finished:
    code: int
    out: str
    err: str
    orphans: list[int]

    @property
    def messages(self) -> list[str]:
        """The lines of ours on stderr."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "warning:"))]


def torchrun(folder: Path, *arguments: object, processes: int = 2, fault: str = "pass", rank: int = 1, update: int = 3,
             options: tuple[str, ...] = ("--standalone",), namespace: str = "", env: dict[str, str] | None = None,
             setup: str = "", forked: bool = True) -> Finished:
    """`train.py` with these arguments in `folder`, in so many processes; those that are left after it are killed.

    options: of torchrun. namespace: whose network they have, instead of the machine's. setup: code that all processes run
    first. forked: torchrun and its processes are spared the loading of torch, which takes longer than a run; all else is as in
    a run of the command.
    """
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(repository=str(REPOSITORY), update=update, rank=rank, fault=FAULTS.get(fault, fault),
                                    setup=setup, started_by=STARTED_BY))
    words = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *options, str(driver), *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(PATIENCE_S)), **(env or {})}
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        process: Forked | subprocess.Popen
        if forked:
            process = Forked(f"{__name__}:_torchrun", [words, environment, str(folder), namespace], out, err)
        else:
            process = subprocess.Popen([sys.executable, *words], cwd=folder, start_new_session=True, stdout=out, stderr=err,
                                       env={**os.environ, **environment})
        try:
            code = process.wait(PATIENCE_S)
        except (subprocess.TimeoutExpired, TimeoutError):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            code = -1
    until = time.monotonic() + PATIENCE_S
    while (orphans := _that_write_to(folder / "stderr")) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    return Finished(code, (folder / "stdout").read_text(), (folder / "stderr").read_text(), orphans)


def trained(folder: Path, images: Path, *more: object, **options) -> Finished:
    return torchrun(folder, "--data", images, "--out", "out", "--epochs", 2, "--no-eval", *SMALL, *more, **options)


def _that_write_to(path: Path) -> list[int]:
    """The live processes whose stderr this file is, whatever session they are in."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "fd" / "2").samefile(path):
                found.append(int(entry.name))
    return found


def _torchrun(words: list[str], environment: dict[str, str], folder: str, namespace: str) -> int:
    if namespace:
        with open(f"/run/netns/{namespace}") as file:
            assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
    return python(words, environment, folder)
