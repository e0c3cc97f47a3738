"""`heads show`: a run as one HTML page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cli.common import (
    chosen_store,
    device_option,
    json_option,
    print_json,
    resumable,
    runs_option,
    say,
    store_option,
)


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--out",
    "out_path",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    metavar="DIR",
    help="Folder of the page. [default: the run's own]",
)
@device_option
@store_option
@runs_option
@json_option
def show(
    run: str,
    out_path: Path | None,
    device: str,
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
) -> None:
    """Write one HTML page of a finished run. RUN is an id, the start of one, or @last.

    The page needs no other file and no network: metrics with their intervals, curves, the best,
    median and worst images, every option, and what all of it came from.

    \b
    Example:
        heads show @last
        heads show @last --out pages/ --json
    """
    from heads.page import write_page

    store = chosen_store(store_path, runs_path)
    with resumable("Run it again."):
        report = write_page(run, out=out_path, store=store, runs=runs_path, device=device)
    if report.note:
        say(report.note)
    if as_json:
        print_json(asdict(report))
    else:
        click.echo(f"Wrote {report.path}.")
