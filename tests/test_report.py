"""The page and the pictures say what the files say."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byol_core.pictures import nearest, save_grid, tile
from byol_core.report import write_report
from byol_core.views import ViewRecipe, inverse_normalise, normalise


class Balanced(HTMLParser):
    """Every tag that opens closes, and nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        source = values.get("src") or values.get("href") or ""
        assert source.startswith("data:") or not source
        if tag not in ("meta", "img", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "polyline":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(folder: Path) -> Balanced:
    parser = Balanced()
    page = (folder / "report.html").read_text()
    assert "http" not in page and "<script" not in page
    parser.feed(page)
    assert parser.open == []
    return parser


def write_run(folder: Path, **summary: object) -> None:
    (folder / "summary.json").write_text(json.dumps({
        "status": "finished", "images": 12, "epochs": 2, "updates": 6, "seconds": 3.5, "device": "cpu", "knn": 0.912,
        "knn_untrained": 0.5, "linear": None, "measured_on": "<3 images>", **summary}))
    lines = [{"update": n, "epoch": n / 3, "loss": 4 / n, "spread": 0.9} for n in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"config": {"data": "<b>"}, "choices": [
        {"name": "lr", "value": 0.1, "reason": "a & b"}]}))
    (folder / "bad_files.txt").write_text("<script>alert(1)</script>.jpg\ttorn\n")
    save_grid(folder / "views.png", [[tile(Image.new("RGB", (4, 4)))]], [["x"]])


def test_report_is_whole_offline_and_says_what_the_summary_says(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_report(tmp_path)
    text = parse(tmp_path).text
    for expected in ("finished", "12 images, 2 epochs, 6 updates, 4 s on cpu", "91.2%", "50.0%", "<3 images>", "a & b",
                     "<script>alert(1)</script>.jpg"):
        assert expected in text


def test_report_of_a_run_without_labels_or_without_end(tmp_path: Path) -> None:
    write_run(tmp_path, knn=None)
    write_report(tmp_path)
    assert "No labels" in parse(tmp_path).text
    for path in tmp_path.iterdir():
        path.unlink()
    write_report(tmp_path)
    assert "has not ended" in parse(tmp_path).text


def test_inverse_normalise_gives_back_the_pixels() -> None:
    images = torch.rand(2, 3, 4, 4)
    recipe = ViewRecipe(4)
    assert torch.allclose(inverse_normalise(normalise(images, recipe), recipe), images, atol=1e-6)


def test_tiles_keep_colours_and_proportions() -> None:
    square = np.asarray(tile(torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1).expand(3, 8, 8)))
    assert square.shape == (96, 96, 3) and (square == [255, 0, 128]).all()
    wide = np.asarray(tile(Image.new("RGB", (200, 100), (255, 0, 0))))
    assert (wide[48] == [255, 0, 0]).all() and (wide[2] == [255, 255, 255]).all()


def test_nearest_are_the_most_similar_others() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    rows, cosines = nearest(features, torch.tensor([0]), 2)
    assert rows.tolist() == [[1, 2]]
    assert cosines[0].tolist() == pytest.approx([2 / (4 + 0.01) ** 0.5, 0.0])
