"""Fixtures: small image folders, a small model, and signal handlers put back after each test."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from byol_core.networks import BYOL
from byol_core.run import command
from byol_core.run.run import Run

HANDLED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that none of them is left for one process alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def signal_handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started under, such as nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of random images: `classes` sub-folders (0: flat) of `per_class` images each."""

    def write(name: str = "imgs", classes: int = 2, per_class: int = 8, size: tuple[int, int] = (16, 16)) -> Path:
        generator = np.random.default_rng(0)
        for label in range(max(classes, 1)):
            folder = tmp_path / name / (f"class{label}" if classes else "")
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., label % 3] //= 4  # so that classes can be told apart
                Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        return tmp_path / name

    return write


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's working folder, in which relative paths such as --out lie."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(image_folder: Callable[..., Path]) -> Path:
    """A flat folder of twelve images."""
    return image_folder(classes=0, per_class=12)


def small_backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def small_byol() -> BYOL:
    torch.manual_seed(0)
    return BYOL(small_backbone(), 4, hidden_dim=8, out_dim=6)


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Starts a run and stops it, as by SIGTERM, after so many updates."""
    original = Run._after_step

    def start(updates: int, *arguments: object) -> None:
        def stop(self: Run, progress, step) -> None:
            self.stop.signal = 15 if progress.updates == updates else None
            original(self, progress, step)

        with monkeypatch.context() as patched:
            patched.setattr(Run, "_after_step", stop)
            assert command.main([str(argument) for argument in arguments]) == 143

    return start
