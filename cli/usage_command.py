"""`featstore du`: what a store takes on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.common import json_option, print_json, store_option
from cli.tables import size, table

if TYPE_CHECKING:
    from featstore.usage import Usage


@click.command()
@store_option
@json_option
def du(store_path: Path, as_json: bool) -> None:
    """Show what a store takes on the disk, part by part, and what of it could be freed.

    \b
    Example:
        featstore du
        featstore du --store /data/features.zarr --json
    """
    from featstore.usage import measure_usage

    usage = measure_usage(store_path)
    if as_json:
        print_json(usage.to_json())
        return
    click.echo(table(["part", "size"], [[part, size(n)] for part, n in _lines(usage)]))
    if usage.waste:
        click.echo(f"\n`featstore gc` frees {size(usage.waste)} now.")
    if usage.waiting:
        click.echo(f"\n{size(usage.waiting)} of removed rows wait for their grace period to end.")
    compactable = sum(one.compact_bytes for one in usage.feature_sets)
    if compactable:
        click.echo(
            f"\n{size(compactable)} of removed rows lie in shards that hold others; "
            "`featstore compact` and then `featstore gc` frees them."
        )


def _lines(usage: Usage) -> list[tuple[str, int]]:
    lines: list[tuple[str, int]] = []
    for one in usage.feature_sets:
        lines.append((f"feature set {one.key} {one.name}", one.bytes))
        lines += [
            (f"  {tap}/{array}", n_bytes)
            for tap, arrays in one.taps.items()
            for array, n_bytes in arrays.items()
        ]
        lines += [("  tables", one.tables), ("  norm, tail, attributes", one.other)]
    lines += [(f"items {name}", n_bytes) for name, n_bytes in usage.items.items()]
    lines += [(f"labels {name}", n_bytes) for name, n_bytes in usage.labels.items()]
    named = ("targets", "runs", "index", "other")
    lines += [(name, getattr(usage, name)) for name in named]
    return [*lines, ("total", usage.bytes)]
