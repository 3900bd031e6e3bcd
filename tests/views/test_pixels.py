"""Order, replacement of bad files, and what the three interchangeable sources of views have in common."""

import multiprocessing
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from byol_core.images.image_set import scan
from byol_core.views import pixels as pixels_module
from byol_core.views.batches import DeviceBatches, Order, _ViewDataset
from byol_core.views.pixels import BadFiles, TooManyBadFilesError, decode_all, load_images, plain_batches
from byol_core.views.recipes import ViewRecipe, inverse_normalise, paper_recipes
from byol_core.views.sources import Batches, batches_of
from tests.helpers.pictures import CPU, PLAIN, Folder, load
from tests.helpers.shards import names

PATHS = ["device", "cpu", "crops"]


def source(path: str, root: Path, recipes: tuple[ViewRecipe, ViewRecipe], order: Order, workers: int = 0) -> Batches:
    return batches_of(load(root, "device" if path == "device" else "cpu"), recipes, order, workers, CPU, path == "cpu")


def test_an_epoch_uses_every_image_once_but_for_an_incomplete_batch() -> None:
    rows = Order(images=11, batch_size=4, seed=3).epoch(0)
    assert rows.shape == (2, 4) and len(set(rows.flatten().tolist())) == 8 and rows.max() < 11


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = Order(50, 10, seed=3)
    torch.manual_seed(1)
    first = order.epoch(2)
    torch.rand(5)
    assert torch.equal(order.epoch(2), first)
    assert not torch.equal(order.epoch(3), first)
    assert not torch.equal(Order(50, 10, seed=4).epoch(2), first)


def test_micro_batches_and_ranks_share_one_permutation() -> None:
    whole = Order(24, 12, seed=1).epoch(5)  # (2, 12)
    halves = Order(24, 12, accum_steps=2, seed=1).epoch(5)  # (4, 6)
    assert torch.equal(halves.flatten(), whole.flatten())
    ranks = [Order(24, 12, accum_steps=2, seed=1, rank=rank, world_size=3).epoch(5) for rank in range(3)]
    assert all(part.shape == (4, 2) for part in ranks)
    assert torch.equal(torch.cat(ranks, dim=1), halves)


# Without overshoot, which crops of bytes lose between the two passes of resizing.
CROPPED = ViewRecipe(16, crop_scale=(0.08, 1.0), flip=0.5, interpolation="bilinear")


@pytest.mark.parametrize("path, recipe, rounding", [("cpu", PLAIN, 1e-5), ("crops", CROPPED, 2 / 255)])
def test_bad_files_are_replaced_the_same_way_and_move_nothing_else(image_folder: Folder, path: str, recipe: ViewRecipe,
                                                                   rounding: float) -> None:
    root = image_folder(classes=0, per_class=24)
    order = Order(24, 12, seed=1)

    def views(path: str) -> tuple[Tensor, list[int]]:
        batches = source(path, root, (recipe, recipe), order)
        shown = [inverse_normalise(torch.cat(pair, dim=3), recipe) for pair in batches.epoch(0)]  # side by side
        return torch.cat(shown), sorted(batches.bad.reasons)

    clean, _ = views(path)
    (root / "007.png").write_bytes(b"")
    (root / "011.png").write_bytes((root / "011.png").read_bytes()[:200])  # the header is whole
    (mended, bad), (from_memory, bad_from_memory) = views(path), views("device")
    assert (mended - from_memory).abs().max() < rounding and bad == bad_from_memory == [7, 11]
    changed = {row for row in range(24) if not torch.equal(clean[row], mended[row])}
    assert changed == {order.epoch(0).flatten().tolist().index(number) for number in bad}


