"""A run that several files give to commands."""

from pathlib import Path

import pytest

from byol_core.evaluate import probes
from byol_core.report import pictures
from tests.helpers import format1
from tests.helpers.runs import SMALL, run


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
