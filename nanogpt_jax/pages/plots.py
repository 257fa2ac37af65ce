"""Drawings of figures with their uncertainty, as SVG: points with error bars, a curve of one number, a map of two.

An error bar is one standard error to each side; the small rings are single values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt_jax.pages.drawing import figure, short
from nanogpt_jax.pages.html import escape

WIDTH, HEIGHT = 620, 260  # of a curve, in the drawing's own units
LEFT, RIGHT, ABOVE, BELOW = 62, 16, 12, 40  # its places for labels
ROW, NAMES, LONGEST = 22, 250, 40  # height of a row of points; the place for its name, and the most characters of it
CELL_WIDTH, CELL_HEIGHT = 74, 34  # of a map


@dataclass(frozen=True)
class Point:
    label: str  # what it stands for
    mean: float | None  # None: there is no value
    error: float | None  # standard error
    values: Sequence[float] = ()
    x: float = 0.0  # its place on a curve


def intervals(title: str, points: Sequence[Point]) -> str:
    """A row for each point: its name, its mean with an error bar, and its single values. "" if there is no mean."""
    low, high = _range(points)
    if low is None or high is None:
        return ""
    height = len(points) * ROW

    def place(value: float) -> float:
        return round(NAMES + 10 + (value - low) / (high - low) * (WIDTH - NAMES - 10 - RIGHT), 1)

    parts = [f'<path class="axis" d="M{NAMES} 0V{height}H{WIDTH - RIGHT}"/>']
    for tick in ticks(low, high, 6):
        parts.append(f'<path class="axis" d="M{place(tick)} 0V{height}"/>')
        parts.append(f'<text x="{place(tick)}" y="{height + 15}" text-anchor="middle">{label(tick)}</text>')
    for i, one in enumerate(points):
        y = i * ROW + ROW // 2
        name = one.label if len(one.label) <= LONGEST else f"{one.label[: LONGEST - 1]}…"
        parts.append(f'<text x="{NAMES - 6}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts += [f'<circle class="single" cx="{place(value)}" cy="{y}" r="2.5"/>' for value in one.values]
        if one.mean is None:
            parts.append(f'<text x="{NAMES + 10}" y="{y + 4}">diverged</text>')
            continue
        if one.error is not None:
            a, b = place(one.mean - one.error), place(one.mean + one.error)
            parts.append(f'<path class="error" d="M{a} {y}H{b}M{a} {y - 4}V{y + 4}M{b} {y - 4}V{y + 4}"/>')
        parts.append(f'<circle cx="{place(one.mean)}" cy="{y}" r="4"/>')
    return figure(title, (WIDTH, height + 22), _told(title, points), "".join(parts))


def curve(title: str, name: str, points: Sequence[Point], log: bool) -> str:
    """Means over one number, in its order. `log`: its axis is logarithmic. "" if there is no mean."""
    low, high = _range(points)
    if low is None or high is None:
        return ""
    points = sorted(points, key=lambda one: one.x)
    scale = math.log if log else float
    first, last = scale(points[0].x), scale(points[-1].x)
    right, bottom = WIDTH - RIGHT, HEIGHT - BELOW

    def across(x: float) -> float:
        return round(LEFT + 14 + (scale(x) - first) / (last - first or 1) * (right - LEFT - 28), 1)

    def up(value: float) -> float:
        return round(ABOVE + (high - value) / (high - low) * (bottom - ABOVE), 1)

    parts = [f'<path class="axis" d="M{LEFT} {ABOVE}V{bottom}H{right}"/>']
    for tick in ticks(low, high, 6):
        parts.append(f'<path class="axis" d="M{LEFT} {up(tick)}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4}" text-anchor="end">{label(tick)}</text>')
    taken = -math.inf  # where the last number of the axis ends
    for one in points:
        x, half = across(one.x), 3.2 * len(label(one.x)) + 3
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        if x - half >= taken:
            parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{label(one.x)}</text>')
            taken = x + half
        if one.mean is None:
            parts.append(f'<text x="{x}" y="{ABOVE + 10}" text-anchor="middle">diverged</text>')
    drawn = [one for one in points if one.mean is not None]
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(name)}</text>')
    line = " ".join(f"{across(one.x)},{up(one.mean)}" for one in drawn if one.mean is not None)
    parts.append(f'<polyline points="{line}"/>')
    for one in drawn:
        x = across(one.x)
        parts += [f'<circle class="single" cx="{x}" cy="{up(value)}" r="2.5"/>' for value in one.values]
        if one.mean is not None and one.error is not None:
            a, b = up(one.mean - one.error), up(one.mean + one.error)
            parts.append(f'<path class="error" d="M{x} {a}V{b}M{x - 4} {a}h8M{x - 4} {b}h8"/>')
        parts += [f'<circle cx="{x}" cy="{up(one.mean)}" r="4"/>'] if one.mean is not None else []
    return figure(title, (WIDTH, HEIGHT), _told(title, points), "".join(parts))


def heat(title: str, across: tuple[str, Sequence[str]], down: tuple[str, Sequence[str]], cells: dict) -> str:
    """A map of two settings, each its name and its values in order. `cells`: (column, row) -> mean, None: diverged.

    The fuller a cell, the lower its figure; each has its figure in it, and the lowest a frame. A cell that is absent
    stays empty. "" if there is no figure.
    """
    known = [value for value in cells.values() if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    (name_x, xs), (name_y, ys) = across, down
    left = 16 + max(7 * min(len(y), 16) for y in ys)
    parts = []
    for (i, j), value in cells.items():
        x, y = left + i * CELL_WIDTH, 20 + j * CELL_HEIGHT
        share = 0.0 if value is None else 0.05 + 0.4 * (high - value) / (high - low or 1)
        best = ' class="best"' if value == low else ""
        parts.append(
            f'<rect{best} x="{x + 1}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
            f'fill-opacity="{share:.3f}"/>'
            f'<text x="{x + CELL_WIDTH // 2}" y="{y + CELL_HEIGHT // 2 + 4}" text-anchor="middle">'
            f"{'diverged' if value is None else f'{value:.4f}'}</text>"
        )
    for j, text in enumerate(ys):
        y = 20 + j * CELL_HEIGHT + CELL_HEIGHT // 2 + 4
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end">{escape(text[:16])}</text>')
    below = 20 + len(ys) * CELL_HEIGHT
    for i, text in enumerate(xs):
        x = left + i * CELL_WIDTH + CELL_WIDTH // 2
        parts.append(f'<text x="{x}" y="{below + 15}" text-anchor="middle">{escape(text[:11])}</text>')
    width = max(left + len(xs) * CELL_WIDTH, left + 7 * len(name_x) + 10, WIDTH)  # else few cells would be huge
    parts.append(f'<text x="0" y="12">{escape(name_y)}</text>')
    parts.append(f'<text x="{left}" y="{below + 34}">{escape(name_x)}</text>')
    told = "; ".join(
        f"{name_x} {xs[i]}, {name_y} {ys[j]}: {'diverged' if value is None else f'{value:.4f}'}"
        for (i, j), value in cells.items()
    )
    return figure(title, (width, below + 42), told, "".join(parts))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def label(value: float) -> str:
    """A number on an axis."""
    return f"{value:.6g}" if 1e-4 <= abs(value) < 1e5 or not value else short(value)


def _range(points: Sequence[Point]) -> tuple[float, float] | tuple[None, None]:
    """From the lowest to the highest value or end of a bar, with some room; Nones if there is no value."""
    ends = [value for one in points for value in one.values]
    for one in points:
        if one.mean is not None:
            ends += [one.mean - (one.error or 0), one.mean + (one.error or 0)]
    if not ends:
        return None, None
    room = (max(ends) - min(ends)) * 0.04 or abs(ends[0]) * 0.01 or 1.0
    return min(ends) - room, max(ends) + room


def _told(title: str, points: Sequence[Point]) -> str:
    def one(point: Point) -> str:
        error = "" if point.error is None else f" ± {point.error:.4f}"
        return f"{point.label}: " + ("diverged" if point.mean is None else f"{point.mean:.4f}{error}")

    return f"{title}: " + "; ".join(map(one, points))
