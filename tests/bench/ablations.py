"""What each part of the method is worth on the embedded digits: one short training for each part broken.

    python -m tests.bench.ablations --seeds 3 --epochs 25 --write
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from tests.bench.table import add_output, environment, markdown, show
from tests.helpers.digits import VARIATIONS, train_digits

COLUMNS = ("linear_1", "linear_5", "knn", "loss", "spread", "rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--only", nargs="*", choices=list(VARIATIONS), default=list(VARIATIONS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.only:
        began = time.monotonic()
        scores = [train_digits(Path("runs", "data", "digits"), seed, options.epochs, name) for seed in range(options.seeds)]
        row = [name]
        for column in COLUMNS:
            values = [(score[column] or 0.0) * (100 if column in COLUMNS[:3] else 1) for score in scores]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        rows.append(tuple(row))
        print(" | ".join(row), f"({time.monotonic() - began:.0f} s)", flush=True)
    command = f"python -m tests.bench.ablations --seeds {options.seeds} --epochs {options.epochs}"
    text = f"`{command}`: {environment('cpu')}\n\n{markdown(('broken part', *COLUMNS), rows)}"
    show("What each part of the method is worth on digits", text, options)


if __name__ == "__main__":
    main()
