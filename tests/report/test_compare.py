"""Several runs on one page: what differs, and all results."""

import re
from pathlib import Path

import pytest

from byol_core.report.__main__ import main
from byol_core.report.compare import compare, flatten
from tests.helpers.reports import Page, line, write_lines, write_run


def test_comparison_shows_differences_alone_and_all_results(tmp_path: Path, capsys) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", knn=0.25)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"blur": 0.1', '"blur": 0.75'))
    assert main([str(one), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    text = Page(tmp_path / "both.html").text
    results, differences = text.split("Differences in configuration")
    assert "91.2%" in results and "25.0%" in results
    assert "views 2 blur" in differences and "0.75" in differences and "views 1 blur" not in differences
    assert Page(tmp_path / "both.html").tags.count("svg") == 10


def test_results_that_are_the_same_in_all_runs_are_left_out(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "one"), write_run(tmp_path / "other", linear=0.875)]
    compare(folders, tmp_path / "both.html")
    results = Page(tmp_path / "both.html").text.split("Differences in configuration")[0]
    assert "verdict" in results and "87.5%" in results and "91.2%" not in results.split("linear")[-1]
    assert "wait fraction" not in results and "updates" not in results
    compare(folders[:1], tmp_path / "one.html")
    assert "wait fraction" in Page(tmp_path / "one.html").text


@pytest.mark.parametrize("lr, by_powers", [(0.5, False), (100.0, True)])
def test_a_rate_far_above_the_others_does_not_flatten_them(tmp_path: Path, lr: float, by_powers: bool) -> None:
    folders = [write_run(tmp_path / "one"), write_run(tmp_path / "other")]
    write_lines(tmp_path / "other", [line(n, lr=lr if n < 6 else 0.0) for n in range(1, 7)])
    compare(folders, tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    figure = text[text.index('id="curve-lr"'):]
    assert ("powers of ten" in figure) == by_powers
    heights = [float(pair.split(",")[1]) for pair in re.findall(r'<polyline class="s0" points="([^"]+)"', figure)[0].split()]
    bottom = 200 - 34  # of the drawing, where its axis is
    assert bottom - heights[0] > 20  # the lower curve, of 0.1, is seen


def test_flatten_names_every_leaf() -> None:
    assert flatten({"a": 1, "b": {"c": [1, 2]}, "v": [{"x": 1}, {"x": 2}]}) == {
        "a": 1, "b c": [1, 2], "v 1 x": 1, "v 2 x": 2}
