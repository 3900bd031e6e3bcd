"""Views from worker crops: the reference's pixels, stand-ins, resume, and nothing that grows; see test_pixels, too."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from byol_core.images.decoding import BadImageError, decode, upright_size
from byol_core.images.image_set import scan
from byol_core.networks import BYOL
from byol_core.runtime import Runtime
from byol_core.training import Progress, Step, train
from byol_core.views import worker_crops
from byol_core.views.batches import DeviceBatches, Order, TimedBatches, WorkerBatches
from byol_core.views.draw import draw_boxes
from byol_core.views.pixels import BadFiles, load_images
from byol_core.views.recipes import ViewRecipe, digits_recipes, inverse_normalise, paper_recipes
from byol_core.views.worker_crops import CropBatches, cut, reduction
from tests.helpers.forking import call
from tests.helpers.memory import counted, private_bytes
from tests.helpers.pictures import CPU, PLAIN, Folder, load
from tests.helpers.runs import SMALL, assert_same_state, checkpoint, run

CROPPED = ViewRecipe(16, crop_scale=(0.08, 1.0), flip=0.5)


def new_batches(root: Path, recipe: ViewRecipe, order: Order) -> CropBatches:
    return CropBatches(load(root, "cpu"), (recipe, recipe), order, 0, CPU)


@pytest.mark.parametrize("device, pinned", [("cpu", False), ("mps", False), ("cuda", True)])
def test_memory_is_pinned_for_cuda_alone(image_folder: Folder, device: str, pinned: bool) -> None:
    crops = CropBatches(load(image_folder(), "cpu"), (PLAIN, PLAIN), Order(8, 4), 2, torch.device(device))
    assert crops.loader.pin_memory == pinned


def photograph(width: int, height: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 whose amplitudes fall with the frequency, as a photograph's do."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = [np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) / frequency, (height, width))
              for _ in range(3)]
    pixels = np.stack([planes[0] + 0.3 * plane for plane in planes], axis=2)
    return (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Eight images of eight sizes: JPEG and PNG, one of them lying on its side, one JPEG and one PNG large."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, (width, height) in enumerate([(40, 30), (30, 40), (17, 16), (64, 24), (9, 50), (256, 240), (20, 21)]):
        Image.fromarray(photograph(width, height, number)).save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    tags = Image.Exif()
    tags[0x0112] = 6  # the orientation
    Image.fromarray(photograph(480, 320, 7)).save(folder / "7.jpg", exif=tags)
    return folder


def test_crops_are_torchvisions_at_the_boxes_that_are_drawn(mixed: Path) -> None:
    order = Order(8, 8, seed=5)
    view1, view2 = next(new_batches(mixed, replace(CROPPED, flip=0.0), order).epoch(3))
    files = scan(mixed)
    for row, index in enumerate(order.epoch(3)[0].tolist()):
        image = F.pil_to_tensor(decode(files.path(index)))
        for number, view in enumerate((view1, view2)):
            box, = draw_boxes(CROPPED, 5, 3, torch.tensor([index]), number, *image.shape[1:]).tolist()
            expected = F.resized_crop(image, *box, [16, 16], InterpolationMode.BICUBIC, antialias=True)
            shown = inverse_normalise(view[row], CROPPED) * 255
            error = (shown - expected.float()).abs()
            reduced = min(box[2:]) >= 64 and files.name(index) == "7.jpg"
            assert error.mean() < 1 if reduced else error.max() < 0.01, (files.name(index), box)


def test_views_are_those_of_images_held_in_memory_but_for_the_rounding_of_crops(tmp_path: Path) -> None:
    for number in range(24):  # neither black nor white anywhere: bytes are clipped between the two passes of resizing
        Image.fromarray(64 + photograph(24, 20, number) // 2).save(tmp_path / f"{number:03d}.png")
    recipe = replace(CROPPED, grey=0.3, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, blur=0.5, blur_kernel=3)
    order = Order(24, 12, seed=2)
    others = DeviceBatches(load(tmp_path, "device"), (recipe, recipe), order).epoch(1)
    for (a1, a2), (b1, b2) in zip(new_batches(tmp_path, recipe, order).epoch(1), others, strict=True):
        for a, b in ((a1, b1), (a2, b2)):
            difference = (inverse_normalise(a, recipe) - inverse_normalise(b, recipe)).abs()
            assert difference.mean() < 0.5 / 255 and difference.max() < 2 * 1.4 * 1.4 / 255  # brighter, with more contrast


def test_a_batch_without_crop_takes_images_whole_as_the_reference_does(mixed: Path) -> None:
    order = Order(8, 4, seed=1)
    reference = WorkerBatches(load(mixed, "cpu"), (PLAIN, PLAIN), order, 0)
    for (a1, a2), (b1, b2) in zip(new_batches(mixed, PLAIN, order).epoch(0), reference.epoch(0), strict=True):
        difference = (inverse_normalise(torch.cat([a1, a2]), PLAIN) - inverse_normalise(torch.cat([b1, b2]), PLAIN)).abs()
        assert difference.mean((1, 2, 3)).max() < 1 / 255  # the one image that is reduced; all others are equal
        assert (difference.amax((1, 2, 3)) < 1e-5).sum() >= len(difference) - 2


def test_a_stand_in_of_another_size_is_cropped_within_its_own(mixed: Path) -> None:
    order = Order(8, 8, seed=1)
    (mixed / "7.jpg").write_bytes(b"torn")
    (mixed / "3.png").write_bytes(b"torn")
    views = new_batches(mixed, CROPPED, order)
    views.bad = BadFiles(views.bad.files, lambda line: None, {index: "known" for index in range(8)})  # no limit
    for epoch in range(20):
        assert all(torch.isfinite(view).all() for view in next(views.epoch(epoch)))


def test_a_header_that_tells_another_size_changes_nothing(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order(8, 8, seed=1)
    batches_ = new_batches(mixed, CROPPED, order)
    monkeypatch.setattr(worker_crops, "REDUCED_BY", ())
    true, _ = next(batches_.epoch(0))
    monkeypatch.setattr(worker_crops, "upright_size", lambda source: upright_size(source)[::-1])
    assert torch.equal(next(batches_.epoch(0))[0], true)


def test_a_recipe_that_warps_is_refused(mixed: Path) -> None:
    with pytest.raises(ValueError, match="needs images of one size - use --views cpu"):
        CropBatches(load(mixed, "cpu"), digits_recipes(8), Order(8, 4), 0, CPU)


@pytest.mark.parametrize("sides, by", [((895, 2000), 1), ((896, 896), 2), ((1791, 3000), 2), ((1792, 1792), 4),
                                       ((3584, 4000), 8), ((9000, 9000), 8), ((100, 9000), 1)])
def test_an_image_is_reduced_only_while_both_crops_keep_twice_the_views_sides(sides: tuple[int, int], by: int) -> None:
    large, small = [0, 0, 9000, 9000], [5, 7, *sides]
    recipes = (ViewRecipe(224), ViewRecipe(224))
    assert reduction([large, small], recipes) == reduction([small, large], recipes) == by


@pytest.mark.parametrize("by, size", [(2, 100), (4, 50), (8, 30)])
def test_a_reduced_jpeg_gives_nearly_the_crop_of_the_whole_one(tmp_path: Path, by: int, size: int) -> None:
    Image.fromarray(photograph(960, 720)).save(tmp_path / "a.jpg", quality=90)
    full, reduced = decode(tmp_path / "a.jpg"), decode(tmp_path / "a.jpg", by)
    assert reduced.size == (960 // by, 720 // by)
    box = [31, 57, 2 * by * size + 11, 2 * by * size + 3]
    recipe = ViewRecipe(size)
    difference = (cut(full, box, 1, recipe).float() - cut(reduced, box, by, recipe).float()).abs()
    assert difference.mean() < 1.5 and difference.quantile(0.99) < 6 and difference.max() < 16
    moved = [box[0] + by, *box[1:]]  # by one pixel of the reduced image: the bound is a narrow one
    assert (cut(full, box, 1, recipe).float() - cut(reduced, moved, by, recipe).float()).abs().mean() > 8


def test_a_jpeg_whose_sides_are_no_multiples_and_other_formats_are_decoded_in_full(tmp_path: Path) -> None:
    Image.fromarray(photograph(64, 33)).save(tmp_path / "a.jpg")
    Image.fromarray(photograph(64, 32)).save(tmp_path / "b.png")
    assert decode(tmp_path / "a.jpg", 2).size == (64, 33) and decode(tmp_path / "b.png", 2).size == (64, 32)


def test_upright_size_is_what_decoding_gives(mixed: Path, tmp_path: Path) -> None:
    for path in mixed.iterdir():
        assert upright_size(path) == decode(path).size[::-1]
    (tmp_path / "torn.jpg").write_bytes(b"torn")
    with pytest.raises(BadImageError, match="UnidentifiedImageError"):
        upright_size(tmp_path / "torn.jpg")


def crop_again_and_again(folder: str) -> int:
    cropping: Any = new_batches(Path(folder), CROPPED, Order(8, 8)).loader.dataset
    private = []
    for epoch in range(200):
        cropping.__getitems__([(epoch, index) for index in range(8)])
        if epoch % 25 == 24:
            private.append(private_bytes())
    assert max(private[4:]) - private[3] < 2e6, private  # of 1,600 images decoded; 2 MB are seven of them
    return 0


@pytest.mark.slow
@counted
def test_memory_does_not_grow_with_the_crops_that_are_made(mixed: Path, tmp_path: Path) -> None:
    """In a process of its own, as others leave gaps behind that are filled some time."""
    call(f"{__name__}:crop_again_and_again", [str(mixed)], tmp_path / "said")


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_a_run_on_images_of_different_sizes_stopped_and_resumed_is_the_run_never_stopped(
        mixed: Path, stopped_after: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", mixed, *SMALL, "--no-eval", "--epochs", 3, "--recipe", "paper", "--optimizer", "sgd"]
    assert run(*arguments, "--out", "whole") == 0
    assert "views: worker crops, finished on cpu (images of different sizes)" in Path("whole/train.log").read_text()
    stopped_after(3, *arguments, "--out", "parts")
    assert run(*arguments, "--out", "parts", "--resume") == 0
    assert_same_state(checkpoint("whole"), checkpoint("parts"))
    assert checkpoint("parts")["progress"]["updates"] == 6
    assert run(*arguments, "--views", "cpu", "--out", "parts", "--resume") == 2
    assert "views made of worker crops -> on the cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_views_made_ahead_on_a_gpu_are_those_of_the_cpu(mixed: Path) -> None:
    gpu, recipes, order = torch.device("cuda", 0), paper_recipes(16), Order(8, 2, seed=1)
    sources = [CropBatches(load(mixed, "cpu"), recipes, order, 2, device) for device in (gpu, CPU)]
    ahead, expected = (list(TimedBatches(source, source.device).epoch(epoch)) for source in sources for epoch in (0,))
    torch.cuda.synchronize()
    for (a1, a2), (b1, b2) in zip(ahead, expected, strict=True):
        assert a1.device == gpu and (a1.cpu() - b1).abs().mean() < 1e-3 and (a2.cpu() - b2).abs().mean() < 1e-3
    for source in sources:
        source.close()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("path", ["device", "crops"])
def test_training_on_cuda_does_not_wait_for_the_device(path: str, graph: bool, mixed: Path, small_byol: BYOL,
                                                       image_folder: Folder) -> None:
    """The whole loop, views included, but for the first step and the end of an epoch, and the epoch that records a graph."""
    gpu, recipes = torch.device("cuda"), paper_recipes(16)
    data = load_images(scan(image_folder() if path == "device" else mixed), "auto", gpu, lambda line: None)[0]
    assert (data.pixels is not None) == (path == "device")
    order = Order(len(data), 2)
    source = DeviceBatches(data, recipes, order) if path == "device" else CropBatches(data, recipes, order, 0, gpu)
    runtime = Runtime(gpu, torch.bfloat16, channels_last=True, cuda_graph=graph)
    runtime.place_model(small_byol)
    optimizer = torch.optim.AdamW(small_byol.online.parameters(), fused=True)
    epochs = 1 + graph
    watched = range((epochs - 1) * len(order) + 1, epochs * len(order) - 1)

    def after_step(progress: Progress, step: Step) -> None:
        torch.cuda.set_sync_debug_mode("error" if progress.updates in watched else "default")

    try:
        done = train(small_byol, TimedBatches(source, gpu), epochs, optimizer=optimizer, runtime=runtime,
                     after_step=after_step, lr_scheduler_interval="step",
                     lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.updates == epochs * len(order) and len(watched) > 1
