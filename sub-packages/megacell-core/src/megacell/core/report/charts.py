# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG texts for a page that has to open without anything else: lines, histograms, bars, points.

Coordinates are in the SVG's own units; colours are told apart by readers who see few (Okabe and Ito's, then others).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, isfinite, log10
from typing import Any

import numpy as np

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31", "#333333", "#bcbd22",
    "#637939", "#ad494a", "#17becf", "#5254a3", "#e7969c", "#a55194", "#6baed6", "#fd8d3c", "#74c476", "#969696",
)  # fmt: skip
WIDTH, HEIGHT = 460, 260
LETTER = 6.4  # width of a letter of the labels, of the wide ones
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 40
_MOST_HOVERED = 150  # points of a line that tell their value
_MOST_POINTS = 1500  # of a line; beyond it each stretch shows its lowest and its highest
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A named line through points; with `dots` each point is marked."""

    name: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """Labels of the axes, lines to compare with by name, and a value that the y axis includes."""

    x: str
    y: str
    references: dict[str, float] = field(default_factory=dict)
    from_zero: bool = False
    reach: float | None = None


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers, 1, 2 or 5 times a power of ten apart, from `low` to `high`."""
    span = high - low
    if not span > 0 or not isfinite(span):
        return [low]
    step = 10.0 ** floor(log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about)
    return [float(round(n * step, 12)) for n in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a number as an axis shows it: short, in k, M and G where it is large."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):g}{suffix}"
    return f"{value:.6g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _limits(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = min(0.0, low) if from_zero else low
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if low == 0 and from_zero else low - margin), high + margin


