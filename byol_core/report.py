"""A run folder as one offline page: the verdict, numbers beside their baselines, curves, pictures, and how to go on.

    python -m byol_core.report runs/imgs                    write runs/imgs/report.html again
    python -m byol_core.report runs/a runs/b [--out FILE]   compare runs: curves overlaid, differences in tables
"""

import argparse
import base64
import html
import json
import re
import shlex
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from byol_core.charts import Curve, Points, draw
from byol_core.checkpoint import write_text
from byol_core.config import TrainConfig, command_line
from byol_core.health import Verdict, judge
from byol_core.report_style import STYLE
from byol_core.sample import without_sample

PICTURES_AT_MOST = 4_500_000  # bytes of the page that pictures may take
SKIPPED_AT_MOST = 200  # files named on the page
SCORES = {"knn": "k nearest neighbours, all labels", "linear": "linear probe, all labels",
          "linear_5": "linear probe, 5 labels per class", "linear_1": "linear probe, 1 label per class"}
# Title, what is healthy, what it is.
HEALTH = {"spread": ("spread", "near 1", "how far apart different images lie; 0 when all look alike"),
          "rank": ("effective rank", "far above 1", "dimensions in use by the projections"),
          "cosine": ("mean cosine", "near 0", "likeness of different images; 1 when all look alike"),
          "alignment": ("alignment", "falling", "squared distance of two views of one image, 0 to 4"),
          "uniformity": ("uniformity", "well below 0", "how evenly the features fill their sphere; 0 when all look alike")}
# Key, title, what to know when reading it, and how to draw it.
CURVES: tuple[tuple[str, str, str, Callable[..., Curve]], ...] = (
    ("loss", "Loss", "0 to 8; may rise again while the features improve",
     partial(Curve, low=0.0, smooth=True)),
    ("spread", "Spread", "1 is healthy, 0 is collapsed", partial(Curve, low=0.0, high=1.0)),
    ("rank", "Effective rank", "dimensions in use; below 3 it is a collapse", partial(Curve, low=0.0)),
    ("knn", "kNN accuracy", "on images whose labels the vote did not see", partial(Curve, percent=True)),
    ("cosine", "Mean cosine", "of different images; 0 is healthy, 1 is collapsed", partial(Curve, low=0.0)),
    ("alignment", "Alignment", "squared distance of two views, 0 to 4", partial(Curve, low=0.0, smooth=True)),
    ("uniformity", "Uniformity", "lower is more even", partial(Curve, high=0.0)),
    ("lr", "Learning rate", "after scaling by the batch", partial(Curve, low=0.0)),
    ("tau", "Target momentum tau", "1 stands still", partial(Curve, high=1.0)),
    ("images_per_second", "Images per second", "in training", partial(Curve, low=0.0, smooth=True)),
    ("wait", "Waiting for data", "share of the time; high means: more --workers",
     partial(Curve, low=0.0, percent=True, smooth=True)),
)
GOOD, BAD = ("learning", "finished well"), ("collapsing", "collapsed")


