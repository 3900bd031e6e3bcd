"""What a change of the recipe is worth: short trainings of many variants on one set of images, and a table of what they learn.

    python -m tests.bench.recipes --images tiny64 --minutes 15 --seeds 3 "as it is:" "slow predictor: predictor_lr=1"
    python -m tests.bench.recipes --images tiny64 --updates 2000 --variants variants.txt --write

A variant is "name: field=value field=value ...", a line of the file or an argument. Its fields are

    any option of train.py, with underscores         batch_size=64  arch=resnet18  lr=0.12
    what a plan has and no option offers             warmup_epochs=2
    any number of a view, for both or for each       crop_scale=0.2..1  blur=0.5/0.1  solarize=0  hue=0
    colour: a factor on the strengths of its changes colour=0.5
    bn_momentum: of every batch norm                 bn_momentum=0.01
    zero_init=true: residual blocks begin as nothing (the last batch norm of each has weight 0)
    from_size=16  from_crop=0.6  from_colour=0.2: pixels of a view, the smallest share of an image in it, and a factor on
    colours, in the first epoch; from there they go evenly to the recipe's own, which hold in the last quarter of the run
    small_crops=2  small_size=16: that many smaller crops of each view, of so many pixels, are predicted as it is

--images is a folder with train/<class>/ and test/<class>/. Variants are compared on a fifth of train/ whose labels the probes
do not see; with --final they are measured on test/, for numbers that are reported: do not choose by those. The table has the
mean over seeds and its deviation, how much that is above the untrained network, and the target's weights beside the online
network's. Runs go on where they were cut off, and each result is kept in results.jsonl the moment it is there.
"""

import argparse
import contextlib
import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_core.evaluate.scoring import Scorer
from byol_core.images.image_set import scan
from byol_core.networks import BYOL
from byol_core.run.data import Loaded, load
from byol_core.run.folder import open_run_folder
from byol_core.run.options import TrainConfig, build_parser, parse_config
from byol_core.run.plan import Choice, Plan, make_plan
from byol_core.run.run import Run, fit_into
from byol_core.views.batches import DeviceBatches, Views
from byol_core.views.pixels import Facts, look_at
from byol_core.views.recipes import ViewRecipe
from tests.bench.table import add_output, environment, markdown, show

ACCURACIES = ("kNN 20", "linear", "1 label", "5 labels")
COLUMNS = ("network", "minutes", "updates", "images/s", *ACCURACIES, "rank", "spread")
COLOURS = ("brightness", "contrast", "saturation", "hue")
Row = dict[str, dict[str, Any]]  # of the online network, and of the target
OWN = ("colour", "bn_momentum", "zero_init", "from_size", "from_crop", "from_colour", "small_crops", "small_size")
FULL_FROM = 0.75  # of the run: what grows has grown by then
EVEN = 4  # pixels by which views grow


@dataclass(frozen=True)
class Variant:
    """A recipe with some of its fields changed."""

    name: str
    fields: dict[str, str]


def parse_variant(text: str) -> Variant:
    """Raises: ValueError for a field that is none."""
    name, _, rest = text.partition(":")
    given = dict(word.partition("=")[::2] for word in rest.split())
    known = {field.name for kind in (TrainConfig, Plan, ViewRecipe) for field in fields(kind)} | set(OWN)
    unknown = sorted(given.keys() - known)
    empty = [field for field, value in given.items() if not value]
    if unknown or empty or not name.strip():
        raise ValueError(f"variant {text!r}: no field {', '.join(unknown)}" if unknown else
                         f"variant {text!r}: {', '.join(empty)} has no value" if empty else f"variant {text!r} has no name")
    return Variant(name.strip(), given)


