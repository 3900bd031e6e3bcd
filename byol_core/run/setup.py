"""What a run is set up with: options, plan, folder, device and precision; it is the same to the end."""

from dataclasses import dataclass
from pathlib import Path

import torch

from byol_core.backbones import build_backbone, check_backbone, load_weights, weights_of_seed
from byol_core.evaluate.probes import Classifier, load_classifier
from byol_core.networks import BYOL
from byol_core.run.options import TrainConfig
from byol_core.run.plan import Plan
from byol_core.run.tensorboard import check_tensorboard
from byol_core.runtime import Runtime, allow_tf32, choose_device, choose_precision, prefers_channels_last
from byol_core.system.distributed import Processes
from byol_core.system.files import read_backbone
from byol_core.version import __version__
from byol_core.views.pixels import choose_workers


@dataclass(frozen=True)
class Setup:
    """asked: the options; config: the same, where the sample has become two folders.

    classifier: that of the probes, None for logistic regression. precision: "bfloat16", "float16" or "float32".
    device_reason, precision_reason: why they are as they are.
    """

    asked: TrainConfig
    config: TrainConfig
    plan: Plan
    folder: Path
    processes: Processes
    runtime: Runtime
    workers: int
    classifier: Classifier | None
    device_reason: str
    precision: str
    precision_reason: str
    tf32: bool

    def new_model(self) -> BYOL:
        """The networks as the seed starts them, where and as the run computes."""
        config, model = self.config, new_model(self.config, self.plan)
        self.runtime.place_model(model)
        if config.compile:
            model.online.compile()
            model.target.compile()
        return model

    def about_backbone(self, model: BYOL) -> dict[str, object]:
        """How to use it: what backbone.json says."""
        plan, recipe = self.plan, self.plan.plain
        return {"arch": plan.arch, "small_stem": plan.small_stem, "image_size": plan.image_size, "mean": recipe.mean,
                "std": recipe.std, "whole_image": recipe.crop_scale is None, "interpolation": recipe.interpolation,
                "feature_dim": model.feature_dim, "network": "online",
                "seed": self.config.seed, "byol_core": __version__}


def set_up(asked: TrainConfig, config: TrainConfig, plan: Plan, folder: Path, processes: Processes) -> Setup:
    """Choose what the options leave to the machine. Raises: ValueError for what this machine, or torch, cannot do."""
    device, device_reason = choose_device(config.device, processes)
    amp_dtype, precision_reason = choose_precision(config.amp, device, plan.arch)
    runtime = Runtime(device, amp_dtype, prefers_channels_last(device, amp_dtype, plan.arch), processes, config.cuda_graph)
    classifier = load_classifier(config.classifier)
    if config.tensorboard:
        check_tensorboard()
    return Setup(asked, config, plan, folder, processes, runtime, choose_workers(config.workers, processes.local_world_size),
                 classifier, device_reason, str(amp_dtype or torch.float32).removeprefix("torch."), precision_reason,
                 allow_tf32(device))


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
