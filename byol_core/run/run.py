"""One run from plan to report: described, resumed, trained, saved and written out."""

import contextlib
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import sklearn
import torch
import torchvision

from byol_core.cuda_graph import WARM_UP
from byol_core.images.duplicates import find_copies
from byol_core.images.image_set import ImageSet, printable, with_several_frames
from byol_core.run.config import TrainConfig, command_line
from byol_core.run.folder import COPIES, lock_of, space_warning
from byol_core.run.parts import Parts
from byol_core.run.plan import RESNET_FROM, Choice, Plan
from byol_core.run.results import Outcome
from byol_core.run.resume import find_snapshot, restore, snapshot
from byol_core.run.tensorboard import Board
from byol_core.runtime import NonFiniteError, peak_memory
from byol_core.system.distributed import ALONE, Processes
from byol_core.system.files import LAST, State, replace_damaged, save_checkpoint, write_json, write_text
from byol_core.system.signals import Stopped, StopRequest
from byol_core.training import Progress, Step, train
from byol_core.version import __version__
from byol_core.views.pixels import BAD_LIMIT, ImageData
from byol_core.views.workers import WorkerError

CHECK_STEPS, CHECK_IMAGES = 5, 1_000  # of a check: updates that are timed, images that are decoded
TIMED_S, MOST_TIMED = 5.0, 100  # seconds and number of updates by which the length of a run of given minutes is found


class _EnoughMeasured(Exception):
    """Ends the training of a check."""


