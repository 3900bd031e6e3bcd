"""What a run is made of, built and checked before any training."""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from byol_core.backbones import build_backbone, check_backbone, load_weights, recompute_blocks, weights_of_seed
from byol_core.evaluate.features import load_classifier
from byol_core.evaluate.scoring import Scorer
from byol_core.evaluate.separation import SeparationScorer
from byol_core.images.image_set import ImageSet, scan
from byol_core.networks import BYOL
from byol_core.run.config import TrainConfig
from byol_core.run.log import RunLog
from byol_core.run.optim import build_optimizer, build_scheduler
from byol_core.run.plan import Plan
from byol_core.run.tensorboard import check_tensorboard
from byol_core.runtime import Runtime, allow_tf32, choose_device, choose_precision, prefers_channels_last
from byol_core.system.distributed import Processes
from byol_core.system.files import read_backbone, tensor_bytes, write_text
from byol_core.training import Progress
from byol_core.version import __version__
from byol_core.views.batches import DeviceBatches, Order, TimedBatches, WorkerBatches
from byol_core.views.crops import CropBatches
from byol_core.views.pixels import BAD_LIMIT, BadFiles, ImageData, TooManyBadFilesError, choose_workers, load_images

IN_WORDS = {"views": "the view recipe", "image names": "the names of the image files"}  # of keys of `Parts.identity`


def new_model(config: TrainConfig, plan: Plan) -> BYOL:
    """The networks as this seed starts them; the same every time."""
    with weights_of_seed(config.seed):
        backbone, feature_dim = build_backbone(plan.arch, plan.small_stem, plan.image_size)
        for size in {plan.image_size, plan.view_size}:
            check_backbone(backbone, feature_dim, size)
        if config.init_from is not None:
            weights = read_backbone(Path(config.init_from))
            try:
                load_weights(backbone, weights)
            except ValueError as error:
                raise ValueError(f"--init-from {config.init_from} does not fit this network: {error} - give the --arch, "
                                 "--small-stem and --image-size it was trained with") from error
        return BYOL(backbone, feature_dim, plan.hidden_dim, plan.projection_dim)


