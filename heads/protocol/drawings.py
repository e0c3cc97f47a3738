"""The pictures of a protocol's page, as inline SVG that takes its colours from the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from heads.svg import ticks

_WIDTH = 560
_LEFT, _RIGHT, _TOP = 58, 16, 16
_PLANE_HEIGHT, _BOTTOM = 320, 46
_ROW, _NAMES = 24, 150  # of the intervals: height of a row, space for the names
_LETTER, _LINE = 6.3, 13.0  # size of the text, as wide and high as it is at most
_GAP = 8.0
_N_COLOURS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """A place in a plane, perhaps with the interval of its height."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A number with its interval, in a line of its own."""

    name: str
    value: float
    low: float | None
    high: float | None


def pareto_chart(dots: Sequence[Dot], frontier: Sequence[Dot], *, title: str, y_label: str) -> str:
    """Draw errors over counts of parameters, and what nothing beats as a line of steps.

    Args:
        dots: `x` is a count; 0 has a place of its own, left of the others.
        frontier: Those of the dots that nothing beats, the fewest parameters first.
        title: For those who cannot see it.
        y_label: What the heights are.
    """
    plane = _Plane(x=_log_scale([dot.x for dot in dots]), y=_linear_scale([dot.y for dot in dots]))
    steps = [
        place
        for one, other in itertools.pairwise(frontier)
        for place in ((one.x, one.y), (other.x, one.y))
    ] + [(dot.x, dot.y) for dot in frontier[-1:]]
    path = " ".join(f"{plane.px(x):.1f},{plane.py(y):.1f}" for x, y in steps)
    is_best = {dot.name for dot in frontier}
    parts = [plane.axes("trained parameters of an identity", y_label)]
    parts.append(f'<polyline class="c1 thin" points="{path}"/>')
    parts += plane.names(dots)
    parts += [plane.dot(dot, "c1" if dot.name in is_best else "off") for dot in dots]
    return _svg(title, _PLANE_HEIGHT, parts)


def plane_chart(dots: Sequence[Dot], *, title: str, x_label: str, y_label: str) -> str:
    """Draw named dots with their intervals, and a line at 0 where that is in sight."""
    heights = [each for dot in dots for each in (dot.y, dot.low, dot.high) if each is not None]
    plane = _Plane(x=_linear_scale([dot.x for dot in dots]), y=_linear_scale([0.0, *heights]))
    parts = [plane.axes(x_label, y_label), plane.zero()]
    return _svg(
        title, _PLANE_HEIGHT, [*parts, *plane.names(dots), *(plane.dot(dot, "c1") for dot in dots)]
    )


def shots_chart(
    series: Mapping[str, Sequence[float]], places: Sequence[str], *, title: str, y_label: str
) -> str:
    """Draw one line a name over places that are evenly apart; what is no number has no dot."""
    heights = [y for values in series.values() for y in values if math.isfinite(y)]
    scale = _Scale(
        low=-0.2,
        high=max(len(places) - 0.8, 0.8),
        marks=tuple((float(number), name) for number, name in enumerate(places)),
    )
    plane = _Plane(x=scale, y=_linear_scale(heights))
    parts = [plane.axes("images learned from", y_label)]
    for number, values in enumerate(series.values()):
        dots = [Dot(name="", x=x, y=y) for x, y in enumerate(values) if math.isfinite(y)]
        style = colour(number)
        path = " ".join(f"{plane.px(dot.x):.1f},{plane.py(dot.y):.1f}" for dot in dots)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        parts += [plane.dot(dot, style) for dot in dots]
    return _svg(title, _PLANE_HEIGHT, parts)


