"""Does anything diverge or collapse at the defaults? Short runs of the main job on several sets, batch by batch.

    python -m tests.bench.stability digits path/to/cifar10/train path/to/photos [--batches 32 256 4096] [--epochs N]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from byol_core.report.facts import read_run
from tests.bench.table import DEVICE, add_output, environment, markdown, show
from tests.helpers.forking import REPOSITORY

AT_ONCE = 512  # images of a micro-batch at the most
COLUMNS = ("images", "batch", "updates", "lr", "loss, first to last", "lowest spread", "rank, last", "kNN (untrained)",
           "verdict")


def run_of(data: str, batch: int, epochs: int, options: list[str]) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as place:
        words = ["--data", data, "--out", f"{place}/out", "--epochs", str(epochs), "--batch-size", str(batch),
                 "--accum-steps", str(max(1, batch // AT_ONCE)), *options]
        done = subprocess.run([sys.executable, str(REPOSITORY / "train.py"), *words], capture_output=True, text=True)
        if done.returncode != 0:  # diverged, or no such batch; what it said last says which
            reason = done.stderr.strip().splitlines()[-1].removeprefix("error: ").partition(" - ")[0]
            return Path(data).name, str(batch), *["-"] * 6, f"failed: {reason}"
        facts = read_run(Path(place) / "out")
        summary, records = facts.summary, [record for record in facts.records if "loss" in record]
        knn = "-" if summary["knn"] is None else f"{summary['knn']:.1%} ({summary['knn_untrained']:.1%})"
        return (f"{Path(data).name}: {summary['images']}", str(batch), str(summary["updates"]),
                f"{facts.plan['lr']:.3g}", f"{records[0]['loss']:.2f} to {records[-1]['loss']:.2f}",
                f"{min(record['spread'] for record in records):.2f}",
                f"{records[-1]['rank']:.1f} of {records[-1]['rank_limit']:.0f}", knn,
                facts.verdict.word)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="digits, or folders of images")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512, 1024, 4096])
    parser.add_argument("--epochs", type=int, default=10)
    add_output(parser)
    options, passed_on = parser.parse_known_args()
    missing = [data for data in options.data if data != "digits" and not Path(data).exists()]
    if missing:
        parser.error(f"no such folder: {missing[0]}")
    rows = []
    for data in options.data:
        for batch in options.batches:
            rows.append(run_of(data, batch, options.epochs, passed_on))
            print(" | ".join(rows[-1]), flush=True)
    command = f"--epochs {options.epochs} {' '.join(passed_on)}".strip()
    show("Defaults from batch to batch", f"`python -m tests.bench.stability ... {command}`: {environment(DEVICE)}\n\n"
         f"{markdown(COLUMNS, rows)}", options)


if __name__ == "__main__":
    main()
