"""Which rows the ledgers rejected, without reading all of them: the index knows of most."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from featstore import index
from featstore.ledger import read_ledger
from featstore.sql.scan import Stamp, ledger_stamps
from featstore.store import FeatureSetFolder

# In a table of its own, their number is known: DuckDB would join them the wrong way round.
_BAD = """
create temp table bad as
select feature_set, tap, shard, "row", reason, pixel_hash
from ledger
where feature_set = $key and status <> 'ok'
"""
_REJECTED = """
select bad.tap, bad.shard, bad."row", rows.image_key, rows.crop, rows."view", bad.reason,
    bad.pixel_hash
from bad
inner join rows using (feature_set, "row")
order by bad.tap, bad."row"
"""
_FOLDED = """
select path, mtime_ns, size from folded where starts_with(path, $folder) order by path
"""
Rejections = dict[tuple[str, int], list[Mapping[str, Any]]]
"""Tap and shard to the lines that say so: row, image_key, crop, view, reason and pixel_hash."""


def read_rejections(
    folder: FeatureSetFolder, taps: Sequence[str]
) -> tuple[dict[str, set[int]], Rejections]:
    """Tell which shards are committed, tap by tap, and which rows of them were rejected.

    The index is asked as it is; only the ledgers that it has not folded, or not as they are now,
    are read.
    """
    stamps = {tap: ledger_stamps(folder.ledger_path(tap, 0).parent) for tap in taps}
    folded, lines = _from_index(folder)
    found: Rejections = {}
    for line in lines:
        found.setdefault((line["tap"], line["shard"]), []).append(line)
    units = [
        (tap, shard)
        for tap, shards in stamps.items()
        for shard, (name, stamp) in shards.items()
        if folded.get(f"{folder.ledger_path(tap, 0).parent.name}/{name}") != stamp
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        read = pool.map(lambda unit: _from_ledger(folder, *unit), units)
        for unit, rejected in zip(units, read, strict=True):
            found.pop(unit, None)
            if rejected:
                found[unit] = rejected
    return {tap: set(shards) for tap, shards in stamps.items()}, found


def _from_index(folder: FeatureSetFolder) -> tuple[dict[str, Stamp], list[Mapping[str, Any]]]:
    """Give the folded ledgers by folder and name, and the rejected lines among them."""
    parent = f"feature_sets/{folder.key}/ledger/"
    asked = index.peek(
        folder.path.parent.parent,
        [(_FOLDED, {"folder": parent}), (_BAD, {"key": folder.key}), (_REJECTED, {})],
    )
    if asked is None:
        return {}, []
    folded, _, lines = asked
    columns = (folded[name].to_pylist() for name in ("path", "mtime_ns", "size"))
    stamps = {
        path[len(parent) :]: (mtime_ns, size) for path, mtime_ns, size in zip(*columns, strict=True)
    }
    return stamps, lines.to_pylist()


def _from_ledger(folder: FeatureSetFolder, tap: str, shard: int) -> list[Mapping[str, Any]]:
    lines = read_ledger(folder, tap, shard)
    if lines["status"].to_pylist().count("ok") == lines.num_rows:
        return []
    return [line for line in lines.to_pylist() if line["status"] != "ok"]
