"""Train on real images, data loading included: our `train` with its defaults beside the loop that lightly documents.

    python -m tests.bench.end_to_end --images cifar/train                            32, 64, and 32 pixels with the small stem
    python -m tests.bench.end_to_end --images cifar/train --case 32 --batch 512 --updates 50 --device cuda
    python -m tests.bench.end_to_end --images DIR --case 224 --arch resnet50 --batch 256 --updates 50 --device cuda

Same network, heads, batch and images; each in its own defaults for everything else. A turn is an epoch of --updates batches;
workers are started before, and ours has decoded small images before, as it does once in a run; that time is given apart.
Of a folder with fewer images than a turn needs, they are used again.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader

from byol_core.config import TrainConfig
from byol_core.data import choose_workers, look_at
from byol_core.folder import scan
from byol_core.metrics import RECORD_EVERY
from byol_core.plan import make_plan
from byol_core.run import Run
from byol_core.training import Progress, Step, train
from tests.bench import rivals, step
from tests.bench.table import environment, markdown, parse, show, side_by_side, working_memory
from tests.bench.views import find

CASES = {"32": (32, False, 128), "64": (64, False, 64), "32s": (32, True, 64), "224": (224, False, 64)}  # size, stem, batch
LIGHTLY = "the loop that lightly documents"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--case", choices=tuple(CASES), action="append",
                        help="view size, s for the small stem (default 32, 64, 32s)")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, help="images (default 128 for 32, else 64)")
    parser.add_argument("--updates", type=int, default=RECORD_EVERY,
                        help=f"batches per turn (default {RECORD_EVERY}, after which a run makes a record of its metrics)")
    options = parse(parser, rounds=3)
    limits = rivals.machine_limits(options.device)
    for case in options.case or ("32", "64", "32s"):
        compare(case, options, limits)


def compare(case: str, options: argparse.Namespace, limits: str) -> None:
    size, small_stem, batch = CASES[case]
    batch = options.batch or batch
    needed = options.updates * batch
    found = find(options.images, needed)
    paths = (found * -(-needed // len(found)))[:needed]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run, started = new_run(paths, case, options, Path(folder))
        ours = "**byol_core's train** with its defaults"
        rows: dict[str, Callable[[], object]] = {ours: partial(epoch_of, run)}
        limit, runtime = "bare forward and backward on resident views", run.parts.runtime
        rows[limit] = partial(rivals.bare_loop(rivals.new_byol(options.arch, small_stem, size, runtime), runtime),
                              rivals.random_views(options.updates, batch, size, runtime))
        resident = "byol_core's train on resident views"
        rows[resident] = step.ours((options.arch, small_stem, size), batch, options.updates, runtime)
        for name, make in rivals.present({LIGHTLY: partial(rivals.lightly_transform, size, blur=size >= 48)}):
            workers = choose_workers(None)
            loader = DataLoader(rivals.Photos(paths, make), batch_size=batch, shuffle=True, drop_last=True,
                                num_workers=workers, persistent_workers=workers > 0)
            rows[name] = partial(rivals.lightly_loop(options.arch, small_stem, size, options.device), loader)
        milliseconds = side_by_side(rows, options.device, options.rounds, warm_up=1)
        if ours not in milliseconds or limit not in milliseconds:
            raise SystemExit(f"too little memory for a batch of {batch} - give a smaller --batch")
        waited = run.parts.batches.waited / (options.rounds + 1) * 1000 / milliseconds[ours]
        memory = {name: f"{working_memory(rows[name], options.device):.1f}" for name in milliseconds
                  } if options.device.startswith("cuda") else {}
        run.parts.batches.close()
    rates = {name: 1000 * options.updates * batch / value for name, value in milliseconds.items()}
    table = [(name, f"{rate:.1f}", f"{rate / rates[limit]:.2f}", f"{rate / rates[LIGHTLY]:.2f}" if LIGHTLY in rates else "-",
              *([memory[name]] if memory else []))
             for name, rate in sorted(rates.items(), key=lambda item: -item[1])]
    again = "" if len(found) == needed else f"{len(found)} images, used again to make {needed}; "
    text = (f"{environment(options.device, 'torchvision')}\n\n{limits}\n\n{again}"
            f"Ours: {run.parts.precision}, views: {run.parts.views_reason}; "
            f"{started:.2f} s to start; waits for views {waited:.1%} of the time; "
            f"an update on real data takes {rates[resident] / rates[ours]:.3f} times as long as on resident views\n\n"
            + markdown(("training", "images/s", "share of the bare step", "times lightly's",
                        *(["GB at work"] if memory else [])), table))
    stem = ", small stem" if small_stem else ""
    show(f"End to end: {options.arch}{stem}, {size} pixels, batch {batch}", text, options.write)


def new_run(paths: list[Path], case: str, options: argparse.Namespace, folder: Path) -> tuple[Run, float]:
    """A run of ours that has not begun, and the seconds that it took to be built."""
    size, small_stem, batch = CASES[case]
    images = folder / "images"
    images.mkdir()
    for number, path in enumerate(paths):
        (images / f"{number:06}{path.suffix}").symlink_to(path.resolve())
    config = TrainConfig(data=(str(images),), epochs=options.rounds + 2, arch=options.arch, image_size=size,
                         small_stem=small_stem, hidden_dim=rivals.HIDDEN, projection_dim=rivals.OUT,
                         batch_size=options.batch or batch, device=options.device, eval=False)
    began = time.perf_counter()
    files = scan(images)
    run = Run(config, make_plan(config, look_at(files)), files, folder)
    run.log.start(run.progress)
    return run, time.perf_counter() - began


def epoch_of(run: Run) -> None:
    """The next epoch of the run, logging included; what comes once in a run or an epoch, such as saving, is left out."""
    def log(progress: Progress, done: Step) -> None:
        run.log.step(progress, done, run.parts.batches.waited)

    parts = run.parts
    train(parts.model, parts.batches, run.progress.epoch + 1, optimizer=parts.optimizer, lr_scheduler=parts.scheduler,
          lr_scheduler_interval=parts.plan.scheduler_interval, tau_base=parts.plan.tau_base, runtime=parts.runtime,
          progress=run.progress, after_step=log)


if __name__ == "__main__":
    main()
