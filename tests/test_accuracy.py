"""A short training on the digits lands where several seeds landed, and a method broken in its essentials does not.

What a probe on digits cannot tell apart (the order of optimizer and moving average, concatenated views, tau 0 with a fast
predictor) is caught exactly by tests/test_training.py and tests/test_networks.py.
"""

from pathlib import Path

import pytest

from tests.helpers.digits import outside_the_band, train_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits") / "digits"


@pytest.mark.slow
def test_a_short_training_on_digits_lands_in_the_band(digits: Path) -> None:
    assert outside_the_band(train_digits(digits)) == []


@pytest.mark.slow
@pytest.mark.parametrize("variation, expected", [
    ("no predictor", ["linear_5", "knn", "spread", "rank"]), ("target in the graph", ["linear_5", "knn", "spread", "rank"]),
    ("frozen target (tau 1)", ["rank"]),
])
def test_a_broken_method_leaves_the_band(digits: Path, variation: str, expected: list[str]) -> None:
    assert set(outside_the_band(train_digits(digits, variation=variation))) >= set(expected)
