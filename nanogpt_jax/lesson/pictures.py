"""The lesson's pictures: attention's weights as squares with their numbers, in an SVG file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

CELL, MARGIN, LETTER = 36, 6, 7.5  # side of a square; around the drawing; width of a letter, about
STYLE = "text{font:13px sans-serif;fill:#222}.n{font-size:11px;text-anchor:middle}.light{fill:#fff}"


def draw(file: str, weights: Sequence[Sequence[float]], words: Sequence[str]) -> None:
    """One head: weights [T][T]. A row is a word that looks, a column one that is looked at; gray: masked."""
    left = max(map(len, words)) * LETTER + 14  # where the squares begin; below them the words need as much
    parts = []
    for t, word in enumerate(words):
        middle = t * CELL + 22
        parts.append(f'<text x="{left - 8:g}" y="{middle}" text-anchor="end">{escape(word)}</text>')
        below = f"translate({left + middle:g} {len(words) * CELL + 8}) rotate(-90)"
        parts.append(f'<text transform="{below}" text-anchor="end">{escape(word)}</text>')
        for s in range(len(words)):
            parts += _square(left + s * CELL, t * CELL, float(weights[t][s]) if s <= t else None)
    told = "; ".join(f"{word}: " + " ".join(f"{w:.2f}" for w in weights[t][: t + 1]) for t, word in enumerate(words))
    side = f"{left + len(words) * CELL + 2 * MARGIN:g}"
    Path(file).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-{MARGIN} -{MARGIN} {side} {side}" width="{side}" '
        f'role="img" aria-label="{escape(told)}">\n<style>{STYLE}</style>\n'
        f'<rect x="-{MARGIN}" y="-{MARGIN}" width="{side}" height="{side}" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n",
        encoding="utf-8",
    )


def _square(x: float, y: int, weight: float | None) -> list[str]:
    """`weight`: None where the mask is."""
    place = f'x="{x:g}" y="{y}" width="{CELL - 2}" height="{CELL - 2}"'
    if weight is None:
        return [f'<rect {place} fill="#e8e8e8"/>']
    square = f'<rect {place} fill="#0b5cad" fill-opacity="{weight:.2f}" stroke="#c9d6e4"/>'
    ink = "n light" if weight > 0.6 else "n"
    number = f'<text x="{x + CELL / 2 - 1:g}" y="{y + 21}" class="{ink}">{weight:.2f}</text>'
    return [square, number] if weight >= 0.005 else [square]
