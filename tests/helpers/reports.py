"""A run folder written by hand, and a page that is checked as it is read."""

import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from byol_core.report.pictures import save_grid, tile
from byol_core.run.options import TrainConfig, command_line

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Every tag that opens closes, nothing is loaded from elsewhere, and nothing can run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        page = path.read_text("utf-8")
        assert len(page) < 5_000_000 and "url(" not in page and "@import" not in page
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "a")
        assert not any(name.startswith("on") for name in values)
        assert values.get("src", "data:").startswith("data:image/png;base64,") or tag != "img"
        assert "href" not in values
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data + " "


def line(update: int, **values: object) -> dict[str, object]:
    return {"update": update, "epoch": update / 3, "loss": 4 / update, "spread": 0.9, "rank": 9.0, "rank_limit": 15,
            "cosine": 0.1, "alignment": 0.5, "uniformity": -2.0, "tau": 0.5, "lr": 0.1, "images_per_second": 100.0,
            "wait": 0.25, "skipped": 0, **values}


def write_run(folder: Path, labels: bool = True, updates: int = 6, hostile: str = "<b>", **summary: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scores = {"knn": 0.912, "knn_untrained": 0.5, "linear": 0.95, "linear_untrained": 0.6}
    scores = scores if labels else dict.fromkeys(scores)
    (folder / "summary.json").write_text(json.dumps({
        "status": "finished", "reason": None, "images": 12, "classes": 2 if labels else 0, "epochs": 2, "updates": updates,
        "seconds": 3.5, "images_per_second": 41.0, "wait_fraction": 0.25, "device": "cpu", "amp": "float32", **scores,
        "measured_on": f"3 images of {hostile}" if labels else None, "rank_features": 4.25, "rank_features_untrained": 3.5,
        **summary}))
    write_lines(folder, [line(n) for n in range(1, updates + 1)])
    (folder / "config.json").write_text(json.dumps({
        "config": {"data": hostile, "out": str(folder), "epochs": 2, "seed": 5},
        "commands": {key: command_line(TrainConfig(data=(hostile,), out=out, epochs=2, seed=5))
                     for key, out in (("this", str(folder)), ("elsewhere", None))},
        "choices": [{"name": "lr", "value": 0.1, "shown": "0.1 x 64/256 = 0.025", "reason": f"a & b {hostile}"}],
        "plan": {"epochs": 2, "updates_per_epoch": 3, "lr": 0.025, "batch_size": 64, "arch": hostile,
                 "views": [{"size": 8, "blur": 1.0}, {"size": 8, "blur": 0.1}]},
        "data": {"images": 12, "classes": [hostile, "b"] if labels else []}, "versions": {"torch": hostile}}))
    (folder / "bad_files.txt").write_text(f"{hostile}.jpg\ttorn {hostile}\n")
    (folder / "train.log").write_text("2026-01-01T00:00:00 hello\n")
    (folder / "backbone.json").write_text(json.dumps({
        "arch": hostile, "small_stem": False, "image_size": 8, "mean": [0.5, 0.25, 0.125], "std": [1, 1, 1]}))
    save_grid(folder / "views.png", [[tile(Image.new("RGB", (4, 4)))]], [["x"]])
    return folder


def write_lines(folder: Path, records: list[dict[str, object]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
