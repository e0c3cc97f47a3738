"""Figures as PNG files, drawn with matplotlib and without a display."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeGuard

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from heads.figures import Bar, Dot, FigureData, Panel

# Okabe and Ito's colours, which people of every kind of colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_GREY, _FAINT = "0.35", "0.88"
_DPI = 160
_PANELS_A_LINE = 3
_PLANE_INCHES = (4.0, 3.3)  # of a panel of dots
_BARS_WIDTH, _BAR_HEIGHT, _AROUND_BARS = 3.4, 0.24, 1.2  # inches
_GAP = 6  # points between a dot and its name
_DOT_PX = 6
_CELL_INCHES, _AROUND_CELLS = 0.42, (1.7, 1.3)  # of a heat map; beside and above it
_MAX_WRITTEN = 16  # cells a side up to which each has its number
_SIDES = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
_TITLE_LETTERS_AN_INCH, _SUBTITLE_LETTERS, _OVER_BARS = 10, 62, 48
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "figure.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.labelcolor": _GREY,
}


def figure_png(data: FigureData) -> bytes:
    """Draw a figure.

    Returns:
        A PNG file; equal data gives equal bytes.
    """
    names = list(dict.fromkeys(bar.name for panel in data.panels for bar in panel.bars))
    # A head has one colour in all panels.
    known = sorted({name for panel in data.panels for name in panel.series or ()})
    n_columns = min(len(data.panels), _PANELS_A_LINE)
    with _figure(data, n_columns, n_names=len(names)) as figure:
        _write_title(figure, data.title)
        n_lines = -(-len(data.panels) // n_columns)
        places = list(figure.subplots(n_lines, n_columns, squeeze=False).flat)
        labels: list[Annotation] = []
        for number, (panel, axes) in enumerate(zip(data.panels, places, strict=False)):
            _head(axes, panel)
            if panel.series is None:
                _draw_bars(axes, panel, names, is_named=number % n_columns == 0)
            else:
                labels += _draw_plane(axes, panel, panel.series, known)
        for axes in places[len(data.panels) :]:
            axes.remove()
        _place(figure, labels, keeps_all=any("" not in (p.series or {}) for p in data.panels))
        return _png(figure)


def heatmap_png(
    matrix: Sequence[Sequence[float]], names: Sequence[str], *, title: str, note: str, cut: int
) -> bytes:
    """Draw how alike things are that stand in an order.

    Args:
        matrix: Numbers from 0 to 1, rows as columns; those below 0 look like 0.
        names: Of its rows.
        title: Of the figure.
        note: In small below the title.
        cut: Rows before the boundary that is drawn; 0: none is.

    Returns:
        A PNG file; equal numbers give equal bytes.
    """
    side = _CELL_INCHES * len(names)
    with mpl.rc_context({**_STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        size = (max(side, 2.5) + _AROUND_CELLS[0], max(side, 2.5) + _AROUND_CELLS[1])
        figure = Figure(figsize=size, dpi=_DPI, layout="compressed")
        FigureCanvasAgg(figure)
        _write_title(figure, title)
        axes = figure.subplots()
        _head(axes, Panel(title="", subtitle=note, x_label="", bars=(), series=None))
        image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        _write_cells(axes, matrix, names)
        if cut:
            line: dict[str, Any] = {"color": "white", "linewidth": 2.5}
            axes.axhline(cut - 0.5, **line)
            axes.axvline(cut - 0.5, **line)
        figure.colorbar(image, ax=axes, shrink=0.7, label="CKA")
        # Names that stand upright are longer than the layout leaves room for.
        return _png(figure, box="tight")


def _write_cells(axes: Axes, matrix: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelcolor="black")
    if len(names) > _MAX_WRITTEN:
        return
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            colour = "black" if value > 0.6 else "white"
            place = {"ha": "center", "va": "center", "fontsize": 7.5, "color": colour}
            axes.text(column, row, f"{value:.2f}", **place)  # type: ignore[arg-type]


def _png(figure: Figure, *, box: Literal["tight"] | None = None) -> bytes:
    sink = io.BytesIO()
    # No date and no version: equal figures are equal files.
    figure.savefig(sink, format="png", metadata={"Software": None}, bbox_inches=box)
    return sink.getvalue()


@contextmanager
def _figure(data: FigureData, n_columns: int, *, n_names: int) -> Iterator[Figure]:
    n_lines = -(-len(data.panels) // n_columns)
    width, height = _PLANE_INCHES
    if n_names:
        width, height = _BARS_WIDTH, _AROUND_BARS + _BAR_HEIGHT * n_names
    with mpl.rc_context(_STYLE):
        size = (n_columns * width + 0.3, n_lines * height + 0.4)
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(wspace=0.06, hspace=0.06)  # type: ignore[union-attr, call-arg]
        yield figure


def _write_title(figure: Figure, title: str) -> None:
    n_letters = int(figure.get_figwidth() * _TITLE_LETTERS_AN_INCH)
    text = "\n".join(textwrap.wrap(title, n_letters))
    figure.suptitle(text, x=0.01, ha="left", weight="bold")


def _head(axes: Axes, panel: Panel) -> None:
    """Write title and, in small, what was measured on."""
    lines = textwrap.wrap(panel.subtitle, _OVER_BARS if panel.bars else _SUBTITLE_LETTERS)
    axes.set_title(panel.title + "\n" * len(lines), loc="left")
    axes.annotate(
        "\n".join(lines),
        (0, 1),
        xytext=(0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        color=_GREY,
        fontsize=7.5,
    )


def _draw_bars(axes: Axes, panel: Panel, names: Sequence[str], *, is_named: bool) -> None:
    """Draw shares as bars, each with its score to the right of it; one row a name."""
    bars = {bar.name: bar for bar in panel.bars}
    for row, name in enumerate(names):
        bar = bars.get(name)
        if bar is not None:
            is_best = math.isclose(bar.share, 1.0)
            axes.barh(row, bar.share, color=COLOURS[0] if is_best else COLOURS[5], height=0.68)
            _draw_interval(axes, bar, row)
        axes.annotate(
            "–" if bar is None else _number(bar.score),
            (1.0, row),
            xycoords=("axes fraction", "data"),
            va="center",
            ha="right",
            fontsize=8.0,
        )
    axes.set_yticks(range(len(names)), names if is_named else [""] * len(names))
    axes.tick_params(axis="y", length=0, labelcolor="black")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(panel.x_label, loc="left", fontsize=7.5)
    reach = max([1.0, *(bar.high for bar in panel.bars if _is_number(bar.high))])
    low = min([0.0, *(bar.share for bar in panel.bars)])
    axes.set_xlim(low, min(reach, 1.3) + 0.2)  # room for the scores
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "best"])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(low, 1)


def _draw_interval(axes: Axes, bar: Bar, row: int) -> None:
    if _is_number(bar.low) and _is_number(bar.high):
        axes.hlines(row, bar.low, bar.high, color="black", linewidth=0.9)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _draw_plane(
    axes: Axes, panel: Panel, series: Mapping[str, Sequence[Dot]], known: Sequence[str]
) -> list[Annotation]:
    """Draw series of dots, or dots with names; give the names, which may still overlap."""
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.18, y=0.12)
    labels = []
    for name, dots in series.items():
        number = known.index(name)
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
        _draw_dots(axes, dots, colour, marker, is_joined=bool(name))
        if name:
            labels.append(_label(axes, dots[-1], name, colour))
        else:
            labels += [_label(axes, dot, dot.name, "black") for dot in dots]
    if any(series):
        _log_axis(axes, series)
    if panel.turned[0]:
        axes.invert_xaxis()
    if panel.turned[1]:
        axes.invert_yaxis()
    return labels


def _draw_dots(
    axes: Axes, dots: Sequence[Dot], colour: str, marker: str, *, is_joined: bool
) -> None:
    x, y = [dot.x for dot in dots], [dot.y for dot in dots]
    axes.plot(x, y, color=colour, marker=marker, markersize=5.5, linewidth=1.3 if is_joined else 0)
    for dot in dots:
        if _is_number(dot.low) and _is_number(dot.high):
            axes.vlines(dot.x, dot.low, dot.high, color=colour, linewidth=0.9, alpha=0.7)


def _log_axis(axes: Axes, series: Mapping[str, Sequence[Dot]]) -> None:
    axes.set_xscale("log")
    x = [dot.x for dots in series.values() for dot in dots]
    few = max(x) / min(x) < 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _count(value: float) -> str:
    """Write a count as short as it is said: 50k, 1.2M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _label(axes: Axes, dot: Dot, text: str, colour: str) -> Annotation:
    label = axes.annotate(
        text,
        (dot.x, dot.y),
        xytext=(0, 0),
        textcoords="offset points",
        color=colour,
        fontsize=8.0,
    )
    label.set_in_layout(False)  # it takes the room that the panel has
    return label


