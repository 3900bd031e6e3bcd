"""How cost grows with images, processes, batch and network, and what ImageNet-1k would take by calculation.

    python -m tests.bench.scaling images|processes|traffic|batch|network|imagenet [--largest N] [--write]
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
from torch import nn

from byol_core.backbones import build_backbone
from byol_core.images.image_set import scan
from byol_core.networks import BYOL
from byol_core.runtime import peak_memory
from byol_core.training import Progress, Step, train
from tests.bench.table import add_output, environment, markdown, show

ROOT = Path(__file__).parent.parent.parent
PER_FOLDER, LINKS = 1000, 30_000  # files in a folder; names of one file, of which a file system allows some 65,000
TRAINED_AT_MOST = 100_000  # images; more are only listed
BAR = 20  # characters of the longest bar
TINY = ("--arch", "conv6", "--hidden-dim", "256", "--projection-dim", "64", "--no-eval", "--device", "cpu",
        "--workers", "0")
# For the calculation: an A100's published ResNet-50 training rate (NVIDIA DeepLearningExamples, mixed precision, one GPU),
# bandwidths as vendors state them (NVLink 3: 300 GB/s each way; HDR InfiniBand: 25 GB/s per machine, crossed once by a ring).
SUPERVISED_RATE, IMAGENET, EPOCHS = 2_500.0, 1_281_167, (100, 300, 1000)
NVLINK, INFINIBAND = 300e9, 25e9


def bars(values: list[float]) -> list[str]:
    return ["#" * max(1, round(BAR * value / max(values))) for value in values]


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


def images(largest: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Seconds to list and to train one epoch; per image both should be flat."""
    counts = [count for count in (1_000, 10_000, 100_000, 1_000_000) if count <= largest]
    rows, per_image = [], []
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            data = folder_of(count, Path(place) / "imgs")
            began = time.perf_counter()
            files = scan(data)
            listed = time.perf_counter() - began
            epoch = None
            if count <= TRAINED_AT_MOST:
                epoch = run_seconds(data, Path(place) / "out", "--epochs", "1", "--batch-size", "250")
            assert len(files) == count
            per_image.append(1e6 * listed / count)
            rows.append((f"{count:,}", f"{listed:.2f}", f"{per_image[-1]:.1f}", f"{len(files.names) / 1e6:.1f}",
                         "not run" if epoch is None else f"{epoch:.1f}",
                         "" if epoch is None else f"{1e6 * epoch / count:.0f}"))
    return (("images", "listing, s", "us per image", "names, MB", "training an epoch, s", "us per image",
             "listing per image"),
            [(*row, bar) for row, bar in zip(rows, bars(per_image))])


def run_seconds(data: Path, out: Path, *options: str, processes: int = 1) -> float:
    """Seconds of training that a run of the main job says it took."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), "--data", str(data), "--out", str(out), *TINY, *options]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(json.loads((out / "summary.json").read_text())["seconds"])


def processes(largest: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Images per second of 1 to 4 processes of one thread each; more than there are cores cannot help."""
    rows, rates = [], []
    with tempfile.TemporaryDirectory() as place:
        data = folder_of(4_800, Path(place) / "imgs")
        for count in (1, 2, 3, 4):
            seconds = run_seconds(data, Path(place) / f"out{count}", "--epochs", "2", "--batch-size", "240", processes=count)
            rates.append(2 * 4_800 / seconds)
    for count, rate in zip((1, 2, 3, 4), rates):
        rows.append((str(count), f"{rate:.0f}", f"{rate / rates[0]:.2f}"))
    return (("processes", "images/s", f"times one process ({os.cpu_count()} cores)", ""),
            [(*row, bar) for row, bar in zip(rows, bars(rates))])