class Run:
    """What happens to the parts of a run, and when. Raises: ValueError for what cannot be trained with."""

    def __init__(self, config: TrainConfig, plan: Plan, files: ImageSet, folder: Path, processes: Processes = ALONE,
                 loaded: tuple[ImageData, str] | None = None, asked: TrainConfig | None = None) -> None:
        self.parts = Parts(config, plan, files, folder, processes, loaded, asked)
        self.outcome = Outcome(self.parts)
        self.processes, self.log = processes, self.parts.log
        self.saved_updates = 0
        self._lock = lock_of(folder)
        self.stop = StopRequest(patient=processes.several)
        if processes.watch is not None:
            processes.watch.last_words = lambda reason: self.write_end("failed", reason)

    @property
    def progress(self) -> Progress:
        return self.parts.progress

    def resume(self) -> None:
        """Go on from --resume's checkpoint, where there is one; a fresh start in an empty folder.

        Raises: CheckpointError for a file that cannot be used, ValueError when it belongs to a different run.
        """
        state, damaged = self.processes.from_first(lambda: find_snapshot(self.parts))
        if state is None:
            return
        restore(self.parts, self.outcome, state)
        if damaged:
            self.processes.on_first(lambda: replace_damaged(self.parts.folder))
        self.saved_updates = self.progress.updates

    def describe(self) -> None:
        """Say what is about to be done, and why so."""
        parts, plan, files, say = self.parts, self.parts.plan, self.parts.data.files, self.log.say
        for remark in files.remarks:
            say(f"warning: {remark}")
        several = with_several_frames(files)
        if several:
            say(f"note: {several} of the files looked at have several frames; of each file the first one is used")
        kinds = f"{len(files.classes)} classes, used only to measure" if files.labels is not None else "no class folders"
        say(f"data: {len(files)} images in {files.given} ({kinds})")
        weights = sum(p.numel() for p in parts.model.online.parameters())
        say(f"network: {weights / 1e6:.1f} M parameters; {plan.updates_per_epoch} updates of {plan.batch_size} images per "
            f"epoch, {plan.total_updates} in all")
        if parts.config.minutes is not None:
            say(f"length: {plan.epochs} epochs of {plan.updates_per_epoch} updates take about "
                f"{parts.config.minutes:g} minutes of training here")
        for choice in plan.choices:
            shown = f"{choice.value:.6g}" if isinstance(choice.value, float) else str(choice.value)
            if choice.name == "lr":
                shown += f" x {plan.batch_size}/256 = {plan.lr:.6g}"
            say(f"  {choice.name} {shown} ({choice.reason})")
        say(f"device: {parts.runtime.device} ({parts.device_reason}); precision: {parts.precision} ({parts.amp_reason})"
            f"{', TF32 where float32 remains' if parts.tf32 else ''}{', compiled' if parts.config.compile else ''}"
            f"{', CUDA graph' if parts.runtime.cuda_graph else ''}"
            f"{', channels_last' if parts.runtime.channels_last else ''}; views: {parts.views_reason}")
        if parts.config.cuda_graph and not parts.runtime.cuda_graph:
            say("note: --cuda-graph is left out, as it is for one process on a CUDA device")
        if self.processes.several:
            alike = "all of them" if parts.runtime.device.type == "cuda" else "each alone, as on this device it must be"
            say(f"processes: {self.processes.world_size}, each with {plan.micro_batch} images at a time; batch statistics "
                f"over {alike}")
        say(f"run folder: {parts.folder}")
        warning = space_warning(parts.folder, parts.checkpoint_bytes()) if self.processes.first else None  # whose folder it is
        if warning is not None:
            say(warning)

    def write_start(self) -> None:
        """config.json and views.png, before the first step."""
        self.processes.on_first(self._write_start)

    def _write_start(self) -> None:
        with self.log.warn_only():
            self._write_config()
        with self.log.warn_only():
            if self.parts.plan.epochs and self.progress.updates == 0:
                self.outcome.picture_views()

    def _write_config(self) -> None:
        parts = self.parts
        if parts.config.tensorboard and not parts.config.check:
            self.log.board = Board(parts.folder, self.progress.updates, self.log.say)
        write_json(parts.folder / "config.json", {
            "config": asdict(parts.config),
            "commands": {"this": command_line(parts.asked), "elsewhere": command_line(replace(parts.asked, out=None))},
            "choices": [asdict(choice) for choice in parts.plan.choices],
            "plan": {key: value for key, value in asdict(parts.plan).items() if key != "choices"},
            "data": {"images": len(parts.data), "classes": list(parts.data.files.classes),
                     "image_names": parts.data.files.fingerprint()},
            "versions": {"byol_core": __version__, "torch": str(torch.__version__),
                         "torchvision": torchvision.__version__, "scikit-learn": sklearn.__version__,
                         "python": platform.python_version(), "system": platform.platform()}})

    def measure_untrained(self) -> None:
        self.processes.on_first(self.outcome.measure_untrained)

    def train(self) -> None:
        """The loop, from wherever the run stands to its end; saves as it goes.

        Raises: Stopped after a signal, NonFiniteError with where it happened; the last good state is saved.
        """
        if self.processes.first:
            self.outcome.report_under_way()
        self.log.start(self.progress)
        try:
            self.stop.waits_for_a_step = True
            self._train(self.progress, self._after_step)
        except NonFiniteError as error:
            amp_dtype = self.parts.runtime.amp_dtype
            raise NonFiniteError(
                f"{error} at epoch {self.progress.epoch + 1}, update {self.progress.updates + (not error.late)} (lr "
                f"{self.parts.optimizer.param_groups[0]['lr']:.3g}, precision {amp_dtype or torch.float32}); "
                f"{self.what_is_saved()} - start again with a lower --lr{' or --amp off' if amp_dtype else ''} "
                "and another --out") from error
        except WorkerError as error:
            self._save_between_updates()
            if self.stop.signal is not None and not self.processes.several:  # they may have died of the same signal
                raise Stopped(self.stop.signal) from error
            raise WorkerError(f"{error}; {self.what_is_saved()}") from error
        finally:
            self.stop.waits_for_a_step = False
            self.log.close()
            self.parts.batches.close()
        if not self.processes.from_first(lambda: (self.parts.folder / LAST).exists()):  # no update was left to be made here
            self.save()

    def _train(self, progress: Progress, after_step: Callable[[Progress, Step], None]) -> None:
        parts, plan = self.parts, self.parts.plan
        train(parts.model, parts.batches, plan.epochs, optimizer=parts.optimizer, lr_scheduler=parts.scheduler,
              lr_scheduler_interval=plan.scheduler_interval, tau_base=plan.tau_base, tau_schedule=plan.tau_schedule,
              accum_steps=plan.accum_steps, seed=parts.config.seed, runtime=parts.runtime, progress=progress,
              after_step=after_step)

    def _after_step(self, progress: Progress, step: Step) -> None:
        config, epochs = self.parts.config, self.parts.plan.epochs
        self.log.step(progress, step, self.parts.batches.take_waited())
        ended_epoch = progress.batch == 0
        if ended_epoch:
            self._share_bad_files()
        if ended_epoch and config.eval_every and progress.epoch % config.eval_every == 0:
            self.processes.on_first(self.outcome.measure_on_the_way)
        asked = self.processes.agree_on_stop(self.stop.signal, now=ended_epoch)
        if asked is not None:
            self.save()
            raise Stopped(*asked, agreed=True)
        if ended_epoch and (progress.epoch % config.save_every == 0 or progress.epoch == epochs):
            self.save()
        if ended_epoch and self.processes.first:
            self.outcome.report_under_way()

    def _share_bad_files(self) -> None:
        """Every process knows of the bad files that the others met."""
        data = self.parts.data
        if self.processes.several and data.pixels is None:
            for reasons in self.processes.gather(data.bad.reasons):
                for index, reason in reasons.items():
                    data.bad.add(index, reason)

    def save(self) -> None:
        self.parts.runtime.confirm()
        self._refuse_what_is_not_finite()
        state = snapshot(self.parts, self.outcome)
        self.processes.on_first(lambda: self._write(state))
        self.saved_updates = self.progress.updates

    def _refuse_what_is_not_finite(self) -> None:
        """A finite step may still have brought batch norm's running statistics, or a weight, to infinity."""
        tensors = [tensor for tensor in self.parts.model.state_dict().values() if tensor.is_floating_point()]
        if not torch.isfinite(torch.nn.utils.get_total_norm([tensor.float() for tensor in tensors])):
            raise NonFiniteError("a weight or a statistic of batch norm is not finite", late=True)

    def _write(self, state: State) -> None:
        if not self._is_in_its_folder():
            raise RuntimeError(f"{self.parts.folder} was removed or replaced while the run went on, so nothing is saved")
        self.log.sync()  # first: a checkpoint counts on the records of its updates
        save_checkpoint(self.parts.folder, state)

    def _save_between_updates(self) -> None:
        """Save what no checkpoint has yet, unless an update is half made: batch norm has seen its first micro-batches.

        Of several processes one cannot know where the others are.
        """
        between = self.progress.batch % self.parts.plan.accum_steps == 0
        if self.progress.updates > self.saved_updates and between and not self.processes.several:
            self.save()

    def what_is_saved(self) -> str:
        last = self.parts.folder / LAST
        there = last.exists() or self.saved_updates  # on a machine of its own a process does not see the folder
        return f"{last} has the weights of update {self.saved_updates}" if there else "nothing was saved yet"

    def finish(self) -> None:
        """What is made of a trained network, and the closing lines."""
        self.processes.on_first(self._finish)

    def _finish(self) -> None:
        self.outcome.finish()
        self.outcome.say()

    def write_end(self, status: str, reason: str) -> None:
        """What is left of a run that did not finish."""
        if self.processes.first and self._is_in_its_folder():
            self.outcome.write_end(status, reason)

    def _is_in_its_folder(self) -> bool:
        """Whether the run folder is still the one that this run holds the lock of: another run may be in its place."""
        return self._lock is None or self._lock == lock_of(self.parts.folder)

    def check(self) -> None:
        """Say what is amiss with the images, and what the whole run would take; nothing is trained.

        Raises: TooManyBadFilesError where a run would end of that.
        """
        self.processes.on_first(self._check_images)
        self.write_start()
        parts, seconds = self.parts, self.seconds_per_update()
        where = " on the GPU" if parts.runtime.device.type == "cuda" else ""
        self.log.say(f"check: {seconds:.2f} s per update, about {seconds * parts.plan.total_updates / 3600:.2f} h in all; "
                     f"about {COPIES * parts.checkpoint_bytes() / 1e6:.0f} MB of disk; "
                     f"{peak_memory(parts.runtime.device) / 1e6:.0f} MB of memory{where}; nothing was trained")

    def _check_images(self) -> None:
        """bad_files.txt, copies.txt, and how many are in them."""
        data, folder = self.parts.data, self.parts.folder
        tried, bad = data.try_some(CHECK_IMAGES)
        copies = find_copies(data.files)
        with self.log.warn_only():
            self.outcome.write_bad_files()
            if copies:
                names = ((printable(data.files.name(place)) for place in pair) for pair in copies)
                write_text(folder / "copies.txt", "".join(f"{copy}\t{first}\n" for copy, first in names))
        self.log.say(f"check: of {tried} images tried {bad} cannot be read{' (bad_files.txt)' if bad else ''}; of all "
                     f"{len(data)} {len(copies)} are copies of others, byte for byte{' (copies.txt)' if copies else ''}")
        data.bad.limit = BAD_LIMIT
        if bad > BAD_LIMIT * tried:
            data.bad.give_up(tried)

    def images_in(self, minutes: float) -> int:
        """How many images fill so many minutes of updates, at least a batch; the run can not be trained after that."""
        seconds, batch = self.seconds_per_update(TIMED_S), self.parts.plan.batch_size
        return max(1, self.processes.from_first(lambda: int(60 * minutes / max(seconds, 1e-6)))) * batch

    def seconds_per_update(self, at_least: float = 0.0) -> float:
        """Measured on a few updates, which change the networks: for a run that will not be trained.

        at_least: seconds that they take together, as the first process counts them: all make as many.
        """
        times: list[float] = []  # at the end of each update
        first = WARM_UP if self.parts.runtime.cuda_graph else 0  # from here on they are as they will be
        wanted = first + CHECK_STEPS

        def per_update() -> float:
            return (times[-1] - times[first]) / (len(times) - 1 - first)

        def stop_early(progress: Progress, step: Step) -> None:
            nonlocal wanted
            self.parts.runtime.confirm()  # waits for the device
            times.append(time.monotonic())
            if at_least and len(times) == first + CHECK_STEPS + 1:
                wanted = first + max(CHECK_STEPS, self.processes.from_first(
                    lambda: min(math.ceil(at_least / max(per_update(), 1e-6)), MOST_TIMED)))
            if len(times) > wanted:
                raise _EnoughMeasured

        with contextlib.suppress(_EnoughMeasured):
            self._train(Progress(), stop_early)
        times = times[first:] if len(times) > first + 1 else times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def fit_into(minutes: float, plan_of: Callable[[int, Choice | None], Plan],
             run_of: Callable[[Plan, tuple[ImageData, str] | None], Run]) -> tuple[int, Choice, tuple[ImageData, str]]:
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
        trial.parts.batches.close()
        loaded = trial.parts.data, trial.parts.views_reason
        del trial  # before the next one takes memory
        if (plan.arch, plan.batch_size) == (before.arch, before.batch_size):
            break
    assert loaded is not None
    return seen, plan.network, loaded
