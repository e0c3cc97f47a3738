"""Small charts as inline SVG: text that takes its colours from the page it stands in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 34  # space for the axes
_MAX_POINTS = 600  # of one line: more would not be seen
_CUT = 0.99  # share of the points of a faint line that decide the range


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a chart.

    `style` is a class of the page: "faint" for what jumps, "train" and "held-out" for what is
    read. A faint line may leave the chart at its top.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A place on the x axis with a name."""

    x: float
    name: str
    style: str = "mark"


def line_chart(series: Sequence[Series], *, title: str, marks: Sequence[Mark] = ()) -> str:
    """Draw lines over steps, as an ``<svg>`` element.

    Args:
        series: At least one with a finite point.
        title: For those who cannot see it.
        marks: Places to point out.
    """
    x_max = max(float(max(one.x)) for one in series if len(one.x))
    low, high = _limits(series)
    frame = _Frame(x=(0.0, x_max or 1.0), y=(low, high))
    parts = [frame.axes(), *(_mark(frame, mark) for mark in marks)]
    parts += [_line(frame, one) for one in series]
    return _svg(title, parts)


def histogram(values: Sequence[float], *, title: str, marks: Sequence[Mark] = ()) -> str:
    """Draw how often values occur, as an ``<svg>`` element."""
    counts, edges = np.histogram(values, bins=min(30, max(5, round(math.sqrt(len(values)) * 2))))
    frame = _Frame(x=(float(edges[0]), float(edges[-1])), y=(0.0, 1.2 * float(counts.max())))
    bars = []
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        x, y, end = frame.px(left), frame.py(float(count)), frame.px(right)
        height = frame.py(0.0) - y
        width = max(end - x - 1.5, 0.5)
        bars.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
        )
    return _svg(title, [frame.axes(), *bars, *(_mark(frame, mark) for mark in marks)])


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Average each value with those before it: `window` of them, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return [float(value) for value in (sums[ends] - sums[starts]) / (ends - starts)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Give round numbers from `low` to `high`, about `count` of them."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """Where numbers lie on the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> float:
        low, high = self.x
        share = (value - low) / ((high - low) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        share = (value - low) / ((high - low) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> str:
        bottom = _HEIGHT - _BOTTOM
        parts = []
        for value in ticks(*self.y, count=4):
            y = self.py(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_at(y)}/>')
            parts.append(f'<text class="y" x="{_LEFT - 8}" y="{y + 4:.1f}">{value:.4g}</text>')
        parts += [
            f'<text class="x" x="{self.px(value):.1f}" y="{bottom + 20}">{value:.4g}</text>'
            for value in ticks(*self.x)
        ]
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_at(bottom)}/>')
        return "".join(parts)


def _at(y: float) -> str:
    return f'y1="{y:.1f}" y2="{y:.1f}"'


def _limits(series: Sequence[Series]) -> tuple[float, float]:
    """Give the range of y: all of what is read, nearly all of what jumps."""
    kept = []
    for one in series:
        values = np.asarray([y for y in one.y if math.isfinite(y)], dtype=np.float64)
        if values.size:
            top = np.quantile(values, _CUT) if one.style == "faint" else values.max()
            kept += [float(values.min()), float(top)]
    if not kept:
        return 0.0, 1.0
    low, high = min(kept), max(kept)
    room = 0.06 * (high - low) or 0.5
    # Zero is shown where it is near, so that heights can be compared.
    return (0.0 if 0 <= low < 0.5 * high else low - room), high + room


def _line(frame: _Frame, one: Series) -> str:
    thin = -(-len(one.x) // _MAX_POINTS) or 1
    points = list(zip(one.x, one.y, strict=True))
    shown = [point for point in points[::thin] if math.isfinite(point[1])]
    top = frame.y[1]
    text = " ".join(f"{frame.px(x):.1f},{frame.py(min(y, top)):.1f}" for x, y in shown)
    dots = ""
    if one.style == "held-out" and len(shown) <= 40:
        dots = "".join(
            f'<circle class="{one.style}" cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="2.6"/>'
            for x, y in shown
        )
    return f'<polyline class="{one.style}" points="{text}"/>{dots}'


def _mark(frame: _Frame, mark: Mark) -> str:
    x = frame.px(mark.x)
    is_right = x > _LEFT + 0.75 * (_WIDTH - _LEFT)
    anchor, shift = ("end", -5) if is_right else ("start", 5)
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"'
    text = (
        f'<text class="{mark.style}" x="{x + shift:.1f}" y="{_TOP + 10}" '
        f'text-anchor="{anchor}">{escape(mark.name)}</text>'
    )
    return f'<line class="{mark.style}" {ends}/>{text}'


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
