"""Drawings of figures, as SVG: curves over steps, and attention's weights as squares."""

from collections.abc import Callable, Sequence

from nanogpt_jax.pages.html import escape

WIDTH, HEIGHT, LEFT, BELOW = 560, 180, 56, 24  # of a chart, and its place for labels, in the drawing's own units
POINTS = 1000  # most points of a line
CELL = 14  # side of a square

Points = Sequence[tuple[int, float]]  # (step, value)
Area = Sequence[tuple[float, float, float]]  # (x, lowest y, highest y), x ascending


def curve(title: str, line: Points, dots: Points = (), band: Area = ()) -> str:
    """A chart of a line, thinned to POINTS, and of dots, before a shaded band. "" if the line is empty."""
    if not line:
        return ""
    line = line[:: -(-len(line) // POINTS)]
    xs, ys = zip(*line, *dots, strict=True)
    low, high = min(ys), max(ys)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (point[0] - min(xs)) / (max(xs) - min(xs) or 1) * (WIDTH - LEFT - 10)
        return round(x, 1), round(10 + (high - point[1]) / (high - low or 1) * (HEIGHT - BELOW - 20), 1)

    told = f"{title}: {short(line[0][1])} at step {line[0][0]}, {short(line[-1][1])} at step {line[-1][0]}"
    points = " ".join("{},{}".format(*place(point)) for point in line)
    band = [(x, max(bottom, low), min(top, high)) for x, bottom, top in band if min(xs) <= x <= max(xs)]
    band = [(x, min(bottom, high), max(top, low)) for x, bottom, top in band]  # where it lies outside of the chart
    return figure(
        title,
        (WIDTH, HEIGHT),
        told,
        f'<path class="axis" d="M{LEFT} 10V{HEIGHT - BELOW}H{WIDTH - 10}"/>'
        f'<text x="{LEFT - 6}" y="15" text-anchor="end">{short(high)}</text>'
        f'<text x="{LEFT - 6}" y="{HEIGHT - BELOW}" text-anchor="end">{short(low)}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">step {min(xs):,}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" text-anchor="end">{max(xs):,}</text>'
        f'{area(band, place)}<polyline points="{points}"/>'
        + "".join('<circle cx="{}" cy="{}" r="3.5"/>'.format(*place(d)) for d in dots),
    )


def area(band: Area, place: Callable[[tuple[float, float]], tuple[float, float]]) -> str:
    """The polygon between the lowest and the highest. `place`: (x, y) -> where it lies in the drawing."""
    if len(band) < 2:
        return ""
    edge = [(x, low) for x, low, _ in band] + [(x, high) for x, _, high in reversed(band)]
    points = " ".join("{},{}".format(*place(point)) for point in edge)
    return f'<polygon class="band" points="{points}"/>'


def squares(title: str, weights: Sequence[Sequence[float]], tokens: Sequence[str]) -> str:
    """One head: weights [T][T] as squares, full at 1 and empty at 0. Where the mask is, there are none."""
    cells = "".join(
        f'<rect x="{s * CELL}" y="{t * CELL}" width="{CELL - 1}" height="{CELL - 1}" fill-opacity="{weight:.3f}"/>'
        for t, row in enumerate(weights)
        for s, weight in enumerate(row[: t + 1])
    )
    x, names = len(tokens) * CELL + 4, [repr(token)[1:-1] for token in tokens]
    words = "".join(f'<text x="{x}" y="{t * CELL + 11}">{escape(name)}</text>' for t, name in enumerate(names))
    most = [max(range(t + 1), key=row.__getitem__) for t, row in enumerate(weights)]
    told = "; ".join(f"{names[t]} looks most at {names[s]} ({weights[t][s]:.2f})" for t, s in enumerate(most))
    return figure(title, (len(tokens) * CELL + 90, len(tokens) * CELL), told, cells + words)


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def figure(title: str, size: tuple[int, int], told: str, drawing: str) -> str:
    """`told`: what the drawing shows, for those who cannot see it."""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'aria-label="{escape(told)}">{drawing}</svg></figure>'
    )