def config_of(variant: Variant, data: Path, out: Path, seed: int) -> TrainConfig:
    """The options of train.py that a variant names. Raises: SystemExit as train.py itself does."""
    flags = {action.dest: action for action in build_parser()._actions}
    words: list[str] = []
    for name, value in variant.fields.items():
        if name in flags and flags[name].nargs == 0:
            words.append(flags[name].option_strings[value.lower() in ("false", "0")])  # --small-stem or --no-small-stem
        elif name in flags:
            words.append(f"{flags[name].option_strings[0]}={value}")
    return parse_config([*words, "--data", str(data), "--out", str(out), "--seed", str(seed), "--no-eval"])


def plan_of(variant: Variant, config: TrainConfig, facts: Facts, seen: int, network: Choice | None = None) -> Plan:
    """`make_plan`, and what of it the variant changes. Raises: ValueError."""
    plan = make_plan(config, facts, seen=seen, network=network)
    options = {field.name for field in fields(TrainConfig)}
    changed = {name: type(getattr(plan, name))(value) for name, value in variant.fields.items()
               if name not in options and hasattr(plan, name)}
    return replace(plan, **changed, views=(view_of(variant, 0, plan.views[0]), view_of(variant, 1, plan.views[1])))


def view_of(variant: Variant, number: int, view: ViewRecipe) -> ViewRecipe:
    """View 0 or 1 with the variant's numbers: "0.5" for both, "0.5/0.1" for each, "0.2..1" for a range."""
    changed: dict[str, Any] = colours_times(float(variant.fields.get("colour", "1")), view)
    for field in fields(ViewRecipe):
        if field.name not in variant.fields or field.name in ("size", "mean", "std"):
            continue
        value = variant.fields[field.name].split("/")[-1 if number else 0]
        if ".." in value:
            low, high = map(float, value.split(".."))
            changed[field.name] = (low, high)
        elif field.name == "crop_scale":  # none
            changed[field.name] = None
        else:
            changed[field.name] = value if field.name == "interpolation" else type(getattr(view, field.name))(float(value))
    return replace(view, **changed)


def colours_times(factor: float, view: ViewRecipe) -> dict[str, float]:
    return {name: factor * getattr(view, name) for name in COLOURS}


def grown(variant: Variant, view: ViewRecipe, share: float) -> ViewRecipe:
    """The view of a moment of the run. share: of the way to the recipe's own, from 0 to 1."""
    def between(name: str, whole: float) -> float:
        first = float(variant.fields.get(name, whole))
        return first + (whole - first) * share

    changed: dict[str, Any] = colours_times(between("from_colour", 1.0), view)
    if view.crop_scale is not None:
        changed["crop_scale"] = (between("from_crop", view.crop_scale[0]), view.crop_scale[1])
    size = between("from_size", view.size)
    return replace(view, **changed, size=view.size if share >= 1 else round(size / EVEN) * EVEN)


def let_grow(variant: Variant, run: Run) -> None:
    """Every epoch has views of its own."""
    batches = run.data.views
    if not variant.fields.keys() & {"from_size", "from_crop", "from_colour"}:
        return
    assert isinstance(batches, DeviceBatches), "views grow where they are made of images in memory"
    whole, made, last = batches.recipes, batches.epoch, FULL_FROM * run.setup.plan.epochs

    def epoch(number: int, start: int = 0) -> Iterator[Views]:
        share = min(number / last, 1.0)
        batches.recipes = grown(variant, whole[0], share), grown(variant, whole[1], share)
        return made(number, start)

    batches.epoch = epoch  # type: ignore[method-assign, assignment]


