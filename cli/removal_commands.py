"""`featstore rm`, `compact` and `gc`: take rows or feature sets away and free their space."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.common import MAX_LISTED, json_option, print_json, resumable, say, store_option
from cli.params import Seconds
from cli.progress import ProgressLine
from cli.tables import count, duration, size

if TYPE_CHECKING:
    from featstore.cleanup import CleanReport
    from featstore.removal import RemovalReport

dry_run_option = click.option("--dry-run", is_flag=True, help="Only list; delete nothing.")


@click.command()
@click.argument("name", required=False, metavar="[FEATURE_SET]")
@click.option(
    "--where", default=None, metavar="EXPR", help="Remove rows: an expression over `samples`."
)
@click.option(
    "--feature-set",
    default=None,
    metavar="KEY|NAME",
    help="With --where: remove the rows of this feature set only, not of all.",
)
@click.option(
    "--keep-shared",
    is_flag=True,
    help="With --where: keep rows that serve an item or a split which EXPR does not name.",
)
@dry_run_option
@store_option
@json_option
def rm(
    name: str | None,
    where: str | None,
    feature_set: str | None,
    keep_shared: bool,
    dry_run: bool,
    store_path: Path,
    as_json: bool,
) -> None:
    """Remove rows (--where), or delete a whole FEATURE_SET for good.

    Rows are gone for every reader at once; `featstore gc` frees the space of shards of which
    nothing is left, `featstore compact` moves what is left in the others. Items, labels,
    thumbnails and runs stay: `featstore copy` makes a store without them. An image that is
    extracted again gets a new row.

    FEATURE_SET is a key, the start of one, or a name; `featstore ls` lists them.

    \b
    Example:
        featstore rm --where "path like 'scene_07/%'" --dry-run
        featstore rm --where "dataset = 'nyu' and split = 'test'" --feature-set dinov2_b@224
        featstore rm dinov2_b@224
    """
    if (name is None) == (where is None):
        raise click.UsageError("Name a FEATURE_SET to delete, or say which rows with --where EXPR.")
    if where is not None:
        from featstore.removal import remove_rows

        report = remove_rows(
            store_path, where, feature_set=feature_set, keep_shared=keep_shared, dry_run=dry_run
        )
        _show_removed_rows(report, dry_run=dry_run, as_json=as_json)
        return
    if feature_set is not None or keep_shared:
        raise click.UsageError("--feature-set and --keep-shared belong to --where EXPR.")
    from featstore.cleanup import remove_feature_set

    assert name is not None
    found = remove_feature_set(store_path, name, dry_run=dry_run)
    _show_deleted(found, dry_run=dry_run, noun="feature set", as_json=as_json)


def _show_removed_rows(report: RemovalReport, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({**report.to_json(), "dry_run": dry_run})
        return
    for key, n_rows in report.feature_sets.items():
        say(f"{key}: {count(n_rows, 'row')}")
    if report.shared_rows:
        say(
            f"{count(report.shared_rows, 'row')} of them also serve an item or a split that the "
            "expression does not name; --keep-shared keeps such rows."
        )
    if report.items_without_rows:
        say(
            f"Items of the store without features now: {report.items_without_rows:,}. Their labels "
            "and thumbnails stay; `featstore copy` leaves them out."
        )
    verb = "Would remove" if dry_run else "Removed"
    click.echo(
        f"{verb} {count(report.rows, 'row')}. `featstore gc` frees {size(report.gc_bytes)} of them "
        f"once the grace period is over, `featstore compact` and then `gc` another "
        f"{size(report.compact_bytes)}."
    )


@click.command()
@click.option(
    "--feature-set", default=None, metavar="KEY|NAME", help="Compact this one only, not all."
)
@click.option(
    "--min-removed",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.3,
    show_default=True,
    help="Least part of a shard's rows that are removed or rejected for it to be rewritten.",
)
@store_option
@json_option
def compact(feature_set: str | None, min_removed: float, store_path: Path, as_json: bool) -> None:
    """Move what is left in shards of which much was removed to new shards.

    `featstore gc` frees the old shards once the grace period is over. Trained runs stay right:
    the old row numbers lead to the new ones. Stop it whenever you like; run again, it goes on.

    \b
    Example:
        featstore rm --where "split = 'test'"
        featstore compact
        featstore gc
    """
    from featstore.compaction import compact as run

    with resumable("Nothing is lost; run it again to go on."), ProgressLine() as progress:
        report = run(
            store_path, feature_set=feature_set, min_removed=min_removed, progress=progress
        )
    if as_json:
        print_json(report.to_json())
        return
    click.echo(
        f"Moved {count(report.rows, 'row')} out of {count(report.shards, 'shard')} "
        f"({size(report.written_bytes)} written)."
    )
    if report.gc_bytes:
        say(f"`featstore gc` frees {size(report.gc_bytes)} once the grace period is over.")
    if report.left_bytes:
        say(
            f"{size(report.left_bytes)} of removed rows stay in shards of which less than "
            f"{min_removed:.0%} is gone; a smaller --min-removed, such as 0.01, takes these too."
        )


@click.command()
@click.option("--targets", is_flag=True, help="Delete prepared targets too; training remakes them.")
@click.option(
    "--grace",
    "grace_s",
    type=Seconds(),
    default="1h",
    show_default=True,
    help="How long removed rows stay readable for what was begun before; 0 frees them now.",
)
@dry_run_option
@store_option
@json_option
def gc(targets: bool, grace_s: float, dry_run: bool, store_path: Path, as_json: bool) -> None:
    """Delete what no committed row, item or run needs: leftovers, and shards of removed rows.

    \b
    Example:
        featstore gc --dry-run
        featstore gc --targets
        featstore gc --grace 0
    """
    from featstore.cleanup import gc as collect

    report = collect(store_path, dry_run=dry_run, targets=targets, grace_s=grace_s)
    for key in report.busy:
        say(f"Left feature set {key} alone: another process is writing it.")
    _show_deleted(report, dry_run=dry_run, noun="file", as_json=as_json)
    if report.waiting_bytes and not as_json:
        say(
            f"{size(report.waiting_bytes)} of removed rows can go in {duration(report.waiting_s)}, "
            "or now with --grace 0 if nothing reads them any more."
        )


def _show_deleted(report: CleanReport, *, dry_run: bool, noun: str, as_json: bool) -> None:
    if as_json:
        print_json({**report.to_json(), "dry_run": dry_run})
        return
    for path in report.removed[:MAX_LISTED]:
        say(path)
    if len(report.removed) > MAX_LISTED:
        say(f"... and {len(report.removed) - MAX_LISTED:,} more")
    verb = "Would remove" if dry_run else "Removed"
    click.echo(f"{verb} {count(len(report.removed), noun)}, {size(report.bytes)}.")
