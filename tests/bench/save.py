"""What a checkpoint costs: its size, and the time to write it (flushed to the disk) and to read it (checksums verified).

    python -m tests.bench.save [--place DIR]      on the disk that DIR is on
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from byol_core.run.options import TrainConfig
from byol_core.run.plan import make_plan
from byol_core.run.setup import new_model
from byol_core.run.state import build_optimizer
from byol_core.system.files import KEYS, LAST, State, read_checkpoint, save_checkpoint
from byol_core.views.pixels import Facts
from tests.bench.table import environment, markdown, parse, show, side_by_side

NETWORKS = {"conv6": Facts(1_797, 8), "resnet18": Facts(50_000, 32), "resnet50": Facts(1_281_167, 224)}


def state_of(arch: str, facts: Facts) -> State:
    """What a run of these images with the optimizer of their recipe saves, but for a few numbers."""
    config = TrainConfig(arch=arch, recipe="digits" if arch == "conv6" else "auto")
    plan = replace(make_plan(config, facts), arch=arch)
    model = new_model(config, plan)
    optimizer = build_optimizer(model.online, plan)
    for parameter in model.online.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # which makes what it keeps for each parameter
    return {**dict.fromkeys(KEYS), "model": model.state_dict(), "optimizer": optimizer.state_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, help="folder on the disk to measure (default: that of temporary files)")
    options = parse(parser, rounds=7)
    rows = []
    for arch, facts in NETWORKS.items():
        state = state_of(arch, facts)
        with tempfile.TemporaryDirectory(dir=options.place) as place:
            last, bare = Path(place) / LAST, Path(place) / "bare.pt"
            save_checkpoint(last.parent, state)
            milliseconds = side_by_side({"save": partial(save_checkpoint, last.parent, state),
                                         "read": partial(read_checkpoint, last),
                                         "torch.save": partial(torch.save, state, bare)}, "cpu", options.rounds)
            size = last.stat().st_size / 1e6
        rows.append((arch, f"{size:.0f}", *(f"{value / 1000:.2f}" for value in milliseconds.values())))
    columns = ("network and its optimizer", "MB", "s to save", "s to read", "s of a bare torch.save, not flushed")
    show("A checkpoint", f"{environment('cpu')}\n\n{markdown(columns, rows)}", options)


if __name__ == "__main__":
    main()
