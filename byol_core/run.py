"""One run from plan to report: the parts built, resumed, measured, trained and written out."""

import contextlib
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import sklearn
import torch
import torchvision
from torch import Tensor, nn

from byol_core import __version__
from byol_core.backbones import build_backbone, check_backbone, load_weights
from byol_core.batches import DeviceBatches, Order, TimedBatches, WorkerBatches
from byol_core.checkpoint import (LAST, CheckpointError, State, check_tensors, export_backbone, newest_checkpoint,
                                  read_backbone, read_checkpoint, replace_damaged, save_checkpoint, tensor_bytes,
                                  write_json, write_text)
from byol_core.config import TrainConfig
from byol_core.crops import CropBatches
from byol_core.data import BAD_LIMIT, BadFiles, ImageData, TooManyBadFilesError, choose_workers, load_images
from byol_core.evaluate import embed_data, load_classifier
from byol_core.folder import ImageSet, scan, with_several_frames
from byol_core.losses import effective_rank
from byol_core.memory import peak_memory, recompute_blocks
from byol_core.metrics import RunLog
from byol_core.networks import BYOL
from byol_core.optim import build_optimizer, build_scheduler
from byol_core.pictures import save_embedding, save_neighbours, save_views
from byol_core.plan import Plan
from byol_core.processes import ALONE, Processes
from byol_core.report import how_to_load, read_run, write_report
from byol_core.run_folder import COPIES, space_warning
from byol_core.runtime import NonFiniteError, Runtime, choose_device, choose_precision
from byol_core.scoring import Scorer, Scores, some_indices
from byol_core.seeds import seed_from
from byol_core.signals import Stopped, StopRequest
from byol_core.tensorboard import Board, check_tensorboard
from byol_core.training import Progress, Step, train
from byol_core.workers import WorkerError

PICTURED_AT_MOST = 2_000  # images among which neighbours are looked for
PIXELS_UP_TO = 16  # image size up to which raw pixels are a baseline
CHECK_STEPS = 5
REPORT_EVERY = 30.0  # seconds between reports of a run under way, and more where writing one takes over 1 % of that
AMP_FLAGS = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}
IN_WORDS = {"views": "the view recipe", "image names": "the names of the image files"}
EXACT = "cannot resume exactly"


