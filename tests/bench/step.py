"""Time a training step on views that lie ready: ours, bare forward and backward in each precision, and other packages'.

    python -m tests.bench.step                                  ResNet-18, 32 pixels, batch 128
    python -m tests.bench.step --size 64 --batch 64
    python -m tests.bench.step --arch resnet50 --size 224 --batch 256 --device cuda
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from byol_core.run.options import TrainConfig
from byol_core.run.plan import make_plan
from byol_core.run.state import build_optimizer, build_scheduler
from byol_core.runtime import Runtime, choose_precision, prefers_channels_last
from byol_core.training import train
from byol_core.views.pixels import Facts
from tests.bench import rivals
from tests.bench.table import environment, markdown, parse, show, side_by_side

NAMES = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="edge of the views in pixels (default 32)")
    parser.add_argument("--batch", type=int, default=128, help="images (default 128)")
    parser.add_argument("--small-stem", action="store_true", help="the 3x3 stem for small images")
    options = parse(parser, rounds=5)
    device, network = options.device, (options.arch, options.small_stem, options.size)
    amp_dtype = choose_precision("auto", torch.device(device), options.arch)[0]
    channels_last = prefers_channels_last(torch.device(device), amp_dtype, options.arch)
    chosen = Runtime(device, amp_dtype, channels_last)  # as a run chooses them

    rows: dict[str, Callable[[], object]] = {}
    names = {}
    for dtype in dict.fromkeys((None, torch.bfloat16, chosen.amp_dtype)):
        for channels_last in (False, True):
            runtime = Runtime(device, dtype, channels_last)
            name = f"bare step, {NAMES[dtype]}{', channels_last' if channels_last else ''}"
            names[dtype, channels_last] = name
            rows[name] = partial(rivals.bare_loop(rivals.new_byol(*network, runtime), runtime),
                                 rivals.random_views(1, options.batch, options.size, runtime))
    limit = names[chosen.amp_dtype, chosen.channels_last]
    rows["**byol_core's train**, as auto chooses"] = ours(network, options.batch, 1, chosen)
    views = rivals.random_views(1, options.batch, options.size, Runtime(device))
    makers = {"the loop that lightly documents": partial(rivals.lightly_loop, *network, device),
              "byol-pytorch's trainer": partial(rivals.byol_pytorch_loop, *network, device)}
    for name, loop in rivals.present(makers):
        rows[name] = partial(loop, views)

    milliseconds = side_by_side(rows, device, options.rounds, warm_up=1, seconds=options.seconds)
    rates = {name: 1000 * options.batch / value for name, value in milliseconds.items()}
    table = [(name, f"{milliseconds[name]:.1f}", f"{rate:.1f}", f"{rate / rates[limit]:.2f}")
             for name, rate in sorted(rates.items(), key=lambda item: -item[1])]
    fastest = max(filter(rates.__contains__, names.values()), key=rates.__getitem__)
    text = "\n\n".join((
        environment(device, "torchvision"), rivals.machine_limits(device),
        f"auto chooses: {limit.removeprefix('bare step, ')}; fastest here: {fastest.removeprefix('bare step, ')}, "
        f"{rates[fastest] / rates[limit]:.2f} times as fast",
        markdown(("step", "ms", "images/s", "share of the bare step as auto chooses"), table)))
    show(f"Step: {options.arch}{', small stem' if options.small_stem else ''}, {options.size} pixels, batch {options.batch}",
         text, options)


def ours(network: tuple[str, bool, int], batch: int, steps: int, runtime: Runtime) -> Callable[[], object]:
    """`train` on one epoch of so many batches, with the optimizer and schedule that the recipe chooses."""
    arch, small_stem, size = network
    config = TrainConfig(arch=arch, small_stem=small_stem, image_size=size, batch_size=batch)
    plan = make_plan(config, Facts(50_000, size))
    model, views = rivals.new_byol(*network, runtime), rivals.random_views(steps, batch, size, runtime)
    optimizer = build_optimizer(model.online, plan)
    scheduler = build_scheduler(optimizer, plan)
    return lambda: train(model, views, 1, optimizer=optimizer, lr_scheduler=scheduler, lr_scheduler_interval="step",
                         tau_base=plan.tau_base, runtime=runtime)


if __name__ == "__main__":
    main()
