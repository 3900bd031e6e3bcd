"""lightly's documented CIFAR recipe, trained for given minutes on the images of a run of ours."""

import time
from collections.abc import Iterable
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from byol_core.backbones import build_backbone
from byol_core.run.plan import Plan
from byol_core.run.run import Run
from tests.bench import rivals

BATCH, RATE = 128, 0.06  # its benchmark; momentum, weight decay and a cosine to 0 as there, tau constant at 0.99
TIMED = 10  # updates, after as many that warm up, by which the number of epochs is chosen


def train_lightly(run: Run, plan: Plan, minutes: float, seed: int) -> tuple[nn.Module, float, float, float]:
    """(backbone, epochs, minutes, images per second) of as many whole epochs as fit, or of a part of one.

    run: gives the images and the device. plan: gives the network and the size of its images.
    Raises: ImportError without lightly.
    """
    device, files = str(run.setup.runtime.device), run.images.files
    torch.manual_seed(seed)
    backbone, dim = build_backbone(plan.arch, plan.small_stem, plan.image_size)
    photos = rivals.Photos([files.path(index) for index in range(len(files))],
                           rivals.lightly_transform(plan.image_size, blur=plan.image_size >= 48))
    batch = min(BATCH, len(photos))
    loader = DataLoader(photos, batch_size=batch, shuffle=True, drop_last=True, num_workers=run.setup.workers,
                        persistent_workers=run.setup.workers > 0)
    optimizer_of = partial(torch.optim.SGD, lr=RATE * batch / BATCH, momentum=0.9, weight_decay=5e-4)
    trial, _ = rivals.lightly_epochs(*build_backbone(plan.arch, plan.small_stem, plan.image_size), device, optimizer_of)
    timed = max(1, min(TIMED, len(loader) // 2))
    batches = chain(loader, loader)  # of one pass where it has two batches, so that workers need not start anew in between
    trial(islice(batches, timed))
    began = time.monotonic()
    trial(islice(batches, timed))
    fit = max(1, int(60 * minutes * timed / (time.monotonic() - began)))
    epochs = fit // len(loader)
    rounds, updates = (epochs, len(loader)) if epochs else (min(10, fit), max(1, fit // 10))
    source: Iterable[Any] = loader if epochs else iter(loader)  # a part of an epoch is trained in ten rounds

    epoch, optimizer = rivals.lightly_epochs(backbone, dim, device, optimizer_of)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    began = time.monotonic()
    for _ in range(rounds):
        epoch(islice(source, updates))
        scheduler.step()
    seconds = time.monotonic() - began
    return backbone, rounds * updates / len(loader), seconds / 60, rounds * updates * batch / seconds