@pytest.mark.parametrize("path", PATHS)
def test_views_depend_on_seed_epoch_index_and_view_not_on_the_start(image_folder: Folder, path: str) -> None:
    order = Order(12, 4, seed=1)
    batches = source(path, image_folder(classes=0, per_class=12), paper_recipes(16), order)
    whole = list(batches.epoch(3))
    for (a1, a2), (b1, b2) in zip(whole[1:], batches.epoch(3, start=1), strict=True):
        assert torch.equal(a1, b1) and torch.equal(a2, b2)
    assert not torch.equal(whole[0][0], whole[0][1])  # two views of one image differ
    by_image = [torch.cat([view1 for view1, _ in epoch])[order.epoch(number).flatten().argsort()]
                for number, epoch in ((3, whole), (4, batches.epoch(4)))]
    assert not any(map(torch.equal, *by_image))


@pytest.mark.parametrize("path", PATHS)
def test_each_view_is_made_by_its_own_recipe(image_folder: Folder, path: str) -> None:
    """The second recipe turns all values over, and nothing else happens."""
    recipes = PLAIN, replace(PLAIN, solarize=1.0, solarize_threshold=0.0)
    batches = source(path, image_folder(), recipes, Order(16, 8))
    assert len(batches) == 2
    for views in batches.epoch(0):
        first, second = (inverse_normalise(view, PLAIN) for view in views)
        assert (first + second - 1).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("path", ["cpu", "crops"])
def test_workers_change_nothing_and_survive_an_abandoned_epoch(image_folder: Folder, path: str) -> None:
    alone, shared = (source(path, image_folder(classes=0, per_class=12), paper_recipes(16), Order(12, 4, seed=1), workers)
                     for workers in (0, 2))
    next(shared.epoch(0))
    for (a1, a2), (b1, b2) in zip(alone.epoch(1, start=1), shared.epoch(1, start=1), strict=True):
        assert torch.equal(a1, b1) and torch.equal(a2, b2)
    shared.close()


def test_data_can_be_sent_to_workers_whatever_the_console_is(image_folder: Folder) -> None:
    data = load_images(scan(image_folder()), "cpu", CPU, open(__file__).readline)[0]  # an open file cannot be pickled
    again = pickle.loads(pickle.dumps(data))
    assert again.image(0).size == (16, 16)


def test_images_on_a_gpu_are_not_asked_for_in_forked_processes(image_folder: Folder, monkeypatch) -> None:
    """When they are not of the view's size, and so go through the loader: they are fetched once, and not one by one."""
    given: list[object] = []

    def loader(dataset: Any, workers: int, **options: object) -> list[object]:
        given.extend([dataset.data.pixels, workers])
        return []

    held = load_images(scan(image_folder()), "device", CPU, lambda line: None)[0]
    monkeypatch.setattr(pixels_module, "new_loader", loader)
    monkeypatch.setattr(pixels_module, "batches_from", iter)
    pixels = held.pixels
    assert pixels is not None
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), shape=pixels.shape, cpu=lambda: pixels)
    for held.pixels in (pixels, on_gpu):
        assert list(plain_batches(held, ViewRecipe(8), torch.arange(4), workers=2)) == []
    assert given == [pixels, 2, pixels, 2] and held.pixels is on_gpu


@pytest.mark.slow
def test_worker_processes_decode_the_same_and_report_bad_files_in_the_same_order(image_folder: Folder,
                                                                                 monkeypatch) -> None:
    root = image_folder(classes=0, per_class=100)
    for number in (3, 97, 32, 31):
        (root / f"{number:03d}.png").write_bytes(b"torn")
    monkeypatch.setattr(pixels_module, "DECODED_ALONE", 50)
    files, bad = scan(root), ([], [])
    alone, shared = (decode_all(files, lambda index, reason: seen.append((index, reason)), workers)
                     for seen, workers in zip(bad, (0, 2)))
    assert alone is not None and shared is not None and torch.equal(alone, shared)
    assert bad[0] == bad[1] and [index for index, _ in bad[0]] == [3, 31, 32, 97]
    image_folder(classes=0, per_class=1, size=(8, 8))  # another size, in place of the first: they stop
    assert decode_all(files, lambda index, reason: None, 2) is None and not multiprocessing.active_children()


