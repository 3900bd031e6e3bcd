"""The benchmarks of speed on a GPU, one after the other in one call; each appends its table to RESULTS.md.

    python -m tests.bench --images path/to/cifar10/train --photos path/to/photos [--device cuda]

One that fails is named in the end, and keeps none of the others from running.
"""

import argparse
import subprocess
import sys
from pathlib import Path


def commands(images: Path, photos: Path, device: str) -> list[list[str]]:
    """A module of this package and its options, in each."""
    on, small, large = ["--device", device], ["--images", str(images)], ["--images", str(photos)]
    return [["ema", *on], ["lars", *on], ["step", *on, "--small-stem", "--batch", "512"],
            ["step", *on, "--arch", "resnet50", "--size", "224", "--batch", "256"],
            ["views", *on, *small, "--photos", str(photos)],
            ["loader", *on, *small, "--photos", str(photos), "--start", str(images)],
            ["end_to_end", *on, *small, "--case", "32s", "--batch", "512", "--updates", "50"],
            ["end_to_end", *on, *large, "--case", "224", "--arch", "resnet50", "--batch", "256", "--updates", "50"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of small images")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    failed = []
    for name, *words in commands(options.images, options.photos, options.device):
        print(f"+ python -m tests.bench.{name} {' '.join(words)}", flush=True)
        if subprocess.call([sys.executable, "-m", f"tests.bench.{name}", *words, "--write"]) != 0:
            failed.append(f"{name} {' '.join(words)}")
    for line in failed:
        print(f"failed: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
