"""Train, measure and keep a row: what a recipe reaches, in how long, on which machine.

    python -m tests.bench.accuracy digits --epochs 80 --seeds 5 --write
    python -m tests.bench.accuracy cifar10 --images data/cifar10 --minutes 10 --seeds 2 --write

Options that this command does not know go to train.py, such as --arch, --batch-size, --lr or --recipe. cifar10 is a
folder with train/<class>/ and test/<class>/. Every run's log stays in its folder under runs/accuracy.
"""

import argparse
import contextlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import train as command
from byol_core.config import parse_config
from byol_core.evaluate import knn_accuracy
from byol_core.plan import Plan
from byol_core.processes import ALONE
from tests.bench.table import environment, markdown, show

COLUMNS = ("epochs", "minutes", "images/s", "kNN 20, last", "kNN 20, best", "kNN 200, last", "linear, last", "1 label",
           "5 labels", "log")
MEASURED = 20  # times that kNN is measured on the way, for the best epoch


@dataclass
class Result:
    """One run: what it took and what it reached, accuracies in percent."""

    folder: Path
    epochs: int
    minutes: float
    images_per_second: float
    accuracies: dict[str, float | None]


def epochs_for(minutes: float, arguments: list[str], out: Path) -> int:
    """As many epochs as fit into so many minutes of training, by the time of a few updates."""
    with contextlib.ExitStack() as stack:
        run = command.prepare(parse_config([*arguments, "--out", str(out), "--no-eval"]), ALONE, stack)
        per_epoch = run.seconds_per_update() * run.parts.plan.updates_per_epoch
    return max(1, int(60 * minutes / per_epoch))


def train_once(arguments: list[str], epochs: int, seed: int, out: Path) -> tuple[Result, Plan]:
    options = [*arguments, "--epochs", str(epochs), "--seed", str(seed), "--out", str(out),
               "--eval-every", str(max(1, epochs // MEASURED))]
    if command.main([*options, "--resume"]) != 0:
        raise SystemExit(f"the run in {out} failed; see its train.log")
    summary = json.loads((out / "summary.json").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = [record["knn"] for record in records if "knn" in record] + [summary["knn"]]
    with contextlib.ExitStack() as stack:
        run = command.prepare(parse_config([*options, "--resume"]), ALONE, stack)
        fit, test = run.parts.scorer.features(run.parts.model.online.backbone)  # type: ignore[union-attr]
    accuracies = {"kNN 20, last": summary["knn"], "kNN 20, best": max(measured), "linear, last": summary["linear"],
                  "kNN 200, last": knn_accuracy(fit.x, fit.y, test.x, test.y, k=200),
                  "1 label": summary.get("linear_1"), "5 labels": summary.get("linear_5")}
    return Result(out, epochs, summary["seconds"] / 60, summary["images_per_second"],
                  {name: None if value is None else 100 * value for name, value in accuracies.items()}), run.parts.plan


def row(name: str, results: list[Result]) -> tuple[str, ...]:
    def mean(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return "-"
        return f"{statistics.mean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")

    cells = {"epochs": str(results[0].epochs), "minutes": mean([result.minutes for result in results]),
             "images/s": mean([result.images_per_second for result in results]),
             "log": str(results[0].folder / "train.log") if len(results) == 1 else ""}
    cells |= {key: mean([result.accuracies[key] for result in results]) for key in results[0].accuracies}
    return name, *(cells[column] for column in COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("digits", "cifar10"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int)
    length.add_argument("--minutes", type=float, help="of training; the epochs follow from the time of a few updates")
    parser.add_argument("--seeds", type=int, default=1, help="runs, with seeds 0, 1, ...")
    parser.add_argument("--images", type=Path, default=Path("data", "cifar10"), help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, default=Path("runs", "accuracy"))
    parser.add_argument("--write", action="store_true", help="append the table to RESULTS.md beside this file")
    options, passed_on = parser.parse_known_args()
    arguments = ["--data", "digits"] if options.set == "digits" else [
        "--data", str(options.images / "train"), "--eval-data", str(options.images / "test")]
    arguments += passed_on
    place = options.out / "-".join([options.set, *(word.strip("-").replace("/", "_") for word in passed_on)])
    epochs = options.epochs or (epochs_for(options.minutes, arguments, place / "timing") if options.minutes else 100)
    runs = [train_once(arguments, epochs, seed, place / f"{epochs}-epochs-seed-{seed}") for seed in range(options.seeds)]
    results, plan = [result for result, _ in runs], runs[0][1]
    rows = [row(f"seed {seed}", [result]) for seed, result in enumerate(results)]
    if len(results) > 1:
        rows.append(row("mean", results))
    recipe = "; ".join(f"{choice.name} {choice.value:.6g}" if isinstance(choice.value, float) else
                       f"{choice.name} {choice.value}" for choice in plan.choices)
    device = json.loads((results[0].folder / "summary.json").read_text())["device"]
    text = (f"`python -m tests.bench.accuracy {options.set} --epochs {epochs} --seeds {options.seeds} "
            f"{' '.join(passed_on)}`: {environment(device, 'torchvision', 'scikit-learn')}\n\n"
            f"batch {plan.batch_size}; {recipe}\n\n{markdown(('run', *COLUMNS), rows)}")
    show(f"Accuracy on {options.set}", text, options.write)


if __name__ == "__main__":
    main()
