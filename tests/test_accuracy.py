"""A short training on the digits lands where several seeds landed.

A method broken in its essentials does not: `python -m tests.bench.ablations`, whose table stands in tests/bench/RESULTS.md.
What a probe on digits cannot tell apart (the order of optimizer and moving average, concatenated views, tau 0 with a fast
predictor) is caught exactly by tests/test_training.py and tests/test_networks.py.
"""

from pathlib import Path

import pytest

from tests.helpers.digits import outside_the_band, train_digits

# Means of three seeds from that table.
MEANS = {"as it is": {"linear_5": 0.9379, "knn": 0.9676, "spread": 0.87, "rank": 35.26},
         "no predictor": {"linear_5": 0.5238, "knn": 0.7185, "spread": 0.01, "rank": 14.36},
         "target in the graph": {"linear_5": 0.4525, "knn": 0.7194, "spread": 0.01, "rank": 12.3},
         "frozen target": {"linear_5": 0.9008, "knn": 0.9528, "spread": 0.83, "rank": 51.43}}


@pytest.mark.slow
def test_a_short_training_on_digits_lands_in_the_band(tmp_path: Path) -> None:
    assert outside_the_band(train_digits(tmp_path / "digits")) == []


@pytest.mark.parametrize("name, outside", [("as it is", []), ("no predictor", list(MEANS["as it is"])),
                                           ("target in the graph", list(MEANS["as it is"])),
                                           ("frozen target", ["linear_5", "rank"])])
def test_a_method_that_is_broken_lies_outside_the_band(name: str, outside: list[str]) -> None:
    assert outside_the_band(MEANS[name]) == outside
