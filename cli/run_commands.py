"""`heads evaluate`, `heads ls` and `heads rm`: what to do with trained runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    LEFT_OUT,
    MAX_LISTED,
    chosen_store,
    device_option,
    json_option,
    leave,
    print_json,
    resumable,
    runs_option,
    say,
    store_option,
)
from cli.progress import ProgressLine
from cli.tables import count, interval, metrics, table

if TYPE_CHECKING:
    from heads.runs import Run

run_argument = click.argument("run", metavar="RUN")


@click.command()
@run_argument
@click.option("--split", default="test", show_default=True, help="Split to measure on.")
@click.option(
    "--data",
    default=None,
    metavar="[NAME=]FORMAT:PATH",
    help="Take labels from here, joined to stored rows by the image.",
)
@click.option(
    "--queries",
    type=click.IntRange(2),
    default=None,
    metavar="N",
    help="Ask N x N queries, for an output of 8 N pixels a side. [default: as trained]",
)
@click.option(
    "--tta",
    type=click.Choice(["hflip"]),
    default=None,
    help="Average each prediction with that of the stored mirror image, turned back.",
)
@device_option
@store_option
@runs_option
@json_option
def evaluate(
    run: str, store_path: Path, runs_path: Path | None, as_json: bool, **options: Any
) -> None:
    """Measure the best head of a run again. RUN is an id, the start of one, or @last.

    Metrics are computed at the labels' own resolution; intervals are 95 % and resample whole
    groups (scenes, videos, individuals). train, val and test mean the parts that the run used.

    \b
    Example:
        heads evaluate @last
        heads evaluate @last --split val --json
        heads evaluate @last --queries 112
        heads evaluate @last --tta hflip
    """
    from heads.evaluate import evaluate as measure

    store = chosen_store(store_path, runs_path)
    with resumable("Nothing was changed."), ProgressLine() as progress:
        report = measure(run, store=store, runs=runs_path, progress=progress, **options)
    for path, reason in list(report.left_out.items())[:MAX_LISTED]:
        say(f"Left out {path}: {reason}")
    if as_json:
        print_json(report.to_json())
    else:
        averaged = f", averaged over {report.tta}" if report.tta else ""
        images = f"{count(report.images, 'image')} of {report.split}{averaged}"
        click.echo(f"{report.run_id}, {images}\n")
        click.echo(metrics(report.metrics, report.intervals))
        click.echo(report.note)
    if report.left_out:
        leave(LEFT_OUT)


@click.command()
@store_option
@runs_option
@json_option
def ls(store_path: Path, runs_path: Path | None, as_json: bool) -> None:
    """List the runs of a store, oldest first.

    \b
    Example:
        heads ls
        heads ls --store features.zarr --json
    """
    from heads.runs import list_runs

    found = list_runs(store_path, runs=runs_path)
    if as_json:
        print_json({"runs": [{**run.record, "status": run.status} for run in found]})
        return
    columns = ["run", "status", "features", "taps", "steps", "measured"]
    click.echo(table(columns, [_run_row(run) for run in found]))


@click.command()
@run_argument
@store_option
@runs_option
@json_option
def rm(run: str, store_path: Path, runs_path: Path | None, as_json: bool) -> None:
    """Delete a run. RUN is an id, the start of one, or @last.

    \b
    Example:
        heads rm @last
        heads rm deap-depth-20260101-120000-0a1b
    """
    from heads.runs import remove_run

    run_id = remove_run(store_path, run, runs=runs_path)
    if as_json:
        print_json({"removed": run_id})
    else:
        click.echo(f"Removed {run_id}.")


def _run_row(run: Run) -> list[Any]:
    record = run.record
    measured = record.get("measured")  # absent until the run is done
    return [
        run.run_id,
        run.status,
        ", ".join(record["feature_set_names"]),
        ", ".join(record["taps"]),
        record.get("steps"),
        None if measured is None else _measured_text(measured),
    ]


def _measured_text(measured: Mapping[str, Any]) -> str:
    name = measured["primary_metric"]
    low, high = measured["intervals"][name] or (None, None)
    return f"{measured['split']} {name} {interval(measured['metrics'][name], low, high)}"
