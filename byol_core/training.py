"""The loop: forward both views, loss in both directions, backward, optimizer, then the target follows."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from byol_core.ema import ema_update
from byol_core.losses import byol_loss
from byol_core.networks import BYOL
from byol_core.runtime import Runtime
from byol_core.schedules import cosine_tau
from byol_core.system.seeds import seed_from

Scheduler = LRScheduler | ReduceLROnPlateau
END = object()  # what stands for the end of a loader


class PlainBatches(Protocol):
    """Any loader with a length that yields (view1, view2) or ((view1, view2), label), such as a DataLoader."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class SeekableBatches(Protocol):
    """Batches of two views that can start an epoch anywhere, in an order that depends on the epoch alone."""

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class Progress:
    """Where a run is: all that a resumed run needs beside the state of model, optimizer, scheduler and scaler.

    epoch: epochs completed. batch: micro-batches used of the next one. updates: optimizer updates applied so far.
    loss_sum, loss_count: over this epoch's updates.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss_sum: float | Tensor = 0.0
    loss_count: int = 0

    def count_update(self, loss: Tensor) -> None:
        self.updates += 1
        self.loss_sum = self.loss_sum + loss
        self.loss_count += 1

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.batch, self.loss_sum, self.loss_count = epoch, 0, 0.0, 0

    def state_dict(self) -> dict[str, int | float]:
        return {**asdict(self), "loss_sum": float(self.loss_sum)}


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    loss: mean over its micro-batches, in 0..8, on the device. projection1, projection2: the target's outputs for the two
    views of the last micro-batch. tau, lr: what it used. applied: False when it was skipped, and no weight moved.
    """

    loss: Tensor
    projection1: Tensor
    projection2: Tensor
    tau: float
    lr: float
    applied: bool


@dataclass(frozen=True)
class Method:
    """The numbers of the method, which `train` takes by name.

    criterion: (prediction, projection) -> loss of one direction; the two directions are summed. tau_base, tau_schedule: the
    target's momentum, "cosine" from the base to 1 over all updates, or "constant". accum_steps: micro-batches per update.
    lr_scheduler_interval: the learning-rate scheduler is stepped after each applied "step" or after each "epoch". seed: of
    dropout and the like, seeded anew from (seed, update); your own loader's randomness is not seeded here.
    Raises: ValueError for a value that is out of range or unknown.
    """

    criterion: Callable[[Tensor, Tensor], Tensor] = byol_loss
    tau_base: float = 0.9995
    tau_schedule: str = "cosine"
    accum_steps: int = 1
    lr_scheduler_interval: str = "epoch"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.accum_steps < 1:
            raise ValueError(f"train: accum_steps must be 1 or more, got {self.accum_steps}")
        if self.lr_scheduler_interval not in ("step", "epoch"):
            raise ValueError(f"train: lr_scheduler_interval must be 'step' or 'epoch', got {self.lr_scheduler_interval!r}")
        if not 0 <= self.tau_base <= 1:
            raise ValueError(f"train: tau_base must be in [0, 1], got {self.tau_base}")
        if self.tau_schedule not in ("cosine", "constant"):
            raise ValueError(f"train: tau_schedule must be 'cosine' or 'constant', got {self.tau_schedule!r}")

    def tau(self, update: int, updates: int) -> float:
        return self.tau_base if self.tau_schedule == "constant" else cosine_tau(update, updates, self.tau_base)


