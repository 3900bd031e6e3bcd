"""Do the data paths train alike? The loss on the way, by each path, from several seeds: means should agree within the noise.

    python -m tests.bench.trajectory --images path/to/cifar10/train [--seeds 3] [--epochs 10] [options of train.py]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.table import DEVICE, add_output, environment, markdown, show

ROOT = Path(__file__).parent.parent.parent
PATHS = {"held on the device": ("device", 2**31), "worker crops": ("device", 0), "the reference, --views cpu": ("cpu", 0)}
TRAIN = ("import sys; from byol_core.views import pixels; pixels.MEMORY_BUDGET = {}; import train; "
         "sys.exit(train.main(sys.argv[1:]))")
PARTS = 5  # of the run, whose mean losses are compared


def losses(images: Path, views: str, budget: int, options: list[str]) -> list[float]:
    """The mean loss of each fifth of a run. budget: bytes of decoded images that it may hold; with none workers crop them."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-c", TRAIN.format(budget), "--data", str(images.resolve()), "--out", f"{place}/out",
                        "--no-eval", "--views", views, *options], check=True, capture_output=True, cwd=ROOT)
        records = [json.loads(line) for line in (Path(place) / "out" / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]["update"]
    if len(records) < 2 * PARTS:
        raise SystemExit(f"{len(records)} lines of metrics are too few for {PARTS} parts - train for more --epochs")
    return [statistics.mean(record["loss"] for record in records if (record["update"] - 1) * PARTS // last == part)
            for part in range(PARTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    add_output(parser)
    options, passed_on = parser.parse_known_args()
    rows = []
    for name, path in PATHS.items():
        runs = [losses(options.images, *path, ["--seed", str(seed), "--epochs", str(options.epochs), *passed_on])
                for seed in range(options.seeds)]
        rows.append((name, *(f"{statistics.mean(part):.3f} ± {statistics.stdev(part):.3f}" for part in zip(*runs))))
        print(" | ".join(rows[-1]), flush=True)
    columns = ("views", *(f"loss, fifth {part + 1} of the run" for part in range(PARTS)))
    show("Loss by data path", f"`python -m tests.bench.trajectory --seeds {options.seeds} --epochs {options.epochs} "
         f"{' '.join(passed_on)}`: {environment(DEVICE)}\n\n{markdown(columns, rows)}", options)


if __name__ == "__main__":
    main()
