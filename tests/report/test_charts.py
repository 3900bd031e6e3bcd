"""Curves: round ticks, short numbers, lines where the numbers are."""

import re

import pytest

from byol_core.report.charts import Curve, draw, number_text, smoothed, thinned, ticks


@pytest.mark.parametrize("low, high, expected", [
    (0, 4, [0, 1, 2, 3, 4]), (0, 0.93, [0, 0.5, 1]), (0, 63, [0, 20, 40, 60, 80]), (0.9, 1, [0.9, 0.95, 1]),
    (-2.5, 0, [-3, -2, -1, 0]), (0, 0.0019, [0, 0.0005, 0.001, 0.0015, 0.002]), (5, 5, [2, 4, 6, 8])])
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value, step, text", [
    (0.5, 0.5, "0.5"), (20, 20, "20"), (1500, 500, "1,500"), (0.0015, 0.0005, "0.0015"), (1.5e-5, 5e-6, "1.5e-5"),
    (0.98265, 1e-5, "0.98265"), (2e6, 1e6, "2e6"), (0.0, 1e-6, "0.000000"), (-3, 1, "-3")])
def test_numbers_on_an_axis_are_as_short_as_tells_them_apart(value: float, step: float, text: str) -> None:
    assert number_text(value, step) == text
    assert number_text(0.25, 0.05, percent=True) == "25%"


def test_thinning_and_smoothing_keep_means_and_ends() -> None:
    points = [(float(x), float(x % 2)) for x in range(2001)]
    few = thinned(points)
    assert len(few) <= 241 and few[-1] == points[-1]
    assert sum(y for _, y in few) / len(few) == pytest.approx(0.5, abs=0.05)
    straight = [(float(x), 2.0 * x) for x in range(100)]
    assert [y for _, y in smoothed(straight)] == pytest.approx([y for _, y in straight])


def test_curve_is_drawn_where_its_numbers_are() -> None:
    drawing = draw("a < b", Curve({"": [(0.0, 0.0), (5.0, 1.0), (10.0, 0.5)]}, low=0.0))
    line = re.search(r'<polyline class="s0" points="([^"]+)"', drawing)
    assert line
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, pair.split(","))) for pair in line[1].split()]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y2 == pytest.approx((y0 + y1) / 2, abs=0.1) and y0 > y1
    assert 'aria-label="a &lt; b over epochs"' in drawing
    assert draw("one point", Curve({"": [(1.0, 1.0)]})) == draw("none", Curve({"": []})) == ""