def new_model(config: TrainConfig, plan: Plan) -> BYOL:
    """The networks as this seed starts them; the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(config.seed, "weights"))
        backbone, feature_dim = build_backbone(plan.arch, plan.small_stem, plan.image_size)
        check_backbone(backbone, feature_dim, plan.image_size)
        if config.init_from is not None:
            weights = read_backbone(Path(config.init_from))
            try:
                load_weights(backbone, weights)
            except ValueError as error:
                raise ValueError(f"--init-from {config.init_from} does not fit this network: {error} - give the --arch, "
                                 "--small-stem and --image-size it was trained with") from error
        return BYOL(backbone, feature_dim, plan.hidden_dim, plan.projection_dim)


class _EnoughMeasured(Exception):
    """Ends the training of a check."""


class Run:
    """All parts of one run. Building it validates everything that can be wrong before training."""

    def __init__(self, config: TrainConfig, plan: Plan, files: ImageSet, folder: Path, processes: Processes = ALONE) -> None:
        self.config, self.plan, self.folder, self.processes = config, plan, folder, processes
        device, self.device_reason = choose_device(config.device, processes)
        amp_dtype, self.amp_reason = choose_precision(config.amp, device, tiny=plan.arch == "conv6")
        channels_last = device.type == "cuda" or plan.arch == "conv6"
        self.runtime = Runtime(device, amp_dtype, channels_last, processes)
        self.classifier = load_classifier(config.classifier)
        if config.tensorboard:
            check_tensorboard()
        self.log = RunLog(folder, plan.epochs, plan.updates_per_epoch, plan.batch_size, processes)
        self.model = self._new_model()
        self.optimizer = build_optimizer(self.model.online, plan)
        self.scheduler = build_scheduler(self.optimizer, plan)
        self.progress = Progress()
        self.saved_updates = 0
        self.workers = choose_workers(config.workers, processes.local_world_size)
        self.data, self.views_reason = self._load(files, config.views)
        self._compare_processes()
        self.bad_eval_files: BadFiles | None = None
        self.scorer = self._new_scorer() if processes.first else None
        self.batches = TimedBatches(self._new_batches(), device)
        self.scores: dict[str, Scores] = {}
        self.best: dict[str, float] = {}  # knn and epoch of best.pt
        self.ranks: dict[str, float | None] = {"rank_features": None, "rank_features_untrained": None}
        self.report_due = 0.0
        self.stop = StopRequest(patient=processes.several)
        if processes.watch is not None:
            processes.watch.last_words = lambda reason: self.write_end("failed", reason)

    def _new_model(self) -> BYOL:
        model = new_model(self.config, self.plan)
        self.runtime.place_model(model)
        if self.config.grad_checkpoint and not recompute_blocks(model.online.backbone):
            raise ValueError(f"--grad-checkpoint: {self.plan.arch} has no repeated blocks to compute again - leave it out")
        if self.config.compile:
            model.online.compile()
            model.target.compile()
        return model

    def _load(self, files: ImageSet, views: str) -> tuple[ImageData, str]:
        try:
            return load_images(files, views, self.runtime.device, self.log.say, self.workers)
        except TooManyBadFilesError as error:
            if self.processes.first:
                write_text(self.folder / "bad_files.txt", error.listing)
            raise

    def _compare_processes(self) -> None:
        """Raises: ValueError when the processes of the run were not given the same images and options."""
        config = self.config
        schedule = {"--resume": config.resume is not None, "--check": config.check, "--save-every": config.save_every,
                    "--eval-every": config.eval_every}  # what decides when processes meet
        identities = self.processes.gather({**self.identity(), "precision": self.precision, **schedule})
        for rank, identity in enumerate(identities):
            for key, value in identities[0].items():
                if identity[key] != value:
                    raise ValueError(f"{IN_WORDS.get(key, key)} differ: {value} in rank 0, {identity[key]} in rank {rank} - "
                                     "all processes of a run need the same images and options")

    def _new_scorer(self) -> Scorer | None:
        """What measures features: on --eval-data, or on a part of --data; None without labels or with --no-eval."""
        config = self.config
        if not config.eval or (self.data.files.labels is None and config.eval_data is None):
            return None
        data, eval_data = self.data, None
        if config.eval_data is not None:
            files = scan(config.eval_data, "--eval-data", leave_out=(self.folder,))
            if files.labels is None:
                raise ValueError(f"--eval-data {config.eval_data} has no class sub-folders, so there is nothing to measure")
            eval_data = self._load(files, "auto")[0]
            self.bad_eval_files = eval_data.bad
            self._compare_classes(files)
            if data.files.labels is None:  # then both the fitting and the measuring are done on parts of --eval-data
                data, eval_data = eval_data, None
        return Scorer(data, eval_data, self.plan.views[0], self.runtime, self.workers, self.classifier)

    def _compare_classes(self, files: ImageSet) -> None:
        own, others = set(self.data.files.classes), set(files.classes)
        if own and not own & others:
            raise ValueError(f"--eval-data {files.given} has no class folder of the same name as one in --data - measured on "
                             "it, every accuracy would be 0")
        if own and others - own:
            self.log.say(f"warning: images of {len(others - own)} classes that --data does not have count as wrong: "
                         f"{', '.join(sorted(others - own)[:5])}")

    def _new_batches(self) -> DeviceBatches | WorkerBatches:
        plan = self.plan
        order = Order(len(self.data), plan.batch_size, plan.accum_steps, self.config.seed, self.processes.rank,
                      self.processes.world_size)
        if self.data.pixels is not None:
            return DeviceBatches(self.data, plan.views, order)
        if self.config.views != "cpu":
            return CropBatches(self.data, plan.views, order, self.workers, self.runtime.device)
        return WorkerBatches(self.data, plan.views, order, self.workers, pin_memory=self.runtime.device.type == "cuda")

    def identity(self) -> dict[str, object]:
        """What must be equal for a resumed run to be the same run."""
        plan = asdict(self.plan)
        del plan["choices"], plan["micro_batch"]  # the latter follows from the number of processes
        return json.loads(json.dumps({
            "images": len(self.data), "image names": self.data.files.fingerprint(), **plan, "seed": self.config.seed,
            "views made": ("on the device" if self.data.pixels is not None else
                           "on the cpu" if self.config.views == "cpu" else "of worker crops")}))

    def save(self) -> None:
        self.runtime.confirm()
        state = {
            "identity": json.dumps(self.identity()), "version": __version__, "torch": str(torch.__version__),
            "progress": self.progress.state_dict(), "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "scaler": self.runtime.scaler.state_dict(), "precision": self.precision, "log": self.log.state_dict(),
            "scores": self.scores, "best": self.best, "measured": self._how_measured(),
            "world_size": self.processes.world_size, "bad_files": self.data.bad.reasons,
        }
        self.processes.on_first(lambda: self._write(state))
        self.saved_updates = self.progress.updates

    def _write(self, state: State) -> None:
        self.log.sync()  # first: a checkpoint counts on the records of its updates
        save_checkpoint(self.folder, state)

    def resume(self) -> None:
        """Go on from --resume's checkpoint, where there is one; a fresh start in an empty folder.

        Raises: CheckpointError for a file that cannot be used, ValueError when it belongs to a different run.
        """
        state = self.processes.from_first(self._saved_state)
        if state is None:
            return
        try:
            self._restore(state)
        except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError, CheckpointError) as error:
            raise CheckpointError(f"the checkpoint to resume from is not of this program's making ({type(error).__name__}: "
                                  f"{error}) - take another, or start a new run in another --out") from error

    def _resumed_folder(self) -> Path:
        asked = Path(self.config.resume or self.folder)
        return asked if asked.is_dir() else asked.parent

    def _saved_state(self) -> State | None:
        asked = Path(self.config.resume or self.folder)
        if not asked.is_dir():
            return read_checkpoint(asked)
        state, damaged = newest_checkpoint(asked)
        for line in damaged:
            self.log.say(f"warning: {line}; using the checkpoint before it")
        if damaged and asked.resolve() == self.folder.resolve():
            replace_damaged(self.folder)
        if state is None and self.config.resume:
            raise CheckpointError(f"no checkpoint in {asked}")
        if state is None:
            self.log.say(f"nothing to resume in {asked}: starting afresh")
        return state

    def _restore(self, state: State) -> None:
        saved, own = json.loads(str(state["identity"])), self.identity()
        changed = [IN_WORDS.get(key, f"{key} {saved.get(key)} -> {own[key]}") for key in own if saved.get(key) != own[key]]
        if changed:
            raise ValueError(f"{EXACT}: {'; '.join(changed)} - repeat the options of the run, or start a new one in another "
                             "--out, from these "
                             f"weights with --init-from {self.folder / LAST}")
        self._check_parts(state)
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.scheduler.load_state_dict(state["scheduler"])  # type: ignore[arg-type]
        if self.runtime.scaler.is_enabled() and state["scaler"]:
            self.runtime.scaler.load_state_dict(state["scaler"])  # type: ignore[arg-type]
        if state["precision"] != self.precision:
            self.log.say(f"note: precision {state['precision']} -> {self.precision}, so this is not an exact resume")
        before, now = state.get("world_size", 1), self.processes.world_size
        if before != now:
            self.log.say(f"note: {before} -> {now} processes: every update uses the same images and views as before, but sums "
                         "and batch statistics are taken over other parts, so this is not an exact resume")
        self.progress = Progress(**state["progress"])  # type: ignore[arg-type]
        self.saved_updates = self.progress.updates
        self.data.bad.reasons.update(state.get("bad_files", {}))  # type: ignore[call-overload]
        if state["measured"] == self._how_measured():
            self.scores = state["scores"]  # type: ignore[assignment]
            if (self.folder / "best.pt").exists():
                self.best = state.get("best", {})  # type: ignore[assignment]
        if not self.is_complete():
            self.log.resume(state["log"], self.progress, self._resumed_folder())  # type: ignore[arg-type]
            self.log.say(f"resuming at epoch {self.progress.epoch}, update {self.progress.updates}"
                         f"{self._other_changes()}")

    def _check_parts(self, state: State) -> None:
        """Raises: CheckpointError or TypeError for what could not come from a run like this one; nothing is changed before."""
        own, model, optimizer = self.model.state_dict(), state["model"], state["optimizer"]
        if not isinstance(model, dict) or model.keys() != own.keys() or not all(isinstance(v, Tensor) for v in model.values()):
            raise CheckpointError("its networks are not like these")
        check_tensors(model, own)  # type: ignore[arg-type]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        check_tensors(optimizer["state"], dict(enumerate(parameters)))  # type: ignore[index]
        progress, bad = Progress(**state["progress"]), state.get("bad_files", {})  # type: ignore[arg-type]
        if not (0 <= progress.epoch <= self.plan.epochs and 0 <= progress.batch <= len(self.batches)
                and progress.updates >= 0):
            raise CheckpointError("it stands where no run like this one can be")
        if not isinstance(bad, dict) or len(bad) > BAD_LIMIT * len(self.data) or not all(
                isinstance(index, int) and isinstance(reason, str) for index, reason in bad.items()):
            raise CheckpointError("its list of bad files is none")

    def _other_changes(self) -> str:
        """Which options differ from those that the run was last started with and do not change its result."""
        try:
            before = json.loads((self.folder / "config.json").read_text("utf-8"))["config"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        now = json.loads(json.dumps(asdict(self.config)))
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now
                   if key in before and key not in ("resume", "debug") and before[key] != now[key]]
        return f"; changed, without effect on the result: {', '.join(changed)}" if changed else ""

    def _how_measured(self) -> str:
        """What scores depend on beside the network: those of another classifier or test set are not to be compared."""
        return f"{self.config.classifier}; {self.scorer.measured_on if self.scorer else None}"

    def _ended(self) -> object:
        """How summary.json says that the run ended; None where it does not, or is damaged."""
        try:
            return json.loads((self.folder / "summary.json").read_text("utf-8"))["status"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_complete(self) -> bool:
        """Whether nothing is left to do, as the summary in the run folder says; the same answer in all processes."""
        return self.processes.from_first(lambda: self.progress.epoch >= self.plan.epochs and self._ended() == "finished")

    def checkpoint_bytes(self) -> int:
        """What a checkpoint will take on the disk: both networks, and what the optimizer keeps for each parameter."""
        kept = 2 if isinstance(self.optimizer, torch.optim.Adam) else 1  # AdamW is an Adam
        return tensor_bytes(self.model.state_dict()) + kept * tensor_bytes(list(self.model.online.parameters()))

    @property
    def precision(self) -> str:
        return str(self.runtime.amp_dtype or torch.float32).removeprefix("torch.")

    def describe(self) -> None:
        plan, files = self.plan, self.data.files
        weights = sum(p.numel() for p in self.model.online.parameters())
        kinds = f"{len(files.classes)} classes, used only to measure" if files.labels is not None else "no class folders"
        for remark in files.remarks:
            self.log.say(f"warning: {remark}")
        several = with_several_frames(files)
        if several:
            self.log.say(f"note: {several} of the files looked at have several frames; of each file the first one is used")
        self.log.say(f"data: {len(files)} images in {files.given} ({kinds})")
        self.log.say(f"network: {weights / 1e6:.1f} M parameters; {plan.updates_per_epoch} updates of {plan.batch_size} "
                     f"images per epoch, {plan.total_updates} in all")
        for choice in plan.choices:
            shown = f"{choice.value:.6g}" if isinstance(choice.value, float) else str(choice.value)
            if choice.name == "lr":
                shown += f" x {plan.batch_size}/256 = {plan.lr:.6g}"
            self.log.say(f"  {choice.name} {shown} ({choice.reason})")
        self.log.say(f"device: {self.runtime.device} ({self.device_reason}); precision: {self.precision} ({self.amp_reason}); "
                     f"views: {self.views_reason}")
        if self.processes.several:
            alike = "all of them" if self.runtime.device.type == "cuda" else "each alone, as on this device it must be"
            self.log.say(f"processes: {self.processes.world_size}, each with {plan.micro_batch} images at a time; batch "
                         f"statistics over {alike}")
        self.log.say(f"run folder: {self.folder}")
        warning = space_warning(self.folder, self.checkpoint_bytes()) if self.processes.first else None  # whose folder it is
        if warning is not None:
            self.log.say(warning)

    def write_start(self) -> None:
        """config.json and views.png, before the first step."""
        self.processes.on_first(self._write_start)

    def _write_start(self) -> None:
        if self.config.tensorboard and not self.config.check:
            self.log.board = Board(self.folder, self.progress.updates, self.log.say)
        write_json(self.folder / "config.json", {
            "config": asdict(self.config), "choices": [asdict(choice) for choice in self.plan.choices],
            "plan": {key: value for key, value in asdict(self.plan).items() if key != "choices"},
            "data": {"images": len(self.data), "classes": list(self.data.files.classes),
                     "image_names": self.data.files.fingerprint()},
            "versions": {"byol_core": __version__, "torch": str(torch.__version__),
                         "torchvision": torchvision.__version__, "scikit-learn": sklearn.__version__,
                         "python": platform.python_version(), "system": platform.platform()}})
        if self.plan.epochs and self.progress.updates == 0:
            order = self.batches.batches.order
            save_views(self.folder / "views.png", self.data, self.plan.views, order.epoch(0)[0],
                       next(self.batches.batches.epoch(0)))
            self._show_on_board("views.png")

    def _show_on_board(self, *pictures: str) -> None:
        if self.log.board is not None:
            for name in pictures:
                self.log.board.picture(self.progress.updates, self.folder / name)

    def measure_untrained(self) -> None:
        """What the network gives before it has learned anything, and, for images that small, what bare pixels give."""
        self.processes.on_first(self._measure_untrained)

    def _measure_untrained(self) -> None:
        if self.plan.image_size <= PIXELS_UP_TO:
            self.measure("pixels", nn.Flatten())
        if "untrained" not in self.scores:
            self.measure("untrained", self._new_model().online.backbone)

    def measure(self, name: str, backbone: nn.Module) -> None:
        """Scores of `backbone` under `name`, where there are labels and it was not measured before the run was resumed."""
        if self.scorer is None or name in self.scores:
            return
        try:
            self.scores[name] = self.scorer.measure(backbone)
        except ValueError as error:
            self.log.say(f"nothing measured: {error}")
            self.scorer = None
            return
        self.log.say(f"{name}: " + "  ".join(f"{key} {value:.1%}" for key, value in self.scores[name].items()
                                             if value is not None))

    def train(self) -> None:
        """The loop, from wherever the run stands to its end; saves as it goes.

        Raises: Stopped after a signal, NonFiniteError with where it happened; the last good state is saved.
        """
        self._report_under_way()
        self.log.start(self.progress)
        try:
            self.stop.waits_for_a_step = True
            train(self.model, self.batches, self.plan.epochs, optimizer=self.optimizer, lr_scheduler=self.scheduler,
                  lr_scheduler_interval=self.plan.scheduler_interval, tau_base=self.plan.tau_base,
                  tau_schedule=self.plan.tau_schedule, accum_steps=self.plan.accum_steps, seed=self.config.seed,
                  runtime=self.runtime, progress=self.progress, after_step=self._after_step)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} at epoch {self.progress.epoch + 1}, update {self.progress.updates + (not error.late)} (lr "
                f"{self.optimizer.param_groups[0]['lr']:.3g}, precision {self.runtime.amp_dtype or torch.float32}); "
                f"{self.what_is_saved()} - start again with a lower --lr{' or --amp off' if self.runtime.amp_dtype else ''} "
                "and another --out") from error
        except WorkerError as error:
            self._save_between_updates()
            if self.stop.signal is not None and not self.processes.several:  # they may have died of the same signal
                raise Stopped(self.stop.signal) from error
            raise WorkerError(f"{error}; {self.what_is_saved()}") from error
        finally:
            self.stop.waits_for_a_step = False
            self.log.close()
            self.batches.close()
        if self.plan.epochs == 0:
            self.save()

    def _save_between_updates(self) -> None:
        """Save what no checkpoint has yet, unless an update is half made: batch norm has seen its first micro-batches.

        Of several processes one cannot know where the others are.
        """
        between = self.progress.batch % self.plan.accum_steps == 0
        if self.progress.updates > self.saved_updates and between and not self.processes.several:
            self.save()

    def what_is_saved(self) -> str:
        last = self.folder / LAST
        there = last.exists() or self.saved_updates  # on a machine of its own a process does not see the folder
        return f"{last} has the weights of update {self.saved_updates}" if there else "nothing was saved yet"

    def _after_step(self, progress: Progress, step: Step) -> None:
        self.log.step(progress, step, self.batches.waited)
        self.batches.waited = 0.0
        ended_epoch = progress.batch == 0
        if ended_epoch:
            self._share_bad_files()
        if ended_epoch and self.config.eval_every and progress.epoch % self.config.eval_every == 0:
            self.processes.on_first(self._measure_on_the_way)
        asked = self.processes.agree_on_stop(self.stop.signal, now=ended_epoch)
        if asked is not None:
            self.save()
            raise Stopped(*asked)
        if ended_epoch and (progress.epoch % self.config.save_every == 0 or progress.epoch == self.plan.epochs):
            self.save()
        if ended_epoch and time.monotonic() >= self.report_due:
            self._report_under_way()
            self.log.start(progress)

    def _share_bad_files(self) -> None:
        """Every process knows of the bad files that the others met."""
        if self.processes.several and self.data.pixels is None:
            for reasons in self.processes.gather(self.data.bad.reasons):
                for index, reason in reasons.items():
                    self.data.bad.add(index, reason)

    def _measure_on_the_way(self) -> None:
        if self.scorer is not None:
            with contextlib.suppress(ValueError):  # labels that allow no measurement: said before training
                knn = self.scorer.knn(self.model.online.backbone)
                self.log.record(self.progress, knn=knn)
                self._keep_best(knn)
            self.log.start(self.progress)

    def _keep_best(self, knn: float) -> None:
        """best.pt is the network as it is now, unless one measured before was better; of equals it is the later one."""
        if knn >= self.best.get("knn", 0.0):
            self.best = {"knn": knn, "epoch": self.progress.epoch}
            export_backbone(self.folder, self.model.online.backbone.state_dict(), {**self._about_backbone(), **self.best},
                            "best")

    def _report_under_way(self) -> None:
        """report.html as the run goes, so that it is true whenever someone looks; it never stops the run."""
        if not self.processes.first:
            return
        began = time.monotonic()
        try:
            write_report(self.folder, self._summary("running"))
        except OSError as error:
            self.log.note(f"warning: {error}")
        self.report_due = began + max(REPORT_EVERY, 100 * (time.monotonic() - began))

    @contextlib.contextmanager
    def _only_to_look_at(self) -> Iterator[None]:
        """Writes that fail are told and do not fail the run: nothing of it is lost."""
        try:
            yield
        except OSError as error:
            self.log.say(f"warning: {error} - the run goes on")

    def finish(self) -> None:
        """Everything that is made of a trained network: export, scores, pictures, summary, report."""
        self.processes.on_first(self._finish)

    def _finish(self) -> None:
        backbone, untrained = self.model.online.backbone, self._new_model().online.backbone
        export_backbone(self.folder, backbone.state_dict(), self._about_backbone())
        self.measure("trained", backbone)
        knn = self.scores.get("trained", {}).get("knn")
        if self.config.eval_every and knn is not None:
            self._keep_best(knn)
        if self.config.eval:
            indices = some_indices(len(self.data), PICTURED_AT_MOST)
            recipe = self.plan.views[0]
            readable, trained = embed_data(backbone, self.data, recipe, indices, self.runtime, self.workers)
            _, before = embed_data(untrained, self.data, recipe, readable, self.runtime, self.workers)
            labels = self.data.files.labels
            with self._only_to_look_at():
                save_neighbours(self.folder / "neighbours.png", self.data, readable, trained, before, self.config.seed)
                save_embedding(self.folder / "embedding.png", trained, None if labels is None else labels[readable],
                               self.data.files.classes, self.config.seed)
            self.ranks = {"rank_features": float(effective_rank(trained)),
                          "rank_features_untrained": float(effective_rank(before))}
            self._show_on_board("neighbours.png", "embedding.png")
        self.write_end("finished")

    def _about_backbone(self) -> dict[str, object]:
        plan, recipe = self.plan, self.plan.views[0]
        return {"arch": plan.arch, "small_stem": plan.small_stem, "image_size": plan.image_size, "mean": recipe.mean,
                "std": recipe.std, "whole_image": recipe.crop_scale is None, "interpolation": recipe.interpolation,
                "feature_dim": self.model.online.state_dict()["projector.0.weight"].shape[1], "network": "online",
                "seed": self.config.seed, "byol_core": __version__}

    def write_end(self, status: str, reason: str | None = None) -> None:
        """summary.json, bad_files.txt and report.html, whatever way the run ended. reason: of a run that did not finish."""
        if not self.processes.first:
            return
        write_json(self.folder / "summary.json", self._summary(status, reason))
        listing = self.data.bad.listing()
        if self.bad_eval_files is not None:
            listing += self.bad_eval_files.listing(f"{self.config.eval_data}/")
        if listing:
            write_text(self.folder / "bad_files.txt", listing)
        with self._only_to_look_at():
            write_report(self.folder)
        if self.log.board is not None:
            self.log.board.close()

    def _summary(self, status: str, reason: str | None = None) -> dict[str, object]:
        scores: dict[str, float | int | str | None] = {}
        for name, suffix in (("trained", ""), ("untrained", "_untrained"), ("pixels", "_pixels")):
            scores |= {key + suffix: value for key, value in self.scores.get(name, {"knn": None, "linear": None}).items()}
        last, log, files = self.log.last, self.log, self.data.files
        return {
            "status": status, "reason": reason, "images": len(files), "classes": len(files.classes),
            "bad_files": len(self.data.bad.reasons),
            "bad_eval_files": len(self.bad_eval_files.reasons) if self.bad_eval_files else 0,
            "epochs": self.progress.epoch, "updates": self.progress.updates, "seconds": round(log.seconds, 3),
            "images_per_second": round(self.progress.updates * self.plan.batch_size / max(log.seconds, 1e-9), 2),
            "wait_fraction": round(log.waited / max(log.seconds, 1e-9), 4),
            "loss": last.get("loss"), "spread": last.get("spread"), **scores, **self.ranks,
            "best_knn": self.best.get("knn"), "best_epoch": self.best.get("epoch"),
            "measured_on": self.scorer.measured_on if self.scorer else None,
            "world_size": self.processes.world_size, "device": str(self.runtime.device),
            "amp": AMP_FLAGS[self.runtime.amp_dtype], "peak_memory_mb": round(peak_memory(self.runtime.device) / 1e6)}

    def check(self) -> None:
        """Say what the whole run would take; nothing is kept."""
        seconds = self.seconds_per_update()
        where = " on the GPU" if self.runtime.device.type == "cuda" else ""
        self.log.say(f"check: {seconds:.2f} s per update, about {seconds * self.plan.total_updates / 3600:.2f} h in all; "
                     f"{len(self.data.bad.reasons)} bad files so far; about "
                     f"{COPIES * self.checkpoint_bytes() / 1e6:.0f} MB of disk; "
                     f"{peak_memory(self.runtime.device) / 1e6:.0f} MB of memory{where}; nothing was trained")

    def seconds_per_update(self) -> float:
        """Measured on a few updates, which change the networks: for a run that will not be trained."""
        times: list[float] = []

        def stop_early(progress: Progress, step: Step) -> None:
            times.append(time.monotonic())
            if len(times) > CHECK_STEPS:
                raise _EnoughMeasured

        with contextlib.suppress(_EnoughMeasured):
            train(self.model, self.batches, self.plan.epochs, optimizer=self.optimizer, lr_scheduler=self.scheduler,
                  lr_scheduler_interval="step", accum_steps=self.plan.accum_steps, runtime=self.runtime,
                  after_step=stop_early)
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0

    def summarise(self) -> None:
        """The closing lines: what was reached, and how to use it."""
        self.processes.on_first(self._summarise)

    def _summarise(self) -> None:
        names = [name for name in ("pixels", "untrained", "trained") if name in self.scores]
        if names:
            self.log.say(f"{'accuracy':<12}" + "".join(f"{name:>12}" for name in names))
            for key in self.scores[names[-1]]:
                values = [self.scores[name].get(key) for name in names]
                self.log.say(f"{key:<12}" + "".join(f"{'-' if value is None else f'{value:.1%}':>12}" for value in values))
        elif self.config.eval:
            self.log.say("no class folders, so no accuracy: look at neighbours.png, or pass a labelled folder as --eval-data")
        if self.data.bad.reasons:
            self.log.say(f"skipped {len(self.data.bad.reasons)} of {len(self.data)} images (bad_files.txt)")
        verdict = read_run(self.folder).verdict
        self.log.say(f"{verdict.word}: {verdict.why}" + (f" - {verdict.advice}" if verdict.advice else ""))
        if self.best:
            self.log.say(f"best: kNN {self.best['knn']:.1%} after epoch {self.best['epoch']}, in {self.folder / 'best.pt'}")
        self.log.say(f"report: {self.folder / 'report.html'}\nuse it:\n{how_to_load(self.folder, self._about_backbone())}")
