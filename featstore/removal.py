"""Removing rows: at once for every reader, the space later by `compact` and `gc`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featstore import index
from featstore.errors import NotFoundError
from featstore.feature_sets import find_feature_set
from featstore.files import exclusive
from featstore.occupancy import removed_bytes
from featstore.remote.location import shown
from featstore.store import FeatureSetFolder, StoreFolder, locate, open_folder
from featstore.tombstones import read_tombstones, write_tombstones

LOCK_WAIT_S = 60.0
_TIMEOUT_S = 600.0
# `where` was checked to be one expression over the columns of `samples` before it stands here. A
# row of equal image, crop and view would take a removed one's place, so that it goes too.
_CHOSEN = """
with chosen as (
    select "row", count(*) as n_lines, count(*) filter (where ({where}
)) as n_meant
    from samples
    where feature_set = $key
    group by "row"
),
meant as (
    select "row", n_lines > n_meant as is_shared
    from chosen
    where n_meant > 0 and (not $keep_shared or n_lines = n_meant)
)
select other."row", bool_or(meant.is_shared) as is_shared
from meant
inner join rows as own on own.feature_set = $key and own."row" = meant."row"
inner join rows as other
    on other.feature_set = own.feature_set
    and other.image_key = own.image_key
    and other.crop = own.crop
    and other."view" = own."view"
where not exists (
    from tombstones
    where tombstones.feature_set = $key and tombstones."row" = other."row"
)
group by other."row"
order by other."row"
"""
_ITEMS_WITHOUT_ROWS = """
select count(*) as n
from items
anti join samples using (dataset, item)
"""


@dataclass(kw_only=True, slots=True)
class RemovalReport:
    """What was removed, or would be."""

    store: str
    where: str
    rows: int = 0  # over all feature sets
    feature_sets: dict[str, int] = field(default_factory=dict)  # key -> rows
    shared_rows: int = 0  # of these, rows that items serve which `where` does not name
    gc_bytes: int = 0  # that `gc` frees once the grace period is over
    compact_bytes: int = 0  # of removed rows in shards that hold others, which `compact` frees
    items_without_rows: int = 0  # in the whole store, afterwards; they and their labels stay

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


def remove_rows(
    store_path: str | Path,
    where: str,
    *,
    feature_set: str | None = None,
    keep_shared: bool = False,
    dry_run: bool = False,
) -> RemovalReport:
    """Remove the rows of which a line in `samples` fulfils `where`.

    No reader finds them from then on. Items, labels and thumbnails stay, and so does the space
    until `compact` and `gc` have run. An image that is extracted again gets a new row.

    Args:
        store_path: Store.
        where: One boolean SQL expression over the columns of the view `samples`.
        feature_set: Key, prefix of one, or name; None: all feature sets.
        keep_shared: Keep rows that also serve an item, or a split, which `where` does not name.
        dry_run: Only count.

    Raises:
        NotFoundError: No stored row fulfils `where`.
        InvalidInputError: `where` is something else.
        ConflictError: Another process is writing a feature set.
        StorageError: The disk refused.
    """
    store = open_folder(locate(store_path))
    report = RemovalReport(store=shown(store.path), where=where)
    for folder in chosen_feature_sets(store, feature_set):
        index.sample_rows(store.path, where, folder.key)  # refuses what is no condition
        if dry_run:
            rows = _choose(store, folder, report, keep_shared)
        else:
            purpose = f"removing rows of feature set {folder.key}"
            lock = store.locks_path / f"{folder.key}.lock"
            with exclusive(lock, purpose=purpose, timeout_s=LOCK_WAIT_S):
                rows = _choose(store, folder, report, keep_shared)
                if len(rows):
                    write_tombstones(folder, rows)
        if len(rows):
            _count(folder, rows, report)
    if not report.rows:
        raise NotFoundError(
            f"No stored row with {where} in {shown(store.path)}. Look with `featstore sql`: "
            '"select * from samples limit 5".'
        )
    if not dry_run:
        [found] = index.query(store.path, _ITEMS_WITHOUT_ROWS).to_pylist()
        report.items_without_rows = found["n"]
    return report


def chosen_feature_sets(store: StoreFolder, name: str | None) -> Iterator[FeatureSetFolder]:
    """Give the named feature set, or all of a store.

    Raises:
        NotFoundError: There is no such feature set, or none at all.
    """
    keys = store.feature_set_keys()
    if name is not None or not keys:
        yield find_feature_set(store, name)
        return
    yield from (store.feature_set(key) for key in keys)


def _choose(
    store: StoreFolder, folder: FeatureSetFolder, report: RemovalReport, keep_shared: bool
) -> np.ndarray:
    """List the rows that are meant."""
    sql = _CHOSEN.replace("{where}", report.where)
    values = {"key": folder.key, "keep_shared": keep_shared}
    found = index.query(store.path, sql, values, timeout_s=_TIMEOUT_S)
    report.shared_rows += sum(found["is_shared"].to_pylist())
    return found["row"].to_numpy().astype(np.int64)


def _count(folder: FeatureSetFolder, rows: np.ndarray, report: RemovalReport) -> None:
    """Add what `rows` are to what can be freed."""
    others = np.setdiff1d(read_tombstones(folder).rows, rows)
    before = removed_bytes(folder, others)
    after = removed_bytes(folder, np.union1d(others, rows))
    report.rows += len(rows)
    report.feature_sets[folder.key] = len(rows)
    report.gc_bytes += after[0] - before[0]
    report.compact_bytes += max(0, after[1] - before[1])
