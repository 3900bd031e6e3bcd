"""Curves as inline SVG: scaled, with sensible ticks, a line for the baseline, and marks for what happened on the way."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 200  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34  # margins, of which the axes' numbers take a part
AT_MOST = 240  # points per line: more than the screen can tell apart
SMOOTHED_FROM = 30  # points; below it a line is not smoothed


@dataclass(frozen=True)
class Curve:
    """What to draw. lines: by name, (x, y) in the order of x.

    low, high: the y axis reaches at least this far. percent: y is a share. smooth: also draw a running mean. baseline: a
    level with its name. marks: x of vertical lines, by kind.
    """

    lines: Mapping[str, Points]
    low: float = math.inf
    high: float = -math.inf
    percent: bool = False
    smooth: bool = False
    baseline: tuple[float, str] | None = None
    marks: Mapping[str, Sequence[float]] | None = None


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    if not high > low:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def number_text(value: float, step: float, percent: bool = False) -> str:
    """`value` with as many decimals as a scale of `step` needs; very small and very large numbers by their power of ten."""
    if percent:
        value, step = 100 * value, 100 * step
    power = math.floor(math.log10(step) + 1e-9)
    decimals = max(0, -power)
    if value and (abs(value) >= 1e6 or decimals > 4 and abs(value) < 1e-2):
        mantissa, exponent = f"{value:.{max(0, math.floor(math.log10(abs(value)) + 1e-9) - power)}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:,.{decimals}f}"
    return text + "%" if percent else text


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most 240 points: means of runs of neighbours, the last point as it is."""
    size = math.ceil(len(points) / AT_MOST)
    if size <= 1:
        return list(points)
    groups = [points[start:start + size] for start in range(0, len(points), size)]
    return [*((sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups), points[-1]]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Running means over a twentieth of the points on either side, fewer at the ends."""
    reach = max(1, len(points) // 20)
    means = []
    for place, (x, _) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        window = points[place - near:place + near + 1]
        means.append((x, sum(y for _, y in window) / len(window)))
    return means


def draw(title: str, curve: Curve) -> str:
    """An <svg> of the curve; "" when no line has two points. Colours come from the page's style, classes s0, s1, ..."""
    lines = {name: thinned(points) for name, points in curve.lines.items()}
    values = [y for points in lines.values() for _, y in points]
    if not any(len(points) > 1 for points in lines.values()):
        return ""
    if curve.baseline:
        values.append(curve.baseline[0])
    y_ticks = ticks(min(*values, curve.low), max(*values, curve.high))
    x_high = max(x for points in lines.values() for x, _ in points) or 1.0
    x_ticks = [tick for tick in ticks(0.0, x_high) if tick <= x_high * (1 + 1e-9)]

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_high

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    def path(points: Points, kind: str) -> str:
        return f'<polyline class="{kind}" points="{" ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)}"/>'

    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
                     f'<text class="y" x="{LEFT - 6}" y="{up(tick) + 4:.1f}">'
                     f'{number_text(tick, y_ticks[1] - y_ticks[0], curve.percent)}</text>')
    for tick in x_ticks:
        parts.append(f'<line class="tick" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{HEIGHT - BOTTOM}" '
                     f'y2="{HEIGHT - BOTTOM + 4}"/><text class="x" x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}">'
                     f'{number_text(tick, x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else 1.0)}</text>')
    parts.append(f'<text class="x" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 2}">epoch</text>')
    for kind, places in (curve.marks or {}).items():
        parts += [f'<line class="mark {kind}" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                  for x in places if x <= x_high]
    if curve.baseline:
        level, name = curve.baseline
        parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(level):.1f}" y2="{up(level):.1f}"/>'
                     f'<text class="base" x="{WIDTH - RIGHT - 2}" y="{up(level) - 4:.1f}">{html.escape(name)}</text>')
    for number, points in enumerate(lines.values()):
        smooth = curve.smooth and len(points) >= SMOOTHED_FROM
        parts.append(path(points, f"s{number % 8} raw" if smooth else f"s{number % 8}"))
        if smooth:
            parts.append(path(smoothed(points), f"s{number % 8}"))
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)} over epochs">{"".join(parts)}'
            "</svg>")