def train(model: BYOL, batches: SeekableBatches | PlainBatches, epochs: int, *, optimizer: Optimizer | None = None,
          lr_scheduler: Scheduler | None = None, runtime: Runtime | None = None, progress: Progress | None = None,
          after_step: Callable[[Progress, Step], None] | None = None, **method: Any) -> Progress:
    """Train `model` by BYOL on `batches` until `epochs` are complete: paper, algorithm 1.

    model: has `online`, `target` and `(view1, view2) -> p1, p2, z1, z2`. batches: two views per image, on any device;
    micro-batches that do not fill an update at the end of an epoch are left out. optimizer: None is Adam (3e-4) over all
    online parameters. lr_scheduler: any torch scheduler of that optimizer; None halves the rate when the epoch loss
    stands still. runtime: device and precision, after `runtime.place_model(model)`; None is the model's device and float32.
    progress: where to go on, exactly if batches can be sought; it is kept up to date. after_step: called after every step, to
    log, to save (after `runtime.confirm()`, which raises if that step was not finite), or to stop by raising. method: the
    fields of `Method`, such as tau_base=0.99.
    All of the model is put into training mode, and gradients that it has are cleared.
    Returns: the progress, complete.
    Raises: ValueError for unusable arguments; NonFiniteError when the loss or a gradient is not finite: weights are those
    before that step (on CUDA it is noticed one step later, and the target has followed once more), batch norm's statistics
    and progress are not, so go on from what was saved.
    """
    numbers = Method(**method)
    accum_steps, criterion = numbers.accum_steps, numbers.criterion
    runtime = runtime or Runtime(next(model.online.parameters()).device)
    optimizer = optimizer or torch.optim.Adam(model.online.parameters(), lr=3e-4)
    lr_scheduler = lr_scheduler or plateau_scheduler(optimizer)
    progress = progress or Progress()
    after_step = after_step or (lambda *_: None)
    _check_parts(model, batches, optimizer, lr_scheduler, runtime)
    updates = _check_length(len(batches), epochs, accum_steps, progress) * epochs
    model.train()
    for owner in (model, optimizer):
        owner.zero_grad(set_to_none=True)  # the caller's gradients are no part of the first update
    forward = runtime.distribute(model)  # model itself, or a wrapper that averages gradients over processes

    def micro_batch(view1: Tensor, view2: Tensor) -> tuple[Tensor, ...]:
        with runtime.autocast():
            p1, p2, z1, z2 = forward(view1, view2)                                   # predictions; projections of target
            both_directions = (criterion(p1, z2) + criterion(p2, z1)) / accum_steps  # each view predicts the other
        runtime.backward(both_directions)
        return both_directions.detach(), z1, z2

    compute = runtime.recorded(micro_batch, _with_gradients(model, optimizer))
    for micro_batches in _updates(batches, epochs, accum_steps, progress):
        tau, lr = numbers.tau(progress.updates, updates), optimizer.param_groups[0]["lr"]
        loss = torch.zeros((), device=runtime.device)
        for view1, view2, last in micro_batches:
            seed = seed_from(numbers.seed, "step", progress.updates, progress.batch, runtime.processes.rank)
            with runtime.micro_batch(forward, seed, last):
                share, z1, z2 = compute(runtime.place(view1), runtime.place(view2))
            loss += share
        loss = runtime.processes.mean(loss)
        applied = runtime.step(optimizer, loss)          # False: skipped, as float16 may overflow
        if applied:
            ema_update(model.target, model.online, tau)  # the target follows, after the optimizer
            progress.count_update(loss)
        _move_on(progress, lr_scheduler, numbers, loss if applied else None, len(batches))
        after_step(progress, Step(loss, z1, z2, tau, lr, applied))
    runtime.confirm()
    return progress


