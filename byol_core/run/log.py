"""The run's own record: metrics.jsonl, train.log, and one progress line."""

import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from byol_core.evaluate.health import RECENT, find_collapse, measure
from byol_core.run.tensorboard import Board
from byol_core.schedules import due
from byol_core.system.console import own_words, show
from byol_core.system.distributed import ALONE, Processes
from byol_core.system.files import write_text
from byol_core.training import Progress, Step

SIZE = {"ncols": 120, "nrows": 24}  # of a terminal that does not tell
RECORD_EVERY = 10  # updates; each record reads a few numbers back from the device
TERMINAL_EVERY, PLAIN_EVERY = 0.5, 30.0  # seconds between progress lines on a terminal and in a file

Value = int | float | str | None


def update_of(line: str) -> int:
    """The update that a line of metrics.jsonl is about; -1 for a line that is torn or empty."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return -1


def _size(terminal: TextIO) -> dict[str, int]:
    """For tqdm, which shows nothing on a terminal that does not tell its size; empty where it can look itself."""
    try:
        return {} if os.get_terminal_size(terminal.fileno()).columns else SIZE
    except (OSError, ValueError):
        return {}


class RunLog:
    """Writes what happens in a run to its folder and to the console; a file that cannot be written never stops the run.

    Of several processes the first one writes, and what it writes are means over all of them. plan: the run's resolved
    numbers, for advice that fits them.
    """

    def __init__(self, folder: Path, epochs: int, updates_per_epoch: int, batch_size: int,
                 processes: Processes = ALONE, plan: Mapping[str, object] | None = None) -> None:
        self.folder, self.processes, self.plan = folder, processes, plan
        self.epochs, self.updates_per_epoch, self.batch_size = epochs, updates_per_epoch, batch_size
        self.total_updates = epochs * updates_per_epoch
        self.seconds = 0.0  # spent in training steps, over all sessions of the run
        self.waited = 0.0  # seconds of them spent waiting for views
        self.loss_sum: float | Tensor = 0.0  # since the last record
        self.loss_count = self.skipped = 0
        self.last: dict[str, Value] = {}
        self.resumed: list[int] = []  # the updates after which the run went on in a new session
        self._board: Board | None = None  # gets every record too
        self._bar: tqdm | None = None
        self._printed = self._marked = time.monotonic()
        self._recorded = (0.0, 0.0, 0)  # seconds, waited, updates at the last record
        self._warned = self._collapse_reported = False
        self._projections: tuple[Tensor, Tensor] | None = None
        self._recent: deque[dict[str, float]] = deque(maxlen=RECENT)  # measures of the latest records

    def say(self, text: str) -> None:
        """A line for the person and for train.log."""
        if not self.processes.first:
            return
        if self._bar is not None:
            self._bar.clear()
        show(sys.stdout, text + "\n")
        self.note(text)

    def note(self, text: str) -> None:
        """A line for train.log alone."""
        self._append("train.log", f"{datetime.now().isoformat(timespec='seconds')} {text}\n")

    @contextlib.contextmanager
    def warn_only(self) -> Iterator[None]:
        """What fails in this block, as on a full disk, is told and does not fail the run: nothing of it is lost."""
        try:
            yield
        except Exception as error:
            self.say(f"warning: {own_words(error)} - the run goes on")

    def record(self, progress: Progress, **values: Value) -> None:
        """One line of metrics.jsonl."""
        within = min(progress.updates / max(self.updates_per_epoch, 1), progress.epoch + 1.0)
        line = {"update": progress.updates, "epoch": round(within if progress.batch else float(progress.epoch), 6), **values}
        self._append("metrics.jsonl", json.dumps(line, allow_nan=False) + "\n")
        if self._board is not None:
            self._board.scalars(progress.updates, values)

    def open_board(self, progress: Progress) -> None:
        """Write all records, and the pictures, for TensorBoard too."""
        self._board = Board(self.folder, progress.updates, self.say)

    def picture(self, progress: Progress, *names: str) -> None:
        """Show pictures of the run folder on the board, where there is one."""
        if self._board is not None:
            for name in names:
                self._board.picture(progress.updates, self.folder / name)

    def close_board(self) -> None:
        if self._board is not None:
            self._board.close()

    def start(self, progress: Progress) -> None:
        """The clock starts; call before training, and again after a pause that is not training."""
        self._marked = time.monotonic()
        if self._bar is None and sys.stderr.isatty() and self.processes.first:
            self._bar = tqdm(total=self.total_updates, initial=progress.updates, bar_format="{desc}", leave=True,
                             **_size(sys.stderr))

    def step(self, progress: Progress, step: Step, waited: float) -> None:
        """Account for one optimizer step; write a record and a progress line when they are due."""
        now = time.monotonic()
        self.seconds, self._marked = self.seconds + now - self._marked, now
        self.waited += waited
        if step.applied:
            self.loss_sum = self.loss_sum + step.loss
            self.loss_count += 1
            self._projections = step.projection1, step.projection2  # those of a skipped step need not be finite
        else:
            self.skipped += 1
        ends_epoch = progress.batch == 0
        if self._projections and self.loss_count and (due(progress.updates, RECORD_EVERY, self.total_updates) or ends_epoch):
            self._measure(progress, step, *self._projections)
            self.record(progress, **self.last)
            self.loss_sum, self.loss_count = 0.0, 0
            self._recorded = (self.seconds, self.waited, progress.updates)
        every = TERMINAL_EVERY if self._bar is not None else PLAIN_EVERY
        if now - self._printed >= every or (progress.epoch == self.epochs and self.last):
            self._printed = now
            self._print(self._line(progress))

    def _measure(self, progress: Progress, step: Step, projection1: Tensor, projection2: Tensor) -> None:
        seconds, waited, updates = self._recorded
        elapsed = max(self.seconds - seconds, 1e-9)
        health = self.processes.mean_values({**measure(projection1, projection2), "wait": (self.waited - waited) / elapsed})
        health = {name: round(value, 7) for name, value in health.items()}
        wait = health.pop("wait")
        self.last = {
            "loss": round(float(self.loss_sum) / self.loss_count, 7), **health, "tau": step.tau, "lr": step.lr,
            "images_per_second": round((progress.updates - updates) * self.batch_size / elapsed, 1),
            "wait": round(wait, 4), "skipped": self.skipped,
        }
        self._recent.append(health)
        collapse = find_collapse(list(self._recent), self.plan)
        if collapse is not None and not self._collapse_reported:
            self._collapse_reported = True
            self.say(f"warning: features are collapsing: {collapse.why} - {collapse.advice}")

    def _line(self, progress: Progress) -> str:
        done = max(progress.updates, 1)
        eta = int(self.seconds / done * (self.total_updates - done))
        ends = f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"
        epoch = f"epoch {min(progress.epoch + 1, self.epochs) if progress.batch else progress.epoch}/{self.epochs}"
        if not self.last:  # before the first record
            speed = done * self.batch_size / max(self.seconds, 1e-9)
            return f"{epoch}  update {progress.updates}/{self.total_updates}  {speed:.0f} img/s  {ends}"
        return (f"{epoch}  loss {self.last['loss']:.4f}  spread {self.last['spread']:.2f}  tau {self.last['tau']:.4f}  "
                f"lr {self.last['lr']:.3g}  {self.last['images_per_second']:.0f} img/s  wait {self.last['wait']:.0%}  {ends}")

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(line)
        elif self.processes.first:
            show(sys.stderr, line + "\n")
        self.note(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "waited": self.waited, "loss_sum": float(self.loss_sum),
                "loss_count": self.loss_count, "skipped": self.skipped, "last": self.last,
                "resumed": self.resumed, "collapse_reported": self._collapse_reported, "recent": list(self._recent)}

    def resume(self, state: dict[str, Any], progress: Progress, folder: Path) -> None:
        """Go on as if never stopped: drop the records of updates that will be made again, and what a crash tore.

        folder: of the run that is gone on with, most often this one.
        """
        self.seconds, self.waited, self.loss_sum = state["seconds"], state["waited"], state["loss_sum"]
        self.loss_count, self.skipped, self.last = state["loss_count"], state["skipped"], state["last"]
        self._collapse_reported = state["collapse_reported"]
        self._recent.extend(state.get("recent", []))  # which checkpoints did not always hold
        self.resumed = [*(at for at in state.get("resumed", []) if isinstance(at, int)), progress.updates]
        self._recorded = (self.seconds, self.waited, progress.updates)
        records = folder / "metrics.jsonl"
        if self.processes.first and records.is_file():
            lines = records.read_text("utf-8", "replace").split("\n")
            kept = [line + "\n" for line in lines if 0 <= update_of(line) <= progress.updates]
            write_text(self.folder / "metrics.jsonl", "".join(kept))

    def sync(self) -> None:
        """Make the records durable, as the checkpoint that counts on them is."""
        with contextlib.suppress(OSError), open(self.folder / "metrics.jsonl", "rb") as file:
            os.fsync(file.fileno())

    def _append(self, name: str, text: str) -> None:
        if not self.processes.first:
            return
        try:
            with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            if not self._warned:
                self._warned = True
                show(sys.stderr, f"warning: cannot write {self.folder / name}: {error.strerror} - the run goes on\n")