class _Frame:
    """The plot's rectangle, its axes, and where a value lies in it."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], axes: Axes) -> None:
        self.x, self.y = x, y
        self.parts = []
        for value in ticks(*x):
            at = self.across(value)
            self.parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{number(value)}</text>')
        for value in ticks(*y):
            at = self.down(value)
            self.parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
            self.parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
        self.parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        self.parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axes.x)}</text>')
        turned = f'transform="translate(12 {(_TOP + HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle"'
        self.parts.append(f"<text {turned}>{escape(axes.y)}</text>")

    def across(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - _LEFT - _RIGHT)

    def down(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - _TOP - _BOTTOM)


def _hover(text: str) -> str:
    """Return what a browser shows of a mark while the pointer is on it."""
    return f"<title>{escape(text)}</title>"


def svg(title: str, parts: Sequence[str], width: int = WIDTH, height: int = HEIGHT) -> str:
    """Return an SVG of parts, its title for screen readers."""
    inside = "\n".join(parts)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
    return f"{head}\n{inside}\n</svg>"


def lines(title: str, drawn: Sequence[Line], axes: Axes) -> str:
    """Return lines over one another with the references of `axes`; "" where there is no point."""
    drawn = [Line(line.name, _finite(line.points), line.dots) for line in drawn]
    points = [point for line in drawn for point in line.points]
    if not points:
        return ""
    x = min(p[0] for p in points), max(p[0] for p in points)
    x = x if x[1] > x[0] else (x[0] - 1, x[1] + 1)
    upright = [p[1] for p in points] + list(axes.references.values()) + [v for v in (axes.reach,) if v is not None]
    frame = _Frame(x, _limits(upright, axes.from_zero), axes)
    parts, keys = frame.parts, []
    for count, (name, value) in enumerate(axes.references.items()):
        at = frame.down(value)
        dashes = ("6 3", "2 3", "9 3 2 3")[count % 3]
        parts.append(f'<path class="reference" stroke-dasharray="{dashes}" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
        keys.append((f'class="reference" stroke-dasharray="{dashes}"', f"{name}: {value:.3f}"))
    for count, line in enumerate(drawn):
        if not line.points:
            continue
        colour = COLOURS[count % len(COLOURS)]
        places = [(frame.across(a), frame.down(b)) for a, b in _thinned(line.points)]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        parts.append(f'<path class="line" stroke="{colour}" d="M{path}"/>')
        parts += _marks(line, places, _thinned(line.points), axes, colour)
        keys.append((f'stroke="{colour}"', line.name))
    return svg(title, parts) + (_keys(keys, _stroke) if len(keys) > 1 else "")


def _marks(line: Line, places: Points, values: Points, axes: Axes, colour: str) -> list[str]:
    """Return a circle for each point that is marked, and unseen ones, not too many, that tell a value on hover."""
    marked = line.dots or len(places) == 1
    look = f'r="2.5" fill="{colour}"' if marked else 'r="4" fill="transparent"'
    parts = []
    for i in range(0, len(places), 1 if marked else -(-len(places) // _MOST_HOVERED)):
        (across, down), (x, y) = places[i], values[i]
        text = _hover(f"{line.name}: {number(y)} at {axes.x} {number(x)}")
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" {look}>{text}</circle>')
    return parts


def _finite(points: Points) -> Points:
    return [(a, b) for a, b in points if isfinite(a) and isfinite(b)]


def _thinned(points: Points) -> Points:
    """Return few points that show the same line: of each stretch the lowest and the highest, in their order."""
    if len(points) <= _MOST_POINTS:
        return points
    kept: list[tuple[float, float]] = []
    for stretch in np.array_split(np.arange(len(points)), _MOST_POINTS // 2):
        ends = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    return kept


def histogram(title: str, counts: Sequence[int], edges: Sequence[float], axes: Axes, mark: float | None = None) -> str:
    """Return bars over their edges; `mark` is a vertical line to compare with."""
    first, last = (pick(end, end if mark is None else mark) for pick, end in ((min, edges[0]), (max, edges[-1])))
    frame = _Frame((first, last + (last - first) * 0.02), (0.0, max(max(counts), 1) * 1.05), axes)
    parts = frame.parts
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            left, right, top = frame.across(low), frame.across(high), frame.down(count)
            size = f'width="{max(right - left - 0.5, 0.5):.2f}" height="{frame.down(0) - top:.2f}"'
            text = _hover(f"{number(low)} to {number(high)}: {count:,}")
            parts.append(f'<rect x="{left:.2f}" y="{top:.2f}" {size} fill="{COLOURS[0]}">{text}</rect>')
    if mark is not None:
        at = frame.across(mark)
        parts.append(f'<path class="reference" stroke-dasharray="6 3" d="M{at:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
    return svg(title, parts)


def bars(title: str, values: dict[str, float], shown: Callable[[float], str], most: float | None = None) -> str:
    """Return a horizontal bar for each name, its value as `shown` beside it; `most` is the whole width."""
    whole, row, right = most or max(values.values(), default=0) or 1.0, 18, 90
    left = 14 + LETTER * max((len(_short(name)) for name in values), default=0)
    parts = []
    for count, (name, value) in enumerate(values.items()):
        top, width = count * row + 2, max(value / whole * (WIDTH - left - right), 0.5)
        parts.append(f'<text x="{left - 6:.0f}" y="{top + 11}" text-anchor="end">{escape(_short(name))}</text>')
        size = f'width="{width:.1f}" height="{row - 5}"'
        text = _hover(f"{name}: {shown(value)}")
        parts.append(f'<rect x="{left:.0f}" y="{top}" {size} fill="{COLOURS[0]}">{text}</rect>')
        parts.append(f'<text x="{left + width + 5:.1f}" y="{top + 11}">{escape(shown(value))}</text>')
    return svg(title, parts, height=max(len(values), 1) * row + 4)


def _short(text: str, most: int = 32) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def points(title: str, places: np.ndarray[Any, Any], labels: Sequence[str]) -> str:
    """Return points in the plane, coloured by their labels, the most frequent first; both axes without numbers.

    Parameters
    ----------
    title : str
    places : float [cells, 2]
    labels : sequence of str [cells]
    """
    names, counts = np.unique(np.asarray(labels, str), return_counts=True)
    order = [str(name) for name in names[np.argsort(-counts, kind="stable")]]
    low, high = places.min(0), places.max(0)
    scale = (np.array([WIDTH, 340]) - 20) / np.where(high > low, high - low, 1)
    at = (places - low) * scale + 10
    parts, keys = [], []
    for count, name in enumerate(order):
        colour = COLOURS[count % len(COLOURS)]
        chosen = at[np.asarray(labels, str) == name]
        dots = "".join(f'<circle cx="{a:.1f}" cy="{340 - b:.1f}" r="2"/>' for a, b in chosen)
        parts.append(f'<g fill="{colour}" fill-opacity="0.75">{_hover(name)}{dots}</g>')
        keys.append((f'fill="{colour}"', f"{name} ({len(chosen):,})"))
    return svg(title, parts, height=340) + _keys(keys, _dot)


def _stroke(style: str) -> str:
    return f'<svg class="key" viewBox="0 0 24 10"><path d="M0 5H24" fill="none" stroke-width="2" {style}/></svg>'


def _dot(style: str) -> str:
    return f'<svg class="key dot" viewBox="0 0 10 10"><circle cx="5" cy="5" r="4" {style}/></svg>'


def _keys(keys: Sequence[tuple[str, str]], mark: Callable[[str], str]) -> str:
    inside = "".join(f"<li>{mark(style)}{escape(name)}</li>" for style, name in keys)
    return f'\n<ul class="keys">{inside}</ul>'
