"""`heads evaluate`, `heads ls` and `heads rm`: what to do with trained runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.common import (
    device_option,
    json_option,
    print_json,
    resumable,
    runs_option,
    store_option,
)
from cli.progress import ProgressLine
from cli.tables import table

run_argument = click.argument("run", metavar="RUN")


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
    columns = ["run", "status", "head", "task", "features", "steps", "test"]
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
