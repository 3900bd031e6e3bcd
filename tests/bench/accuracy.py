"""Train, measure and keep a row: what a recipe reaches, in how long, on which machine.

    python -m tests.bench.accuracy digits --epochs 80 --seeds 5 --write
    python -m tests.bench.accuracy cifar10 --images data/cifar10 --minutes 10 --seeds 2 --write

Options that this command does not know go to train.py, such as --arch, --batch-size, --lr or --recipe. All but digits are a
folder with train/<class>/ and test/<class>/. A run that was cut off goes on; what was measured is read back from its folder.
With --write the log of each run is kept beside the results.
With --quick nothing is measured but the last network, once; each accuracy is printed as it is found.
"""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from byol_core.evaluate.probes import knn_accuracy
from byol_core.evaluate.scoring import Scorer
from byol_core.run import command
from byol_core.run.options import parse_config
from byol_core.run.plan import Plan, make_plan
from byol_core.run.run import Run
from byol_core.system.distributed import ALONE
from byol_core.system.files import write_json
from byol_core.views.pixels import look_at
from tests.bench.lightly_recipe import train_lightly
from tests.bench.table import add_output, append_json, commit, environment, markdown, show

ACCURACIES = ("kNN 20, last", "kNN 20, best", "kNN 200, last", "kNN 200, best", "linear, last", "linear, best", "1 label",
              "5 labels")
COLUMNS = ("commit", "epochs", "minutes", "images/s", *ACCURACIES, "log")
OURS = ("--data", "--eval-data", "--out", "--seed", "--resume", "--eval-every", "--no-eval", "--check")  # set by this command
MEASURED = 20  # times that kNN is measured on the way, for the best epoch
EVERY = 10  # epochs between them in a run of minutes, whose epochs are not known yet; a shorter one is measured at its end
Tell = Callable[[dict[str, float | None]], None]
LOGS = Path("tests", "bench", "logs")  # the command is run from the root of the repository


@dataclass
class Result:
    """One run, or a baseline: what it took, where that is known, and what it reached, accuracies in [0, 1].

    begun, measured: the commits at which the run was begun, where it is one, and its accuracies were found.
    """

    name: str
    accuracies: dict[str, float | None]
    epochs: float | None = None
    minutes: float | None = None
    images_per_second: float | None = None
    log: str = ""
    begun: str = ""
    measured: str = field(default_factory=commit)

    def cells(self) -> tuple[str, ...]:
        commits = self.measured if self.begun in ("", self.measured) else f"{self.begun}, measured at {self.measured}"
        known = {"commit": commits, "epochs": _shown(self.epochs, ".5g"), "minutes": _shown(self.minutes, ".2f"),
                 "images/s": _shown(self.images_per_second, ".0f"), "log": self.log}
        return self.name, *(known[column] if column in known else _percent(self.accuracies.get(column)) for column in COLUMNS)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def checksum(images: Path) -> str:
    """Of the names and sizes of the files in train/ and test/, so that runs on other images are other runs."""
    files = sorted((str(Path(folder, name).relative_to(images)), Path(folder, name).stat().st_size)
                   for part in ("train", "test") for folder, _, names in os.walk(images / part, followlinks=True)
                   for name in names)
    return f"{zlib.crc32(json.dumps(files).encode()):08x}"


def once(file: Path, make: Callable[[], Result]) -> Result:
    """What an earlier call has left in `file`, or what `make` returns, left there if it has accuracies."""
    if file.exists():
        return Result(**json.loads(file.read_text()))
    result = make()
    if result.accuracies:
        write_json(file, asdict(result))
    return result


def options_of(arguments: list[str], length: list[str], seed: int, out: Path) -> list[str]:
    """Options of train.py. length: the two that say how long."""
    return [*arguments, *length, "--seed", str(seed), "--out", str(out)]


