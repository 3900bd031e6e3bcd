"""A run folder as one offline page: the verdict, numbers beside their baselines, curves, pictures, and how to go on."""

import base64
import html
import json
import shlex
import struct
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from byol_core.report.curves import CURVES, curve_of, figure
from byol_core.report.facts import MEASURED, SCORES, RunFacts, parse_object, read_run, read_text, shown
from byol_core.report.markup import count, details, document, duration, named, percent, plain, table
from byol_core.system.files import LAST, PREVIOUS, write_text

PICTURES_AT_MOST = 4_500_000  # bytes of the page that pictures may take
PNG = b"\x89PNG\r\n\x1a\n"  # how such files begin
SKIPPED_AT_MOST = 200  # files named on the page
# Title, what is healthy, what it is.
HEALTH = {"spread": ("spread", "near 1", "how far apart different images lie; 0 when all look alike"),
          "rank": ("effective rank", "far above 1", "dimensions in use by the projections"),
          "cosine": ("mean cosine", "near 0", "likeness of different images; 1 when all look alike"),
          "alignment": ("alignment", "falling", "squared distance of two views of one image, 0 to 4"),
          "uniformity": ("uniformity", "well below 0", "how evenly the features fill their sphere; 0 when all look alike")}
GOOD, BAD = ("learning", "learned"), ("collapsing", "collapsed", "worse than untrained")


def write_report(folder: Path, under_way: bool = False) -> None:
    """Write report.html from summary.json, config.json, metrics.jsonl and the pictures in `folder`, whichever exist.

    under_way: it is the run itself that writes it, and goes on.
    """
    run = read_run(folder, under_way)
    curves = "".join(figure(key, title, note, curve_of(run, key, kind)) for key, title, note, kind in CURVES)
    legend = "".join(f'<span><i class="mark {kind}"></i>{text}</span>' for kind, text, marks in
                     (("resume", "resumed", run.resumed), ("skip", "steps skipped by the float16 scaler", run.skips)) if marks)
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
        ("All options", details("as resolved", json.dumps(run.config["config"], indent=1)) if run.config["config"] else ""),
    ]
    write_text(folder / "report.html", document(run.name, "BYOL run", sections, _footer(run)))


def _verdict(run: RunFacts) -> str:
    verdict, epochs = run.verdict, run.plan.get("epochs")
    done = run.summary["epochs"]
    place = f"after {done} of {epochs} epochs" if epochs is not None else f"after {done} epochs"
    by = f" by {run.summary['reason']}" if run.summary.get("reason") else ""
    headline, tone = {
        "finished": (f"finished, but {verdict.word}" if verdict.word in ("flat", "undecided") else verdict.word,
                     "good" if verdict.word in GOOD else "bad" if verdict.word == "flat" else "warn"),
        "stopped": (f"stopped {place}{by}", "warn"), "failed": (f"failed {place}", "bad"),
        "running": (f"{verdict.word}, {place}", "good" if verdict.word in GOOD else "warn"),
    }.get(run.status, (f"has not ended, or was cut off, {place}", "warn"))
    if verdict.word == "starting" and run.status == "finished":
        headline, tone = "finished, but without records to judge by" if run.summary["updates"] else \
            "finished without training", "warn"
    if verdict.word in BAD:
        tone = "bad"
    lines = [f'<p class="headline">{html.escape(headline[0].upper() + headline[1:])}</p>']
    if run.status == "failed" and run.summary.get("reason"):
        lines.append(f"<p>{html.escape(str(run.summary['reason']))}</p>")
    state = "" if run.status in ("running", "finished") else f"{verdict.word}: "  # where the headline does not say it
    if verdict.word != "starting":
        told = state + verdict.why
        lines.append(f"<p>{html.escape(told[0].upper() + told[1:])}.</p>")
    if verdict.advice:
        lines.append(f"<p><strong>What to do:</strong> {html.escape(verdict.advice)}.</p>")
    return f'<div class="verdict {tone}">{"".join(lines)}</div>'


def _facts(run: RunFacts) -> str:
    summary, classes = run.summary, _classes(run)
    machine = [str(summary[key]) for key in ("device", "amp") if (summary.get(key) or "off") != "off"]
    if (summary.get("world_size") or 1) != 1:
        machine.append(f"{summary['world_size']} processes")
    facts = [("images", count(summary.get("images", run.config["data"].get("images")))),
             ("classes", count(classes) if classes else "no labels"),
             ("network", html.escape(str(run.plan.get("arch", "")))),
             ("updates", count(summary["updates"])),
             ("training time", duration(summary.get("seconds"))),
             ("images per second", count(summary.get("images_per_second"))),
             ("waiting for data", percent(summary.get("wait_fraction"))),
             ("device", html.escape(", ".join(machine)))]
    return '<dl class="facts">' + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value) \
        + "</dl>"


