"""What the guards cost: training steps on the digits with each of them patched out, beside the same steps with all of them.

    python -m tests.bench.checks --threads 1 --rounds 25
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer

from byol_core.images.digits import write_digits
from byol_core.images.image_set import scan
from byol_core.run import log
from byol_core.run.options import TrainConfig
from byol_core.run.plan import make_plan
from byol_core.run.setup import new_model
from byol_core.run.state import build_optimizer, build_scheduler
from byol_core.runtime import Runtime
from byol_core.training import train
from byol_core.views.batches import DeviceBatches, Order
from byol_core.views.pixels import Facts, load_images
from tests.bench.table import environment, markdown, parse, show, wait_for

UPDATES = 10  # of one measurement: as many as there are between two records
BAD_EVERY = 20  # one file in so many is bad


def step_unguarded(self: Runtime, optimizer: Optimizer, loss: Tensor) -> bool:
    """`Runtime.step` in float32 without a look at loss and gradients."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return True


HEALTH = {"spread": 1.0, "rank": 20.0, "alignment": 1.0, "uniformity": -3.0, "cosine": 0.0, "rank_limit": 63}
GUARDS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "the look for numbers that are not finite": lambda: mock.patch.object(Runtime, "step", step_unguarded),
    "the measures of health": lambda: mock.patch.object(log, "measure", lambda *_: HEALTH),
    "stand-ins for bad files": lambda: mock.patch.object(DeviceBatches, "_readable", lambda self, epoch, indices: indices),
}


def ten_updates(folder: Path, device: str, without: tuple[str, ...]) -> Callable[[], None]:
    """Trains a network of its own for ten updates at a call, as a run does, with those guards patched out."""
    data, _ = load_images(scan(write_digits(folder / "digits")[0]), "device", torch.device(device), lambda line: None)
    data.bad.reasons = {index: "torn" for index in range(0, len(data), BAD_EVERY)}
    config = TrainConfig(recipe="digits", epochs=1)
    plan = make_plan(config, Facts(len(data), 8))
    model, runtime = new_model(config, plan), Runtime(device, channels_last=True)
    runtime.place_model(model)
    optimizer = build_optimizer(model.online, plan)
    scheduler = build_scheduler(optimizer, plan)
    batches = DeviceBatches(data, plan.views, Order(UPDATES * plan.batch_size, plan.batch_size))
    records = log.RunLog(Path(tempfile.mkdtemp(dir=folder)), 1, UPDATES, plan.batch_size)

    def run() -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            for name in without:
                stack.enter_context(GUARDS[name]())
            train(model, batches, 1, optimizer=optimizer, lr_scheduler=scheduler, runtime=runtime,
                  after_step=lambda progress, step: records.step(progress, step, 0.0))
    return run


def seconds(function: Callable[[], None], device: str) -> float:
    """Of processor time on a CPU, which other processes disturb less; of the clock on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait_for(device)
    began = clock()
    function()
    wait_for(device)
    return clock() - began


def main() -> None:
    options = parse(argparse.ArgumentParser(description=__doc__))
    with tempfile.TemporaryDirectory() as place:
        leave_out = {"without any": tuple(GUARDS), "all guards": (), **{f"without {name}": (name,) for name in GUARDS}}
        functions = {name: ten_updates(Path(place), options.device, without) for name, without in leave_out.items()}
        rounds = [{name: seconds(function, options.device) for name, function in functions.items()}
                  for _ in range(options.rounds + 2)][2:]  # two to warm up; in each round all of them run
    rows = [(name, f"{1000 * statistics.median(times[name] for times in rounds) / UPDATES:.2f}",
             f"{100 * (statistics.median(times[name] / times['without any'] for times in rounds) - 1):+.1f} %")
            for name in functions]
    show("What the guards cost, conv6 on the digits, batch 64", f"{environment(options.device)}\n\n" + markdown(
        ("steps", "median ms per step", "median of the ratios of each round"), rows), options)


if __name__ == "__main__":
    main()