def test_names_are_sent_to_a_worker_as_shared_memory(tmp_path: Path) -> None:
    """Of 20,000 files of 46 bytes each, which as Python objects a worker would copy page by page, as it reads them."""
    lines = "".join(f"some/folder/of/a/large/set/of/images/{number:07d}.jpg\n" for number in range(20_000))
    (tmp_path / "list.txt").write_text(lines)
    files = scan(tmp_path / "list.txt")
    assert len(names(files)) == 20_000  # and none of them is kept as it is asked for
    assert len(ForkingPickler.dumps(files)) < 5_000 and files.name(12_345).endswith("/0012345.jpg")
    assert sum(part.numel() * part.element_size() for part in (files.names, files.ends)) * 50 < 60e6  # for a million


def test_each_bad_file_is_reported_once_and_too_many_stop(image_folder: Folder) -> None:
    lines: list[str] = []
    bad = BadFiles(scan(image_folder(classes=0, per_class=20)), lines.append)
    bad.add(3, "torn")
    bad.add(3, "torn")
    bad.add(1, "empty")
    assert lines == ["skipped 003.png: torn", "skipped 001.png: empty"]
    assert bad.listing() == "001.png\tempty\n003.png\ttorn\n"
    with pytest.raises(TooManyBadFilesError, match="3 of 20 images cannot be read, more than 10%"):
        bad.add(2, "empty")


def test_sets_of_one_size_are_held_in_memory_up_to_the_budget_and_others_are_not(image_folder: Folder, monkeypatch) -> None:
    same, mixed = image_folder("same"), image_folder("mixed")
    image_folder("mixed", classes=1, per_class=1, size=(20, 10))
    made: list[torch.Tensor] = []
    monkeypatch.setattr(pixels_module, "decode_all", lambda *given: made.append(decode_all(*given)) or made[-1])
    data, reason = load_images(scan(same), "auto", CPU, print)
    assert data.pixels is not None and data.pixels.data_ptr() == made[0].data_ptr()  # held once
    assert data.pixels.shape == (16, 3, 16, 16) and "16 images of 16x16 in memory" in reason
    assert DeviceBatches(data, (PLAIN, PLAIN), Order(16, 16)).pixels is data.pixels  # held once
    assert data.pixels.untyped_storage().nbytes() == data.pixels.numel()
    for where in ("auto", "device"):
        data, reason = load_images(scan(mixed), where, CPU, print)
        assert data.pixels is None and reason == "worker crops, finished on cpu (images of different sizes)"
    monkeypatch.setattr(pixels_module, "MEMORY_BUDGET", 1000)
    data, reason = load_images(scan(same), "auto", CPU, print)
    assert data.pixels is None and "over the budget" in reason


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_plain_batches_are_the_images_in_order_without_the_bad_ones(image_folder: Folder, where: str) -> None:
    root = image_folder(classes=0, per_class=12)
    (root / "002.png").write_bytes(b"")
    data = load(root, where)
    found, images = zip(*plain_batches(data, PLAIN, torch.arange(12), batch_size=5))
    assert torch.cat(found).tolist() == [0, 1, *range(3, 12)]
    shown = inverse_normalise(torch.cat(images)[2], PLAIN) * 255
    expected = torch.from_numpy(np.array(data.image(3))).permute(2, 0, 1)
    assert torch.allclose(shown, expected.float(), atol=1e-2)


@pytest.mark.slow
def test_reference_views_do_not_depend_on_the_number_of_threads(image_folder: Folder) -> None:
    """A worker has one, the main process as many as there are cores; the mean of a large image shows the difference."""
    data = load(image_folder(classes=0, per_class=12, size=(224, 224)), "cpu")
    dataset, threads = _ViewDataset(data, paper_recipes(224), seed=0), torch.get_num_threads()
    views = []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            views.append(torch.stack([torch.stack(dataset[0, index][:2]) for index in range(12)]))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*views)
