"""A short training on the digits lands where several seeds landed, and a method broken in its essentials does not.

What a probe on digits cannot tell apart (the order of optimizer and moving average, concatenated views, tau 0 with a fast
predictor) is caught exactly by tests/test_training.py and tests/test_networks.py.
"""

from pathlib import Path

import pytest

from byol_core.scoring import Scores
from tests.digits import train_digits

# Means of 3 seeds plus and minus 4 standard deviations (of spread 0.07, as its own rounds to 0), after 25 epochs: see
# "What each part of the method is worth on digits" in tests/bench/RESULTS.md.
BAND = {"linear_5": (0.906, 0.970), "knn": (0.939, 0.996), "spread": (0.8, 0.95), "rank": (26.0, 44.0)}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits") / "digits"


def outside(scores: Scores) -> list[str]:
    return [name for name, (low, high) in BAND.items() if not low <= scores[name] <= high]


@pytest.mark.slow
def test_a_short_training_on_digits_lands_in_the_band(digits: Path) -> None:
    assert outside(train_digits(digits)) == []


@pytest.mark.slow
@pytest.mark.parametrize("variation, expected", [
    ("no predictor", ["linear_5", "knn", "spread", "rank"]), ("target in the graph", ["linear_5", "knn", "spread", "rank"]),
    ("frozen target (tau 1)", ["rank"]),
])
def test_a_broken_method_leaves_the_band(digits: Path, variation: str, expected: list[str]) -> None:
    assert set(outside(train_digits(digits, variation=variation))) >= set(expected)
