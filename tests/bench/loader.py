"""Two finished views per image, in images per second of one core: our three paths beside what others put into a DataLoader.

    python -m tests.bench.loader --images cifar/train --photos photos
    python -m tests.bench.loader --photos photos --device cuda     ours finished on the GPU, others' views copied to it
    python -m tests.bench.loader --start cifar/train               the seconds before training: all files listed and decoded

Everything runs in one process with --threads threads (1: rates per core), file by file as from disk; the contenders take
turns, and a rate is the median over --rounds turns.
"""

import argparse
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from byol_core.images.image_set import ImageSet, scan
from byol_core.views.batches import DeviceBatches, Order, TimedBatches, WorkerBatches
from byol_core.views.pixels import ImageData, choose_workers, load_images
from byol_core.views.recipes import ViewRecipe, paper_recipes
from byol_core.views.worker_crops import CropBatches
from tests.bench import rivals
from tests.bench.table import environment, markdown, parse, show, side_by_side

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of small images, for views of 32 pixels")
    parser.add_argument("--photos", type=Path, help="folder of photographs, for views of 224 pixels")
    parser.add_argument("--start", type=Path, help="folder of images of one size, listed and decoded as a run starts with it")
    parser.add_argument("--count", type=int, default=96, help="images of a folder to use (default 96)")
    options = parse(parser, rounds=5, threads=1)
    if options.images is options.photos is options.start is None:
        parser.error("give --images, --photos or --start")
    if options.count < BATCH:
        parser.error(f"--count must be {BATCH} or more")
    for folder, size in ((options.images, 32), (options.photos, 224)):
        if folder is not None:
            compare(find(folder, options.count), size, options)
    if options.start is not None:
        start(options.start, options)


def start(folder: Path, options: argparse.Namespace) -> None:
    """Seconds until the images of a folder lie decoded on the device."""
    device, workers = torch.device(options.device), choose_workers(None)
    if not folder.is_dir() or in_memory(scan(folder), device) is None:
        raise SystemExit(f"{folder} is no folder of images of one size that fit into memory: only those are decoded before")
    rows: dict[str, Callable[[], object]] = {"listed": lambda: scan(folder)}
    for number in (0, workers):
        rows[f"listed and decoded, {number} workers"] = lambda number=number: load_images(  # type: ignore[misc]
            scan(folder), "device", device, print, number)
    milliseconds = side_by_side(rows, options.device, options.rounds, warm_up=1)
    table = [(name, f"{value / 1000:.1f}") for name, value in milliseconds.items()]
    show(f"Start: {len(scan(folder)):,} images", f"{environment(options.device, 'torchvision')}\n\n"
         + markdown(("before training", "seconds"), table), options)


def compare(paths: list[Path], size: int, options: argparse.Namespace) -> None:
    device, recipes = torch.device(options.device), paper_recipes(size)
    count = len(paths) // BATCH * BATCH
    if not count:
        raise SystemExit(f"{len(paths)} images are fewer than a batch of {BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder, "images.txt")
        listing.write_text("".join(f"{path.resolve()}\n" for path in paths[:count]))
        files = scan(listing)
    order = Order(count, BATCH)
    undecoded = load_images(files, "cpu", device, print)[0]
    crops, reference = CropBatches(undecoded, recipes, order, 0, device), WorkerBatches(undecoded, recipes, order, 0)
    rows: dict[str, Callable[[], object]] = {
        "**byol_core**: worker crops, finished on the device": lambda: deque(TimedBatches(crops, device).epoch(0), 0),
        "**byol_core**: worker crops, a worker's part alone": lambda: cropped(crops),
        "byol_core: the reference, --views cpu": lambda: copied(reference.epoch(0), device),
    }
    held = in_memory(files, device)
    if held is not None:
        resident = DeviceBatches(held, recipes, order)
        rows["**byol_core**: decoded once, held on the device"] = lambda: deque(TimedBatches(resident, device).epoch(0), 0)
    pipeline = [torchvision_view(recipe) for recipe in recipes]
    makers: dict[str, Callable[[], Any]] = {
        "torchvision v2 on PIL, in a DataLoader": lambda: lambda image: [view(image) for view in pipeline],
        "lightly's BYOL transform, in a DataLoader": lambda: rivals.lightly_transform(size, blur=True)}
    for name, transform in rivals.present(makers):
        loader = DataLoader(rivals.Photos(paths[:count], transform), batch_size=BATCH)
        rows[name] = partial(copied, loader, device)

    milliseconds = side_by_side(rows, options.device, options.rounds, warm_up=1)
    rates = {name: 1000 * count / value for name, value in milliseconds.items()}
    peer = rates.get("lightly's BYOL transform, in a DataLoader")
    table = [(name, f"{rate:,.0f}", f"{rate / peer:.2f}" if peer else "-")
             for name, rate in sorted(rates.items(), key=lambda item: -item[1])]
    text = f"{environment(options.device, 'torchvision')}\n\n{rivals.machine_limits(options.device)}\n\n" + markdown(
        ("two views of each image", "images/s", "times lightly's"), table)
    show(f"Loader: {count} images to {size} pixels, per core", text, options)


def in_memory(files: ImageSet, device: torch.device) -> ImageData | None:
    data = load_images(files, "device", device, print)[0]
    return data if data.pixels is not None else None


def cropped(crops: CropBatches) -> None:
    """What a worker does and sends."""
    dataset: Any = crops.loader.dataset
    for indices in crops.order.epoch(0).tolist():
        crops.loader.collate_fn(dataset.__getitems__([(0, index) for index in indices]))


def copied(batches: Iterable[Any], device: torch.device) -> None:
    for view1, view2 in batches:
        view1.to(device), view2.to(device)


def find(folder: Path, count: int) -> list[Path]:
    """`count` images spread evenly over the folder. Raises: ValueError where there are none."""
    files = scan(folder)
    return [files.path(index) for index in range(0, len(files), max(1, len(files) // count))][:count]


def torchvision_view(recipe: ViewRecipe) -> Callable[[Image.Image], Tensor]:
    """The recipe as one would write it with torchvision's transforms alone, in bytes up to the normalisation."""
    assert recipe.crop_scale is not None
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return v2.Compose([
        v2.RandomResizedCrop(recipe.size, recipe.crop_scale, recipe.crop_ratio, InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(recipe.flip), v2.RandomApply([jitter], recipe.jitter), v2.RandomGrayscale(recipe.grey),
        v2.RandomApply([v2.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma)], recipe.blur),
        v2.RandomSolarize(128, recipe.solarize), v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(recipe.mean), list(recipe.std))])


if __name__ == "__main__":
    main()
