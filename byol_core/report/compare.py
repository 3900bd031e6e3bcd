"""Several runs on one page: results and curves side by side, and in which options they differ."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byol_core.report.curves import CURVES, overlaid
from byol_core.report.facts import SCORES, VERDICT, read_run
from byol_core.report.markup import document, percent, plain, table
from byol_core.system.files import write_text


def compare(folders: Sequence[Path], out: Path) -> None:
    """Write one page that sets several runs side by side."""
    runs = [read_run(folder) for folder in folders]
    names = [str(folder) for folder in folders]
    legend = "".join(f'<span><i class="swatch s{number % 8}"></i>{html.escape(name)}</span>'
                     for number, name in enumerate(names))
    curves = "".join(overlaid(key, title, note, kind, {name: run.points(key) for name, run in zip(names, runs)})
                     for key, title, note, kind in CURVES)
    verdicts = [{"status": run.status, "verdict": run.verdict.word, "why": run.verdict.why} for run in runs]
    options = [flatten({**run.config["config"], **run.plan, "data": " ".join(_data(run.config["config"])),
                        **run.config["versions"], "images": run.config["data"].get("images")}) for run in runs]
    results = [{key: value for key, value in run.summary.items() if key not in ("status", "images", *VERDICT)}
               for run in runs]
    sections = [
        ("", f'<p class="legend">{legend}</p>'),
        ("Results", _side_by_side(names, verdicts, results)),
        ("Curves", f'<div class="curves">{curves}</div><p class="legend">{legend}</p>' if curves else ""),
        ("Differences in configuration", _side_by_side(names, [{} for _ in runs], options)
         or "<p>None: the runs were asked for in the same way.</p>"),
    ]
    write_text(out, document(f"{len(runs)} runs compared", "BYOL runs", sections, ""))


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """{"views": [{"blur": 1}]} as {"views 1 blur": 1}."""
    if isinstance(value, Mapping):
        parts = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
        parts = [(str(number), item) for number, item in enumerate(value, 1)]
    else:
        return {prefix: value}
    return {key: leaf for name, item in parts for key, leaf in flatten(item, f"{prefix} {name}".strip()).items()}


def _side_by_side(names: Sequence[str], always: Sequence[Mapping[str, object]],
                  differing: Sequence[Mapping[str, object]]) -> str:
    """A column per run: all of `always`, and of `differing` what is not the same in all runs, or of one run what is known."""
    keys = list(dict.fromkeys(key for column in differing for key in column))
    values = {key: [column.get(key) for column in differing] for key in keys}
    values = {key: found for key, found in values.items()
              if (found != [None] if len(found) == 1 else any(value != found[0] for value in found))}
    values = {key: [column[key] for column in always] for key in always[0]} | values
    rows = []
    for key, found in values.items():
        accuracy = key.startswith((*SCORES, "best_knn", "retrieval"))
        cells = [percent(value) if accuracy and isinstance(value, float) else html.escape(plain(value)) for value in found]
        rows.append([html.escape(key.replace("_", " ")), *cells])
    return table(rows, ["", *map(html.escape, names)]) if rows else ""


def _data(asked: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths of --data; runs from before there could be several have one text."""
    data = asked.get("data", ())
    return (data,) if isinstance(data, str) else tuple(data)