def change_network(variant: Variant, network: nn.Module) -> None:
    """What of the network a variant changes, before any training."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and "bn_momentum" in variant.fields:
            module.momentum = float(variant.fields["bn_momentum"])
        last = getattr(module, "bn3", getattr(module, "bn2", None))
        if hasattr(module, "downsample") and last is not None and variant.fields.get("zero_init") == "true":
            nn.init.zeros_(last.weight)
    if "small_crops" in variant.fields:
        assert isinstance(network, BYOL)
        predict_small_crops(network, int(variant.fields["small_crops"]), int(variant.fields.get("small_size", "16")))


def predict_small_crops(model: BYOL, count: int, size: int) -> None:
    """Of `count` squares of each view, too, the other view's target is predicted; they lie alike in a whole batch."""
    forward = model.forward

    def with_crops(view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        prediction1, prediction2, projection1, projection2 = forward(view1, view2)
        more: tuple[list[Tensor], list[Tensor]] = [prediction1], [prediction2]
        for view, predictions in zip((view1, view2), more):
            for _ in range(count):
                top, left = torch.randint(view.shape[-1] - size + 1, (2,)).tolist()
                predictions.append(model.online(view[..., top:top + size, left:left + size]))
        return (torch.cat(more[0]), torch.cat(more[1]), projection1.repeat(count + 1, 1), projection2.repeat(count + 1, 1))

    model.forward = with_crops  # type: ignore[method-assign]


def begun(variant: Variant, seed: int, options: argparse.Namespace, stack: contextlib.ExitStack) -> Run:
    """A run of one variant with one seed in a folder of its own, which the stack closes: new, or to be gone on with."""
    place = options.out / options.images.resolve().name / re.sub(r"\W+", "-", variant.name)
    out = stack.enter_context(open_run_folder(place / f"seed-{seed}-{options.minutes or options.updates:g}", True))
    config = config_of(variant, options.images / "train", out, seed)
    files = scan(config.data)
    facts = look_at(files)
    kept = out.with_name(f"{out.name}-length.json")
    planned = partial(plan_of, variant, config, facts)

    def run_of(plan: Plan, loaded: Loaded | None) -> Run:
        run = Run(config, plan, files, out, loaded=loaded)
        change_network(variant, run.state.model)
        let_grow(variant, run)
        return run

    if not kept.exists():
        if options.minutes is None:
            plan = planned(facts.images)
            seen, network = options.updates * plan.batch_size, plan.network
        else:
            seen, network, _ = fit_into(options.minutes, planned, run_of)
        kept.write_text(json.dumps([seen, asdict(network)]))
    seen, network = json.loads(kept.read_text())
    run = run_of(planned(seen, Choice(**network)), None)
    if (out / "last.pt").exists():
        run.resume()
    return run


def accuracies(scorer: Scorer, backbone: nn.Module) -> dict[str, float | None]:
    """In percent."""
    scores = scorer.measure(backbone)
    named = zip(ACCURACIES, ("knn", "linear", "linear_1", "linear_5"))
    return {name: None if (value := scores.get(key)) is None else 100 * value for name, key in named}


def one(variant: Variant, seed: int, options: argparse.Namespace, baselines: dict[str, dict[str, float | None]]
        ) -> tuple[str, Row]:
    """(network, row) of a variant with one seed; its untrained network and raw pixels are measured where they are not yet.

    The row is what training took and what both networks reached.
    """
    with contextlib.ExitStack() as stack:
        run = begun(variant, seed, options, stack)
        setup, plan, log = run.setup, run.setup.plan, run.log
        test = load(setup, scan(str(options.images / "test")), log.say)[0] if options.final else None
        scorer = Scorer(run.images, test, plan.plain, setup.runtime, setup.workers)
        views = f", views of {plan.view_size}" * (plan.view_size != plan.image_size)
        zero = ", zero_init" * (variant.fields.get("zero_init") == "true")
        network = f"{plan.arch} at {plan.image_size}{views}{', small stem' * plan.small_stem}{zero}"
        untrained = setup.new_model()
        change_network(variant, untrained)
        for name, backbone in ((f"untrained {network}, seed {seed}", untrained.online.backbone),
                               (f"raw pixels at {plan.image_size}", nn.Flatten())):
            if name not in baselines:
                baselines[name] = accuracies(scorer, backbone)
        run.train()
        updates = run.progress.updates
        took = {"minutes": log.seconds / 60, "updates": updates,
                "images/s": updates * plan.batch_size / max(log.seconds, 1e-9), "rank": log.last.get("rank"),
                "spread": log.last.get("spread")}
        return network, {"": took | accuracies(scorer, run.state.backbone),
                         ", target": accuracies(scorer, run.state.model.target.backbone)}


def spread_of(values: Sequence[float | None], form: str, below: float | None = None) -> str:
    """"mean ± deviation (+ how much it is above)" of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = statistics.mean(known)
    text = f"{mean:{form}}" + (f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else "")
    return text if below is None else f"{text} ({mean - below:+{form}})"


def lines_of(name: str, network: str, rows: list[Row], untrained: list[dict[str, float | None]]) -> list[tuple[str, ...]]:
    """The lines of the table for one variant: the online network's and the target's, over seeds."""
    forms = {"minutes": ".1f", "updates": ".0f", "images/s": ".0f", "rank": ".1f", "spread": ".2f"}
    known = {key: [value for row in untrained if (value := row[key]) is not None] for key in ACCURACIES}
    before = {key: statistics.mean(values) for key, values in known.items() if values}
    lines = []
    for which in rows[0]:
        cells = [spread_of([row[which].get(column) for row in rows], forms.get(column, ".1f"), before.get(column))
                 for column in COLUMNS[1:]]
        lines.append((name + which, network, *cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("variant", nargs="*", help='"name: field=value ..."')
    parser.add_argument("--variants", type=Path, help="file with a variant per line")
    parser.add_argument("--images", type=Path, required=True, help="folder with train/ and, for --final, test/")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of training; as many updates as fit")
    length.add_argument("--updates", type=int)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant, with seeds 0, 1, ...")
    parser.add_argument("--final", action="store_true", help="measure on test/, not on a part of train/")
    parser.add_argument("--out", type=Path, default=Path("runs", "recipes"))
    add_output(parser)
    options = parser.parse_args()
    lines = options.variants.read_text().splitlines() if options.variants else []
    try:
        variants = [parse_variant(line) for line in [*lines, *options.variant] if line.strip()]
    except ValueError as error:
        parser.error(str(error))
    if not variants:
        parser.error("no variant is given")
    baselines: dict[str, dict[str, float | None]] = {}
    table: list[tuple[str, ...]] = []
    for variant in variants:
        rows = []
        for seed in range(options.seeds):
            network, row = one(variant, seed, options, baselines)
            rows.append(row)
            with (options.out / options.images.resolve().name / "results.jsonl").open("a") as file:
                file.write(json.dumps({**asdict(variant), "seed": seed, "final": options.final, **row}) + "\n")
        untrained = [value for name, value in baselines.items() if name.startswith(f"untrained {network}, seed")]
        table += lines_of(variant.name, network, rows, untrained)
        print("\n".join(" | ".join(line) for line in table[-2:]), flush=True)
    for name, values in baselines.items():
        table.append((name, *["-"] * 4, *(spread_of([values[key]], ".1f") for key in ACCURACIES), "-", "-"))
    given = "\n".join(f"- {variant.name}: {' '.join(f'{key}={value}' for key, value in variant.fields.items())}"
                      for variant in variants)
    long = f"--minutes {options.minutes:g}" if options.minutes else f"--updates {options.updates}"
    on = "test/" if options.final else "a fifth of train/, whose labels the probes did not see"
    show(f"Recipes on {options.images.resolve().name}",
         f"`python -m tests.bench.recipes {long} --seeds {options.seeds}{' --final' * options.final} ...`: "
         f"{environment('cpu', 'torchvision', 'scikit-learn')}\n\n"
         f"Measured on {on}; in brackets: above untrained.\n\n{given}\n\n{markdown(('variant', *COLUMNS), table)}", options)


if __name__ == "__main__":
    main()