@dataclass(frozen=True)
class RunFiles:
    """What a run folder says. summary: of a run that ended or is under way, {} where there is none that is up to date."""

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, Any]]
    resumed: list[float]
    skipped: list[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def plan(self) -> dict[str, Any]:
        return self.config.get("plan", {})

    @property
    def status(self) -> str:
        """ "running", "stopped", "failed" or "finished"; "unknown" when nothing says that it ended."""
        return str(self.summary.get("status", "unknown"))

    @property
    def verdict(self) -> Verdict:
        return judge(self.records, self.plan.get("epochs", 0), self.status, self.summary, self.plan)

    def points(self, key: str) -> list[tuple[float, float]]:
        found = [(record["epoch"], record[key]) for record in self.records if record.get(key) is not None]
        if key == "knn" and found:  # what was measured before and after belongs to it
            before, after = self.summary.get("knn_untrained"), self.summary.get("knn")
            found = [*([(0.0, before)] if before is not None else []), *found]
            if after is not None and self.summary["epochs"] > found[-1][0]:
                found.append((float(self.summary["epochs"]), after))
        return found


def read_run(folder: Path, summary: Mapping[str, object] | None = None) -> RunFiles:
    """The files of a run folder, whichever exist. summary: of a run under way, in place of summary.json."""
    records = []
    for line in _read_text(folder / "metrics.jsonl").splitlines():
        record = _parse(line)
        if record.keys() >= {"update", "epoch"}:  # else the line that a killed run was writing
            records.append(record)
    config = _parse(_read_text(folder / "config.json"))
    known = _parse(_read_text(folder / "summary.json")) if summary is None else dict(summary)
    if known and records and known["updates"] < records[-1]["update"]:
        known = {}  # it tells of an earlier end, from which the run went on
    per_epoch = config.get("plan", {}).get("updates_per_epoch") or 1
    resumed = [int(update) / per_epoch for update in
               re.findall(r"^\S+ resuming at epoch \d+, update (\d+)$", _read_text(folder / "train.log"), re.MULTILINE)]
    return RunFiles(folder, known, config, records, resumed, _read_text(folder / "bad_files.txt").splitlines())


def write_report(folder: Path, summary: Mapping[str, object] | None = None) -> None:
    """Write report.html from summary.json, config.json, metrics.jsonl and the pictures in `folder`, whichever exist.

    summary: what summary.json would say of a run that is under way, with status "running".
    """
    run = read_run(folder, summary)
    curves = "".join(_figure(key, title, note, _curve_of(run, key, kind)) for key, title, note, kind in CURVES)
    legend = "".join(f'<span><i class="mark {kind}"></i>{text}</span>' for kind, text in
                     (("resume", "resumed"), ("skip", "steps skipped by the float16 scaler")) if f'"mark {kind}"' in curves)
    sections = [
        ("", _verdict(run) + _facts(run)),
        ("What it learned", _scores(run)),
        ("Health, without labels", _health(run)),
        ("Curves", f'<div class="curves">{curves}</div><p class="legend">{legend}</p>' if curves else ""),
        ("Pictures", _pictures(folder)),
        ("Use the backbone", _use(run)),
        ("Go on", _go_on(run)),
        ("Configuration, and why", _choices(run)),
        ("The two views", _views(run)),
        ("Environment", _environment(run)),
        (f"Skipped files ({len(run.skipped)})", _skipped(run)),
        ("All options", _details("as resolved", json.dumps(run.config.get("config", {}), indent=1)) if run.config else ""),
    ]
    write_text(folder / "report.html", _page(run.name, "BYOL run", sections, _footer(run)))


def compare(folders: Sequence[Path], out: Path) -> None:
    """Write one page that sets several runs side by side."""
    runs = [read_run(folder) for folder in folders]
    names = [str(folder) for folder in folders]
    legend = "".join(f'<span><i class="swatch s{number % 8}"></i>{html.escape(name)}</span>'
                     for number, name in enumerate(names))
    curves = "".join(_figure(key, title, note, kind({name: run.points(key) for name, run in zip(names, runs)}))
                     for key, title, note, kind in CURVES)
    verdicts = [{"status": run.status, "verdict": run.verdict.word, "why": run.verdict.why} for run in runs]
    results = [{**verdict, **{key: value for key, value in run.summary.items() if key != "status"}}
               for verdict, run in zip(verdicts, runs)]
    options = [flatten({**run.config.get("config", {}), **run.plan, "data": " ".join(_data(run.config.get("config", {}))),
                        **run.config.get("versions", {}), "images": run.config.get("data", {}).get("images")}) for run in runs]
    sections = [
        ("", f'<p class="legend">{legend}</p>'),
        ("Results", _side_by_side(names, results, only_differences=False)),
        ("Curves", f'<div class="curves">{curves}</div><p class="legend">{legend}</p>' if curves else ""),
        ("Differences in configuration", _side_by_side(names, options, only_differences=True)
         or "<p>None: the runs were asked for in the same way.</p>"),
    ]
    write_text(out, _page(f"{len(runs)} runs compared", "BYOL runs", sections, ""))


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """{"views": [{"blur": 1}]} as {"views 1 blur": 1}."""
    if isinstance(value, Mapping):
        parts = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
        parts = [(str(number), item) for number, item in enumerate(value, 1)]
    else:
        return {prefix: value}
    return {key: leaf for name, item in parts for key, leaf in flatten(item, f"{prefix} {name}".strip()).items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:  # absent, or cut off
        return {}
    return value if isinstance(value, dict) else {}


def _page(title: str, kind: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    body = "".join(f"<section>{f'<h2>{heading}</h2>' if heading else ''}{content}</section>"
                   for heading, content in sections if content)
    name = html.escape(title)
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{name} - {kind}</title><style>{STYLE}</style></head><body><main>"
            f'<header><p class="kind">{kind}</p><h1>{name}</h1></header>{body}{footer}</main></body></html>'
            "\n")


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), kinds: str = "") -> str:
    """Cells are HTML already. kinds: a letter per column, n for numbers."""
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} class="n">{cell}</{tag}>' if kinds[place:place + 1] == "n" else
                                f"<{tag}>{cell}</{tag}>" for place, cell in enumerate(cells)) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(row(cells, "td") for cells in rows)}</tbody></table></div>'


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"


