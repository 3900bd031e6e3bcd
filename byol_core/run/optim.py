"""The optimizer and the learning-rate scheduler that a plan names, as torch's own objects."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from byol_core.lars import LARS, parameter_groups
from byol_core.networks import OnlineNetwork
from byol_core.run.plan import Plan
from byol_core.schedules import warmup_cosine
from byol_core.training import plateau_scheduler


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
