"""A run that several files give to commands."""

from pathlib import Path

import pytest

from byol_core.evaluate import probes
from tests.helpers import format1
from tests.helpers.runs import SMALL, run


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies on a few labels are means over fewer draws here: no test of a run asks how exact they are."""
    monkeypatch.setattr(probes, "DRAWS", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run's folder, beside its images in imgs/."""
    place = tmp_path_factory.mktemp("trained")
    format1.write_images(place / "imgs")
    assert run("--data", place / "imgs", "--epochs", 1, "--out", place / "run", "--no-eval", *SMALL) == 0
    return place / "run"
