"""`heads table`: the finished runs of a store as the tables of papers show them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import json_option, print_json, runs_option, say, store_option
from cli.tables import interval
from cli.tables import table as aligned

if TYPE_CHECKING:
    from heads.table import Board, Line, Table, Value

_COLUMNS = ("#", "backbone", "I", "F", "P", "P_learn", "head", "recipe", "seed", "steps")
_LEGEND = (
    "I: input in pixels. F: grid of tokens and tap. P, P_learn: parameters of the backbone and of "
    "the head, in millions. [a, b]: 95 % interval of one run. (min a, max b): over seeds, around "
    "their mean."
)
_LATEX_SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@click.command()
@click.option("--task", default=None, metavar="NAME", help="Only runs of this task.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Show this metric too; the order stays that of the task's first metric.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "csv", "latex", "json"]),
    default="text",
    show_default=True,
    help="How the boards are printed.",
)
@store_option
@runs_option
@json_option
def table(
    task: str | None,
    metrics: Sequence[str],
    style: str,
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
) -> None:
    """Rank the finished runs of a store, best first.

    Runs are ranked together only where their numbers mean the same: one task with one set of
    options, measured by one protocol on the same images. Others stand on a board of their own,
    and a line says why. Runs that differ in nothing but the seed are one line: their mean, with
    the smallest and the largest of them.

    \b
    Example:
        heads table
        heads table --task depth --metric delta1 --metric absrel
        heads table --format latex
    """
    from heads.entries import read_entries
    from heads.runs import list_runs
    from heads.table import check_metrics, make_table

    entries, left_out = read_entries(list_runs(store_path, runs=runs_path))
    made = make_table(entries, task=task)
    check_metrics(made, metrics if made.boards else ())
    if as_json or style == "json":
        print_json({**_to_json(made), "left_out": {**left_out, **made.left_out}})
        return
    for run_id, reason in {**left_out, **made.left_out}.items():
        say(f"Not ranked: {run_id}. {reason}")
    if not made.boards:
        say("There is no finished run to rank. Train one with `heads train`.")
    writers: dict[str, Callable[[Table, Sequence[str]], str]] = {
        "text": boards_text,
        "csv": boards_csv,
        "latex": boards_latex,
    }
    click.echo(writers[style](made, metrics), nl=False)


def boards_text(made: Table, metrics: Sequence[str]) -> str:
    """Write boards as aligned text, each under its heading, and why they are several."""
    blocks = []
    for number, board in enumerate(made.boards, start=1):
        prefix = f"Board {number}: " if len(made.boards) > 1 else ""
        columns, rows = _shown(board, metrics, arrows=("↓", "↑"), number=_text_value)
        blocks.append(f"{prefix}{board.heading}\n\n{aligned(columns, rows)}\n")
    if made.boards:
        blocks.append("".join(f"{reason}\n" for reason in (*made.reasons, _LEGEND)))
    return "\n".join(blocks)


def boards_latex(made: Table, metrics: Sequence[str]) -> str:
    r"""Write each board as a table for LaTeX, with the rules of the package booktabs."""
    blocks = []
    for number, board in enumerate(made.boards, start=1):
        arrows = (r"$\downarrow$", r"$\uparrow$")
        columns, rows = _shown(board, metrics, arrows=arrows, number=_latex_value)
        lines = [" & ".join(row) + r" \\" for row in rows]
        notes = [] if number == 1 else [f"% {made.reasons[number - 2]}"]
        blocks.append(
            "\n".join(
                [
                    *notes,
                    r"\begin{table}",
                    rf"\caption{{{_latex(board.heading)}. {_latex(_LEGEND)}}}",
                    rf"\begin{{tabular}}{{{'l' * len(columns)}}}",
                    r"\toprule",
                    " & ".join(columns) + r" \\",
                    r"\midrule",
                    *lines,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                    "",
                ]
            )
        )
    return "\n".join(blocks)


def boards_csv(made: Table, metrics: Sequence[str]) -> str:
    """Write all boards as one CSV; a rank counts on its own board only."""
    sink = io.StringIO()
    names = dict.fromkeys([*(board.primary_metric for board in made.boards), *metrics])
    parts = ("", "_low", "_high", "_interval")
    metric_columns = [f"{name}{part}" for name in names for part in parts]
    writer = csv.writer(sink, lineterminator="\n")
    facts = ("board", "heading", "rank", "backbone", "input", "features", "backbone_parameters")
    rest = ("parameters", "head", "options", "recipe", "seeds", "steps", "runs")
    writer.writerow([*facts, *rest, *metric_columns])
    for number, board in enumerate(made.boards, start=1):
        for line in board.lines:
            writer.writerow(
                [number, board.heading, line.rank, *_csv_cells(line), *_csv_values(line, names)]
            )
    return sink.getvalue()


def _csv_cells(line: Line) -> list[Any]:
    return [
        line.backbone,
        _size(line.input_hw),
        _features(line),
        line.backbone_parameters,
        line.parameters,
        line.head,
        _pairs(line.options),
        _pairs(line.recipe),
        " ".join(map(str, line.seeds)),
        _span(line.steps),
        " ".join(line.run_ids),
    ]


def _csv_values(line: Line, names: dict[str, None]) -> list[Any]:
    found: list[Any] = []
    for name in names:
        value = line.values.get(name)
        found += [None] * 4 if value is None else [value.value, value.low, value.high, value.kind]
    return found


def _to_json(made: Table) -> dict[str, Any]:
    """Give the boards as JSON values, numbers unrounded."""
    return {"boards": [asdict(board) for board in made.boards], "reasons": made.reasons}


def _shown(
    board: Board,
    metrics: Sequence[str],
    *,
    arrows: tuple[str, str],
    number: Callable[[Value], str],
) -> tuple[list[str], list[list[str]]]:
    """Give the columns and the cells of a board; columns without a single value are left out."""
    names = list(dict.fromkeys([board.primary_metric, *metrics]))
    arrow = arrows[0] if board.is_lower_better else arrows[1]
    is_latex = number is _latex_value
    clean = _latex if is_latex else str
    columns = [clean(name) for name in (*_COLUMNS, *names)]
    columns[len(_COLUMNS)] += f" {arrow}"
    rows = [
        [*(clean(each) for each in _cells(line)), *(_metric(line, name, number) for name in names)]
        for line in board.lines
    ]
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    return [columns[at] for at in kept], [[row[at] or "-" for at in kept] for row in rows]


def _cells(line: Line) -> list[str]:
    seeds = str(line.seeds[0]) if len(line.seeds) == 1 else f"{len(line.seeds)} seeds"
    # The steps that were asked for tell nothing where all of them were done.
    recipe = {
        name: value
        for name, value in line.recipe.items()
        if name != "steps" or line.steps != (value, value)
    }
    options = _pairs(line.options)
    return [
        "" if line.rank is None else str(line.rank),
        line.backbone,
        _size(line.input_hw),
        _features(line),
        "" if line.backbone_parameters is None else _millions(line.backbone_parameters),
        _millions(line.parameters),
        f"{line.head} ({options})" if options else line.head,
        _pairs(recipe),
        seeds,
        _span(line.steps),
    ]


def _millions(count: int) -> str:
    """Write a count in millions; 0.000 would say that there is nothing to learn."""
    return "<0.001" if 0 < count < 500 else f"{count / 1e6:.3f}"


def _metric(line: Line, name: str, number: Callable[[Value], str]) -> str:
    value = line.values.get(name)
    return "" if value is None else number(value)


def _text_value(value: Value) -> str:
    from heads.table import SEEDS

    if value.kind == SEEDS:
        return f"{value.value:.3f} (min {value.low:.3f}, max {value.high:.3f})"
    return interval(value.value, value.low, value.high)


def _latex_value(value: Value) -> str:
    return _text_value(value).replace(" [", r" {\small [", 1).replace("]", "]}", 1)


def _features(line: Line) -> str:
    """Write grid and taps: "16x16 block:5, block:11"; a grid is named once."""
    grids: dict[tuple[int, int], list[str]] = {}
    for tap, grid in line.taps:
        grids.setdefault(grid, []).append(tap)
    return ", ".join(
        f"{rows}x{columns} {', '.join(taps)}" for (rows, columns), taps in grids.items()
    )


def _size(size_hw: tuple[int, int] | None) -> str:
    if size_hw is None:
        return ""
    return str(size_hw[0]) if size_hw[0] == size_hw[1] else f"{size_hw[0]}x{size_hw[1]}"


def _span(steps: tuple[int, int]) -> str:
    return str(steps[0]) if steps[0] == steps[1] else f"{steps[0]}-{steps[1]}"


def _pairs(values: Any) -> str:
    return ", ".join(f"{name} {'none' if each is None else each}" for name, each in values.items())


def _latex(text: str) -> str:
    return "".join(_LATEX_SIGNS.get(sign, sign) for sign in text)
