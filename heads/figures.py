"""The numbers behind the papers' figures, from boards of finished runs.

Only runs of one board stand in one panel, so that their numbers mean the same. Where a store holds
several heads, recipes or boards, the ones with the most to show are taken, and a note says how
many runs were left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from featstore.errors import NotFoundError, not_found
from featstore.registry import short_name
from heads.comparable import (
    Backbones,
    interval_text,
    largest_boards,
    left_out,
    measured_text,
    metric_text,
    of_one_head,
    on_one_backbone,
    pairs,
    primary,
    setting_of,
    sized_name,
    what_there_is,
)
from heads.table import Board, Line, Table

MIN_RANKED = 3  # backbones below which a rank correlation says nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One backbone of one task, as a share of the best one."""

    name: str
    share: float
    low: float | None
    high: float | None
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """A run, or several seeds of it, in a plane."""

    name: str
    x: float
    y: float
    low: float | None = None  # of y
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One part of a figure: bars, or series of dots."""

    title: str
    subtitle: str
    bars: tuple[Bar, ...] = ()
    x_label: str = ""
    y_label: str = ""
    series: Mapping[str, tuple[Dot, ...]] | None = None  # None: bars; "": dots that are named
    turned: tuple[bool, bool] = (False, False)  # whether the x and the y axis fall


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureData:
    """A figure before it is drawn: panels, and the same numbers as rows of a table."""

    kind: str
    title: str
    panels: tuple[Panel, ...]
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


def make_figure(kind: str, table: Table) -> FigureData:
    """Choose what a figure shows that needs nothing but runs; `heads.speed` needs latencies too.

    Args:
        kind: "relative", "budget" or "correlation".
        table: All boards of a store.

    Raises:
        NotFoundError: There is no such figure, or the runs that it needs are missing.
    """
    if kind not in FIGURES:
        raise not_found("figure", kind, FIGURES)
    return FIGURES[kind](table)


def relative_figure(table: Table) -> FigureData:
    """Compare backbones on each task: each one's score as a share of the best one's.

    The share is score / best, or best / score where less is better. A task whose best score is
    not positive has no shares and is left out.

    Raises:
        NotFoundError: No task has two backbones that can be compared.

    Source:
        Lueddecke & Ecker, TMLR 2025, figure 3, which maps scores linearly into [0, 1] instead.
    """
    head, found = of_one_head(table)
    tasks = [each for each in found if len(each.lines) > 1 and each.best > 0]
    if not tasks:
        raise NotFoundError(
            "The figure relative needs finished runs of one head and recipe on two backbones, "
            f"measured on the same images, and {what_there_is(table)}: extract another backbone "
            "and train the head on it."
        )
    bars = [_bars(each) for each in tasks]
    shares: dict[str, list[float]] = {}
    for bar in itertools.chain(*bars):
        shares.setdefault(bar.name, []).append(bar.share)
    order = sorted(shares, key=lambda name: (-sum(shares[name]) / len(shares[name]), name))
    panels = [
        Panel(
            title=metric_text(each.board),
            subtitle=measured_text(each.board),
            x_label=interval_text(each.board, each.lines.values()),
            bars=tuple(sorted(own, key=lambda bar: order.index(bar.name))),
        )
        for each, own in zip(tasks, bars, strict=True)
    ]
    return FigureData(
        kind="relative",
        title=f"Score as a share of the best backbone's, with the head {head}",
        panels=tuple(panels),
        rows=tuple(
            _relative_row(each, bar, head)
            for each, own in zip(tasks, bars, strict=True)
            for bar in own
        ),
        notes=left_out(table, [line for each in tasks for line in each.lines.values()]),
    )


def budget_figure(table: Table) -> FigureData:
    """Compare heads on each task: their parameters against their score, on one backbone.

    Of a head with one set of options, the best of several recipes and taps is shown.

    Raises:
        NotFoundError: No task has two sizes of heads on one backbone that can be compared.

    Source:
        Lueddecke & Ecker, TMLR 2025, figure 4.
    """
    boards = largest_boards(table, lambda board: len(on_one_backbone(board)))
    tasks = [(board, on_one_backbone(board)) for board in boards]
    tasks = [(b, lines) for b, lines in tasks if len({line.parameters for line in lines}) > 1]
    if not tasks:
        raise NotFoundError(
            "The figure budget needs finished runs of two heads, or of one in two sizes, on one "
            f"backbone, measured on the same images, and {what_there_is(table)}: train with "
            "another --head or with --set dim=N."
        )
    return FigureData(
        kind="budget",
        title="Parameters of the head against its score",
        panels=tuple(_budget_panel(board, lines) for board, lines in tasks),
        rows=tuple(_budget_row(board, line) for board, lines in tasks for line in lines),
        notes=left_out(table, [line for _, lines in tasks for line in lines]),
    )


def correlation_figure(table: Table) -> FigureData:
    """Compare tasks by pairs: do they rank the backbones alike?

    The rank correlation is Spearman's, of scores turned so that more is better: 1 says that both
    tasks order the backbones alike.

    Raises:
        NotFoundError: No two tasks share three backbones.

    Source:
        Lueddecke & Ecker, TMLR 2025, figure 6, which compares with the scores of other papers.
    """
    head, found = of_one_head(table)
    couples = [
        (one, other, shared)
        for one, other in itertools.combinations(found, 2)
        if len(shared := [name for name in one.lines if name in other.lines]) >= MIN_RANKED
    ]
    if not couples:
        raise NotFoundError(
            f"The figure correlation needs finished runs of one head on {MIN_RANKED} backbones "
            f"for each of two tasks, and {what_there_is(table)}: train those that are missing."
        )
    return FigureData(
        kind="correlation",
        title=f"Backbones on two tasks each, with the head {head}",
        panels=tuple(_pair_panel(*couple) for couple in couples),
        rows=tuple(row for couple in couples for row in _pair_rows(*couple, head)),
        notes=left_out(
            table,
            [each.lines[name] for *both, names in couples for each in both for name in names],
        ),
    )


FIGURES: Mapping[str, Callable[[Table], FigureData]] = {
    "relative": relative_figure,
    "budget": budget_figure,
    "correlation": correlation_figure,
}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Give Spearman's correlation; equal values share their mean rank, NaN if all are equal."""
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (x, y)]
    size = math.sqrt(float(np.square(ranks[0]).sum() * np.square(ranks[1]).sum()))
    return float(np.dot(*ranks)) / size if size else math.nan