def _classes(run: RunFacts) -> int:
    return run.summary.get("classes") or len(run.config["data"].get("classes") or [])


def _scores(run: RunFacts) -> str:
    scores, trained, on_the_way = run.summary, "trained", run.recorded("knn")
    if scores.get("knn") is None and on_the_way:
        scores, trained = {**scores, "knn": on_the_way[-1][1]}, f"after epoch {on_the_way[-1][0]:.0f}"
    columns = [(suffix, title) for suffix, title in (("", trained), ("_untrained", "untrained"), ("_pixels", "raw pixels"))
               if scores.get("knn" + suffix) is not None]
    if not columns:
        return f"<p>{_why_no_scores(run)}</p>{_best(run)}"
    rows = []
    for key, title in SCORES.items():
        if any(scores.get(key + suffix) is not None for suffix, _ in columns):
            rows.append([title, *(_bar(scores.get(key + suffix), suffix) for suffix, _ in columns)])
    later = "" if run.summary.get("knn") is not None else " The trained network is measured when the run is complete."
    return (f"<p>Accuracy on {html.escape(str(scores.get('measured_on') or 'held-out images'))}.{later}</p>"
            + table(rows, ["", *(title for _, title in columns)]) + _best(run))


def _why_no_scores(run: RunFacts) -> str:
    asked = run.config["config"]
    if not asked.get("eval", True):
        return "Not measured, as asked (--no-eval)."
    if not _classes(run) and asked.get("eval_data") is None:
        return "There are no class folders, so no accuracy: judge by the health below, and by the neighbours."
    return "Not measured: the labels do not allow it; train.log says why." if run.status == "finished" else "Not measured yet."


def _best(run: RunFacts) -> str:
    """Of runs that were measured on the way."""
    epoch, found = run.summary.get("best_epoch"), [name for name in MEASURED if run.summary.get(f"best_{name}") is not None]
    if not found or epoch is None:
        return ""
    name, score = found[-1], shown(found[-1], run.summary[f"best_{found[-1]}"])
    flattered = " Chosen by these images, it is a little flattered on them." if name == "knn" else ""
    return (f"<p>Best {name.replace('knn', 'k nearest neighbours')} on the way: <b>{score}</b> after epoch {epoch}; that "
            f"network is best.pt, to be used as backbone.pt is.{flattered}</p>")


def _bar(value: float | None, suffix: str) -> str:
    if value is None:
        return ""
    kind = "baseline" if suffix else "trained"
    return f'<span class="bar"><i class="{kind}" style="width:{100 * value:.1f}%"></i></span><b>{value:.1%}</b>'


def _health(run: RunFacts) -> str:
    records = [record for record in run.records if "spread" in record]
    rows = []
    for key, (title, healthy, meaning) in HEALTH.items():
        values = [record[key] for record in records if key in record]
        if values:
            limit = f" of {records[-1]['rank_limit']:.0f}" if key == "rank" and "rank_limit" in records[-1] else ""
            rows.append([named(title, f"{meaning}; healthy: {healthy}"), f"{values[0]:.3g}", f"{values[-1]:.3g}{limit}"])
    if run.summary.get("separation_untrained") is not None:
        meaning = "of images from each other, against the scatter of their own views, in the features; healthy: rising"
        found = run.recorded("separation")
        last = run.summary.get("separation", found[-1][1] if found else None)
        rows.append([named("separation", meaning), plain(run.summary["separation_untrained"], 3), plain(last, 3)])
    if run.summary.get("retrieval_untrained") is not None:
        meaning = "how often a view's nearest one is of the same image; healthy: rising"
        rows.append([named("retrieval", meaning), *(shown("retrieval", run.summary.get(key))
                                                    for key in ("retrieval_untrained", "retrieval"))])
    if run.summary.get("rank_features") is not None:
        meaning = "of the backbone, over whole images; much lower than in a like run: dimensions were lost. High is no proof"
        rows.append([named("effective rank of the features", meaning),
                     *(plain(run.summary.get(key), 3) for key in ("rank_features_untrained", "rank_features"))])
    return table(rows, ["", "first", "last"], "tnn") if rows else ""


