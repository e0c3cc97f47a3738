"""`featstore verify` and `reindex`: keep a store in order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.common import (
    FAILED,
    MAX_LISTED,
    device_option,
    json_option,
    leave,
    print_json,
    resumable,
    say,
    store_option,
)
from cli.progress import ProgressLine
from cli.tables import count, size

if TYPE_CHECKING:
    from featstore.verify import VerifyReport


@click.command()
@click.option("--repair", is_flag=True, help="Extract the damaged shards again, and nothing else.")
@click.option(
    "--data",
    multiple=True,
    metavar="NAME=FORMAT:PATH",
    help="Where a data set lies now, if it moved; repeatable.",
)
@click.option(
    "--weights",
    default=None,
    metavar="FILE",
    help="The backbone's weights file, if it moved.",
)
@device_option
@store_option
@json_option
def verify(
    repair: bool,
    data: tuple[str, ...],
    weights: str | None,
    device: str,
    store_path: Path,
    as_json: bool,
) -> None:
    """Check every stored number against its checksum; exit 1 if something is wrong.

    \b
    Example:
        featstore verify
        featstore verify --repair
        featstore verify --repair --data nyu=nyu:/new/place/nyu --json
    """
    from featstore.verify import verify as check

    with resumable("Nothing is lost; run it again."), ProgressLine() as progress:
        report = check(
            store_path,
            repair=repair,
            data=data,
            weights=weights,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
    else:
        _show_verified(report)
    if not report.ok:
        leave(FAILED)


def _show_verified(report: VerifyReport) -> None:
    for problem in report.problems[:MAX_LISTED]:
        state = "Repaired" if problem.repaired else "Damaged"
        rows = f" ({count(len(problem.rows), 'row')})" if problem.rows else ""
        say(f"{state}: {problem.file}{rows}: {problem.message}")
    if len(report.problems) > MAX_LISTED:
        say(f"... and {len(report.problems) - MAX_LISTED:,} more; --json lists them all.")
    checked = f"{count(report.rows, 'row')} in {count(report.shards, 'shard')}"
    left = [problem for problem in report.problems if not problem.repaired]
    if left:
        click.echo(f"{checked}, {size(report.bytes)}: {count(len(left), 'problem')}.")
        say("Repair them with `featstore verify --repair`.")
    else:
        click.echo(f"{checked}, {size(report.bytes)}: all good.")
    if report.waste:
        files = count(len(report.waste), "file")
        say(f"Interrupted writes left {files}; `featstore gc` sweeps them up.")


@click.command()
@store_option
@json_option
def reindex(store_path: Path, as_json: bool) -> None:
    """Make the index anew from the store's files, which are the truth.

    \b
    Example:
        featstore reindex
    """
    from featstore.index import query, rebuild

    with resumable("The old index still stands; run it again."):
        rebuild(store_path)
    names = ("datasets", "items", "feature_sets", "rows", "runs")
    counts = ", ".join(f"(select count(*) from {name}) as {name}" for name in names)
    [found] = query(store_path, f"select {counts}").to_pylist()
    if as_json:
        print_json(found)
    else:
        click.echo(f"Indexed {', '.join(f'{n:,} {name}' for name, n in found.items())}.")
