"""A folder from Python: the batches that the command would train on, by one call."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import byol_core
from byol_core.run import command
from byol_core.run.run import Run
from byol_core.views.batches import DeviceBatches
from byol_core.views.worker_crops import CropBatches
from tests.helpers.runs import SMALL


@pytest.mark.parametrize("kind, size", [(DeviceBatches, (16, 16)), (CropBatches, None)])
def test_views_are_those_of_the_command(kind: type, size: tuple[int, int] | None, image_folder: Callable[..., Path],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    data = image_folder(size=size or (16, 16))
    if size is None:  # one is larger
        image_folder("more", classes=0, per_class=1, size=(20, 17)).joinpath("000.png").rename(data / "class0" / "100.png")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = command.prepare

    def prepare(*args: object) -> Run:
        run = original(*args)  # type: ignore[arg-type]
        seen.extend(run.batches.epoch(1))
        return run

    monkeypatch.setattr(command, "prepare", prepare)
    folders = [str(data / "class0"), str(data / "class1")]
    assert command.main(["--data", *folders, "--out", str(data.parent / "out"), *SMALL, "--batch-size", "4", "--epochs", "0",
                         "--seed", "3", "--recipe", "paper", "--image-size", "16", "--no-eval", "--device", "cpu"]) == 0
    batches = byol_core.open_batches(folders, 4, 16, seed=3)
    assert isinstance(batches, kind) and len(batches) == len(seen) == 4
    for ours, theirs in zip(batches.epoch(1), seen, strict=True):
        assert all(map(torch.equal, ours, theirs)) and ours[0].shape == (4, 3, 16, 16) and ours[0].dtype == torch.float32
    batches.close()


def test_small_images_keep_their_size_and_a_bad_file_is_told(image_folder: Callable[..., Path]) -> None:
    data = image_folder(size=(20, 24), per_class=16)
    (data / "class1" / "003.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="class1/003.png"):
        batches = byol_core.open_batches([str(data / "class0"), str(data / "class1")], batch_size=32, workers=0)
    view1, view2 = next(batches.epoch(0))
    assert view1.shape == (32, 3, 20, 20) and torch.isfinite(view1).all() and not torch.equal(view1, view2)


def test_what_cannot_be_opened_is_named(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be in 2..16, the images there are, got 64"):
        byol_core.open_batches(image_folder(), batch_size=64)
    with pytest.raises(ValueError, match="nowhere - check data"):
        byol_core.open_batches(tmp_path / "nowhere")
