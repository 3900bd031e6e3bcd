"""A short training on the embedded digits, as it is or with one part of the method broken."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from byol_core import training
from byol_core.ema import ema_update
from byol_core.evaluate.scoring import Scorer, Scores
from byol_core.images.digits import write_digits
from byol_core.images.image_set import scan
from byol_core.losses import byol_loss, effective_rank, spread
from byol_core.networks import BYOL
from byol_core.run.options import TrainConfig
from byol_core.run.plan import Plan, make_plan
from byol_core.run.setup import new_model
from byol_core.run.state import build_optimizer, build_scheduler
from byol_core.runtime import Runtime
from byol_core.views.batches import DeviceBatches, Order
from byol_core.views.pixels import Facts, ImageData, load_images

BAND_EPOCHS = 25
# Where `train_digits` lands after so many epochs: means of 3 seeds plus and minus 4 standard deviations (of spread 0.07, as
# its own rounds to 0); see "What each part of the method is worth on digits" in tests/bench/RESULTS.md.
BAND = {"linear_5": (0.906, 0.970), "knn": (0.939, 0.996), "spread": (0.8, 0.95), "rank": (26.0, 44.0)}


@dataclass
class Setup:
    """The parts of a run, for a variation to break."""

    plan: Plan
    model: BYOL
    criterion: Callable[[Tensor, Tensor], Tensor] = byol_loss
    ema_before_optimizer: bool = False


class ConcatenatedViews(BYOL):
    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        both = torch.cat([view1, view2])
        return *self.online(both).chunk(2), *self.target(both).chunk(2)


class TargetInTheGraph(BYOL):
    """The online network is its own target, and gradients flow through it."""

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1, z2 = (self.online.projector(self.online.backbone(view)) for view in (view1, view2))
        return self.online.predictor(z1), self.online.predictor(z2), z1, z2


def loss_without_stop_gradient(prediction: Tensor, projection: Tensor) -> Tensor:
    return (2 - 2 * nn.functional.cosine_similarity(prediction, projection, dim=1)).mean()


def halved_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    return byol_loss(prediction, projection) / 2


def _plan(criterion: Callable[[Tensor, Tensor], Tensor] = byol_loss, **changes: object) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        setup.plan = replace(setup.plan, **changes)  # type: ignore[arg-type]
        setup.criterion = criterion
    return change


def _class(kind: type[BYOL], criterion: Callable[[Tensor, Tensor], Tensor] = byol_loss) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        setup.model.__class__ = kind
        setup.criterion = criterion
    return change


def _views(**changes: object) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        view1, view2 = (replace(view, **changes) for view in setup.plan.views)  # type: ignore[arg-type]
        setup.plan = replace(setup.plan, views=(view1, view2))
    return change


_lars = partial(_plan, optimizer="lars", lr=2.0, weight_decay=1e-6)
VARIATIONS: dict[str, Callable[[Setup], None]] = {
    "as it is": lambda setup: None,
    "no predictor": lambda setup: setattr(setup.model.online, "predictor", nn.Identity()),
    "no moving average (tau 0)": _plan(tau_base=0.0, tau_schedule="constant"),
    "frozen target (tau 1)": _plan(tau_base=1.0, tau_schedule="constant"),
    "views concatenated": _class(ConcatenatedViews),
    "target in the graph": _class(TargetInTheGraph, loss_without_stop_gradient),
    "moving average before the optimizer": lambda setup: setattr(setup, "ema_before_optimizer", True),
    "colour, blur and noise off": _views(jitter=0.0, blur=0.0, noise=0.0),
    "geometry off": _views(rotate=0.0, zoom=(1.0, 1.0), shear=0.0, shift=0.0, elastic=0.0),
    "bending off": _views(elastic=0.0),
    "predictor no faster than the rest": _plan(predictor_lr=1.0),
    "loss halved": _plan(halved_loss),
    "LARS": _lars(),
    "LARS, loss halved": _lars(halved_loss),
}


def outside_the_band(scores: Mapping[str, float | None], names: Iterable[str] = tuple(BAND)) -> list[str]:
    """Which of the scores of these names lie outside the band. Raises: KeyError for one that is missing."""
    return [name for name in names if not BAND[name][0] <= (scores[name] or 0.0) <= BAND[name][1]]


def train_digits(root: Path, seed: int = 0, epochs: int = BAND_EPOCHS, variation: str = "as it is") -> Scores:
    """Scores after training: accuracies in [0, 1], and the last batch's loss, spread and effective rank."""
    train_files, test_files = map(scan, write_digits(root))
    runtime = Runtime("cpu", channels_last=True)
    data, held_out = (load_images(files, "device", runtime.device, lambda line: None)[0]
                      for files in (train_files, test_files))
    setup = prepared(data, epochs, VARIATIONS[variation], seed)
    last: Scores = {}

    def remember(progress: training.Progress, step: training.Step) -> None:
        if progress.updates == setup.plan.total_updates:
            last.update(loss=float(step.loss), spread=float(spread(step.projection1)))

    train_setup(setup, data, runtime, remember, seed)
    scorer = Scorer(data, held_out, setup.plan.views[0], runtime, workers=0)
    features = scorer.features(setup.model.online.backbone)[1].x
    return {**scorer.measure(setup.model.online.backbone), **last, "rank": float(effective_rank(features))}


def prepared(data: ImageData, epochs: int, change: Callable[[Setup], None], seed: int = 0) -> Setup:
    """What the digits' recipe makes of a run, changed."""
    config = TrainConfig(recipe="digits", epochs=epochs, seed=seed)
    plan = make_plan(config, Facts(len(data), 8))
    setup = Setup(plan, new_model(config, plan))
    change(setup)
    return setup


def train_setup(setup: Setup, data: ImageData, runtime: Runtime,
                after_step: Callable[[training.Progress, training.Step], None], seed: int = 0) -> None:
    plan, model = setup.plan, setup.model
    runtime.place_model(model)
    optimizer = build_optimizer(model.online, plan)
    with ExitStack() as patches:
        if setup.ema_before_optimizer:
            patches.enter_context(mock.patch.object(training, "ema_update", lambda target, online, tau: None))
            steps = iter(range(plan.total_updates))
            optimizer.register_step_pre_hook(lambda *_: ema_update(
                model.target, model.online, training.cosine_tau(next(steps), plan.total_updates, plan.tau_base)))
        training.train(model, DeviceBatches(data, plan.views, Order(len(data), plan.batch_size, seed=seed)), plan.epochs,
                       optimizer=optimizer, lr_scheduler=build_scheduler(optimizer, plan), lr_scheduler_interval="step",
                       criterion=setup.criterion, tau_base=plan.tau_base, tau_schedule=plan.tau_schedule, seed=seed,
                       runtime=runtime, after_step=after_step)