def _verdict(run: RunFiles) -> str:
    verdict, epochs = run.verdict, run.plan.get("epochs")
    done = run.summary.get("epochs", int(run.records[-1]["epoch"]) if run.records else 0)
    place = f"after {done} of {epochs} epochs" if epochs is not None else f"after {done} epochs"
    by = f" by {run.summary['reason']}" if run.summary.get("reason") else ""
    headline, tone = {
        "finished": (verdict.word if verdict.word in ("finished well", "collapsed") else f"finished, but {verdict.word}",
                     "good" if verdict.word in GOOD else "bad"),
        "stopped": (f"stopped {place}{by}", "warn"), "failed": (f"failed {place}", "bad"),
        "running": (f"{verdict.word}, {place}", "good" if verdict.word in GOOD else "warn"),
    }.get(run.status, (f"has not ended, or was cut off, {place}", "warn"))
    if verdict.word == "starting" and run.status == "finished":
        headline, tone = "finished without training", "warn"
    if verdict.word in BAD:
        tone = "bad"
    lines = [f'<p class="headline">{html.escape(headline[0].upper() + headline[1:])}</p>']
    if run.status == "failed" and run.summary.get("reason"):
        lines.append(f"<p>{html.escape(str(run.summary['reason']))}</p>")
    state = "" if verdict.word in headline else f"{verdict.word}: "
    if verdict.word != "starting":
        told = state + verdict.why
        lines.append(f"<p>{html.escape(told[0].upper() + told[1:])}.</p>")
    if verdict.advice:
        lines.append(f"<p><strong>What to do:</strong> {html.escape(verdict.advice)}.</p>")
    return f'<div class="verdict {tone}">{"".join(lines)}</div>'


def _facts(run: RunFiles) -> str:
    summary, data = run.summary, run.config.get("data", {})
    images, classes = summary.get("images", data.get("images")), summary.get("classes", len(data.get("classes", [])))
    last = run.records[-1] if run.records else {}
    machine = [str(summary[key]) for key in ("device", "amp") if summary.get(key, "off") != "off"]
    if summary.get("world_size", 1) != 1:
        machine.append(f"{summary['world_size']} processes")
    facts = [("images", _count(images)), ("classes", _count(classes) if classes else "no labels"),
             ("network", html.escape(str(run.plan.get("arch", "")))),
             ("updates", _count(summary.get("updates", last.get("update")))),
             ("training time", _duration(summary.get("seconds"))),
             ("images per second", _count(summary.get("images_per_second"))),
             ("waiting for data", _percent(summary.get("wait_fraction"))),
             ("device", html.escape(", ".join(machine)))]
    return '<dl class="facts">' + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value) \
        + "</dl>"


def _scores(run: RunFiles) -> str:
    summary = run.summary
    columns = [(suffix, title) for suffix, title in (("", "trained"), ("_untrained", "untrained"), ("_pixels", "raw pixels"))
               if summary.get("knn" + suffix) is not None]
    if not columns:
        classes = summary.get("classes", len(run.config.get("data", {}).get("classes", [])))
        return "<p>Not measured.</p>" if classes else \
            "<p>There are no class folders, so no accuracy: judge by the health below, and by the neighbours.</p>"
    rows = []
    for key, title in SCORES.items():
        if any(summary.get(key + suffix) is not None for suffix, _ in columns):
            rows.append([title, *(_bar(summary.get(key + suffix), suffix) for suffix, _ in columns)])
    later = "" if summary.get("knn") is not None else " The trained network is measured when the run is complete."
    return (f"<p>Accuracy on {html.escape(str(summary.get('measured_on')))}.{later}</p>"
            + _table(rows, ["", *(title for _, title in columns)]) + _best(run))


def _best(run: RunFiles) -> str:
    best = run.summary.get("best_knn")
    return "" if best is None else (f"<p>Best k nearest neighbours on the way: <b>{best:.1%}</b> after epoch "
                                    f"{run.summary['best_epoch']}; that network is best.pt, to be used as backbone.pt is. "
                                    "Chosen by these images, it is a little flattered on them.</p>")


def _bar(value: float | None, suffix: str) -> str:
    if value is None:
        return ""
    kind = "baseline" if suffix else "trained"
    return f'<span class="bar"><i class="{kind}" style="width:{100 * value:.1f}%"></i></span><b>{value:.1%}</b>'


