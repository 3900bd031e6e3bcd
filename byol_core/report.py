"""A run folder as one offline page: what was reached, beside what an untrained network gives, with curves and pictures."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byol_core.checkpoint import write_text

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: left; border-bottom: 1px solid #8884 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; image-rendering: pixelated; background: #fff }
figure { margin: 1rem 0 } figcaption { color: #888 } svg { width: 100%; height: auto } pre { overflow-x: auto }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem }
"""
SCORES = {"knn": "kNN, all labels", "linear": "linear probe, all labels", "linear_5": "linear probe, 5 labels per class",
          "linear_1": "linear probe, 1 label per class"}
CURVES = {"loss": "loss (0 to 8)", "spread": "spread (1 is healthy, 0 collapsed)", "tau": "tau", "lr": "learning rate",
          "knn": "kNN accuracy", "images_per_second": "images per second"}


def write_report(folder: Path) -> None:
    """Write report.html from summary.json, config.json, metrics.jsonl and the pictures in `folder`, whichever exist."""
    summary = _read_json(folder / "summary.json")
    config = _read_json(folder / "config.json")
    records = [json.loads(line) for line in _read_text(folder / "metrics.jsonl").splitlines()]
    parts = [f"<h1>BYOL run {html.escape(folder.name)}</h1>", _verdict(summary), _scores(summary),
             '<div class="curves">', *(_curve(records, key, title) for key, title in CURVES.items()), "</div>",
             _picture(folder / "neighbours.png", "Random images and their nearest others, trained and untrained"),
             _picture(folder / "views.png", "What the network is trained on: originals and their two views"),
             _choices(config), _skipped(folder / "bad_files.txt"),
             "<h2>Configuration</h2><pre>" + html.escape(json.dumps(config.get("config", {}), indent=1)) + "</pre>"]
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(folder.name)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n")
    write_text(folder / "report.html", page)


def _read_text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(_read_text(path) or "{}")


def _verdict(summary: dict[str, Any]) -> str:
    if not summary:
        return "<p>The run has not ended.</p>"
    facts = (f"{summary['images']} images, {summary['epochs']} epochs, {summary['updates']} updates, "
             f"{summary['seconds']:.0f} s on {summary['device']}")
    return f"<p><strong>{html.escape(summary['status'])}</strong>: {html.escape(facts)}.</p>"


def _scores(summary: dict[str, Any]) -> str:
    found = [key for key in SCORES if summary.get(key) is not None]
    if not found:
        return "<p>No labels, so nothing was measured: see the neighbours below.</p>"
    columns = [("", "trained"), ("_untrained", "untrained"), ("_pixels", "raw pixels")]
    columns = [(suffix, title) for suffix, title in columns if summary.get("knn" + suffix) is not None]
    head = "".join(f'<th class="n">{title}</th>' for _, title in columns)
    rows = ""
    for key in found:
        cells = "".join(f'<td class="n">{_percent(summary.get(key + suffix))}</td>' for suffix, _ in columns)
        rows += f"<tr><td>{SCORES[key]}</td>{cells}</tr>"
    return f"<table><tr><th>accuracy on {html.escape(summary['measured_on'])}</th>{head}</tr>{rows}</table>"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _curve(records: Sequence[dict[str, Any]], key: str, title: str) -> str:
    points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    if len(points) < 2:
        return ""
    step = max(1, len(points) // 400)
    points = points[::step]
    x_high = max(x for x, _ in points) or 1
    y_low, y_high = min(0, min(y for _, y in points)), max(y for _, y in points) or 1
    line = " ".join(f"{40 + 350 * x / x_high:.1f},{110 - 100 * (y - y_low) / (y_high - y_low):.1f}" for x, y in points)
    return (f'<figure><svg viewBox="0 0 400 130" role="img" aria-label="{title}">'
            f'<polyline points="40,10 40,110 390,110" fill="none" stroke="#888"/>'
            f'<polyline points="{line}" fill="none" stroke="#27c" stroke-width="1.5"/>'
            f'<g font-size="10" fill="#888"><text x="0" y="14">{y_high:.3g}</text><text x="0" y="112">{y_low:.3g}</text>'
            f'<text x="330" y="125">epoch {x_high:.3g}</text></g></svg><figcaption>{title}</figcaption></figure>')


def _picture(path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _choices(config: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(choice['name'])}</td><td>{html.escape(str(choice['value']))}</td>"
                   f"<td>{html.escape(choice['reason'])}</td></tr>" for choice in config.get("choices", []))
    return f"<h2>Choices and reasons</h2><table>{rows}</table>" if rows else ""


def _skipped(path: Path) -> str:
    text = _read_text(path)
    return f"<h2>Skipped files</h2><pre>{html.escape(text[:20_000])}</pre>" if text else ""