def _pictures(folder: Path) -> str:
    titles = {"embedding.png": "All features on a plane: what lies together looks alike to the network",
              "views.png": "What it is trained on: originals and their two views, in true colours",
              "neighbours.png": "Random images and the others most like them, by the trained and by the untrained network"}
    parts, left = [], PICTURES_AT_MOST
    for name, title in titles.items():
        try:
            png = (folder / name).read_bytes()
        except OSError:
            continue
        if not png.startswith(PNG) or len(png) < 24:  # damaged: its size is not known
            continue
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
            f"backbone.load_state_dict(torch.load({str(folder / 'backbone.pt')!r}, weights_only=True)); backbone.eval()")


def _use(run: RunFacts) -> str:
    about = parse_object(read_text(run.folder / "backbone.json"))
    if not about.keys() >= {"arch", "small_stem", "image_size", "mean", "std"}:
        return ""
    return (f"<pre>{html.escape(how_to_load(run.folder, about))}</pre>"
            f"<p>Give it images of {html.escape(str(about['image_size']))} pixels in [0, 1], normalised by mean "
            f"{html.escape(plain(about['mean']))} and std {html.escape(plain(about['std']))}. In evaluation mode, as here, "
            "features do not depend on the other images of a batch; backbone.train() is for training it further.</p>")


def _go_on(run: RunFacts) -> str:
    command, elsewhere = (str(run.config["commands"].get(key, "")) for key in ("this", "elsewhere"))
    if not command or not elsewhere:  # runs of earlier versions have none
        return "<p>The command that started the run goes on with it, --resume added.</p>"
    if run.status == "finished":
        again = f"{elsewhere} --out NEW-FOLDER --init-from {shlex.quote(str(run.folder / 'backbone.pt'))}"
        return f"<p>The run is complete. A new one may start from its weights:</p><pre>{html.escape(again)}</pre>"
    if run.status == "failed" and run.summary.get("error") in ("NonFiniteError", "NonFiniteFeaturesError"):
        return "<p>Gone on with, the run would fail in the same place: see the reason above, and what it advises.</p>"
    if not any((run.folder / name).exists() for name in (LAST, PREVIOUS)):
        what = "begins anew: no checkpoint was saved yet."
    elif run.status == "running":
        what = "goes on after an interruption, exactly."
    else:
        what = "goes on from the last checkpoint, exactly."
    return f"<p>In the folder where the run was started:</p><pre>{html.escape(command)} --resume</pre><p>{what}</p>"


def _choices(run: RunFacts) -> str:
    rows = []
    for choice in run.choices:
        value = plain(choice.get("shown", choice["value"]))  # runs of earlier versions have the bare value
        rows.append([html.escape(str(choice["name"])), named(html.escape(value), html.escape(str(choice["reason"])))])
    asked = run.config["config"]
    length = f"what fits into --minutes {plain(asked['minutes'])}" if asked.get("minutes") else "in all"
    for name, why in (("epochs", length), ("batch_size", "per update")):
        if name in run.plan:
            rows.append([name, named(html.escape(str(run.plan[name])), html.escape(why))])
    if "seed" in asked:
        rows.append(["seed", named(html.escape(str(asked["seed"])), "of everything random")])
    return table(rows, ["", "value, and why"]) if rows else ""


def _views(run: RunFacts) -> str:
    views = run.plan.get("views") or []
    if len(views) != 2:
        return ""
    rows = [[html.escape(key.replace("_", " ")), *(html.escape(plain(view.get(key))) for view in views)] for key in views[0]]
    return table(rows, ["", "view 1", "view 2"])


def _environment(run: RunFacts) -> str:
    facts = {**run.config["versions"], **{key: run.summary[key] for key in ("device", "amp", "world_size")
                                          if run.summary.get(key) is not None}, "run folder": str(run.folder)}
    return table([[html.escape(str(key)), html.escape(str(value))] for key, value in facts.items()])


def _skipped(run: RunFacts) -> str:
    rows = []
    for line in run.skipped[:SKIPPED_AT_MOST]:
        name, _, why = line.partition("\t")
        rows.append([html.escape(name), html.escape(why)])
    more = len(run.skipped) - len(rows)
    rest = f"<p>and {more} more, in bad_files.txt</p>" if more else ""
    return table(rows, ["file", "why"], "ww") + rest if rows else ""


def _footer(run: RunFacts) -> str:
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return ""
    return f"<footer>Last record {datetime.fromtimestamp(path.stat().st_mtime).isoformat(' ', 'minutes')}.</footer>"
