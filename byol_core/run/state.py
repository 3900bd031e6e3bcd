"""What trains, and what of it a checkpoint holds: networks, optimizer, schedule, gradient scaler, progress."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from byol_core.lars import LARS, parameter_groups
from byol_core.networks import BYOL, OnlineNetwork
from byol_core.run.plan import Plan
from byol_core.schedules import warmup_cosine
from byol_core.system.files import CheckpointError, State, check_tensors, tensor_bytes
from byol_core.training import Progress, plateau_scheduler


class TrainingState:
    """All that an update changes.

    scaler: of float16's gradients, as the runtime has it; in other precisions it does nothing.
    """

    def __init__(self, model: BYOL, plan: Plan, scaler: torch.amp.GradScaler) -> None:
        self.model = model
        self.optimizer = build_optimizer(model.online, plan)
        self.scheduler = build_scheduler(self.optimizer, plan)
        self.scaler = scaler
        self.progress = Progress()

    @property
    def backbone(self) -> nn.Module:
        """The one that is measured and exported."""
        return self.model.online.backbone

    def state_dict(self) -> State:
        return {name: getattr(self, name).state_dict() for name in ("progress", "model", "optimizer", "scheduler", "scaler")}

    def check(self, state: State, epochs: int, batches: int) -> None:
        """Raises: CheckpointError, or what damage raises, for a state that `load_state_dict` cannot load whole.

        epochs: of the run. batches: micro-batches of an epoch.
        """
        own, model, optimizer = self.model.state_dict(), state["model"], state["optimizer"]
        if not isinstance(model, dict) or model.keys() != own.keys() or not all(isinstance(v, Tensor) for v in model.values()):
            raise CheckpointError("its networks are not like these")
        check_tensors(model, own)  # type: ignore[arg-type]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        check_tensors(optimizer["state"], dict(enumerate(parameters)))  # type: ignore[index]
        progress = Progress(**state["progress"])  # type: ignore[arg-type]
        if not (0 <= progress.epoch <= epochs and 0 <= progress.batch <= batches and progress.updates >= 0):
            raise CheckpointError("its progress is out of range for this run")

    def load_state_dict(self, state: State) -> None:
        """For a state that was checked."""
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.scheduler.load_state_dict(state["scheduler"])  # type: ignore[arg-type]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])  # type: ignore[arg-type]
        self.progress = Progress(**state["progress"])  # type: ignore[arg-type]

    def checkpoint_bytes(self) -> int:
        """What a checkpoint will take on the disk: both networks, and what the optimizer keeps for each parameter."""
        kept = 2 if isinstance(self.optimizer, torch.optim.Adam) else 1  # AdamW is an Adam
        return tensor_bytes(self.model.state_dict()) + kept * tensor_bytes(list(self.model.online.parameters()))


def build_optimizer(network: OnlineNetwork, plan: Plan) -> Optimizer:
    """The plan's optimizer over all of `network`'s trainable parameters; biases and 1-D tensors do not decay."""
    groups = list(_groups(network, plan))
    if plan.optimizer == "lars":
        return LARS(groups, lr=plan.lr, momentum=0.9)
    fused = next(network.parameters()).device.type in ("cpu", "cuda")
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=0.9, fused=fused)
    if plan.optimizer == "adam":
        return torch.optim.Adam(groups, lr=plan.lr, fused=fused)
    assert plan.optimizer == "adamw", plan.optimizer
    return torch.optim.AdamW(groups, lr=plan.lr, fused=fused)


def _groups(network: OnlineNetwork, plan: Plan) -> Iterator[dict[str, Any]]:
    """`parameter_groups`, each in two: the predictor has a learning rate of its own."""
    predictor = {id(parameter) for parameter in network.predictor.parameters()}
    for group in parameter_groups(network, plan.weight_decay):
        for in_predictor, factor in ((False, 1.0), (True, plan.predictor_lr)):
            chosen = [p for p in cast(list[Tensor], group["params"]) if (id(p) in predictor) == in_predictor]
            yield {**group, "params": chosen, "lr": plan.lr * factor}


def build_scheduler(optimizer: Optimizer, plan: Plan) -> LRScheduler | ReduceLROnPlateau:
    """The plan's schedule; it is to be stepped after each update or each epoch, as `plan.scheduler_interval` says."""
    if plan.scheduler == "plateau":
        return plateau_scheduler(optimizer)
    per_epoch = plan.updates_per_epoch if plan.scheduler_interval == "step" else 1
    middle = 0.0 if plan.scheduler_interval == "step" else 0.5  # an epoch's rate is that of its middle, so never 0
    total, warmup = plan.epochs * per_epoch, round(plan.warmup_epochs * per_epoch)

    def factor(step: int) -> float:
        if plan.scheduler == "cosine":
            return warmup_cosine(step + middle, max(total, 1), min(warmup, total), 1.0)
        return min(1.0, (step + middle) / warmup) if warmup else 1.0

    return LambdaLR(optimizer, factor)