def train_once(arguments: list[str], length: list[str], seed: int, out: Path, quick: bool,
               tell: Tell = lambda found: None) -> Result:
    """Train, or go on, and measure the last network and the one whose kNN was best of those that were measured.

    Returns: of a run that fails, a result without accuracies.
    length: the words of the command that say how long. quick: measure the last network alone, and nothing on the way. tell:
    takes its accuracies as they are found.
    Raises: SystemExit for a run that is stopped, or cannot be begun.
    """
    options = options_of(arguments, length, seed, out)
    every = max(1, int(length[1]) // MEASURED) if length[0] == "--epochs" else EVERY
    while_training = ["--no-eval"] if quick else ["--eval-every", str(every)]
    begun = out.with_name(f"{out.name}-commit.txt")
    if not (out / "last.pt").exists():
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(commit())
    code = command.main([*options, *while_training, "--resume"])
    if code > 1:
        raise SystemExit(code if code == 2 else f"stopped; the same command goes on in {out}")
    summary = json.loads((out / "summary.json").read_text())
    if code == 1:
        return Result(f"seed {seed}, failed: {summary['reason']}", {}, summary["epochs"], summary["seconds"] / 60,
                      begun=begun.read_text())
    run = run_of(options)
    scorer = scorer_of(run, run.setup.plan)
    accuracies = measured(scorer, run.state.backbone, "last", tell)
    if (out / "best.pt").exists() and not quick:
        best = run.setup.new_model().online.backbone
        best.load_state_dict(torch.load(out / "best.pt", weights_only=True))
        accuracies |= measured(scorer, best, "best")
    return Result(f"seed {seed}", accuracies, summary["epochs"], summary["seconds"] / 60, summary["images_per_second"],
                  begun=begun.read_text())


def run_of(options: list[str]) -> Run:
    """A finished run, read back."""
    with contextlib.ExitStack() as stack:
        return command.prepare(parse_config([*options, "--resume"]), ALONE, stack)


def scorer_of(run: Run, plan: Plan) -> Scorer:
    """The scorer of `run`, for images of the size of that plan."""
    own = run.data.measuring.scorer
    assert isinstance(own, Scorer)
    return Scorer(own.data, own.eval_data, plan.plain, own.runtime, own.workers, own.classifier, own.report)


def measured(scorer: Scorer, backbone: nn.Module, which: str, tell: Tell = lambda found: None) -> dict[str, float | None]:
    """The accuracies of a backbone. which: "last" or "best"; few labels are left to the last. tell: takes them as found."""
    fit, test = scorer.features(backbone)
    found: dict[str, float | None] = {}
    for k in (20, 200):
        found[f"kNN {k}, {which}"] = knn_accuracy(fit.x, fit.y, test.x, test.y, k)
        print(f"kNN {k}, {which}: {found[f'kNN {k}, {which}']:.4f}", flush=True)
        tell(found)  # the probes below take longer
    scores = scorer.measure(backbone)
    found[f"linear, {which}"] = scores["linear"]
    return found if which == "best" else found | {"1 label": scores.get("linear_1"), "5 labels": scores.get("linear_5")}


def mean_row(results: list[Result]) -> tuple[str, ...]:
    """The means of the runs that were finished."""
    def mean(values: list[float | None], form: str) -> str:
        known = [value for value in values if value is not None]
        return f"{statistics.mean(known):{form}} ± {statistics.stdev(known):{form}}" if len(known) > 1 else "-"

    percents = [{key: None if value is None else 100 * value for key, value in result.accuracies.items()}
                for result in results]
    accuracies = [mean([values.get(key) for values in percents], ".2f") for key in ACCURACIES]
    return ("mean", "", mean([result.epochs for result in results], ".4g"),
            mean([result.minutes for result in results], ".2f"),
            mean([result.images_per_second for result in results], ".0f"), *accuracies, "")


def baselines(run: Run, out: Path) -> list[Result]:
    """The untrained network of this seed and bare pixels, measured alike."""
    def result(name: str, backbone: nn.Module) -> Result:
        return Result(name, measured(scorer_of(run, run.setup.plan), backbone, "last"))

    return [once(out / "untrained.json", lambda: result(f"untrained, seed {run.setup.config.seed}",
                                                        run.setup.new_model().online.backbone)),
            once(out / "pixels.json", lambda: result("raw pixels", nn.Flatten()))]


def lightly_results(run: Run, whose: str, runs: list[tuple[int, Path, float]]) -> list[Result]:
    """lightly's recipe for as long as each run of ours.

    whose: "ours", the network of `run`, or "theirs". runs: seed, folder and minutes of each of ours.
    Where our views are smaller than images that are measured, lightly's are at most 4/3 as large as ours: 32 pixels for 24, as
    CIFAR's images. Shown whole, images would take most of its time.
    """
    plan = run.setup.plan if whose == "ours" else make_plan(replace(
        run.setup.config, arch="resnet18", image_size=None, view_size=None, small_stem=None), look_at(run.images.files))
    views = replace(plan, image_size=min(plan.image_size, 4 * plan.view_size // 3))
    network = f"{plan.arch}{' with the small stem' * plan.small_stem} at {views.image_size} pixels"

    def result(seed: int, length: float) -> Result:
        backbone, epochs, took, rate = train_lightly(run, views, length, seed)
        return Result(f"lightly's recipe in the same minutes, {network}, seed {seed}",
                      measured(scorer_of(run, plan), backbone, "last"), epochs, took, rate)

    return [once(out / f"lightly-{whose}.json", partial(result, seed, length)) for seed, out, length in runs]


def tell(options: argparse.Namespace, seed: int, found: dict[str, float | None]) -> None:
    append_json(options, **{f"seed {seed}": {"accuracies": found}})


def parse() -> tuple[argparse.Namespace, list[str]]:
    """(this command's options, those that are passed on to the runs)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("set", choices=("digits", "cifar10", "tiny64"))
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--epochs", type=int)
    either.add_argument("--minutes", type=float, help="of training; the epochs follow from the time of a few updates")
    parser.add_argument("--seeds", type=int, default=1, help="runs, with seeds 0, 1, ...")
    parser.add_argument("--first-seed", type=int, default=0, help="begin with this one, where others are measured already")
    parser.add_argument("--images", type=Path, default=Path("data", "cifar10"), help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("runs", "accuracy"))
    parser.add_argument("--quick", action="store_true", help="measure the last network alone: no best one, no untrained one, "
                        "no raw pixels, nothing on the way")
    parser.add_argument("--lightly", nargs="?", const="ours", choices=("ours", "theirs"), help="train lightly's recipe for "
                        "the same minutes, too: on our network, or on theirs, a ResNet-18 that sees images in their own size")
    add_output(parser)
    options, passed_on = parser.parse_known_args()
    if options.seeds < 1 or (options.epochs is not None and options.epochs < 1) or options.first_seed < 0:
        parser.error("--seeds and --epochs must be 1 or more, --first-seed 0 or more")
    if options.minutes is not None and options.minutes <= 0:
        parser.error("--minutes must be above 0")
    if options.set != "digits" and not (options.images / "train").is_dir():
        parser.error(f"no folder {options.images / 'train'} - give the one that holds train/ and test/ as --images")
    if options.lightly:
        importlib.import_module("lightly")  # before hours of training
    own = {word.partition("=")[0] for word in passed_on} & set(OURS)
    if own:
        parser.error(f"{' '.join(sorted(own))}: this command sets that itself")
    return options, passed_on


def main() -> None:
    options, passed_on = parse()
    arguments = ["--data", "digits"] if options.set == "digits" else [
        "--data", str(options.images / "train"), "--eval-data", str(options.images / "test")]
    arguments += passed_on
    images = [] if options.set == "digits" else [checksum(options.images)]
    place = options.out / "-".join([options.set, *images, *(word.strip("-").replace("/", "_") for word in passed_on)])
    length = ["--minutes", f"{options.minutes:g}"] if options.minutes else ["--epochs", str(options.epochs or 100)]

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    outs = [place / f"{length[1]}-{length[0].strip('-')}-seed-{seed}" for seed in seeds]
    results = []
    for seed, out in zip(seeds, outs):
        result = once(out / f"measured{'-quick' * options.quick}.json", partial(
            train_once, arguments, length, seed, out, options.quick, partial(tell, options, seed)))
        result.log = str(LOGS / f"{place.name}-{out.name}.log") if options.write else ""
        results.append(result)
        append_json(options, **{result.name: asdict(result)})
    whole = [result for result in results if result.accuracies]
    if not whole:
        keep(options, length, passed_on, [result.cells() for result in results], "every run failed")
        raise SystemExit(1)
    finished = [(seed, out, result.minutes or 0.0) for seed, out, result in zip(seeds, outs, results) if result.accuracies]
    seed, out, _ = finished[-1]
    run = run_of(options_of(arguments, length, seed, out))
    lightlys = lightly_results(run, options.lightly, finished) if options.lightly else []
    bare = [] if options.quick else baselines(run, out)
    for result in lightlys + bare:
        append_json(options, **{result.name: asdict(result)})
    rows = [result.cells() for result in results]
    rows += [mean_row(whole)] if len(whole) > 1 else []
    rows += [result.cells() for result in lightlys]
    rows += [mean_row(lightlys)] if len(lightlys) > 1 else []
    rows += [result.cells() for result in bare]
    plan = run.setup.plan
    recipe = "; ".join(f"{choice.name} {choice.value:.6g}" if isinstance(choice.value, float) else
                       f"{choice.name} {choice.value}" for choice in plan.choices)
    if not any(choice.name == "batch_size" for choice in plan.choices):
        recipe = f"batch_size {plan.batch_size}; {recipe}"
    keep(options, length, passed_on, rows, recipe, str(run.setup.runtime.device))
    for result, out in zip(results, outs):
        if result.log:  # written last, as they change what git describes
            LOGS.mkdir(exist_ok=True)
            log = (out / "train.log").read_text()
            Path(result.log).write_text(log.replace(f"{options.out}/", "OUT/").replace(f"{options.images}/", "DIR/"))
    if len(whole) < len(results):
        raise SystemExit(1)


def keep(options: argparse.Namespace, length: list[str], passed_on: list[str], rows: list[tuple[str, ...]], recipe: str,
         device: str = "cpu") -> None:
    flags = ["--quick"] * options.quick + [f"--lightly {options.lightly}"] * bool(options.lightly)
    first = ["--first-seed", str(options.first_seed)] * bool(options.first_seed)
    words = [options.set, *length, "--seeds", str(options.seeds), *first, *flags,
             *([] if options.set == "digits" else ["--images", "DIR"]), *passed_on]
    text = (f"`python -m tests.bench.accuracy {' '.join(words)}`: {environment(device, 'torchvision', 'scikit-learn')}\n\n"
            f"{recipe}\n\n{markdown(('run', *COLUMNS), rows)}")
    show(f"Accuracy on {options.set}", text, options)


if __name__ == "__main__":
    main()
