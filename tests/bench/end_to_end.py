"""Train on real images, data loading included: our `train` with its defaults beside the loop that lightly documents.

    python -m tests.bench.end_to_end --images cifar/train                            32, 64, and 32 pixels with the small stem
    python -m tests.bench.end_to_end --images cifar/train --case 32 --batch 512 --updates 50 --device cuda
    python -m tests.bench.end_to_end --images DIR --case 224 --arch resnet50 --batch 256 --updates 50 --device cuda --compile
    python -m tests.bench.end_to_end ... --compile --cuda-graph      a row with --compile, and one with both

Same network, heads, batch and images; each in its own defaults for everything else. A turn is an epoch of --updates batches;
workers are started before, and ours has decoded small images before, as it does once in a run; that time is given apart.
Of a folder with fewer images than a turn needs, they are used again.
"Once under way" leaves out the first updates of each turn, four or a quarter: workers need a moment for the first batch of an
epoch, and a CUDA graph is recorded anew. Both are long beside these short turns and short beside a run.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader

from byol_core.cuda_graph import WARM_UP
from byol_core.images.image_set import scan
from byol_core.run.log import RECORD_EVERY
from byol_core.run.options import TrainConfig
from byol_core.run.plan import make_plan
from byol_core.run.run import Run
from byol_core.runtime import Runtime
from byol_core.training import Progress, Step, train
from byol_core.views.pixels import choose_workers, look_at
from tests.bench import rivals, step
from tests.bench.loader import find
from tests.bench.table import environment, markdown, parse, show, side_by_side, wait_for

CASES = {"32": (32, False, 128), "64": (64, False, 64), "32s": (32, True, 64), "224": (224, False, 64)}  # size, stem, batch
OURS = "**byol_core's train** with its defaults"
LIMIT, RESIDENT = "bare forward and backward on resident views", "byol_core's train on resident views"
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
    parser.add_argument("--compile", action="store_true", help="a row with --compile, too")
    parser.add_argument("--cuda-graph", action="store_true", help="a row with --cuda-graph, and --compile where given, too")
    parser.add_argument("--workers", type=int, help="data workers, ours and the peer's (default: as a run chooses)")
    parser.add_argument("--no-peers", action="store_true", help="leave other packages out")
    options = parse(parser, rounds=3)
    if options.cuda_graph and not options.device.startswith("cuda"):
        parser.error(f"--cuda-graph needs a CUDA device, and --device is {options.device}")
    limits = rivals.machine_limits(options.device)
    for case in options.case or ("32", "64", "32s"):
        compare(case, options, limits)


def compare(case: str, options: argparse.Namespace, limits: str) -> None:
    size, small_stem, usual = CASES[case]
    batch = options.batch or usual
    needed = options.updates * batch
    found = find(options.images, needed)
    paths = (found * -(-needed // len(found)))[:needed]
    memory: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        link(paths, folder / "images")
        turns = {name: new_turns(folder, case, options, **chosen) for name, chosen in variants(options).items()}
        for some in turns.values():
            stack.callback(some.run.data.views.close)
        rows: dict[str, Callable[[], object]] = {**turns}
        rows |= others(paths, (options.arch, small_stem, size), batch, turns[OURS].run.setup.runtime, options)
        milliseconds = side_by_side(rows, options.device, options.rounds, 1, seconds=options.seconds, memory=memory)
        if OURS not in milliseconds or LIMIT not in milliseconds:
            raise SystemExit(f"too little memory for a batch of {batch} - give a smaller --batch")
    rates = {name: 1000 * options.updates * batch / value for name, value in milliseconds.items()}
    table = [(name, f"{rate:.1f}", f"{rate / rates[LIMIT]:.2f}", f"{rate / rates[LIGHTLY]:.2f}" if LIGHTLY in rates else "-",
              *([f"{memory[name]:.1f}"] if memory else []))
             for name, rate in sorted(rates.items(), key=lambda item: -item[1])]
    columns = ("training", "images/s", "share of the bare step", "times lightly's", *(["GB at work"] if memory else []))
    again = [] if len(found) == needed else [f"{len(found)} images, used again to make {needed}"]
    notes, numbers = compared(turns, rates, (options.updates - settling(options.updates)) * batch)
    text = "\n\n".join((environment(options.device, "torchvision"), limits, *again, *notes, markdown(columns, table)))
    stem = ", small stem" if small_stem else ""
    show(f"End to end: {options.arch}{stem}, {size} pixels, batch {batch}", text, options, images_per_second=rates,
         workers=turns[OURS].run.setup.workers, views=turns[OURS].run.data.views_reason,
         gigabytes=memory, milliseconds_of_bare_step=milliseconds[LIMIT] / options.updates, **numbers)


def variants(options: argparse.Namespace) -> dict[str, dict[str, bool]]:
    """By the row's name: the fields of a run of ours: the defaults, and what was asked for on top, one after the other."""
    found: list[dict[str, bool]] = [{}]
    for name in ("compile", "cuda_graph"):
        if getattr(options, name):
            found.append({**found[-1], name: True})
    return {f"byol_core's train, --{' --'.join(chosen).replace('_', '-')}" if chosen else OURS: chosen for chosen in found}


