"""Runs that several files use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from byol_core.evaluate import probes
from byol_core.report import pictures
from tests.helpers import format1
from tests.helpers.pictures import write_images
from tests.helpers.runs import SMALL, checkpoint, run
from tests.helpers.torchrun import trained


@pytest.fixture(autouse=True)
def soon_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer draws for accuracies on a few labels, fewer steps of t-SNE: no test of a run asks how exact these are."""
    monkeypatch.setattr(probes, "DRAWS", 2)
    monkeypatch.setattr(pictures, "TSNE_STEPS", 250)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run's folder, beside its images in imgs/."""
    place = tmp_path_factory.mktemp("trained")
    format1.write_images(place / "imgs")
    assert run("--data", place / "imgs", "--epochs", 1, "--out", place / "run", "--no-eval", *SMALL) == 0
    return place / "run"


@pytest.fixture
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict]:
    """The checkpoint of a run of so many processes on image_folder(per_class=24), made once for all workers of pytest."""
    fcntl = pytest.importorskip("fcntl")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def of(processes: int) -> dict:
        place = base / f"undisturbed-{processes}"
        with open(f"{place}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "out").exists():
                done = trained(place, write_images(place, per_class=24), processes=processes)
                assert done.code == 0 and f"processes: {processes}, each with {12 // processes} images at a time" in done.out
        return checkpoint(place / "out")

    return of
