"""The three sources of views, and which of them fits the images."""

import atexit
import warnings
import weakref
from collections.abc import Sequence
from os import PathLike

import torch

from byol_core.images.image_set import scan
from byol_core.views.batches import DeviceBatches, Order, WorkerBatches
from byol_core.views.pixels import ImageData, choose_workers, load_images, look_at, usual_size
from byol_core.views.recipes import ViewRecipe, paper_recipes
from byol_core.views.worker_crops import CropBatches

Batches = DeviceBatches | WorkerBatches


def batches_of(data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], order: Order, workers: int, device: torch.device,
               on_cpu: bool = False) -> Batches:
    """Made on the device, from images held there or from crops that workers cut; on_cpu: one by one in workers, as torchvision
    does it."""
    if data.pixels is not None:
        return DeviceBatches(data, recipes, order)
    if not on_cpu:
        return CropBatches(data, recipes, order, workers, device)
    return WorkerBatches(data, recipes, order, workers, pin_memory=device.type == "cuda")


def open_batches(data: "str | PathLike[str] | Sequence[str]", batch_size: int = 256, view_size: int | None = None, *,
                 views: tuple[ViewRecipe, ViewRecipe] | None = None, seed: int = 0, workers: int | None = None,
                 device: "str | torch.device" = "cpu") -> Batches:
    """Batches of two random views, (B, 3, S, S) float32 each on `device`, of the images in a folder: for `byol_core.train`.

    data: a folder, flat or nested, a .txt list, a pattern of .tar shards, or several of them. view_size: edge S in pixels;
    None is that of small images, 128 or 224 for larger ones. views: how the two are made; None is as in the BYOL paper.
    seed: of the order and of the views, which depend on nothing else. workers: processes that read images; None is one per
    CPU, at most 8. A file that cannot be read is replaced by another one, with a warning.
    Returns: len() is the batches of an epoch; `epoch(number)` yields them; `close()` stops the workers.
    Raises: ValueError when there are no images, or fewer than a batch.

    >>> batches = open_batches("imgs", batch_size=64)  # doctest: +SKIP
    >>> train(model, batches, epochs=100)  # doctest: +SKIP
    """
    given = (str(data),) if isinstance(data, (str, PathLike)) else tuple(map(str, data))
    files = scan(given, "data")
    facts = look_at(files)
    if not 2 <= batch_size <= facts.images:
        raise ValueError(f"open_batches: batch_size must be in 2..{facts.images}, the images there are, got {batch_size}")
    device = torch.device(device)
    recipes = views or paper_recipes(view_size or usual_size(facts))
    workers = choose_workers(workers)
    images, _ = load_images(files, "auto", device, warnings.warn, workers)
    batches = batches_of(images, recipes, Order(len(files), batch_size, seed=seed), workers, device)
    if isinstance(batches, WorkerBatches):  # whose workers ignore the signal with which Python would end them at its own end
        atexit.register(_close, weakref.ref(batches))
    return batches


def _close(batches: "weakref.ref[WorkerBatches]") -> None:
    left = batches()
    if left is not None:
        left.close()