def legend(names: Sequence[str]) -> str:
    """Name the lines of `shots_chart`."""
    shown = "".join(
        f'<span><i class="{colour(number)}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="legend">{shown}</div>'


def colour(number: int) -> str:
    """Give the class of a line: six colours, then the same ones dashed."""
    dashed = " dashed" if number >= _N_COLOURS else ""
    return f"c{number % _N_COLOURS + 1}{dashed}"


def intervals_chart(bars: Sequence[Bar], *, title: str, x_label: str) -> str:
    """Draw a line a name: its number and its interval, in colour where that excludes 0."""
    known = [each for bar in bars for each in (bar.value, bar.low, bar.high) if each is not None]
    scale = _linear_scale([0.0, *known])
    height = _TOP + _ROW * len(bars) + _BOTTOM

    def px(value: float) -> float:
        return scale.share(value) * (_WIDTH - _NAMES - _RIGHT) + _NAMES

    bottom = height - _BOTTOM
    parts = [
        f'<line class="grid" x1="{px(value):.1f}" x2="{px(value):.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text class="x" x="{px(value):.1f}" y="{bottom + 18}">{escape(text)}</text>'
        for value, text in scale.marks
    ]
    zero = px(0.0)
    parts.append(f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="{_TOP}" y2="{bottom}"/>')
    middle = (_NAMES + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="x" x="{middle:.1f}" y="{bottom + 36}">{escape(x_label)}</text>')
    parts += [_interval(bar, _TOP + _ROW * (n + 0.5), px) for n, bar in enumerate(bars)]
    return _svg(title, height, parts)


def _interval(bar: Bar, y: float, px: Callable[[float], float]) -> str:
    is_known = bar.low is not None and bar.high is not None
    style = "off"
    text = f'<text class="y" x="{_NAMES - 12}" y="{y + 4:.1f}">{escape(bar.name)}</text>'
    if is_known:
        assert bar.low is not None
        assert bar.high is not None
        style = "c1" if bar.low > 0 else "c2" if bar.high < 0 else "off"
        ends = f'x1="{px(bar.low):.1f}" x2="{px(bar.high):.1f}"'
        text += f'<line class="{style}" {ends} y1="{y:.1f}" y2="{y:.1f}"/>'
    return text + f'<circle class="{style}" cx="{px(bar.value):.1f}" cy="{y:.1f}" r="4"/>'


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """An axis: where numbers lie between its ends, and which are written."""

    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    is_log: bool = False  # then `low` and `high` are exponents, and 0 lies at `low`

    def share(self, value: float) -> float:
        at = value
        if self.is_log:
            at = math.log10(value) if value > 0 else self.low
        return (at - self.low) / (self.high - self.low)


def _linear_scale(values: Sequence[float]) -> _Scale:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    return _Scale(
        low=low, high=high, marks=tuple((v, f"{v:.4g}") for v in ticks(low, high, count=5))
    )


def _log_scale(values: Sequence[float]) -> _Scale:
    """Give powers of ten; where there is a 0, it has the room of one of them."""
    positive = [value for value in values if value > 0]
    low = math.floor(math.log10(min(positive, default=1.0)))
    high = max(math.ceil(math.log10(max(positive, default=10.0)) + 0.05), low + 1)
    marks = [(10.0**power, _count(10.0**power)) for power in range(low, high + 1)]
    if len(positive) < len(values):
        low -= 1
        marks.insert(0, (0.0, "0"))
    return _Scale(low=low - 0.25, high=high + 0.1, marks=tuple(marks), is_log=True)


def _count(value: float) -> str:
    """Write a count as short as it is said: 10k, 1M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


class _Plane:
    """Two axes, and where names find room between them."""

    def __init__(self, *, x: _Scale, y: _Scale) -> None:
        self._x, self._y = x, y

    def px(self, value: float) -> float:
        at = value if value > 0 or not self._x.is_log else 10 ** (self._x.low + 0.25)
        return _LEFT + self._x.share(at) * (_WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        return _PLANE_HEIGHT - _BOTTOM - self._y.share(value) * (_PLANE_HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str, y_label: str) -> str:
        right, bottom = _WIDTH - _RIGHT, _PLANE_HEIGHT - _BOTTOM
        parts = []
        for value, text in self._y.marks:
            y = self.py(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="y" x="{_LEFT - 8}" y="{y + 4:.1f}">{escape(text)}</text>'
            )
        for value, text in self._x.marks:
            x = self.px(value)
            parts.append(f'<text class="x" x="{x:.1f}" y="{bottom + 18}">{escape(text)}</text>')
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
            f'<text class="x" x="{(_LEFT + right) / 2}" y="{bottom + 38}">{escape(x_label)}</text>'
            f'<text x="{_LEFT}" y="{_TOP - 4}">{escape(y_label)}</text>'
        )
        return "".join(parts)

    def zero(self) -> str:
        y = self.py(0.0)
        return f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'

    def dot(self, dot: Dot, style: str) -> str:
        x, y = self.px(dot.x), self.py(dot.y)
        text = f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        if dot.low is None or dot.high is None:
            return text
        ends = f'y1="{self.py(dot.low):.1f}" y2="{self.py(dot.high):.1f}"'
        return f'<line class="{style} thin" x1="{x:.1f}" x2="{x:.1f}" {ends}/>{text}'

    def names(self, dots: Sequence[Dot]) -> Iterator[str]:
        """Write each name beside its dot, where it covers neither a dot nor another name."""
        taken = [_around(self.px(dot.x), self.py(dot.y)) for dot in dots]
        for dot in dots:
            x, y, width = self.px(dot.x), self.py(dot.y), _LETTER * len(dot.name)
            places = list(_beside(x, y, width))
            boxes = [(left, base - _LINE + 3, left + width, base + 3) for left, base in places]
            costs = [
                sum(_overlap(box, other) for other in taken) + 2 * _is_outside(box) for box in boxes
            ]
            best = costs.index(min(costs))
            taken.append(boxes[best])
            left, base = places[best]
            yield f'<text class="name" x="{left:.1f}" y="{base:.1f}">{escape(dot.name)}</text>'


def _beside(x: float, y: float, width: float) -> Iterator[tuple[float, float]]:
    """List places for a name around its dot, left end and base line, the best ones first."""
    right, left, middle = x + _GAP, x - _GAP - width, x - width / 2
    yield from ((right, y + 4), (left, y + 4), (middle, y - _GAP), (middle, y + _GAP + 10))
    for lines in (1, 2, 3):
        above, below = y + 4 - lines * _LINE, y + 4 + lines * _LINE
        yield from ((right, above), (right, below), (left, above), (left, below))


_Box = tuple[float, float, float, float]


def _around(x: float, y: float) -> _Box:
    return (x - 5, y - 5, x + 5, y + 5)


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _is_outside(box: _Box) -> bool:
    return box[0] < _LEFT or box[2] > _WIDTH or box[1] < 0 or box[3] > _PLANE_HEIGHT - _BOTTOM


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
