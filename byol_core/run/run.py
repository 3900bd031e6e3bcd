"""One run from plan to report: described, resumed, trained, saved and written out."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from byol_core.cuda_graph import WARM_UP
from byol_core.images.duplicates import find_copies
from byol_core.images.image_set import ImageSet
from byol_core.run.data import Loaded, open_data
from byol_core.run.describe import describe, write_config
from byol_core.run.folder import CHECKPOINTS, lock_of
from byol_core.run.log import RunLog
from byol_core.run.options import TrainConfig
from byol_core.run.plan import RESNET_FROM, Choice, Plan
from byol_core.run.results import Results
from byol_core.run.resume import Saveable, compare_processes, find_saved
from byol_core.run.setup import set_up
from byol_core.run.state import TrainingState
from byol_core.runtime import NonFiniteError, peak_memory
from byol_core.system.console import printable
from byol_core.system.distributed import ALONE, Processes
from byol_core.system.files import LAST, State, replace_damaged, save_checkpoint, write_text
from byol_core.system.signals import Stopped, StopRequest
from byol_core.training import Progress, Step, train
from byol_core.views.workers import WorkerError

CHECK_STEPS, CHECK_IMAGES = 5, 1_000  # of a check: updates that are timed, images that are decoded
TIMED_S, MOST_TIMED = 5.0, 100  # seconds and number of updates by which the length of a run of given minutes is found


class _EnoughMeasured(Exception):
    """Ends the training of a check."""


class Run:
    """A run from its options to its results; Raises: ValueError for what cannot be trained with.

    config, asked: as `Setup` has them; asked is config where they are one. loaded: the images of `files` and where their views
    are made, if another run of these options has loaded them already.
    """

    def __init__(self, config: TrainConfig, plan: Plan, files: ImageSet, folder: Path, processes: Processes = ALONE,
                 loaded: Loaded | None = None, asked: TrainConfig | None = None) -> None:
        self.setup = set_up(asked or config, config, plan, folder, processes)
        self.processes, runtime = processes, self.setup.runtime
        self.log = RunLog(folder, plan.epochs, plan.updates_per_epoch, plan.batch_size, processes, asdict(plan))
        self.state = TrainingState(self.setup.new_model(), plan, runtime.scaler)
        self.data = open_data(self.setup, files, self.log.say, loaded)
        self.images, self.batches = self.data.images, self.data.batches
        compare_processes(self.setup, self.images)
        self.results = Results(self.setup, self.log, self.state, self.images, self.data.measuring)
        self.saveable = Saveable(self.setup, self.state, self.images, self.results, self.log)
        self.saved_updates = 0
        self._lock = lock_of(folder)
        self.stop = StopRequest(patient=processes.several)

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def resume(self) -> None:
        """Go on from --resume's checkpoint, where there is one; a fresh start in an empty folder.

        Raises: CheckpointError for a file that cannot be used, ValueError when it belongs to a different run.
        """
        saved, damaged = self.processes.from_first(lambda: find_saved(self.setup, self.log.say))
        if saved is None:
            return
        self.saveable.load_state_dict(saved)
        if damaged:
            self.processes.on_first(lambda: replace_damaged(self.setup.folder))
        self.saved_updates = self.progress.updates

    def describe(self) -> None:
        """Say what is about to be done, and why so."""
        describe(self.setup, self.images.files, self.state, self.data.views_reason, self.log.say)

    def write_start(self) -> None:
        """config.json and views.png, before the first step."""
        self.processes.on_first(self._write_start)

    def _write_start(self) -> None:
        with self.log.warn_only():
            if self.setup.config.tensorboard and not self.setup.config.check:
                self.log.open_board(self.progress)
            write_config(self.setup, self.images.files)
        with self.log.warn_only():
            if self.setup.plan.epochs and self.progress.updates == 0:
                self.results.picture_views(self.data.views)

    def measure_untrained(self) -> None:
        self.processes.on_first(self.results.measure_untrained)

    def train(self) -> None:
        """The loop, from wherever the run stands to its end; saves as it goes.

        Raises: Stopped after a signal, NonFiniteError with where it happened; the last good state is saved.
        """
        self.processes.on_first(self.results.report_under_way)
        self.log.start(self.progress)
        with self.stop.during_steps():
            try:
                self._train(self.progress, self.after_step)
            except NonFiniteError as error:
                amp_dtype = self.setup.runtime.amp_dtype
                raise NonFiniteError(
                    f"{error} at epoch {self.progress.epoch + 1}, update {self.progress.updates + (not error.late)} (lr "
                    f"{self.state.optimizer.param_groups[0]['lr']:.3g}, precision {self.setup.precision}); "
                    f"{self.what_is_saved()} - start again with a lower --lr{' or --amp off' if amp_dtype else ''} "
                    "and another --out") from error
            except WorkerError as error:
                self._save_between_updates()
                if self.stop.signal is not None and not self.processes.several:  # they may have died of the same signal
                    raise Stopped(self.stop.signal) from error
                raise WorkerError(f"{error}; {self.what_is_saved()}") from error
            finally:
                self.log.close()
                self.data.views.close()
        if self.stop.signal is not None:  # it came after the last update
            raise Stopped(self.stop.signal)
        if not self.processes.from_first(lambda: (self.setup.folder / LAST).exists()):  # no update was left to be made here
            self.save()

    def _train(self, progress: Progress, after_step: Callable[[Progress, Step], None]) -> None:
        state, plan = self.state, self.setup.plan
        train(state.model, self.batches, plan.epochs, optimizer=state.optimizer, lr_scheduler=state.scheduler,
              lr_scheduler_interval=plan.scheduler_interval, tau_base=plan.tau_base, tau_schedule=plan.tau_schedule,
              accum_steps=plan.accum_steps, seed=self.setup.config.seed, runtime=self.setup.runtime, progress=progress,
              after_step=after_step)

    def after_step(self, progress: Progress, step: Step) -> None:
        config, epochs = self.setup.config, self.setup.plan.epochs
        self.log.step(progress, step, self.batches.take_waited())
        ended_epoch = progress.batch == 0
        if ended_epoch:
            self._share_bad_files()
        if ended_epoch and config.eval_every and progress.epoch % config.eval_every == 0:
            self.processes.on_first(self.results.measure_on_the_way)
        asked = self.processes.agree_on_stop(self.stop.signal, now=ended_epoch)
        if asked is not None:
            self._share_bad_files()
            self.save()
            raise Stopped(*asked)
        if ended_epoch and (progress.epoch % config.save_every == 0 or progress.epoch == epochs):
            self.save()
        if ended_epoch:
            self.processes.on_first(self.results.report_under_way)

    def _share_bad_files(self) -> None:
        """Every process knows of the bad files that the others met."""
        if self.processes.several and self.images.pixels is None:
            for reasons in self.processes.gather(self.images.bad.reasons):
                for index, reason in reasons.items():
                    self.images.bad.add(index, reason)

    def save(self) -> None:
        self.setup.runtime.confirm()
        self._refuse_what_is_not_finite()
        saved = self.saveable.state_dict()
        self.processes.on_first(lambda: self._write(saved))
        self.saved_updates = self.progress.updates

    def _refuse_what_is_not_finite(self) -> None:
        """A finite step may still have brought batch norm's running statistics, or a weight, to infinity."""
        tensors = [tensor for tensor in self.state.model.state_dict().values() if tensor.is_floating_point()]
        if not torch.isfinite(torch.nn.utils.get_total_norm([tensor.float() for tensor in tensors])):
            raise NonFiniteError("a weight or a statistic of batch norm is not finite", late=True)

    def _write(self, saved: State) -> None:
        if not self._is_in_its_folder():
            raise FileNotFoundError(f"{self.setup.folder} was removed or replaced while the run went on, so nothing is saved")
        self.log.sync()  # first: a checkpoint counts on the records of its updates
        save_checkpoint(self.setup.folder, saved)

    def _save_between_updates(self) -> None:
        """Save what no checkpoint has yet, unless an update is half made: batch norm has seen its first micro-batches.

        Of several processes one cannot know where the others are.
        """
        between = self.progress.batch % self.setup.plan.accum_steps == 0
        if self.progress.updates > self.saved_updates and between and not self.processes.several:
            self.save()

    def what_is_saved(self) -> str:
        last = self.setup.folder / LAST
        there = last.exists() or self.saved_updates  # on a machine of its own a process does not see the folder
        return f"{last} has the weights of update {self.saved_updates}" if there else "nothing was saved yet"

    def finish(self) -> None:
        """What is made of a trained network, and the closing lines."""
        self.processes.on_first(self.results.finish)

    def write_end(self, status: str, reason: str, error: Exception | None = None) -> None:
        """What is left of a run that did not finish. error: by which it failed."""
        if self.processes.first and self._is_in_its_folder():
            self.results.write_end(status, reason, error)

    def _is_in_its_folder(self) -> bool:
        """Whether the run folder is still the one that this run holds the lock of: another run may be in its place."""
        return self._lock is None or self._lock == lock_of(self.setup.folder)

    def check(self) -> None:
        """Say what is amiss with the images, and what the whole run would take; nothing is trained.

        Raises: TooManyBadFilesError where a run would end of that.
        """
        self.processes.on_first(self._check_images)
        self.write_start()
        seconds, device = self.seconds_per_update(), self.setup.runtime.device
        where = " on the GPU" if device.type == "cuda" else ""
        hours = seconds * self.setup.plan.total_updates / 3600
        self.log.say(f"check: {seconds:.2f} s per update, about {hours:.2f} h in all; about "
                     f"{CHECKPOINTS * self.state.checkpoint_bytes() / 1e6:.0f} MB of disk; "
                     f"{peak_memory(device) / 1e6:.0f} MB of memory{where}; nothing was trained")

    def _check_images(self) -> None:
        """bad_files.txt, copies.txt, and how many are in them."""
        data, folder = self.images, self.setup.folder
        tried, bad = data.try_some(CHECK_IMAGES)
        copies = find_copies(data.files)
        with self.log.warn_only():
            self.results.write_bad_files()
            if copies:
                names = ((printable(data.files.name(place)) for place in pair) for pair in copies)
                write_text(folder / "copies.txt", "".join(f"{copy}\t{first}\n" for copy, first in names))
        self.log.say(f"check: of {tried} images tried {bad} cannot be read{' (bad_files.txt)' if bad else ''}; of all "
                     f"{len(data)} {len(copies)} are copies of others, byte for byte{' (copies.txt)' if copies else ''}")
        data.bad.enforce_limit(tried, bad)

    def images_in(self, minutes: float) -> int:
        """How many images fill so many minutes of updates, at least a batch; the run can not be trained after that."""
        seconds, batch = self.seconds_per_update(TIMED_S), self.setup.plan.batch_size
        return max(1, self.processes.from_first(lambda: int(60 * minutes / max(seconds, 1e-6)))) * batch

    def seconds_per_update(self, at_least: float = 0.0) -> float:
        """Measured on a few updates, which change the networks: for a run that will not be trained.

        at_least: seconds that they take together, as the first process counts them: all make as many.
        """
        times: list[float] = []  # of each update but the first, without what the processes then agree on
        first = WARM_UP if self.setup.runtime.cuda_graph else 0  # from here on they are as they will be
        began, wanted = math.inf, first + CHECK_STEPS

        def stop_early(progress: Progress, step: Step) -> None:
            nonlocal began, wanted
            self.setup.runtime.confirm()  # waits for the device
            if began < math.inf:
                times.append(time.monotonic() - began)
            if at_least and len(times) == first + CHECK_STEPS:
                wanted = first + max(CHECK_STEPS, self.processes.from_first(
                    lambda: min(math.ceil(at_least * CHECK_STEPS / max(sum(times[first:]), 1e-6)), MOST_TIMED)))
            if len(times) >= wanted:
                raise _EnoughMeasured
            began = time.monotonic()

        with contextlib.suppress(_EnoughMeasured):
            self._train(Progress(), stop_early)
        times = times[first:] or times
        return sum(times) / len(times) if times else 0.0