def traffic(largest: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
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


def batch(largest: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Images per second of batches of 32 to 4096, in micro-batches of at most 256: accumulation should cost nothing."""
    rows, rates = [], []
    with tempfile.TemporaryDirectory() as place:
        data = folder_of(8_192, Path(place) / "imgs")
        sizes = (32, 64, 128, 256, 512, 1024, 2048, 4096)
        for size in sizes:
            steps = max(1, size // 256)
            seconds = run_seconds(data, Path(place) / f"out{size}", "--epochs", "1", "--batch-size", str(size),
                                  "--accum-steps", str(steps))
            rates.append(8_192 / seconds)
            rows.append((str(size), str(steps), f"{rates[-1]:.0f}"))
    return ("batch", "micro-batches", "images/s", ""), [(*row, bar) for row, bar in zip(rows, bars(rates))]


def network(largest: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Seconds of a step of 32 images of 64 pixels, and the memory it takes."""
    rows, times = [], []
    for name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        script = f"from tests.bench.scaling import step_of; print(*step_of({name!r}))"
        seconds, memory = map(float, subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True,
                                                    text=True).stdout.split())
        weights = sum(p.numel() for p in BYOL(*build_backbone(name)).online.parameters()) / 1e6
        times.append(seconds)
        rows.append((name, f"{weights:.1f}", f"{seconds:.2f}", f"{memory / 1e6:.0f}"))
    return (("network", "M parameters", "s per step", "peak MB", "s per step"),
            [(*row, bar) for row, bar in zip(rows, bars(times))])


def step_of(name: str) -> tuple[float, int]:
    """(median seconds of a training step, peak bytes of the process); for a process of its own."""
    model = BYOL(*build_backbone(name))
    ends: list[float] = []

    def after_step(progress: Progress, step: Step) -> None:
        ends.append(time.perf_counter())

    views = [(torch.randn(32, 3, 64, 64), torch.randn(32, 3, 64, 64))] * 5
    train(model, views, 1, after_step=after_step)
    return statistics.median(after - before for before, after in zip(ends, ends[1:])), peak_memory(torch.device("cpu"))


def times_a_supervised_step() -> float:
    """Seconds of one of our steps of ResNet-50 over those of a supervised one with as many images, both measured here."""
    backbone, dim = build_backbone("resnet50")
    network = nn.Sequential(backbone, nn.Linear(dim, 1000))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(1000, (32,))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return step_of("resnet50")[0] / statistics.median(times)


def imagenet(largest: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A calculation: ResNet-50 at 224 pixels, batch 4096, float32 gradients, a ring per update, sent while computing.

    One of our steps takes as many times a supervised one as measured here, and a supervised one what an A100's published
    rate says (2,500 images/s, mixed precision); data loading keeps up.
    """
    gradient = 4 * sum(p.numel() for p in BYOL(*build_backbone("resnet50")).online.parameters())
    times = times_a_supervised_step()
    rate = SUPERVISED_RATE / times  # images per second and GPU
    rows = []
    for gpus, bandwidth in ((8, NVLINK), (64, INFINIBAND)):
        compute = 4096 / gpus / rate
        traffic = 2 * (gpus - 1) / gpus * gradient  # bytes that each GPU sends per update
        exchange = traffic / bandwidth
        updates = IMAGENET // 4096
        hours = [epochs * updates * max(compute, exchange) / 3600 for epochs in EPOCHS]
        rows.append((str(gpus), f"{times:.2f}", f"{rate:.0f}", f"{1000 * compute:.0f}", f"{traffic / 1e6:.0f}",
                     f"{1000 * exchange:.1f}", *(f"{number:.1f}" for number in hours)))
    return (("GPUs", "times a supervised step, measured", "images/s and GPU", "ms of computing per update",
             "MB sent per GPU and update", "ms of sending", *(f"hours for {epochs} epochs" for epochs in EPOCHS)), rows)


KINDS = {kind.__name__: kind for kind in (images, processes, traffic, batch, network, imagenet)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--largest", type=int, default=1_000_000, help="most images to be listed")
    add_output(parser)
    options = parser.parse_args()
    kind = KINDS[options.kind]
    columns, rows = kind(options.largest)
    machine = f"{environment('cpu')}, load {os.getloadavg()[0]:.1f}"
    text = f"{inspect.getdoc(kind)}\n\n{markdown(columns, rows)}\n\n{machine}"
    show(f"Scaling: {options.kind}", text, options)


if __name__ == "__main__":
    main()
