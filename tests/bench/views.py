"""Two views of images in memory, in images per second: batched views beside torchvision, lightly and kornia.

    python -m tests.bench.views --images cifar/train            32-pixel views
    python -m tests.bench.views --photos photos                 224-pixel views of photographs
    python -m tests.bench.views --images ... --device cuda      the batched views on the GPU

Everything runs in one process with --threads threads (1: rates per core); the pipelines take turns, and a rate is the median
over --rounds turns. `tests.bench.loader` measures the same with reading and decoding.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from byol_core.views.draw import draw, draw_boxes
from byol_core.views.recipes import ViewRecipe, cpu_view, paper_recipes
from byol_core.views.render import render
from byol_core.views.worker_crops import cut
from tests.bench import rivals
from tests.bench.table import environment, markdown, parse, show, side_by_side

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
Recipes = tuple[ViewRecipe, ViewRecipe]
Work = Callable[[], object]
LIGHTLY = "lightly's BYOL transform"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of small images, shown at 32 pixels")
    parser.add_argument("--photos", type=Path, help="folder of photographs, shown at 224 pixels")
    parser.add_argument("--count", type=int, default=96, help="images of a folder to use (default 96)")
    options = parse(parser, rounds=5, threads=1)
    if options.images is options.photos is None:
        parser.error("give --images or --photos")
    for folder, size in ((options.images, 32), (options.photos, 224)):
        if folder is not None:
            compare([decoded(path) for path in find(folder, options.count)], size, options)


def find(folder: Path, count: int) -> list[Path]:
    """`count` images spread evenly over the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"no images under {folder}: looked for {' '.join(sorted(SUFFIXES))}")
    return paths[::max(1, len(paths) // count)][:count]


def decoded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def compare(images: list[Image.Image], size: int, options: argparse.Namespace) -> None:
    recipes, device = paper_recipes(size), torch.device(options.device)
    rows: dict[str, Work] = {"**byol_core**: cropped singly, finished as a batch": lambda: cropped(images, recipes, device)}
    per_image: dict[str, Callable[[], Any]] = {
        "torchvision v2 on PIL images": lambda: both(torchvision_view(recipe, tensors=False) for recipe in recipes),
        "torchvision v2 on tensors": lambda: both(torchvision_view(recipe, tensors=True) for recipe in recipes),
        "byol_core: the reference (torchvision v2, colours in float32)": lambda: both(map(cpu_view, recipes)),
        LIGHTLY: lambda: rivals.lightly_transform(size, blur=True)}
    for name, transform in rivals.present(per_image):
        rows[name] = lambda transform=transform: [transform(image) for image in images]  # type: ignore[misc]
    if len({image.size for image in images}) == 1:
        resident = torch.stack([F.pil_to_tensor(image) for image in images]).to(device)
        rows["**byol_core**: the whole batch, held on the device"] = lambda: batched(resident, recipes)
        for name, work in rivals.present({"kornia, the whole batch": lambda: kornia_views(resident, recipes)}):
            rows[name] = work
    milliseconds = side_by_side(rows, options.device, options.rounds, warm_up=1)
    rates = {name: 1000 * len(images) / value for name, value in milliseconds.items()}
    table = [(name, f"{rate:,.0f}", f"{rate / rates[LIGHTLY]:.2f}" if LIGHTLY in rates else "-")
             for name, rate in sorted(rates.items(), key=lambda item: -item[1])]
    text = f"{environment(options.device, 'torchvision')}\n\n{rivals.machine_limits(options.device)}\n\n" + markdown(
        ("two views of each image", "images/s", "times lightly's"), table)
    show(f"Views: {len(images)} images in memory to {size} pixels", text, options)


def both(views: Any) -> Callable[[Image.Image], list[Tensor]]:
    view1, view2 = views
    return lambda image: [view1(image), view2(image)]


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


def kornia_views(resident: Tensor, recipes: Recipes) -> Work:
    """Both views of the whole batch by kornia's augmentations. Raises: ImportError."""
    import kornia.augmentation as K

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


def batched(images: Tensor, recipes: Recipes) -> list[Tensor]:
    indices = torch.arange(len(images))
    return [render(images, draw(recipe, 0, 0, indices, view, *images.shape[-2:]), recipe)
            for view, recipe in enumerate(recipes)]


def cropped(images: list[Image.Image], recipes: Recipes, device: torch.device) -> list[Tensor]:
    """Of images of any size: the crops as a worker cuts them, the rest of the recipe on the device."""
    widths, heights = torch.tensor([image.size for image in images]).unbind(1)
    indices = torch.arange(len(images))
    views = []
    for view, recipe in enumerate(recipes):
        boxes = draw_boxes(recipe, 0, 0, indices, view, heights, widths).tolist()
        crops = torch.stack([cut(image, box, 1, recipe) for image, box in zip(images, boxes)])
        params = replace(draw(recipe, 0, 0, indices, view, recipe.size, recipe.size), boxes=None)
        views.append(render(crops.to(device, non_blocking=True), params, recipe))
    return views


if __name__ == "__main__":
    main()