def fit_into(minutes: float, plan_of: Callable[[int, Choice | None], Plan],
             run_of: Callable[[Plan, Loaded | None], Run]) -> tuple[int, Choice, Loaded]:
    """(how many images fill so many minutes of updates, the network, the images of the set as they were loaded on the way).

    A few updates are timed. Their time may tell another network or another size of the batch, and is measured anew with them.

    plan_of: (images of all updates, the network if it is chosen) -> plan, as `make_plan`. run_of: (plan, loaded) -> run.
    """
    plan, loaded = plan_of(RESNET_FROM, None), None
    for attempt in range(3):
        epochs = max(plan.epochs, math.ceil((WARM_UP + CHECK_STEPS + 1) / plan.updates_per_epoch))
        trial = run_of(replace(plan, epochs=epochs), loaded)
        if attempt == 0:
            trial.log.say(f"measuring how many updates fit into {minutes:g} minutes")
        seen = trial.images_in(minutes)
        before, plan = plan, plan_of(seen, None if attempt == 0 else plan.network)
        trial.data.views.close()
        loaded = trial.images, trial.data.views_reason
        del trial  # before the next one takes memory
        if (plan.arch, plan.batch_size) == (before.arch, before.batch_size):
            break
    assert loaded is not None
    return seen, plan.network, loaded
