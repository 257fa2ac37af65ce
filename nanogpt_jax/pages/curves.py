"""Many curves in one chart, as SVG: for `compare`.

Kinds of lines differ in their dashes and in the number at their end, so no colour alone says anything (compare.css).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt_jax.pages.drawing import Area, area, short
from nanogpt_jax.pages.html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 400, 260, 44, 24, 10, 38  # of a chart and its margins, in its own units
KINDS = 6  # that can be told apart; all others are drawn alike, behind them
POINTS = 240  # most points of a line
EARLY = 0.2  # of x: what is above the rest here is cut off
MOST = 2  # times the median line's height, so that a run that breaks does not flatten all others
APART = 12  # of two labels, in the chart's own units


@dataclass(frozen=True)
class Line:
    label: str  # at its end; "" for none
    kind: int  # 0 to KINDS - 1; -1: one of the others
    points: Sequence[tuple[float, float]]  # (x, y), x ascending


def chart(title: str, x_title: str, lines: Sequence[Line], told: str, bands: Sequence[Area] = ()) -> str:
    """Lines over one pair of axes, before shaded bands; a line of one point is a dot. "" if there are no points.
    `told`: what it shows, for those who cannot see it.

    Curves of a loss fall steeply first. So the top of the chart is the largest value after the EARLY part of x, and
    at most MOST times as high as the median line then is. What lies above is cut off, but for dots.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    x_low, x_high = 0.0, max(line.points[-1][0] for line in lines) or 1.0
    low = min(y for line in lines for _, y in line.points)
    tops = [max([y for x, y in line.points if x >= x_high * EARLY] or [line.points[-1][1]]) for line in lines]
    dots = [line.points[0][1] for line in lines if len(line.points) == 1]
    y_low, y_high = _widened(low, max([min(max(tops), low + MOST * (statistics.median(tops) - low)), *dots]))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BELOW

    def place(x: float, y: float) -> tuple[float, float]:
        return round((x - x_low) / (x_high - x_low) * wide, 1), round((y_high - y) / (y_high - y_low) * high, 1)

    grid, texts = [], []
    for y in ticks(y_low, y_high):
        at = TOP + place(0, y)[1]
        grid.append(f"M{LEFT} {at}H{WIDTH - RIGHT}")
        texts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{_figure(y)}</text>')
    for x in ticks(x_low, x_high, 5):
        at = LEFT + place(x, 0)[0]
        texts.append(f'<text x="{at}" y="{HEIGHT - BELOW + 15}" text-anchor="middle">{_figure(x)}</text>')
    texts.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    drawn, whole = [area(band, lambda point: place(*point)) for band in bands], []  # cut off at the edges, and not
    for line in sorted(lines, key=lambda line: -line.kind if line.kind >= 0 else -KINDS):  # the best on top
        points, kind = [place(x, y) for x, y in _thinned(line.points)], f"k{line.kind if line.kind >= 0 else 'x'}"
        if len(points) == 1:
            x, y = points[0]
            whole.append(f'<circle class="{kind}" cx="{LEFT + x:.1f}" cy="{TOP + y:.1f}" r="1.5"/>')
        else:
            drawn.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>')
    labels = _labels([(place(*line.points[-1]), line) for line in lines if line.label], wide, high)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(told)}"><path class="grid" d="{"".join(grid)}"/>'
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BELOW}H{WIDTH - RIGHT}"/>{"".join(texts)}'
        f'<svg x="{LEFT}" y="{TOP}" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}">{"".join(drawn)}</svg>'
        f"{''.join(whole)}{labels}</svg></figure>"
    )


def sample(kind: int) -> str:
    """A short piece of a line of that kind, for a legend."""
    name = f"k{kind}" if kind >= 0 else "kx"
    return (
        f'<svg class="sample" viewBox="0 0 44 10" aria-hidden="true"><polyline class="{name}" points="0,5 44,5"/></svg>'
    )


def shade() -> str:
    """A piece of a band, for a legend."""
    return (
        '<svg class="sample" viewBox="0 0 44 10" aria-hidden="true"><rect class="band" width="44" height="10"/></svg>'
    )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` of them: 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    apart = next(p for p in (power * f for f in (1, 2, 5, 10, 20)) if (high - low) / p <= most - 1)
    first = math.ceil(low / apart - 1e-9)
    return [n * apart for n in range(first, math.floor(high / apart + 1e-9) + 1)]


def _labels(ends: list[tuple[tuple[float, float], Line]], wide: float, high: float) -> str:
    """Each label once, beside the end of its longest line, moved up or down where another one stands."""
    found: dict[str, tuple[float, float]] = {}
    for place, line in sorted(ends, key=lambda end: -end[0][0]):
        found.setdefault(line.label, place)
    columns: dict[int, list[tuple[float, float, str]]] = {}  # those that might touch, by x
    for label, (x, y) in found.items():
        columns.setdefault(round(x / wide * 10), []).append((min(max(y, 0.0), high), x, label))  # y may be cut off
    parts = []
    for column in columns.values():
        column.sort()
        places: list[float] = []
        for y, _, _ in column:
            places.append(max(y, places[-1] + APART) if places else y)
        lift = max(0.0, places[-1] - high)  # the whole column, if its end hangs out of the chart
        parts += [
            f'<text x="{LEFT + x + 4:.1f}" y="{TOP + y - lift + 4:.1f}">{escape(label)}</text>'
            for y, (_, x, label) in zip(places, column, strict=True)
        ]
    return "".join(parts)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS: means of neighbours, and the last one itself."""
    n = -(-len(points) // POINTS)
    if n == 1:
        return list(points)
    parts = [points[i : i + n] for i in range(0, len(points), n)]
    return [
        (math.fsum(x for x, _ in part) / len(part), math.fsum(y for _, y in part) / len(part)) for part in parts
    ] + [points[-1]]


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range with some room, and of some size."""
    high = max(low, high)
    room = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _figure(value: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if sign == "k" else size
            return f"{value / unit:.4g}{sign}"
    return short(round(value, 9))
