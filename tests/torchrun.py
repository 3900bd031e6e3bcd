"""Runs of the main job under torchrun, with a fault in one process; for the tests."""

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SMALL = ("--arch", "conv6", "--hidden-dim", "16", "--projection-dim", "8", "--batch-size", "8", "--workers", "0",
         "--device", "cpu")
MARK = "BYOL_CORE_TEST"
# What one process does after its third update, by name; `rank` is its rank and `attempt` counts torchrun's restarts.
FAULTS = {
    "raises": "raise RuntimeError('the dog ate it')",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "gets SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "hangs": "time.sleep(600)",
    "freezes": "os.kill(os.getpid(), signal.SIGSTOP)",
}
DRIVER = """
import os, signal, sys, time
sys.path.insert(0, {repository!r})
import train
from byol_core import watch
from byol_core.run import Run
watch.STUCK_S = {stuck}
{setup}
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
after_step = Run._after_step
def faulty(run, progress, step):
    after_step(run, progress, step)
    if progress.updates == {update} and rank == {rank} and attempt == 0:
        {fault}
Run._after_step = faulty
sys.exit(train.main(sys.argv[1:]))
"""


@dataclass
class Finished:
    code: int
    out: str
    err: str
    seconds: float
    orphans: list[int]

    @property
    def messages(self) -> list[str]:
        """The lines of ours on stderr."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "warning:"))]


def torchrun(folder: Path, *arguments: object, processes: int = 2, fault: str = "pass", rank: int = 1, update: int = 3,
             options: tuple[str, ...] = ("--standalone",), before: tuple[str, ...] = (), timeout: float = 120.0,
             patience: float = 6.0, env: dict[str, str] | None = None, stuck: float = 20.0, setup: str = "") -> Finished:
    """`train.py` with these arguments in `folder`, in so many processes.

    options: of torchrun. before: of the command. stuck: seconds after which a process is taken to be stuck. setup: code that
    all processes run first.
    """
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(repository=str(REPOSITORY), update=update, rank=rank, fault=FAULTS.get(fault, fault),
                                    stuck=stuck, setup=setup))
    command = [*before, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *options,
               str(driver), *map(str, arguments)]
    return watched(command, folder, timeout, env, patience)


def watched(command: list[str], folder: Path, timeout: float, env: dict[str, str] | None = None,
            patience: float = 6.0) -> Finished:
    """Run a command; say which of the processes it started are left after `patience` seconds, and kill them."""
    mark = uuid.uuid4().hex
    began = time.monotonic()
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark, **(env or {})})
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = -1
        seconds = time.monotonic() - began
    until = time.monotonic() + patience
    while (orphans := marked(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    return Finished(code, (folder / "stdout").read_text(), (folder / "stderr").read_text(), seconds, orphans)


def marked(mark: str) -> list[int]:
    """The live processes that have inherited this mark in their environment, whatever session they are in."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
