"""`heads layers`: which layer serves which task."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    FAILED,
    LEFT_OUT,
    device_option,
    is_said,
    json_option,
    leave,
    print_json,
    resumable,
    runs_option,
    say,
    say_left_out,
    store_option,
)
from cli.learning_options import (
    backbone_option,
    batch_size_option,
    cache_option,
    compared_taps_option,
    data_option,
    feature_set_option,
    lr_option,
    seed_option,
    set_option,
    split_option,
    steps_option,
    tap_norm_option,
    val_fraction_option,
)
from cli.progress import ProgressLine
from cli.tables import interval, table

if TYPE_CHECKING:
    from heads.layers import Cell, LayerMap

_COLUMNS = (
    "task",
    "tap",
    "metric",
    "value",
    "low",
    "high",
    "split",
    "images",
    "held_out_loss",
    "is_best",
    "run_id",
    "error",
)


@click.command()
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="TASK",
    help="What to learn, such as segmentation; repeatable.",
)
@click.option(
    "--head",
    default=None,
    metavar="HEAD",
    help="Which head. [default: linear, and linear_pool for classification]",
)
@feature_set_option
@backbone_option
@compared_taps_option
@tap_norm_option
@split_option
@val_fraction_option("to choose the best")
@steps_option
@batch_size_option
@lr_option
@seed_option
@data_option
@set_option("the head, the tasks or the training loop")
@cache_option
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "csv", "json"]),
    default="text",
    show_default=True,
    help="How the table is printed.",
)
@device_option
@store_option
@runs_option
@json_option
def layers(
    tasks: Sequence[str],
    style: str,
    settings: Sequence[tuple[str, str]],
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a small head on every stored layer, and show which layer serves which task.

    All layers learn from one pass over the store, each in a run of its own. The best of a task is
    chosen on the held-out part; the numbers are those of the test split, with 95 % intervals.
    Block outputs are read through the backbone's final norm, so that the last block and the tap
    norm are the same.

    \b
    Example:
        heads layers --task segmentation
        heads layers --task depth --task segmentation --steps 300 --format csv
        heads layers --task depth --head conv --tap block:5 --tap block:8 --json
    """
    from heads.layers import map_layers

    # What was not said is left to the library, whose defaults the help shows.
    said = {name: value for name, value in options.items() if is_said(name)}
    with resumable("No run was begun yet; start it again."), ProgressLine() as progress:
        found = map_layers(
            store_path,
            tasks=tasks,
            options=dict(settings),
            runs=runs_path,
            progress=progress,
            **said,
        )
    if as_json or style == "json":
        print_json(found.to_json())
    else:
        click.echo(map_text(found) if style == "text" else map_csv(found), nl=False)
    _tell(found)


def map_text(found: LayerMap) -> str:
    """Write taps against tasks, the best of each marked."""
    cells = {(cell.task, cell.tap): cell for cell in found.cells}
    columns, rows = ["tap"], [[tap] for tap in found.taps]
    for task, head in zip(found.tasks, found.heads, strict=True):
        first = cells[task, found.taps[0]]
        arrow = "↓" if first.is_lower_better else "↑"
        split = next((c.split for c in found.cells if c.task == task and c.split), "")
        columns += [f"{task} ({head}): {split} {first.metric} {arrow}", "held-out loss", ""]
        for row, tap in zip(rows, found.taps, strict=True):
            row += _shown(cells[task, tap])
    lines = [table(columns, rows), ""]
    if any(cell.is_best for cell in found.cells):
        text = "best: the lowest loss on the held-out part; the test split does not choose."
    else:
        text = "Nothing was held out, so none is called best."
    return "\n".join([*lines, f"{text} [a, b]: 95 % interval.", ""])


def _shown(cell: Cell) -> list[Any]:
    if cell.error is not None:
        return ["failed", None, ""]
    value = None if cell.value is None else interval(cell.value, cell.low, cell.high)
    loss = None if cell.held_out_loss is None else f"{cell.held_out_loss:.4f}"
    return [value, loss, "best" if cell.is_best else ""]


def map_csv(found: LayerMap) -> str:
    """Write one line a tap and task, numbers unrounded."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for cell in found.cells:
        writer.writerow([getattr(cell, name) for name in _COLUMNS])
    return sink.getvalue()


def _tell(found: LayerMap) -> None:
    """Say what does not stand in the table, and leave with the code that fits."""
    for note in found.notes:
        say(note)
    say_left_out(found.left_out)
    failed = [cell for cell in found.cells if cell.error is not None]
    for cell in failed:
        say(f"{cell.task} on {cell.tap}: {cell.error}")
    if failed:
        leave(FAILED)
    if found.left_out:
        leave(LEFT_OUT)
