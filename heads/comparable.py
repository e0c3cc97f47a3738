"""Which lines of the boards may stand in one figure, and what they are called there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featstore.registry import short_name
from heads.table import NO_INTERVAL, Board, Line, Table, Value

Setting = tuple[str, str]
"""A head and its options that are not its defaults, as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbones:
    """Lines of one board that differ in nothing but the backbone, by its name; best first."""

    board: Board
    lines: Mapping[str, Line]

    @property
    def values(self) -> dict[str, Value]:
        """Give the primary metric by the backbone's name."""
        return {name: primary(self.board, line) for name, line in self.lines.items()}

    @property
    def best(self) -> float:
        """Give the best value there is."""
        pick = min if self.board.is_lower_better else max
        return pick(value.value for value in self.values.values())


def primary(board: Board, line: Line) -> Value:
    """Give what a board is ranked by."""
    return line.values[board.primary_metric]


def of_one_head(table: Table) -> tuple[str, list[Backbones]]:
    """Choose the head, with its options, that most backbones of most tasks have.

    Of each task it takes one board, and of that one recipe: again those of most backbones.

    Returns:
        The head in words, and one entry a task; nothing where there is no run.
    """
    settings = {setting_of(line) for board in table.boards for line in board.lines}
    most: list[tuple[Board, list[Line]]] = []
    chosen = ""
    for setting in sorted(settings):
        found = _boards_of(table, setting)
        if sum(len(lines) for _, lines in found) > sum(len(lines) for _, lines in most):
            most, chosen = found, " ".join(filter(None, setting))
    sizes: dict[str, set[Any]] = {}
    for _, lines in most:
        for line in lines:
            sizes.setdefault(line.backbone, set()).add(line.input_hw)
    several = {name for name, found_sizes in sizes.items() if len(found_sizes) > 1}
    return chosen, [Backbones(board=b, lines=_by_name(lines, several)) for b, lines in most]


def on_one_backbone(board: Board) -> list[Line]:
    """List the best line of each head and options, on the backbone that has most of them."""
    backbones: dict[str, dict[Setting, Line]] = {}
    for line in board.lines:
        if line.rank is not None:
            backbones.setdefault(sized_name(line), {}).setdefault(setting_of(line), line)
    return list(max(backbones.values(), key=len, default={}).values())


def largest_boards(table: Table, size: Callable[[Board], int]) -> list[Board]:
    """Choose of each task the board with the most to show."""
    tasks: dict[str, Board] = {}
    for board in table.boards:
        if board.task not in tasks or size(board) > size(tasks[board.task]):
            tasks[board.task] = board
    return list(tasks.values())


def setting_of(line: Line) -> Setting:
    """Give head and options of a line."""
    options = pairs(line.options)
    return short_name(line.head), f"({options})" if options else ""


def sized_name(line: Line) -> str:
    """Name a backbone with its input size: "dinov2_b@224"."""
    if line.input_hw is None:
        return line.backbone
    rows, columns = line.input_hw
    return f"{line.backbone}@{rows}" if rows == columns else f"{line.backbone}@{rows}x{columns}"


def metric_text(board: Board) -> str:
    """Write task and metric with the direction that is better: "depth: rmse ↓"."""
    arrow = "↓" if board.is_lower_better else "↑"
    return f"{short_name(board.task)}: {board.primary_metric} {arrow}"


def measured_text(board: Board) -> str:
    """Write what was measured on: "nyu test, 654 images"."""
    facts = board.facts
    n_images = f"{facts['images']:,} image{'' if facts['images'] == 1 else 's'}"
    return f"{', '.join(facts['data sets'])} {facts['split']}, {n_images}"


def interval_text(board: Board, lines: Iterable[Line]) -> str:
    """Say what the thin lines around values are; nothing where there are none."""
    kinds = {primary(board, line).kind for line in lines} - {NO_INTERVAL}
    return f"thin lines: {' or '.join(sorted(kinds))}" if kinds else ""


def left_out(table: Table, shown: Iterable[Line]) -> tuple[str, ...]:
    """Say how many runs of a table are not among the lines that are shown."""
    drawn = {run_id for line in shown for run_id in line.run_ids}
    every = {r for board in table.boards for line in board.lines for r in line.run_ids}
    n_left = len(every - drawn)
    if not n_left:
        return ()
    are = "is" if n_left == 1 else "are"
    text = (
        f"{n_left} of {len(every)} finished runs {are} not drawn: another head, recipe or protocol "
        "than those that are, or nothing to compare with. `heads table` lists all."
    )
    return (text,)


def what_there_is(table: Table) -> str:
    """Say what a store has, where a figure needs more."""
    lines = [line for board in table.boards for line in board.lines]
    if not lines:
        return "the store has no finished run"
    parts = [
        f"{len(names)} {kind}{'' if len(names) == 1 else 's'} ({', '.join(names)})"
        for kind, names in (
            ("task", sorted({short_name(board.task) for board in table.boards})),
            ("head", sorted({short_name(line.head) for line in lines})),
            ("backbone", sorted({line.backbone for line in lines})),
        )
    ]
    n_boards = len(table.boards)
    parts.append(f"{n_boards} board{'' if n_boards == 1 else 's'} of comparable runs")
    return f"the store has {', '.join(parts)}"


def pairs(values: Mapping[str, Any]) -> str:
    """Write options as text: "dim 32, queries 56"."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _boards_of(table: Table, setting: Setting) -> list[tuple[Board, list[Line]]]:
    boards = largest_boards(table, lambda board: len(_of_setting(board, setting)))
    found = [(board, _of_setting(board, setting)) for board in boards]
    return [(board, lines) for board, lines in found if lines]


def _of_setting(board: Board, setting: Setting) -> list[Line]:
    """List the lines of one head and of the recipe that most backbones share, best first."""
    recipes: dict[str, list[Line]] = {}
    for line in board.lines:
        if line.rank is not None and setting_of(line) == setting:
            recipes.setdefault(pairs(line.recipe), []).append(line)
    return max(recipes.values(), key=len, default=[])


def _by_name(lines: Sequence[Line], several_sizes: set[str]) -> dict[str, Line]:
    """Name lines by backbone; by size and then by taps too where one backbone has several."""
    names = [sized_name(x) if x.backbone in several_sizes else x.backbone for x in lines]
    named: dict[str, Line] = {}
    for line, name in zip(lines, names, strict=True):
        taps = "+".join(tap for tap, _ in line.taps)
        named.setdefault(f"{name} {taps}" if names.count(name) > 1 else name, line)
    return named