def _place(figure: Figure, labels: Sequence[Annotation], *, keeps_all: bool) -> None:
    """Put each label on that side of its dot where it covers least.

    Without `keeps_all`, a label that covers something on every side is left out: a dot without a
    name can be read, two names over one another cannot.
    """
    figure.draw_without_rendering()
    dots = [box for axes in figure.axes for box in _dots_of(axes)]
    placed: list[Bbox] = []
    for label in sorted(labels, key=_height, reverse=True):
        assert label.axes is not None
        inside = label.axes.get_window_extent()
        costs = []
        for number, side in enumerate(_SIDES):
            _move(label, side)
            box = label.get_window_extent()
            is_cut = box.x1 > inside.x1 + 1 or box.x0 < inside.x0
            n_covered = sum(box.overlaps(other) for other in (*placed, *dots))
            costs.append((n_covered + 2 * is_cut, number))
        cost, number = min(costs)
        _move(label, _SIDES[number])
        if cost and not keeps_all:
            label.set_visible(False)
        else:
            placed.append(label.get_window_extent())


def _height(label: Annotation) -> float:
    assert label.axes is not None
    return float(label.axes.transData.transform(label.xy)[1])


def _dots_of(axes: Axes) -> Iterator[Bbox]:
    """Give a box around each dot of a panel."""
    for line in axes.get_lines():
        for x, y in axes.transData.transform(line.get_xydata()):
            yield Bbox.from_extents(x - _DOT_PX, y - _DOT_PX, x + _DOT_PX, y + _DOT_PX)


def _move(label: Annotation, side: tuple[int, int]) -> None:
    """Put a label beside its dot: -1, 0 or 1 steps to the right and up."""
    right, up = side
    label.set_position((_GAP * right, _GAP * up * (0.7 if right else 1.0)))
    label.set_horizontalalignment(("right", "center", "left")[right + 1])
    label.set_verticalalignment(("top", "center", "bottom")[up + 1])


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
