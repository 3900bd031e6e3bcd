"""Time `python -m byol_core.embed` beside lightly's embedding loop, from image files to features, names and labels:

    python -m tests.bench.embed --threads 1 --rounds 2 --images cifar10/train
"""

import argparse
import contextlib
import importlib
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision

from byol_core import embed
from byol_core.pretrained import load_pretrained, untrained_backbone
from byol_core.system.files import export_backbone
from byol_core.views.recipes import IMAGENET_MEAN, IMAGENET_STD
from tests.bench import rivals
from tests.bench.table import environment, markdown, parse, show, side_by_side

SIZE, BATCH = 32, 256
OURS, THEIRS = "**byol_core.embed**", "lightly SelfSupervisedEmbedding.embed"


def write_backbone(folder: Path) -> Path:
    folder.mkdir()
    backbone = untrained_backbone("resnet18", False, SIZE, seed=0)[0]
    export_backbone(folder, backbone.state_dict(), {
        "arch": "resnet18", "small_stem": False, "image_size": SIZE, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
        "seed": 0, "whole_image": False, "interpolation": "bicubic", "network": "online"})
    return folder / "backbone.pt"


def ours(backbone: Path, data: Path, out: Path, device: str) -> Callable[[], object]:
    options = embed.build_parser().parse_args(
        ["--checkpoint", str(backbone), "--data", str(data), "--out", str(out), "--device", device, "--workers", "0"])
    embedding = embed.prepare(options)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            embed.carry_out(embedding)  # to a file on the disk, which lightly leaves to its caller
    return run


def lightly(backbone: Path, data: Path, device: str) -> Callable[[], tuple]:
    embedding = importlib.import_module("lightly.embedding")
    transforms = torchvision.transforms.Compose([torchvision.transforms.ToTensor(),
                                                 torchvision.transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    dataset = importlib.import_module("lightly.data").LightlyDataset(str(data), transform=transforms)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH)
    model = torch.nn.Module()
    model.backbone = load_pretrained(backbone).backbone.to(device)
    loop = embedding.SelfSupervisedEmbedding(model, None, None, None)

    def run() -> tuple:
        with contextlib.redirect_stderr(io.StringIO()):
            return loop.embed(loader, device=torch.device(device))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help=f"folder of {SIZE}-pixel JPEGs")
    options = parse(parser)
    count = sum(1 for path in options.images.rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as name:
        backbone, out = write_backbone(Path(name) / "run"), Path(name) / "embeddings.npz"
        functions: dict[str, Callable[[], object]] = {OURS: ours(backbone, options.images, out, options.device)}
        for peer, theirs in rivals.present({THEIRS: partial(lightly, backbone, options.images, options.device)}):
            functions[peer] = theirs
            functions[OURS]()
            found, wanted = np.load(out)["embeddings"], theirs()[0]  # of the same work, though it may be done in bf16
            assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
        clock = time.process_time if options.device == "cpu" else time.perf_counter  # which other processes disturb less
        times = side_by_side(functions, options.device, options.rounds, 0, clock)
    rows = [(f"resnet18, ImageNet stem: {name}", f"{value:.0f}", f"{1000 * count / value:.0f}", f"{value / times[OURS]:.2f}")
            for name, value in times.items()]
    what = "median ms of the processor" if options.device == "cpu" else "median ms"
    table = markdown(("embedding", what, "images/s", "times ours"), rows)
    packages = ["lightly"] if THEIRS in times else []
    show(f"Embedding {count} JPEGs of {SIZE}x{SIZE} from files", f"{environment(options.device, *packages)}\n\n{table}",
         options)


if __name__ == "__main__":
    main()
