"""Time a LARS step beside other implementations, on a ResNet-50: python -m tests.bench.lars"""

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision

from byol_core.lars import LARS, parameter_groups
from tests.bench.table import arguments, environment, markdown, milliseconds_on_gpu, show, side_by_side

Groups = list[dict[str, Any]]
LR, DECAY = 0.1, 1.5e-6
OURS = "**LARS**"


def timm(groups: Groups) -> torch.optim.Optimizer:
    return importlib.import_module("timm.optim.lars").Lars(groups, lr=LR, momentum=0.9, weight_decay=DECAY)


def lightly(groups: Groups) -> torch.optim.Optimizer:
    return importlib.import_module("lightly.utils.lars").LARS(groups, lr=LR, momentum=0.9, weight_decay=DECAY)


ROWS: list[tuple[str, str, Callable[[Groups], torch.optim.Optimizer]]] = [
    (OURS, "torch", lambda groups: LARS(groups, lr=LR)),
    ("torch SGD, foreach (no adaptation)", "torch", lambda groups: torch.optim.SGD(groups, LR, 0.9, foreach=True)),
    ("torch SGD, tensor by tensor (same)", "torch", lambda groups: torch.optim.SGD(groups, LR, 0.9, foreach=False)),
    ("timm Lars", "timm", timm),
    ("lightly LARS", "lightly", lightly),
]


def main() -> None:
    options = arguments(__doc__)
    functions: dict[str, Callable[[], object]] = {}
    present = []
    for name, package, make in ROWS:
        module = torchvision.models.resnet50().to(options.device)
        for param in module.parameters():
            param.grad = 1e-3 * torch.randn_like(param)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                functions[name] = make(parameter_groups(module, DECAY)).step
        except ImportError as error:
            print(f"{package} skipped: {error}")
            continue
        if package != "torch":
            present.append(package)

    on_gpu = options.device.startswith("cuda")
    times = side_by_side(functions, options.device, options.rounds, seconds=options.seconds)
    alone = {name: milliseconds_on_gpu(functions[name], options.device) for name in times} if on_gpu else times
    rows = [(name, f"{value:.1f}", *([f"{alone[name]:.3f}"] if on_gpu else []), f"{value / times[OURS]:.2f}")
            for name, value in sorted(times.items(), key=lambda item: item[1])]
    table = markdown(("optimizer", "median ms per step", *(["ms of the GPU alone"] if on_gpu else []), "times ours"), rows)
    show("LARS, ResNet-50, 25.6 M parameters", f"{environment(options.device, *present)}\n\n{table}", options,
         milliseconds=times, milliseconds_of_the_device=alone)


if __name__ == "__main__":
    main()