class Parts:
    """The data, the networks and all that works on them, in one run; Raises: ValueError for what cannot be trained with.

    loaded: the images of `files` and where their views are made, if another run of these options has loaded them already.
    asked: the options before `with_sample`, if they differ.
    """

    def __init__(self, config: TrainConfig, plan: Plan, files: ImageSet, folder: Path, processes: Processes,
                 loaded: tuple[ImageData, str] | None = None, asked: TrainConfig | None = None) -> None:
        self.asked = asked or config
        self.config, self.plan, self.folder, self.processes = config, plan, folder, processes
        device, self.device_reason = choose_device(config.device, processes)
        amp_dtype, self.amp_reason = choose_precision(config.amp, device, plan.arch)
        self.tf32 = allow_tf32(device)
        self.runtime = Runtime(device, amp_dtype, prefers_channels_last(device, amp_dtype, plan.arch), processes,
                               config.cuda_graph)
        self.classifier = load_classifier(config.classifier)
        if config.tensorboard:
            check_tensorboard()
        self.log = RunLog(folder, plan.epochs, plan.updates_per_epoch, plan.batch_size, processes, asdict(plan))
        self.model = self.new_model()
        self.optimizer = build_optimizer(self.model.online, plan)
        self.scheduler = build_scheduler(self.optimizer, plan)
        self.progress = Progress()
        self.workers = choose_workers(config.workers, processes.local_world_size)
        self.data, self.views_reason = loaded or self._load(files, config.views)
        self._compare_processes()
        self.bad_eval_files: BadFiles | None = None
        self.order = Order(len(self.data), plan.batch_size, plan.accum_steps, config.seed, processes.rank,
                           processes.world_size, plan.updates_per_epoch)
        self.scorer = self._new_scorer() if processes.first and config.eval else None
        self.batches = TimedBatches(self._new_batches(self.order), device)

    def new_model(self) -> BYOL:
        """`new_model` where and as the run computes."""
        if self.config.grad_checkpoint and self.config.compile:
            raise ValueError("--compile: torch cannot compile what --grad-checkpoint computes again - leave one of them out")
        if self.config.grad_checkpoint and self.config.cuda_graph:
            raise ValueError("--cuda-graph: a graph cannot hold what --grad-checkpoint computes again - leave one of them out")
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
            limit = 1.0 if self.config.check else BAD_LIMIT  # a check counts them all
            return load_images(files, views, self.runtime.device, self.log.say, self.workers, limit)
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

    def _new_scorer(self) -> Scorer | SeparationScorer:
        """What measures features: on --eval-data, on a part of --data, or without labels."""
        config = self.config
        if self.data.files.labels is None and config.eval_data is None:
            return self.without_labels()
        data, eval_data = self.data, None
        if config.eval_data is not None:
            files = scan(config.eval_data, "--eval-data", leave_out=(self.folder,))
            for remark in files.remarks:
                self.log.say(f"warning: --eval-data: {remark}")
            if files.labels is None:
                raise ValueError(f"--eval-data {config.eval_data} has fewer than 2 class sub-folders, so there is nothing to "
                                 "measure")
            eval_data = self._load(files, "auto")[0]
            self.bad_eval_files = eval_data.bad
            self._compare_classes(files)
            if data.files.labels is not None:
                self._warn_of_overlap(files)
            if data.files.labels is None:  # then both the fitting and the measuring are done on parts of --eval-data
                data, eval_data = eval_data, None
        return Scorer(data, eval_data, self.plan.plain, self.runtime, self.workers, self.classifier, self.log.say)

    def without_labels(self) -> SeparationScorer:
        return SeparationScorer(self._new_batches, self.order, self.runtime)

    def _compare_classes(self, files: ImageSet) -> None:
        own, others = set(self.data.files.classes), set(files.classes)
        if own and not own & others:
            raise ValueError(f"--eval-data {files.given} has no class folder of the same name as one in --data - measured on "
                             "it, every accuracy would be 0")
        if own and others - own:
            self.log.say(f"warning: images of {len(others - own)} classes that --data does not have count as wrong: "
                         f"{', '.join(sorted(others - own)[:5])}")

    def _warn_of_overlap(self, files: ImageSet) -> None:
        real_folder = functools.cache(os.path.realpath)

        def places(images: ImageSet) -> Iterator[tuple[str, str]]:
            return ((real_folder(path.parent), path.name) for path in map(images.path, range(len(images))))

        measured = set(places(files))
        both = sum(place in measured for place in places(self.data.files))
        if both:
            self.log.say(f"warning: {both} of {len(files)} images of --eval-data are in --data, too: the probes are fitted on "
                         "them, so the accuracies are too high")

    def _new_batches(self, order: Order) -> DeviceBatches | WorkerBatches:
        plan = self.plan
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
            **({} if self.config.minutes is None else {"minutes": self.config.minutes}),
            "views made": ("on the device" if self.data.pixels is not None else
                           "on the cpu" if self.config.views == "cpu" else "of worker crops")}))

    @property
    def precision(self) -> str:
        return str(self.runtime.amp_dtype or torch.float32).removeprefix("torch.")

    @property
    def backbone(self) -> nn.Module:
        """The one that is measured and exported."""
        return self.model.online.backbone

    def about_backbone(self) -> dict[str, object]:
        """How to use it: what backbone.json says."""
        plan, recipe = self.plan, self.plan.plain
        return {"arch": plan.arch, "small_stem": plan.small_stem, "image_size": plan.image_size, "mean": recipe.mean,
                "std": recipe.std, "whole_image": recipe.crop_scale is None, "interpolation": recipe.interpolation,
                "feature_dim": self.model.online.state_dict()["projector.0.weight"].shape[1], "network": "online",
                "seed": self.config.seed, "byol_core": __version__}

    def checkpoint_bytes(self) -> int:
        """What a checkpoint will take on the disk: both networks, and what the optimizer keeps for each parameter."""
        kept = 2 if isinstance(self.optimizer, torch.optim.Adam) else 1  # AdamW is an Adam
        return tensor_bytes(self.model.state_dict()) + kept * tensor_bytes(list(self.model.online.parameters()))