def others(paths: list[Path], network: tuple[str, bool, int], batch: int, runtime: Runtime, options: argparse.Namespace
           ) -> dict[str, Callable[[], object]]:
    """What a run of ours is compared with: the limit of any trainer, our loop on views that lie ready, and lightly's loop."""
    rows: dict[str, Callable[[], object]] = {
        LIMIT: partial(rivals.bare_loop(rivals.new_byol(*network, runtime), runtime),
                       rivals.random_views(options.updates, batch, network[2], runtime)),
        RESIDENT: step.ours(network, batch, options.updates, runtime)}
    makers = {} if options.no_peers else {LIGHTLY: partial(rivals.lightly_transform, network[2], blur=network[2] >= 48)}
    for name, transform in rivals.present(makers):
        workers = choose_workers(options.workers)
        loader = DataLoader(rivals.Photos(paths, transform), batch_size=batch, shuffle=True, drop_last=True,
                            num_workers=workers, persistent_workers=workers > 0)
        rows[name] = partial(rivals.lightly_loop(*network, options.device), loader)
    return rows


def compared(turns: "dict[str, Turns]", rates: dict[str, float], later_images: int) -> tuple[list[str], dict[str, float]]:
    """(what is to be said beside the table, numbers). later_images: of a turn once under way."""
    ours = turns[OURS]
    notes = [f"Ours: {ours.run.setup.precision}, views: {ours.run.data.views_reason}; {ours.started:.2f} s to start"]
    numbers: dict[str, float] = {}
    if RESIDENT in rates:
        notes.append(f"An update on real data takes {rates[RESIDENT] / rates[OURS]:.3f} times as long as on resident views")
    for name, some in turns.items():
        if name in rates and later_images:
            rate, end = later_images / some.seconds_under_way, some.ending
            numbers |= {f"images_per_second_under_way{end}": rate, f"share_of_bare_step{end}": rate / rates[LIMIT],
                        f"waits{end}": some.waits_under_way, f"waits_with_first_batches{end}": some.waits}
            notes.append(f"{name.replace('*', '')}: waits for views {some.waits:.1%} of the time; once under way "
                         f"{some.waits_under_way:.1%}, with {rate:.1f} images/s, {rate / rates[LIMIT]:.3f} of the bare step; "
                         f"its first turn took {some.seconds[0]:.1f} s")
    if LIGHTLY in rates:
        numbers["times_lightly"] = rates[OURS] / rates[LIGHTLY]
    for name, some in turns.items():
        if name in rates and name != OURS:
            numbers[f"times_default{some.ending}"] = rates[name] / rates[OURS]
    return notes, numbers


def settling(updates: int) -> int:
    """The updates of a turn before it is under way."""
    return max(1, min(WARM_UP + 1, updates // 4))


def link(paths: list[Path], images: Path) -> None:
    images.mkdir()
    for number, path in enumerate(paths):
        (images / f"{number:06}{path.suffix}").symlink_to(path.resolve())


@dataclass
class Turns:
    """A run of ours that goes on by an epoch at each call, logging included; what comes once in a run or an epoch, such as
    saving, is left out.

    started: seconds that it took to be built. seconds, waited: of each turn, and of each once under way. The first turn warms
    up, and is in no mean.
    """

    run: Run
    started: float
    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    later_seconds: list[float] = field(default_factory=list)
    later_waited: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        run, state, setup = self.run, self.run.state, self.run.setup
        first, waits = settling(len(run.batches)), list[float]()
        began = under_way = time.perf_counter()

        def log(progress: Progress, done: Step) -> None:
            nonlocal under_way
            if len(waits) + 1 == first:
                wait_for(setup.runtime.device)
            waits.append(run.batches.take_waited())
            run.log.step(progress, done, waits[-1])
            if len(waits) == first:
                under_way = time.perf_counter()

        train(state.model, run.batches, run.progress.epoch + 1, optimizer=state.optimizer, lr_scheduler=state.scheduler,
              lr_scheduler_interval=setup.plan.scheduler_interval, tau_base=setup.plan.tau_base, runtime=setup.runtime,
              progress=run.progress, after_step=log)
        wait_for(setup.runtime.device)
        ended = time.perf_counter()
        waits.append(run.batches.take_waited())
        self.seconds.append(ended - began)
        self.waited.append(sum(waits))
        self.later_seconds.append(ended - under_way)
        self.later_waited.append(sum(waits[first:]))

    @property
    def ending(self) -> str:
        """Of the names of its numbers: what it was run with, but for the defaults."""
        config = self.run.setup.config
        return "_compile" * config.compile + "_cuda_graph" * config.cuda_graph

    @property
    def waits(self) -> float:
        """The share of the time that goes into waiting for views."""
        return sum(self.waited[1:]) / sum(self.seconds[1:])

    @property
    def waits_under_way(self) -> float:
        return sum(self.later_waited[1:]) / sum(self.later_seconds[1:])

    @property
    def seconds_under_way(self) -> float:
        """Of a turn but for its first updates; the median."""
        return statistics.median(self.later_seconds[1:])


def new_turns(folder: Path, case: str, options: argparse.Namespace, compile: bool = False,
              cuda_graph: bool = False) -> Turns:
    size, small_stem, batch = CASES[case]
    config = TrainConfig(data=(str(folder / "images"),), epochs=options.rounds + 2, arch=options.arch, image_size=size,
                         view_size=size, small_stem=small_stem, hidden_dim=rivals.HIDDEN, projection_dim=rivals.OUT,
                         batch_size=options.batch or batch, device=options.device, eval=False, workers=options.workers,
                         compile=compile, cuda_graph=cuda_graph)
    place = folder / f"run{'-compiled' * compile}{'-graph' * cuda_graph}"
    place.mkdir()
    began = time.perf_counter()
    files = scan(folder / "images")
    run = Run(config, make_plan(config, look_at(files)), files, place)
    run.log.start(run.progress)
    return Turns(run, time.perf_counter() - began)


if __name__ == "__main__":
    main()