def _updates(batches: SeekableBatches | PlainBatches, epochs: int, accum_steps: int,
             progress: Progress) -> Iterator[Iterator[tuple[Tensor, Tensor, bool]]]:
    """For each update from where `progress` stands its micro-batches: two views, and whether it is the last one of them."""
    seekable = callable(getattr(batches, "epoch", None))

    def micro_batches() -> Iterator[tuple[Tensor, Tensor, bool]]:
        for number in range(1, accum_steps + 1):
            batch: Any = next(source, END)
            if batch is END:
                raise ValueError("train: an epoch gave fewer batches than len(batches)")
            yield *(batch if seekable else _two_views(batch)), number == accum_steps
            progress.batch += 1

    for epoch in range(progress.epoch, epochs):
        source: Iterator[Any] = iter(())  # a loader's workers of the epoch before end, before others begin
        source = (iter(batches.epoch(epoch, progress.batch)) if seekable else  # type: ignore[union-attr]
                  islice(batches, progress.batch, None))  # type: ignore[arg-type]
        for _ in range((len(batches) - progress.batch) // accum_steps):
            yield micro_batches()


def _move_on(progress: Progress, scheduler: Scheduler, method: Method, loss: Tensor | None, batches: int) -> None:
    """Step the scheduler where that is due, and begin the next epoch where this one is used up. loss: None if skipped."""
    if method.lr_scheduler_interval == "step" and loss is not None:
        _advance(scheduler, loss)
    if batches - progress.batch < method.accum_steps:
        if method.lr_scheduler_interval == "epoch" and progress.loss_count:
            _advance(scheduler, progress.loss_sum / progress.loss_count)
        progress.start_epoch(progress.epoch + 1)


def plateau_scheduler(optimizer: Optimizer) -> ReduceLROnPlateau:
    """Halve the learning rate after 30 epochs without a lower epoch loss: the source system's default, on a loss it has."""
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=30)


def _with_gradients(model: BYOL, optimizer: Optimizer) -> list[Tensor]:
    """The online network's parameters and those of a criterion that has some, each once."""
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return list(dict.fromkeys([*model.online.parameters(), *trained]))


def _check_parts(model: BYOL, batches: object, optimizer: Optimizer, lr_scheduler: Scheduler, runtime: Runtime) -> None:
    try:
        length = len(batches)  # type: ignore[arg-type]
    except TypeError:  # also of a DataLoader without one
        raise ValueError("train: batches must have a length, as a DataLoader of a map-style dataset or a list has; "
                         f"got {type(batches).__name__}") from None
    if not length:
        raise ValueError("train: batches are empty")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if trained.isdisjoint(id(parameter) for parameter in model.online.parameters()):
        raise ValueError("train: optimizer holds no parameter of model.online, so nothing would be trained")
    device = next(model.online.parameters()).device
    if device.type != runtime.device.type:
        raise ValueError(f"train: the model is on {device}, runtime on {runtime.device} - call runtime.place_model(model) "
                         "before making the optimizer")
    if getattr(lr_scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("train: lr_scheduler belongs to another optimizer - make it from the one passed as optimizer")


def _check_length(batches: int, epochs: int, accum_steps: int, progress: Progress) -> int:
    """Updates per epoch."""
    if epochs < 0:
        raise ValueError(f"train: epochs must be 0 or more, got {epochs}")
    if accum_steps > batches:
        raise ValueError(f"train: accum_steps must be in 1..{batches}, the batches of an epoch, got {accum_steps}")
    used = batches // accum_steps * accum_steps
    if progress.batch not in range(0, used, accum_steps):
        raise ValueError(f"train: progress.batch is {progress.batch}, where no update of an epoch of {used} batches with "
                         f"accum_steps {accum_steps} begins - go on with the batches and accum_steps that it was made with")
    return batches // accum_steps


def _two_views(batch: Any) -> tuple[Tensor, Tensor]:
    """Of what a loader gives. Raises: ValueError when it is something else."""
    views = batch[0] if isinstance(batch, (tuple, list)) and batch and not isinstance(batch[0], Tensor) else batch
    if (not isinstance(views, (tuple, list)) or len(views) != 2 or not all(isinstance(view, Tensor) for view in views)
            or views[0].shape != views[1].shape):
        raise ValueError("train: each batch must be (view1, view2), or ((view1, view2), label), with two views of one "
                         f"shape; got {_shapes(batch)}")
    return views[0], views[1]


def _shapes(batch: object) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    return f"({', '.join(map(_shapes, batch))})" if isinstance(batch, (tuple, list)) else type(batch).__name__


def _advance(scheduler: Scheduler, loss: float | Tensor) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(float(loss))
    else:
        scheduler.step()
