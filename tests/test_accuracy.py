"""A short training on the digits lands where several seeds landed.

A method broken in its essentials does not: `python -m tests.bench.ablations`, whose table stands in tests/bench/RESULTS.md.
What a probe on digits cannot tell apart (the order of optimizer and moving average, concatenated views, tau 0 with a fast
predictor) is caught exactly by tests/test_training.py and tests/test_networks.py.
"""

from pathlib import Path

import pytest

from tests.helpers.digits import outside_the_band, train_digits


@pytest.mark.slow
def test_a_short_training_on_digits_lands_in_the_band(tmp_path: Path) -> None:
    assert outside_the_band(train_digits(tmp_path / "digits")) == []