def _health(run: RunFiles) -> str:
    records = [record for record in run.records if "spread" in record]
    rows = []
    for key, (title, healthy, meaning) in HEALTH.items():
        values = [record[key] for record in records if key in record]
        if values:
            limit = f" of {records[-1]['rank_limit']:.0f}" if key == "rank" and "rank_limit" in records[-1] else ""
            rows.append([_named(title, f"{meaning}; healthy: {healthy}"), f"{values[0]:.3g}", f"{values[-1]:.3g}{limit}"])
    if run.summary.get("rank_features") is not None:
        meaning = "of the backbone, over whole images; much lower than in a like run: dimensions were lost. High is no proof"
        rows.append([_named("effective rank of the features", meaning), f"{run.summary['rank_features_untrained']:.3g}",
                     f"{run.summary['rank_features']:.3g}"])
    return _table(rows, ["", "first", "last"], "tnn") if rows else ""


def _named(title: str, meaning: str) -> str:
    return f"{title}<small>{meaning}</small>"


def _curve_of(run: RunFiles, key: str, kind: Callable[..., Curve]) -> Curve:
    skipped = [record["epoch"] for before, record in zip([{}, *run.records], run.records)
               if record.get("skipped", 0) > before.get("skipped", record.get("skipped", 0) if before else 0)]
    untrained = run.summary.get("knn_untrained")
    return kind({"": run.points(key)}, marks={"resume": run.resumed, "skip": skipped},
                baseline=(untrained, f"untrained {untrained:.1%}") if key == "knn" and untrained is not None else None)


def _figure(key: str, title: str, note: str, curve: Curve) -> str:
    drawing = draw(title, curve)
    if not drawing:
        return ""
    points: Points = next(iter(curve.lines.values()))
    last = "" if len(curve.lines) > 1 or not points else \
        f"<b>{_percent(points[-1][1]) if curve.percent else _plain(float(f'{points[-1][1]:.3g}'))}</b>"
    return (f'<figure class="curve" id="curve-{key}"><figcaption><span>{title}</span>{last}<small>{note}</small></figcaption>'
            f"{drawing}</figure>")


def _pictures(folder: Path) -> str:
    titles = {"embedding.png": "All features on a plane: what lies together looks alike to the network",
              "neighbours.png": "Random images and the others most like them, by the trained and by the untrained network",
              "views.png": "What it is trained on: originals and their two views, in true colours"}
    parts, left = [], PICTURES_AT_MOST
    for name, title in titles.items():
        if not (folder / name).exists():
            continue
        png = (folder / name).read_bytes()
        data = base64.b64encode(png).decode()
        if len(data) > left:
            parts.append(f"<p>{title}: see {name} in the run folder, which is too large for this page.</p>")
            continue
        left -= len(data)
        width, height = struct.unpack(">II", png[16:24])  # of the PNG header
        parts.append(f'<figure style="max-width:{width}px"><figcaption><span>{title}</span></figcaption>'
                     f'<img alt="{title}" width="{width}" height="{height}" src="data:image/png;base64,{data}"></figure>')
    return f'<div class="pictures">{"".join(parts)}</div>' if parts else ""


def how_to_load(folder: Path, about: Mapping[str, object]) -> str:
    """Lines of Python that load the exported backbone of the run in `folder`. about: what backbone.json says."""
    return ("import torch; from byol_core.backbones import build_backbone\n"
            f"backbone, dim = build_backbone({about['arch']!r}, small_images={about['small_stem']}, "
            f"image_size={about['image_size']})\n"
            f"backbone.load_state_dict(torch.load({str(folder / 'backbone.pt')!r}, weights_only=True))")


def _use(run: RunFiles) -> str:
    about = _parse(_read_text(run.folder / "backbone.json"))
    if not about.keys() >= {"arch", "small_stem", "image_size", "mean", "std"}:
        return ""
    return (f"<pre>{html.escape(how_to_load(run.folder, about))}</pre>"
            f"<p>Give it images of {about['image_size']} pixels in [0, 1], normalised by mean "
            f"{html.escape(_plain(about['mean']))} and std {html.escape(_plain(about['std']))}.</p>")


