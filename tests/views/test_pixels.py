"""Order, replacement of bad files, and the two interchangeable sources of views."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from byol_core.images.image_set import ImageSet, scan
from byol_core.views import pixels as pixels_module
from byol_core.views.batches import DeviceBatches, Order, WorkerBatches, _ViewDataset
from byol_core.views.pixels import BadFiles, TooManyBadFilesError, decode_all, load_images, plain_batches
from byol_core.views.recipes import ViewRecipe, inverse_normalise, paper_recipes
from tests.helpers.memory import counted, private_bytes
from tests.helpers.pictures import CPU, PLAIN, load


def sources(root: Path, recipes: tuple[ViewRecipe, ViewRecipe], order: Order, workers: int = 0):
    return (DeviceBatches(load(root, "device"), recipes, order), WorkerBatches(load(root, "cpu"), recipes, order, workers))


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


def test_both_sources_give_the_same_images_in_the_same_order(image_folder: Callable[..., Path]) -> None:
    root = image_folder(classes=0, per_class=10)
    device, worker = sources(root, (PLAIN, PLAIN), Order(10, 4, seed=1))
    assert len(device) == len(worker) == 2
    for (a1, a2), (b1, b2) in zip(device.epoch(1), worker.epoch(1), strict=True):
        assert torch.allclose(a1, b1, atol=1e-5) and torch.allclose(a2, b2, atol=1e-5)


def test_bad_files_are_replaced_the_same_way_and_move_nothing_else(image_folder: Callable[..., Path]) -> None:
    root = image_folder(classes=0, per_class=20)
    order = Order(20, 20, seed=1)
    (clean, _), = sources(root, (PLAIN, PLAIN), order)[0].epoch(0)
    (root / "007.png").write_bytes(b"")
    device, worker = sources(root, (PLAIN, PLAIN), order)
    (from_device, _), (from_worker, _) = next(device.epoch(0)), next(worker.epoch(0))
    assert torch.allclose(from_device, from_worker, atol=1e-5)
    changed = [row for row in range(20) if not torch.allclose(clean[row], from_device[row], atol=1e-5)]
    assert changed == [order.epoch(0)[0].tolist().index(7)]
    assert list(worker.bad.reasons) == list(device.bad.reasons) == [7]


@pytest.mark.parametrize("path", [0, 1])
def test_views_depend_on_seed_epoch_index_and_view_not_on_the_start(image_folder: Callable[..., Path], path: int) -> None:
    root = image_folder(classes=0, per_class=12)
    batches = sources(root, paper_recipes(16), Order(12, 4, seed=1))[path]
    whole = list(batches.epoch(3))
    for (a1, a2), (b1, b2) in zip(whole[1:], batches.epoch(3, start=1), strict=True):
        assert torch.equal(a1, b1) and torch.equal(a2, b2)
    assert not torch.equal(whole[0][0], whole[0][1])  # two views of one image differ
    assert not torch.equal(next(batches.epoch(4))[0], whole[0][0])


@pytest.mark.slow
def test_workers_change_nothing_and_survive_an_abandoned_epoch(image_folder: Callable[..., Path]) -> None:
    root = image_folder(classes=0, per_class=12)
    alone = sources(root, paper_recipes(16), Order(12, 4, seed=1))[1]
    shared = sources(root, paper_recipes(16), Order(12, 4, seed=1), workers=2)[1]
    next(shared.epoch(0))
    for (a1, a2), (b1, b2) in zip(alone.epoch(1, start=1), shared.epoch(1, start=1), strict=True):
        assert torch.equal(a1, b1) and torch.equal(a2, b2)


def test_data_can_be_sent_to_workers_whatever_the_console_is(image_folder: Callable[..., Path]) -> None:
    import pickle
    data = load_images(scan(image_folder()), "cpu", CPU, open(__file__).readline)[0]  # an open file cannot be pickled
    again = pickle.loads(pickle.dumps(data))
    assert again.image(0).size == (16, 16)


def test_images_on_a_gpu_are_not_asked_for_in_forked_processes(image_folder: Callable[..., Path], monkeypatch) -> None:
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
def test_worker_processes_decode_the_same_and_report_bad_files_in_the_same_order(image_folder: Callable[..., Path],
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
    image_folder("imgs", classes=0, per_class=1, size=(8, 8))
    assert decode_all(files, lambda index, reason: None, 2) is None


class Touched(Dataset[int]):
    """Looks up 20,000 names an item, as an epoch does; gives the memory that only this process holds, in bytes."""

    def __init__(self, files: ImageSet) -> None:
        self.files = files

    def __len__(self) -> int:
        return 10

    def __getitem__(self, item: int) -> int:
        for index in range(item * len(self.files) // 10, (item + 1) * len(self.files) // 10):
            self.files.name(index)
        return private_bytes()


@pytest.fixture
def long_list(tmp_path: Path) -> ImageSet:
    """200,000 paths of 46 bytes that no file stands behind: 9 MB of names, 30 MB as Python objects."""
    lines = "".join(f"some/folder/of/a/large/set/of/images/{number:07d}.jpg\n" for number in range(200_000))
    (tmp_path / "list.txt").write_text(lines)
    return scan(tmp_path / "list.txt")


@pytest.mark.slow
@counted
def test_memory_of_a_worker_does_not_grow_with_the_names_it_has_seen(long_list: ImageSet) -> None:
    private = [int(size) for size in DataLoader(Touched(long_list), batch_size=None, num_workers=1)]
    assert max(private[2:]) - private[2] < 1e6, private  # at first it copies what any process touches


@pytest.mark.slow
def test_a_million_names_are_sent_to_a_worker_as_shared_memory(long_list: ImageSet) -> None:
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # noqa: F401  (teaches it to share tensors)
    assert len(ForkingPickler.dumps(long_list)) < 5_000
    held = sum(part.numel() * part.element_size() for part in (long_list.names, long_list.ends))
    assert held * 5 < 60e6 and long_list.name(123_456).endswith("/0123456.jpg")  # for a million


def test_each_bad_file_is_reported_once_and_too_many_stop(image_folder: Callable[..., Path]) -> None:
    lines: list[str] = []
    bad = BadFiles(scan(image_folder(classes=0, per_class=20)), lines.append)
    bad.add(3, "torn")
    bad.add(3, "torn")
    bad.add(1, "empty")
    assert lines == ["skipped 003.png: torn", "skipped 001.png: empty"]
    assert bad.listing() == "001.png\tempty\n003.png\ttorn\n"
    with pytest.raises(TooManyBadFilesError, match="3 of 20 images cannot be read, more than 10%"):
        bad.add(2, "empty")


def test_sets_of_one_size_are_held_in_memory_and_others_are_not(image_folder: Callable[..., Path]) -> None:
    same, mixed = image_folder("same"), image_folder("mixed")
    image_folder("mixed", classes=1, per_class=1, size=(20, 10))
    data, reason = load_images(scan(same), "auto", CPU, print)
    assert data.pixels is not None and data.pixels.shape == (16, 3, 16, 16) and "16 images of 16x16 in memory" in reason
    for where in ("auto", "device"):
        data, reason = load_images(scan(mixed), where, CPU, print)
        assert data.pixels is None and reason == "worker crops, finished on cpu (images of different sizes)"


def test_a_set_over_the_memory_budget_is_not_held(image_folder: Callable[..., Path], monkeypatch) -> None:
    monkeypatch.setattr(pixels_module, "MEMORY_BUDGET", 1000)
    data, reason = load_images(scan(image_folder()), "auto", CPU, print)
    assert data.pixels is None and "over the budget" in reason


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_plain_batches_are_the_images_in_order_without_the_bad_ones(image_folder: Callable[..., Path], where: str) -> None:
    root = image_folder(classes=0, per_class=12)
    (root / "002.png").write_bytes(b"")
    data = load(root, where)
    found, images = zip(*plain_batches(data, PLAIN, torch.arange(12), batch_size=5))
    assert torch.cat(found).tolist() == [0, 1, *range(3, 12)]
    shown = inverse_normalise(torch.cat(images)[2], PLAIN) * 255
    expected = torch.from_numpy(__import__("numpy").array(data.image(3))).permute(2, 0, 1)
    assert torch.allclose(shown, expected.float(), atol=1e-2)


@pytest.mark.slow
def test_reference_views_do_not_depend_on_the_number_of_threads(image_folder: Callable[..., Path]) -> None:
    """A worker has one, the main process as many as there are cores; the mean of a large image shows the difference."""
    data = load(image_folder(classes=0, per_class=12, size=(224, 224)), "cpu")
    dataset, threads = _ViewDataset(data, paper_recipes(224), seed=0), torch.get_num_threads()
    views = []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            views.append(torch.stack([torch.stack(dataset[0, index][:2]) for index in range(12)]))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(views[0], views[1]) and torch.equal(views[0], views[2])
