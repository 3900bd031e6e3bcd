"""Time a LARS step beside other implementations, on a ResNet-50: python -m tests.bench.lars"""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision

from byol_core.lars import LARS, parameter_groups
from tests.bench import rivals
from tests.bench.table import environment, markdown, milliseconds_on_gpu, parse, show, side_by_side

Groups = list[dict[str, Any]]
LR, DECAY = 0.1, 1.5e-6
OURS = "**LARS**"


def timm(groups: Groups) -> torch.optim.Optimizer:
    return importlib.import_module("timm.optim.lars").Lars(groups, lr=LR, momentum=0.9, weight_decay=DECAY)


def lightly(groups: Groups) -> torch.optim.Optimizer:
    return importlib.import_module("lightly.utils.lars").LARS(groups, lr=LR, momentum=0.9, weight_decay=DECAY)


ROWS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    OURS: lambda groups: LARS(groups, lr=LR),
    "torch SGD, foreach (no adaptation)": lambda groups: torch.optim.SGD(groups, LR, 0.9, foreach=True),
    "torch SGD, tensor by tensor (same)": lambda groups: torch.optim.SGD(groups, LR, 0.9, foreach=False),
    "timm Lars": timm, "lightly LARS": lightly}


def step_of(make: Callable[[Groups], torch.optim.Optimizer], device: str) -> Callable[[], object]:
    """Of a network of its own. Raises: ImportError."""
    module = torchvision.models.resnet50().to(device)
    for param in module.parameters():
        param.grad = 1e-3 * torch.randn_like(param)
    return make(parameter_groups(module, DECAY)).step


def main() -> None:
    options = parse(argparse.ArgumentParser(description=__doc__))
    functions = dict(rivals.present({name: partial(step_of, make, options.device) for name, make in ROWS.items()}))
    packages = [name.split()[0] for name in functions if ROWS[name] in (timm, lightly)]
    on_gpu = options.device.startswith("cuda")
    times = side_by_side(functions, options.device, options.rounds, seconds=options.seconds)
    alone = {name: milliseconds_on_gpu(functions[name], options.device) for name in times} if on_gpu else times
    rows = [(name, f"{value:.1f}", *([f"{alone[name]:.3f}"] if on_gpu else []), f"{value / times[OURS]:.2f}")
            for name, value in sorted(times.items(), key=lambda item: item[1])]
    table = markdown(("optimizer", "median ms per step", *(["ms of the GPU alone"] if on_gpu else []), "times ours"), rows)
    show("LARS, ResNet-50, 25.6 M parameters", f"{environment(options.device, *packages)}\n\n{table}", options,
         milliseconds=times, milliseconds_of_the_device=alone)


if __name__ == "__main__":
    main()
