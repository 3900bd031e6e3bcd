"""Time `python -m byol_core.embed` beside lightly's embedding loop, from image files to features, names and labels:

    python -m tests.bench.embed --threads 1 --rounds 5
    python -m tests.bench.embed --threads 1 --rounds 2 --images cifar10/train
"""

import contextlib
import importlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from byol_core import embed
from byol_core.pretrained import load_pretrained, untrained_backbone
from byol_core.system.files import export_backbone
from byol_core.views.recipes import IMAGENET_MEAN, IMAGENET_STD
from tests.bench.table import arguments, environment, markdown, show, side_by_side

IMAGES, SIZE, BATCH = 512, 32, 256  # what one core does in half a minute


def write_images(folder: Path) -> Path:
    """JPEGs of the size of CIFAR's, smooth as photographs are, in ten classes."""
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path, quality=95)
    return folder


def write_backbone(folder: Path, small_stem: bool) -> Path:
    folder.mkdir()
    backbone = untrained_backbone("resnet18", small_stem, SIZE, seed=0)[0]
    export_backbone(folder, backbone.state_dict(), {
        "arch": "resnet18", "small_stem": small_stem, "image_size": SIZE, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
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
    options = arguments(__doc__, images=f"folder of {SIZE}-pixel JPEGs (default: {IMAGES} drawn ones); then with the ImageNet "
                        "stem alone, and without runs to warm up")
    rows = []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(name)
        images = options.images or write_images(place / "images")
        clock = time.process_time if options.device == "cpu" else time.perf_counter  # which other processes disturb less
        count = sum(1 for path in images.rglob("*.jpg"))
        for stem, small_stem in (("ImageNet stem", False), ("small stem", True))[:1 if options.images else 2]:
            backbone, out = write_backbone(place / stem, small_stem), place / "embeddings.npz"
            functions: dict[str, Callable[[], object]] = {
                "**byol_core.embed**": ours(backbone, images, out, options.device)}
            try:
                theirs = lightly(backbone, images, options.device)
                functions["lightly SelfSupervisedEmbedding.embed"] = theirs
                functions["**byol_core.embed**"]()
                assert np.allclose(np.load(out)["embeddings"], theirs()[0], atol=1e-3)  # the same work is done
            except ImportError as error:
                print(f"lightly skipped: {error}")
            times = side_by_side(functions, options.device, options.rounds, 0 if options.images else 2, clock)
            for function, value in times.items():
                ratio = value / times["**byol_core.embed**"]
                rows.append((f"resnet18, {stem}: {function}", f"{value:.0f}", f"{1000 * count / value:.0f}", f"{ratio:.2f}"))
    what = "median ms of the processor" if options.device == "cpu" else "median ms"
    table = markdown(("embedding", what, "images/s", "times ours"), rows)
    packages = ["lightly"] if any("lightly" in row[0] for row in rows) else []
    show(f"Embedding {count} JPEGs of {SIZE}x{SIZE} from files", f"{environment(options.device, *packages)}\n\n{table}",
         options)


if __name__ == "__main__":
    main()
