"""`featstore verify`, `reindex`, `gc` and `rm`: keep a store in order."""

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
    from featstore.cleanup import CleanReport
    from featstore.verify import VerifyReport

dry_run_option = click.option("--dry-run", is_flag=True, help="Only list; delete nothing.")


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


@click.command()
@click.option("--targets", is_flag=True, help="Delete prepared targets too; training remakes them.")
@dry_run_option
@store_option
@json_option
def gc(targets: bool, dry_run: bool, store_path: Path, as_json: bool) -> None:
    """Delete what no committed row, item or run needs: leftovers of interrupted writes.

    \b
    Example:
        featstore gc --dry-run
        featstore gc --targets
    """
    from featstore.cleanup import gc as collect

    report = collect(store_path, dry_run=dry_run, targets=targets)
    for key in report.busy:
        say(f"Left alone what another process is writing in {key}.")
    _show_removed(report, dry_run=dry_run, noun="file", as_json=as_json)


@click.command()
@click.argument("feature_set", metavar="FEATURE_SET")
@store_option
@json_option
def rm(feature_set: str, store_path: Path, as_json: bool) -> None:
    """Delete a feature set for good; items, labels and runs stay.

    FEATURE_SET is a key, the start of one, or a name; `featstore ls` lists them.

    \b
    Example:
        featstore rm dinov2_b@224
        featstore rm 3f9c1d20
    """
    from featstore.cleanup import remove_feature_set

    report = remove_feature_set(store_path, feature_set)
    _show_removed(report, dry_run=False, noun="feature set", as_json=as_json)


def _show_removed(report: CleanReport, *, dry_run: bool, noun: str, as_json: bool) -> None:
    if as_json:
        print_json({**report.to_json(), "dry_run": dry_run})
        return
    for path in report.removed[:MAX_LISTED]:
        say(path)
    if len(report.removed) > MAX_LISTED:
        say(f"... and {len(report.removed) - MAX_LISTED:,} more")
    verb = "Would remove" if dry_run else "Removed"
    click.echo(f"{verb} {count(len(report.removed), noun)}, {size(report.bytes)}.")