def _bars(each: Backbones) -> list[Bar]:
    is_lower = each.board.is_lower_better
    bars = []
    for name, value in each.values.items():
        ends = (value.high, value.low) if is_lower else (value.low, value.high)
        low, high = (None if end is None else _share(end, each.best, is_lower) for end in ends)
        share = _share(value.value, each.best, is_lower)
        bars.append(Bar(name=name, share=share, low=low, high=high, score=value.value))
    return bars


def _share(value: float, best: float, is_lower_better: bool) -> float:
    if not is_lower_better:
        return value / best
    return best / value if value > 0 else math.inf


def _relative_row(each: Backbones, bar: Bar, head: str) -> dict[str, Any]:
    return {
        **_origin(each.board),
        "head": head,
        "backbone": bar.name,
        "score": bar.score,
        "share": bar.share,
        "share_low": bar.low,
        "share_high": bar.high,
        "runs": " ".join(each.lines[bar.name].run_ids),
    }


def _budget_panel(board: Board, lines: Sequence[Line]) -> Panel:
    series: dict[str, list[Dot]] = {}
    for line in sorted(lines, key=lambda line: line.parameters):
        value = primary(board, line)
        dot = Dot(
            name=setting_of(line)[1],
            x=line.parameters,
            y=value.value,
            low=value.low,
            high=value.high,
        )
        series.setdefault(short_name(line.head), []).append(dot)
    return Panel(
        title=metric_text(board),
        subtitle=f"{sized_name(lines[0])}; {measured_text(board)}",
        x_label="; ".join(filter(None, ["parameters", interval_text(board, lines)])),
        series={name: tuple(dots) for name, dots in sorted(series.items())},
    )


def _budget_row(board: Board, line: Line) -> dict[str, Any]:
    value = primary(board, line)
    return {
        **_origin(board),
        "backbone": sized_name(line),
        "head": line.head,
        "options": pairs(line.options),
        "parameters": line.parameters,
        "score": value.value,
        "low": value.low,
        "high": value.high,
        "runs": " ".join(line.run_ids),
    }


def _pair_correlation(one: Backbones, other: Backbones, names: Sequence[str]) -> float:
    x, y = ([each.values[name].value for name in names] for each in (one, other))
    is_turned = one.board.is_lower_better != other.board.is_lower_better
    return (-1 if is_turned else 1) * rank_correlation(x, y)


def _pair_panel(one: Backbones, other: Backbones, names: Sequence[str]) -> Panel:
    rho = _pair_correlation(one, other, names)
    text = "undefined" if math.isnan(rho) else f"{rho:.2f}"
    about = dict.fromkeys((measured_text(one.board), measured_text(other.board)))
    dots = [Dot(name=name, x=one.values[name].value, y=other.values[name].value) for name in names]
    return Panel(
        title=f"rank correlation {text}",
        subtitle="; ".join([f"{len(names)} backbones", *about]),
        x_label=f"{short_name(one.board.task)}: {one.board.primary_metric} (better →)",
        y_label=f"{short_name(other.board.task)}: {other.board.primary_metric} (better ↑)",
        series={"": tuple(dots)},
        turned=(one.board.is_lower_better, other.board.is_lower_better),
    )


def _pair_rows(
    one: Backbones, other: Backbones, names: Sequence[str], head: str
) -> list[dict[str, Any]]:
    rho = _pair_correlation(one, other, names)
    return [
        {
            **_origin(one.board),
            **{f"other_{name}": value for name, value in _origin(other.board).items()},
            "head": head,
            "backbone": name,
            "score": one.values[name].value,
            "other_score": other.values[name].value,
            "backbones": len(names),
            "rank_correlation": rho,
        }
        for name in names
    ]


def _origin(board: Board) -> dict[str, Any]:
    return {"task": board.task, "metric": board.primary_metric, "board": board.heading}
