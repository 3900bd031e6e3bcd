"""How cost grows with images, processes, batch and network.

    python -m tests.bench.scaling images|processes|traffic|batch|network [--largest N] [--write]
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from byol_core.backbones import build_backbone
from byol_core.images.image_set import scan
from byol_core.networks import BYOL
from byol_core.runtime import peak_memory
from byol_core.training import train
from tests.bench.table import add_output, environment, markdown, show
from tests.helpers.forking import REPOSITORY

PER_FOLDER, LINKS = 1000, 30_000  # files in a folder; names of one file, of which a file system allows some 65,000
TRAINED_AT_MOST = 100_000  # images; more are only listed
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # columns and rows
TINY = ("--arch", "conv6", "--hidden-dim", "256", "--projection-dim", "64", "--no-eval", "--device", "cpu",
        "--workers", "0")


def folder_of(images: int, place: Path) -> Path:
    """So many names of tiny PNGs, a thousand to a folder."""
    source = place / ".sources"
    source.mkdir(parents=True)
    for number in range(-(-images // LINKS)):
        Image.new("RGB", (8, 8), (number * 40 % 256, 90, 30)).save(source / f"{number}.png")
    for start in range(0, images, PER_FOLDER):
        folder = place / f"{start // PER_FOLDER:05d}"
        folder.mkdir()
        for number in range(start, min(start + PER_FOLDER, images)):
            os.link(source / f"{number // LINKS}.png", folder / f"{number:07d}.png")
    return place


def images(largest: int) -> Table:
    """Seconds to list and to train one epoch; per image both should be flat."""
    counts = [count for count in (1_000, 10_000, 100_000, 1_000_000) if count <= largest]
    rows: list[tuple[str, ...]] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            data = folder_of(count, Path(place) / "imgs")
            began = time.perf_counter()
            files = scan(data)
            listed = time.perf_counter() - began
            assert len(files) == count
            trained = ("not run", "")
            if count <= TRAINED_AT_MOST:
                epoch = run_seconds(data, Path(place) / "out", "--epochs", "1", "--batch-size", "250")
                trained = (f"{epoch:.1f}", f"{1e6 * epoch / count:.0f}")
            rows.append((f"{count:,}", f"{listed:.2f}", f"{1e6 * listed / count:.1f}", f"{len(files.names) / 1e6:.1f}",
                         *trained))
    return ("images", "listing, s", "us per image", "names, MB", "training an epoch, s", "us per image"), rows


def run_seconds(data: Path, out: Path, *options: str, processes: int = 1) -> float:
    """Seconds of training that a run of the main job says it took."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["--data", str(data), "--out", str(out), *TINY, *options]
    subprocess.run([sys.executable, *launcher, str(REPOSITORY / "train.py"), *words], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(json.loads((out / "summary.json").read_text())["seconds"])


def processes(largest: int) -> Table:
    """Images per second of 1 to 4 processes of one thread each; more than there are cores cannot help."""
    rows, rates = list[tuple[str, ...]](), list[float]()
    with tempfile.TemporaryDirectory() as place:
        data = folder_of(4_800, Path(place) / "imgs")
        for count in (1, 2, 3, 4):
            seconds = run_seconds(data, Path(place) / f"out{count}", "--epochs", "2", "--batch-size", "240", processes=count)
            rates.append(2 * 4_800 / seconds)
    for count, rate in zip((1, 2, 3, 4), rates):
        rows.append((str(count), f"{rate:.0f}", f"{rate / rates[0]:.2f}"))
    return ("processes", "images/s", f"times one process ({os.cpu_count()} cores)"), rows


def traffic(largest: int) -> Table:
    """Bytes that each process sends per update, as the loopback device counts them: a run of two epochs less one of one.

    A ring sends the gradients 2 (n - 1) / n times. What comes on top is for n processes: one number of each, sent alike, by
    which they agree on stopping, the mean of the loss, what an epoch's end takes, and the headers of all packets.
    """
    rows: list[tuple[str, ...]] = []
    gradients = 4 * sum(p.numel() for p in BYOL(*build_backbone("conv6"), 256, 64).online.parameters())
    with tempfile.TemporaryDirectory() as place:
        data = folder_of(9_600, Path(place) / "imgs")
        for count in (2, 4, 8):
            sent = []
            for epochs in (1, 2):
                before = sent_over_loopback()
                run_seconds(data, Path(place) / f"out{count}-{epochs}", "--epochs", str(epochs), "--batch-size", "240",
                            processes=count)
                sent.append(sent_over_loopback() - before)
            each, ring = (sent[1] - sent[0]) / (9_600 // 240) / count, 2 * (count - 1) / count * gradients
            rows.append((str(count), f"{each / 1e3:.1f}", f"{ring / 1e3:.1f}", f"{(each - ring) / 1e3:.1f}",
                         f"{16 * (count - 1)}"))
    rows.append(("1,000, by reckoning", "", f"{2 * 0.999 * gradients / 1e3:.1f}", "", f"{16 * 999}"))
    return ("processes", "kB sent by each", "gradients, by reckoning", "the rest", "bytes to agree on stopping"), rows


def sent_over_loopback() -> int:
    """Bytes since the system started; Linux alone."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def batch(largest: int) -> Table:
    """Images per second of batches of 32 to 4096, in micro-batches of at most 256: accumulation should cost nothing."""
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as place:
        data = folder_of(8_192, Path(place) / "imgs")
        for size in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            steps = max(1, size // 256)
            seconds = run_seconds(data, Path(place) / f"out{size}", "--epochs", "1", "--batch-size", str(size),
                                  "--accum-steps", str(steps))
            rows.append((str(size), str(steps), f"{8_192 / seconds:.0f}"))
    return ("batch", "micro-batches", "images/s"), rows


def network(largest: int) -> Table:
    """Seconds of a step of 32 images of 64 pixels, and the memory it takes."""
    rows: list[tuple[str, ...]] = []
    for name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        script = f"from tests.bench.scaling import step_of; print(*step_of({name!r}))"
        printed = subprocess.check_output([sys.executable, "-c", script], cwd=REPOSITORY, text=True)
        seconds, memory = map(float, printed.split())
        weights = sum(p.numel() for p in BYOL(*build_backbone(name)).online.parameters()) / 1e6
        rows.append((name, f"{weights:.1f}", f"{seconds:.2f}", f"{memory / 1e6:.0f}"))
    return ("network", "M parameters", "s per step", "peak MB"), rows


def step_of(name: str) -> tuple[float, int]:
    """(median seconds of a training step, peak bytes of the process); for a process of its own."""
    model = BYOL(*build_backbone(name))
    ends: list[float] = []
    views = [(torch.randn(32, 3, 64, 64), torch.randn(32, 3, 64, 64))] * 5
    train(model, views, 1, after_step=lambda progress, step: ends.append(time.perf_counter()))
    return statistics.median(after - before for before, after in zip(ends, ends[1:])), peak_memory(torch.device("cpu"))


KINDS = {kind.__name__: kind for kind in (images, processes, traffic, batch, network)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--largest", type=int, default=1_000_000, help="most images to be listed")
    add_output(parser)
    options = parser.parse_args()
    kind = KINDS[options.kind]
    columns, rows = kind(options.largest)
    text = f"{inspect.getdoc(kind)}\n\n{markdown(columns, rows)}\n\n{environment('cpu')}"
    show(f"Scaling: {options.kind}", text, options)


if __name__ == "__main__":
    main()
