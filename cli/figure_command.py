"""`heads figure`: the papers' figures from the finished runs of a store."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.common import json_option, print_json, runs_option, say, store_option

if TYPE_CHECKING:
    from heads.figures import FigureData


@click.command()
@click.argument(
    "kind", metavar="FIGURE", type=click.Choice(["relative", "budget", "correlation", "speed"])
)
@click.option(
    "--out",
    "out_path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The file.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(["png", "csv"]),
    default=None,
    help="A picture, or the numbers behind it. [default: as FILE ends, else png]",
)
@click.option(
    "--any-device",
    "is_any_device",
    is_flag=True,
    help="Of speed: show backbones together that were timed on different devices.",
)
@store_option
@runs_option
@json_option
def figure(
    kind: str,
    out_path: Path,
    style: str | None,
    is_any_device: bool,
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
) -> None:
    """Draw a figure of the finished runs of a store.

    relative: each backbone's score as a share of the best one's, task by task. budget: parameters
    of heads against their score. correlation: whether two tasks rank the backbones alike. speed:
    the latency of the backbones, which `featstore extract` measures, against their score. Only
    runs that `heads table` ranks together stand in one panel.

    \b
    Example:
        heads figure relative --out relative.png
        heads figure budget --out budget.csv --format csv
        heads figure speed --out speed.png
    """
    if is_any_device and kind != "speed":
        raise click.UsageError(f"--any-device is of the figure speed, not of {kind}.")
    from featstore.files import write_bytes
    from heads.entries import read_entries
    from heads.figures import make_figure
    from heads.runs import list_runs
    from heads.table import make_table

    entries, _ = read_entries(list_runs(store_path, runs=runs_path))
    table = make_table(entries)
    if kind == "speed":
        from heads.speed import latencies_of, speed_figure

        timed = latencies_of(store_path, entries)
        data = speed_figure(table, timed, is_any_device=is_any_device)
    else:
        data = make_figure(kind, table)
    is_csv = style == "csv" or (style is None and out_path.suffix.lower() == ".csv")
    if is_csv:
        written = figure_csv(data).encode()
    else:
        from heads.charts import figure_png

        written = figure_png(data)
    write_bytes(out_path, written)
    for note in data.notes:
        say(note)
    if as_json:
        print_json({"path": str(out_path), "figure": kind, "rows": data.rows, "notes": data.notes})
    else:
        click.echo(f"Wrote {out_path}.")


def figure_csv(data: FigureData) -> str:
    """Write the numbers behind a figure, unrounded."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, fieldnames=list(data.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(data.rows)
    return sink.getvalue()
