"""Fixtures: small image folders, a small model, and signal handlers put back after each test.

What takes seconds to load is imported where it is used: pytest-xdist's main process reads this file and runs no test.
"""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from byol_core.networks import BYOL

HANDLED = {number: signal.getsignal(number) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
           if (number := getattr(signal, name, None)) is not None}  # before any run, also of a fixture, has set others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that none of them is left for one process alone at the end; those of a GPU where there is one."""
    import torch

    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def signal_handlers_restored() -> Iterator[None]:
    restore_signal_handlers()
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests were started under, such as nohup
    yield
    restore_signal_handlers()


def restore_signal_handlers() -> None:
    for number, handler in HANDLED.items():
        signal.signal(number, handler)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of random images: `classes` sub-folders (0: flat) of `per_class` images each."""
    from tests.helpers.pictures import write_images

    return partial(write_images, tmp_path)


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's working folder, in which relative paths such as --out lie."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(image_folder: Callable[..., Path]) -> Path:
    """A flat folder of twelve images."""
    return image_folder(classes=0, per_class=12)


@pytest.fixture
def seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def small_byol(seeded: None) -> "BYOL":
    from byol_core.networks import BYOL
    from tests.helpers.modules import small_backbone

    return BYOL(small_backbone(), 4, hidden_dim=8, out_dim=6)


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Starts a run and stops it, as by SIGTERM, after so many updates."""
    from byol_core.run import command
    from byol_core.run.run import Run

    original = Run.after_step

    def start(updates: int, *arguments: object) -> None:
        def stop(self: Run, progress, step) -> None:
            self.stop.signal = 15 if progress.updates == updates else None
            original(self, progress, step)

        with monkeypatch.context() as patched:
            patched.setattr(Run, "after_step", stop)
            assert command.main([str(argument) for argument in arguments]) == 143

    return start


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on 36 images of 3 classes, beside its data in imgs/."""
    import train
    from tests.helpers.pictures import write_images

    place = tmp_path_factory.mktemp("trained")
    data = write_images(place, classes=3, per_class=12)
    assert train.main(["--data", str(data), "--epochs", "2", "--out", str(place / "run"), "--arch", "conv6",
                       "--image-size", "16", "--view-size", "12", "--batch-size", "12", "--hidden-dim", "16",
                       "--projection-dim", "8", "--workers", "0", "--seed", "3", "--device", "cpu"]) == 0
    return place / "run"


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """An exported conv6 with random weights."""
    from tests.helpers.modules import write_backbone

    return write_backbone(tmp_path / "run")