def _go_on(run: RunFiles) -> str:
    known = {option.name for option in fields(TrainConfig)}
    asked = run.config.get("config", {})
    if not asked or not set(asked) <= known:
        return ""
    asked = {**asked, "data": _data(asked)}
    processes = run.summary.get("world_size", 1)
    command = command_line(without_sample(TrainConfig(**asked)))
    if processes != 1:
        command = command.replace("python", f"torchrun --nproc-per-node={processes}", 1)
    where = "<p>In the folder where the run was started:</p>"
    if run.status == "finished":
        again = f"{command_line(without_sample(TrainConfig(**{**asked, 'out': None})))} --out NEW-FOLDER --init-from " \
                f"{shlex.quote(str(run.folder / 'backbone.pt'))}"
        return f"<p>The run is complete. A new one may start from its weights:</p><pre>{html.escape(again)}</pre>"
    if run.status == "running":
        return f"{where}<pre>{html.escape(command)} --resume</pre><p>goes on after an interruption, exactly.</p>"
    return f"{where}<pre>{html.escape(command)} --resume</pre><p>goes on from the last checkpoint, exactly.</p>"


def _data(asked: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths of --data; runs from before there could be several have one text."""
    data = asked.get("data", ())
    return (data,) if isinstance(data, str) else tuple(data)


def _choices(run: RunFiles) -> str:
    rows = []
    for choice in run.config.get("choices", []):
        value = f"{choice['value']:.6g}" if isinstance(choice["value"], float) else str(choice["value"])
        if choice["name"] == "lr" and "lr" in run.plan:
            value += f" x {run.plan['batch_size']}/256 = {run.plan['lr']:.6g}"
        rows.append([html.escape(str(choice["name"])), _named(html.escape(value), html.escape(str(choice["reason"])))])
    asked = run.config.get("config", {})
    rows += [[name, _named(html.escape(str(run.plan[name])), "per update" if name == "batch_size" else "as asked")]
             for name in ("epochs", "batch_size") if name in run.plan]
    if "seed" in asked:
        rows.append(["seed", _named(html.escape(str(asked["seed"])), "of everything random")])
    return _table(rows, ["", "value, and why"]) if rows else ""


def _views(run: RunFiles) -> str:
    views = run.plan.get("views", [])
    if len(views) != 2:
        return ""
    rows = [[html.escape(key.replace("_", " ")), *(html.escape(_plain(view.get(key))) for view in views)] for key in views[0]]
    return _table(rows, ["", "view 1", "view 2"])


def _environment(run: RunFiles) -> str:
    facts = {**run.config.get("versions", {}), **{key: run.summary[key] for key in ("device", "amp", "world_size")
                                                  if key in run.summary}, "run folder": str(run.folder)}
    return _table([[html.escape(str(key)), html.escape(str(value))] for key, value in facts.items()])


def _skipped(run: RunFiles) -> str:
    rows = [[html.escape(part) for part in line.split("\t", 1)] for line in run.skipped[:SKIPPED_AT_MOST]]
    more = len(run.skipped) - len(rows)
    return (_table(rows, ["file", "why"]) + (f"<p>and {more} more, in bad_files.txt</p>" if more else "")) if rows else ""


def _footer(run: RunFiles) -> str:
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return ""
    return f"<footer>Last record {datetime.fromtimestamp(path.stat().st_mtime).isoformat(' ', 'minutes')}.</footer>"


def _side_by_side(names: Sequence[str], columns: Sequence[Mapping[str, object]], only_differences: bool) -> str:
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = []
    for key in keys:
        values = [column.get(key) for column in columns]
        if only_differences and all(value == values[0] for value in values) or all(value is None for value in values):
            continue
        accuracy = key.startswith((*SCORES, "best_knn"))
        cells = [_percent(value) if accuracy and isinstance(value, float) else html.escape(_plain(value)) for value in values]
        rows.append([html.escape(key.replace("_", " ")), *cells])
    return _table(rows, ["", *map(html.escape, names)]) if rows else ""


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _percent(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, (int, float)) else ""


def _count(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, (int, float)) else ""


def _duration(seconds: object) -> str:
    if not isinstance(seconds, (int, float)):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    return f"{whole // 3600} h {whole // 60 % 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m byol_core.report", allow_abbrev=False,
                                     description="Write the report of a run again, or compare several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", metavar="FILE", help="where to write the comparison (default: compare.html)")
    asked = parser.parse_args(arguments)
    folders = [Path(run) for run in asked.runs]
    for folder in folders:
        if not (folder / "config.json").exists():
            sys.stderr.write(f"error: {folder} is not a run folder: no config.json in it\n")
            return 2
    try:
        if len(folders) == 1 and asked.out is None:
            write_report(folders[0])
            sys.stdout.write(f"{folders[0] / 'report.html'}\n")
        else:
            out = Path(asked.out or "compare.html")
            compare(folders, out)
            sys.stdout.write(f"{out}\n")
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
