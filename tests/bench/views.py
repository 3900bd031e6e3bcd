"""Images per second, two views each: batched views beside torchvision, lightly and kornia on the same images.

    python -m tests.bench.views --images cifar/train            32-pixel views, with and without decoding
    python -m tests.bench.views --photos photos                 224-pixel views of photographs, likewise
    python -m tests.bench.views --images ... --device cuda      the batched views on the GPU

Everything runs in this one process with --threads threads (1: rates per core). The pipelines take turns; a rate is the
median over --rounds turns, the spread its lowest and highest. Peers that cannot be imported are named and left out.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from byol_core.device_views import draw, draw_boxes, render
from byol_core.views import ViewRecipe, cpu_view, paper_recipes

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
Recipes = tuple[ViewRecipe, ViewRecipe]
Work = Callable[[], object]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {arguments.threads} threads, "
          f"batched views on {name}\n")
    if arguments.images:
        paths = find(arguments.images, arguments.count)
        compare(f"{len(paths)} images of {arguments.images} at 32 pixels", paths, paper_recipes(32), device,
                arguments.rounds)
    if arguments.photos:
        paths = find(arguments.photos, arguments.count)
        compare(f"{len(paths)} photographs of {arguments.photos} at 224 pixels", paths, paper_recipes(224), device,
                arguments.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of small images, shown at 32 pixels")
    parser.add_argument("--photos", type=Path, help="folder of photographs, shown at 224 pixels")
    parser.add_argument("--count", type=int, default=125, help="how many images of a folder to use (default 125)")
    parser.add_argument("--rounds", type=int, default=5, help="turns per pipeline (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--device", default="cpu", help="where the batched views are rendered (default cpu)")
    arguments = parser.parse_args()
    if not (arguments.images or arguments.photos):
        parser.error("give --images DIR, --photos DIR or both")
    return arguments


def find(folder: Path, count: int) -> list[Path]:
    """`count` images spread evenly over the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"no images under {folder}: looked for {' '.join(sorted(SUFFIXES))}")
    return paths[::max(1, len(paths) // count)][:count]


def compare(title: str, paths: list[Path], recipes: Recipes, device: torch.device, rounds: int) -> None:
    """Print one table of rates, without and with decoding."""
    images = [decode(path) for path in paths]
    pipelines = per_image_pipelines(recipes)
    rows: dict[str, Work] = {}
    for name, views in pipelines.items():
        rows[name] = lambda views=views: [view(image) for image in images for view in views]  # type: ignore[misc]
    sizes = {image.size for image in images}
    if len(sizes) == 1:
        resident = torch.stack([F.pil_to_tensor(image) for image in images]).to(device)
        kornia = kornia_work(resident, recipes)
        if kornia is not None:
            rows["kornia, whole batch"] = kornia
        rows["byol_core, whole batch, one size, decoded once"] = lambda: resident_views(resident, recipes)
    rows["byol_core, cropped one by one, finished as a batch"] = lambda: finish(crop(images, recipes), recipes, device)
    rows["decoding alone"] = lambda: [decode(path) for path in paths]
    for name, views in pipelines.items():
        rows[f"decoding, {name}"] = (
            lambda views=views: [view(image) for path in paths for image in [decode(path)]  # type: ignore[misc]
                                 for view in views])
    rows["decoding, byol_core's crops (a worker's part)"] = lambda: crop([decode(path) for path in paths], recipes)
    rows["decoding, byol_core, cropped one by one, finished as a batch"] = (
        lambda: finish(crop([decode(path) for path in paths], recipes), recipes, device))

    print(f"## {title}\n\n| two views of each image | images/s | spread |\n|---|---:|---:|")
    for name, rates in measure(rows, len(paths), rounds, device).items():
        print(f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} - {max(rates):,.0f} |")
    print()


def measure(rows: dict[str, Work], images: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Images per second of each row in each round; the first, unmeasured turn warms up."""
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, work in rows.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                rates[name].append(images / (time.perf_counter() - start))
    return rates


def decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def per_image_pipelines(recipes: Recipes) -> dict[str, list[Callable[[Image.Image], Tensor]]]:
    """The pipelines that make one view of one image at a time, two views each."""
    pipelines = {"torchvision v2 on PIL images": [torchvision_view(recipe, tensors=False) for recipe in recipes],
                 "torchvision v2 on tensors": [torchvision_view(recipe, tensors=True) for recipe in recipes],
                 "byol_core's reference (torchvision v2, colours in float32)": [cpu_view(recipe) for recipe in recipes]}
    try:
        from lightly.transforms import byol_transform
    except ImportError as error:
        print(f"lightly is left out ({error}): pip install 'byol_core[peers]'\n")
    else:
        size = recipes[0].size
        pipelines["lightly's BYOL transform"] = [byol_transform.BYOLView1Transform(input_size=size),
                                                 byol_transform.BYOLView2Transform(input_size=size)]
    return pipelines


def torchvision_view(recipe: ViewRecipe, tensors: bool) -> Callable[[Image.Image], Tensor]:
    """The recipe as one would write it with torchvision's transforms alone, in bytes up to the normalisation."""
    assert recipe.crop_scale is not None
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    return v2.Compose([
        *([v2.PILToTensor()] if tensors else []),
        v2.RandomResizedCrop(recipe.size, recipe.crop_scale, recipe.crop_ratio, InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(recipe.flip), v2.RandomApply([jitter], recipe.jitter), v2.RandomGrayscale(recipe.grey),
        v2.RandomApply([v2.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma)], recipe.blur),
        v2.RandomSolarize(128, recipe.solarize), *([] if tensors else [v2.PILToTensor()]),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(recipe.mean), list(recipe.std))])


def kornia_work(resident: Tensor, recipes: Recipes) -> Work | None:
    """Both views of the whole batch by kornia's augmentations; None where it is not installed."""
    try:
        import kornia.augmentation as K
    except ImportError as error:
        print(f"kornia is left out ({error}): pip install kornia\n")
        return None

    def view(recipe: ViewRecipe) -> Callable[[Tensor], Tensor]:
        assert recipe.crop_scale is not None
        size, kernel = (recipe.size, recipe.size), (recipe.blur_kernel, recipe.blur_kernel)
        return K.AugmentationSequential(
            K.RandomResizedCrop(size, recipe.crop_scale, recipe.crop_ratio, resample="bicubic"),
            K.RandomHorizontalFlip(p=recipe.flip),
            K.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue, p=recipe.jitter),
            K.RandomGrayscale(p=recipe.grey), K.RandomGaussianBlur(kernel, recipe.blur_sigma, p=recipe.blur),
            K.RandomSolarize(p=recipe.solarize), K.Normalize(torch.tensor(recipe.mean), torch.tensor(recipe.std)))

    views = [view(recipe) for recipe in recipes]
    return lambda: [view(resident.float() / 255) for view in views]


def resident_views(images: Tensor, recipes: Recipes) -> list[Tensor]:
    indices = torch.arange(len(images))
    return [render(images, draw(recipe, 0, 0, indices, view, *images.shape[-2:]), recipe)
            for view, recipe in enumerate(recipes)]


def crop(images: list[Image.Image], recipes: Recipes) -> list[Tensor]:
    """Both views' crops of images of any size, as bytes: what a worker sends."""
    widths, heights = torch.tensor([image.size for image in images]).unbind(1)
    tensors = [F.pil_to_tensor(image) for image in images]
    crops = []
    for view, recipe in enumerate(recipes):
        boxes = draw_boxes(recipe, 0, 0, torch.arange(len(images)), view, heights, widths)
        size, mode = [recipe.size, recipe.size], InterpolationMode(recipe.interpolation)
        crops.append(torch.stack([F.resized_crop(image, *box, size, mode, antialias=True)
                                  for image, box in zip(tensors, boxes.tolist())]))
    return crops


def finish(crops: list[Tensor], recipes: Recipes, device: torch.device) -> list[Tensor]:
    """The rest of the recipe, on the device."""
    indices = torch.arange(len(crops[0]))
    params = [replace(draw(recipe, 0, 0, indices, view, recipe.size, recipe.size), boxes=None)
              for view, recipe in enumerate(recipes)]
    return [render(images.to(device, non_blocking=True), numbers, recipe)
            for images, numbers, recipe in zip(crops, params, recipes)]


if __name__ == "__main__":
    main()
