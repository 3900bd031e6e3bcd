"""The curves of a page: what is drawn, how, and what to know when reading it."""

import math
from collections.abc import Callable, Mapping
from functools import partial

from byol_core.report.charts import Curve, Points, draw
from byol_core.report.facts import RunFacts, shown
from byol_core.report.markup import percent, plain

# Key, title, what to know when reading it, and how to draw it.
CURVES: tuple[tuple[str, str, str, Callable[..., Curve]], ...] = (
    ("loss", "Loss", "0 to 8; may rise again while the features improve",
     partial(Curve, low=0.0, smooth=True)),
    ("spread", "Spread", "1 is healthy, 0 is collapsed", partial(Curve, low=0.0, high=1.0)),
    ("rank", "Effective rank", "dimensions in use; a collapse leaves fewer than 5", partial(Curve, low=0.0)),
    ("knn", "kNN accuracy", "on images whose labels the vote did not see", partial(Curve, percent=True)),
    ("separation", "Separation", "of a few images, each in several views; higher is better", partial(Curve, low=0.0)),
    ("cosine", "Mean cosine", "of different images; 0 is healthy, 1 is collapsed", partial(Curve, low=0.0)),
    ("alignment", "Alignment", "squared distance of two views, 0 to 4", partial(Curve, low=0.0, smooth=True)),
    ("uniformity", "Uniformity", "lower is more even", partial(Curve, high=0.0)),
    ("lr", "Learning rate", "after scaling by the batch", partial(Curve, low=0.0)),
    ("tau", "Target momentum tau", "1 stands still", partial(Curve, high=1.0)),
    ("images_per_second", "Images per second", "in training", partial(Curve, low=0.0, smooth=True)),
    ("wait", "Waiting for data", "share of the time; high means: more --workers",
     partial(Curve, low=0.0, percent=True, smooth=True)),
)


def curve_of(run: RunFacts, key: str, kind: Callable[..., Curve]) -> Curve:
    untrained = run.summary.get(f"{key}_untrained")
    baseline = None if untrained is None else (untrained, f"untrained {shown(key, untrained)}")
    return kind({"": run.points(key)}, marks={"resume": run.resumed, "skip": run.skips}, baseline=baseline)


def figure(key: str, title: str, note: str, curve: Curve) -> str:
    drawing = draw(title, curve)
    if not drawing:
        return ""
    points: Points = next(iter(curve.lines.values()))
    last = "" if len(curve.lines) > 1 or not points else \
        f"<b>{percent(points[-1][1]) if curve.percent else plain(points[-1][1], 3)}</b>"
    return (f'<figure class="curve" id="curve-{key}"><figcaption><span>{title}</span>{last}<small>{note}</small></figcaption>'
            f"{drawing}</figure>")


def overlaid(key: str, title: str, note: str, kind: Callable[..., Curve], lines: Mapping[str, Points]) -> str:
    """Curves of several runs; learning rates over ten times apart by their power of ten, or all but one would lie flat."""
    peaks = [max(y for _, y in points) for points in lines.values() if points]
    if key != "lr" or not peaks or not max(peaks) > 10 * min(peaks) > 0:
        return figure(key, title, note, kind(lines))
    floor = min(peaks) / 100  # schedules end near 0, which has no power of ten
    powers = {name: [(x, math.log10(max(y, floor))) for x, y in points] for name, points in lines.items()}
    return figure(key, f"{title}, powers of ten", f"{note}; -3 is 0.001", Curve(powers))
