"""`featstore copy` and `merge`: part of a store elsewhere, several stores in one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.common import (
    LEFT_OUT,
    MAX_LISTED,
    json_option,
    leave,
    print_json,
    resumable,
    say,
)
from cli.params import Names, StorePath
from cli.progress import ProgressLine
from cli.tables import count, size

if TYPE_CHECKING:
    from featstore.copying import CopyReport

_AGAIN = "What is copied stays; the same command goes on where it stopped."
no_runs_option = click.option(
    "--no-runs", "runs", is_flag=True, flag_value=False, default=True, help="Leave the runs out."
)


@click.command()
@click.argument("source", type=StorePath(), metavar="SRC")
@click.argument("target", type=StorePath(), metavar="DST")
@click.option(
    "--where", default=None, metavar="EXPR", help="Copy these rows: an expression over `samples`."
)
@click.option("--taps", type=Names(), default=None, help="Copy these taps only, not all.")
@click.option(
    "--feature-set", default=None, metavar="KEY|NAME", help="Copy this one only, not all."
)
@no_runs_option
@json_option
def copy(
    source: Path,
    target: Path,
    where: str | None,
    taps: tuple[str, ...] | None,
    feature_set: str | None,
    runs: bool,
    as_json: bool,
) -> None:
    """Copy rows and taps with their items and labels from SRC into DST, which is made or grows.

    Every chunk is checked and arrives byte for byte. Removed rows, and items that have no row, do
    not come along. A finished run does where every row that it names is copied, now or before.
    Exit code 3: some rows lack a tap in DST that the rest of their shard has not either.

    \b
    Example:
        featstore copy features.zarr small.zarr --where "split = 'train'" --taps norm
        featstore copy features.zarr /mnt/usb/features.zarr
        featstore copy features.zarr one.zarr --feature-set dinov2_b@224 --no-runs
    """
    from featstore.copying import copy_store

    with resumable(_AGAIN), ProgressLine() as progress:
        report = copy_store(
            source,
            target,
            where=where,
            taps=taps or (),
            feature_set=feature_set,
            runs=runs,
            progress=progress,
        )
    _show(report, as_json=as_json)


@click.command()
@click.argument("stores", nargs=-1, required=True, type=StorePath(), metavar="SRC... DST")
@no_runs_option
@json_option
def merge(stores: tuple[Path, ...], runs: bool, as_json: bool) -> None:
    """Join stores that were made apart into DST, which is made or grows.

    Feature sets of one key become one, and an image that several stores have is stored once.
    Stores that contradict each other (a data set's name with other items, a run's name with
    another run) are refused before anything is written.

    \b
    Example:
        featstore merge node1.zarr node2.zarr node3.zarr all.zarr
        featstore merge colleague.zarr features.zarr
    """
    from featstore.copying import merge_stores

    if len(stores) < 2:
        raise click.UsageError("Name one or more stores to join, and the target last.")
    with resumable(_AGAIN), ProgressLine() as progress:
        report = merge_stores(stores[:-1], stores[-1], runs=runs, progress=progress)
    _show(report, as_json=as_json)


def _show(report: CopyReport, *, as_json: bool) -> None:
    if as_json:
        print_json(report.to_json())
    else:
        for one in report.feature_sets:
            say(
                f"{one.key} {one.name}: {count(one.new_rows, 'new row')}, "
                f"{one.reused_rows:,} there already, {size(one.bytes)} written"
            )
        for run_id, reason in list(report.runs_left_out.items())[:MAX_LISTED]:
            say(f"Left out run {run_id}: {reason}.")
        new = sum(one.new_rows for one in report.feature_sets)
        click.echo(
            f"Copied {count(new, 'row')}, {count(report.items, 'item')}, "
            f"{count(report.labels, 'label')} and {count(len(report.runs), 'run')} "
            f"to {report.target}."
        )
    if report.left_out:
        say(
            f"{count(report.left_out, 'row')} lack some of the taps, because the rest of their "
            "shard does. `featstore extract` completes them."
        )
        leave(LEFT_OUT)
