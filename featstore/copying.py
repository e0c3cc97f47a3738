"""Copying a store, or a part of it, and joining stores that were made apart.

Everything that could contradict is compared before anything is written. Each part is then brought
in the order in which it may be missing: items, labels, shards with their ledgers, runs; whatever
ends in between, the same call goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featstore import index
from featstore.errors import InvalidInputError, NotFoundError, invalid, not_found
from featstore.feature_copy import CopiedFeatureSet, copy_rows
from featstore.files import exclusive, remove_partials
from featstore.items import copy_items
from featstore.joining import Holding, Wanted, check_join, join, read_holding
from featstore.labels import copy_labels
from featstore.remote.location import shown
from featstore.removal import chosen_feature_sets
from featstore.run_copy import copy_runs
from featstore.store import (
    StoreFolder,
    check_target,
    ensure_folder,
    is_store,
    locate,
    open_folder,
)
from featstore.types import Progress, ProgressCallback, ignore_progress
from featstore.version import __version__

_WAIT_S = 600.0
_TIMEOUT_S = 600.0
# `where` was checked to be one expression over the columns of `samples` before it stands here.
_CHOSEN = """
select distinct "row", dataset, item
from samples
where feature_set = $key and ({where}
)
order by all
"""


@dataclass(kw_only=True, slots=True)
class CopyReport:
    """What a copy or a merge brought."""

    sources: list[str]
    target: str
    items: int = 0  # new ones
    labels: int = 0  # new ones, thumbnails too
    feature_sets: list[CopiedFeatureSet] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    runs_left_out: dict[str, str] = field(default_factory=dict)  # run -> why

    @property
    def left_out(self) -> int:
        """Rows that lack some of the taps in the target."""
        return sum(one.left_out for one in self.feature_sets)

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return {**asdict(self), "left_out": self.left_out}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Portion:
    """What one store brings."""

    store: StoreFolder
    rows: Mapping[str, np.ndarray]  # by feature set
    taps: Mapping[str, tuple[str, ...]]  # by feature set
    items: Wanted
    runs: bool


def copy_store(
    source: str | Path,
    target: str | Path,
    *,
    where: str | None = None,
    taps: Sequence[str] = (),
    feature_set: str | None = None,
    runs: bool = True,
    progress: ProgressCallback = ignore_progress,
) -> CopyReport:
    """Copy chosen rows and taps, with their items and labels, into a store that is made or grows.

    Chunks are copied byte for byte, each checked against its ledger. Finished runs come along
    where the copy has every row that they name.

    Args:
        source: Store.
        target: Store; where it is there already, what it lacks is added.
        where: One boolean SQL expression over the view `samples`; None: every row.
        taps: Taps to copy; none: all.
        feature_set: Key, prefix of one, or name; None: all feature sets.
        runs: Copy the runs too.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: There is no such store, feature set or tap, or no row fulfils `where`.
        InvalidInputError: The target holds something that contradicts, or is no store.
        FormatError: Bytes of the source are damaged.
        ConflictError: Another process is writing the target.
        StorageError: The disk refused; the same call goes on where it stopped.
    """
    store = open_folder(locate(source))
    portion = _portion(store, where, taps, feature_set, runs)
    return _join_all([portion], locate(target), progress)


def merge_stores(
    sources: Sequence[str | Path],
    target: str | Path,
    *,
    runs: bool = True,
    progress: ProgressCallback = ignore_progress,
) -> CopyReport:
    """Join stores that were made apart into one: rows that several of them have are stored once.

    Args:
        sources: Stores.
        target: Store; where it is there already, what it lacks is added.
        runs: Join the runs too.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: There is no such store.
        InvalidInputError: Two of them contradict each other; nothing was written.
        FormatError: Bytes of a source are damaged.
        ConflictError: Another process is writing the target.
        StorageError: The disk refused; the same call goes on where it stopped.
    """
    if not sources:
        raise invalid("sources", list(sources), "one or more stores")
    return _join_all([_whole(locate(one), runs) for one in sources], locate(target), progress)


def _whole(path: Path, runs: bool) -> _Portion:
    """Take all of a store, items without rows too."""
    store = open_folder(path)
    folders = [store.feature_set(key) for key in store.feature_set_keys()]
    items = index.query(path, "select dataset, item from items order by all", timeout_s=_TIMEOUT_S)
    return _Portion(
        store=store,
        rows={one.key: index.sample_rows(path, None, one.key) for one in folders},
        taps={one.key: tuple(one.taps) for one in folders},
        items=_by_data_set(items.to_pylist()),
        runs=runs,
    )


def _portion(
    store: StoreFolder,
    where: str | None,
    taps: Sequence[str],
    feature_set: str | None,
    runs: bool,
) -> _Portion:
    folders = list(chosen_feature_sets(store, feature_set))
    known = {tap for folder in folders for tap in folder.taps}
    for tap in taps:
        if tap not in known:
            raise not_found("tap", tap, known)
    rows: dict[str, np.ndarray] = {}
    lines: list[dict[str, Any]] = []
    for folder in folders:
        index.sample_rows(store.path, where, folder.key)  # refuses what is no condition
        sql = _CHOSEN.replace("{where}", where or "true")
        found = index.query(store.path, sql, {"key": folder.key}, timeout_s=_TIMEOUT_S)
        own = [tap for tap in folder.taps if not taps or tap in taps]
        if found.num_rows and own:
            rows[folder.key] = np.unique(found["row"].to_numpy().astype(np.int64))
            lines += found.to_pylist()
    if not rows:
        chosen = "No stored row" if where is None else f"No stored row with {where}"
        raise NotFoundError(f"{chosen} in {shown(store.path)}. See `featstore ls`.")
    return _Portion(
        store=store,
        rows=rows,
        taps={
            one.key: tuple(tap for tap in one.taps if not taps or tap in taps)
            for one in folders
            if one.key in rows
        },
        items=_by_data_set(lines),
        runs=runs,
    )


def _by_data_set(lines: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in lines:
        found.setdefault(line["dataset"], set()).add(line["item"])
    return found


def _join_all(portions: Sequence[_Portion], path: Path, progress: ProgressCallback) -> CopyReport:
    """Compare everything, then bring one portion after the other."""
    for portion in portions:
        if path.resolve() == portion.store.path.resolve():
            raise InvalidInputError(
                f"{shown(path)} is a source and the target. Name another target."
            )
    check_target(path)
    held = read_holding(open_folder(path)) if is_store(path) else Holding()
    for portion in portions:
        theirs = read_holding(
            portion.store, wanted=portion.items, keys=list(portion.rows), runs=portion.runs
        )
        check_join(held, theirs)
        join(held, theirs)
    target = ensure_folder(path, library=__version__)
    report = CopyReport(sources=[shown(one.store.path) for one in portions], target=shown(path))
    for portion in portions:
        _bring(portion, target, report, progress)
    index.refresh(target.path)
    return report


def _bring(
    portion: _Portion, target: StoreFolder, report: CopyReport, progress: ProgressCallback
) -> None:
    source = portion.store
    for done, (dataset, items) in enumerate(sorted(portion.items.items()), 1):
        lock = target.locks_path / f"items-{dataset}.lock"
        with exclusive(lock, purpose=f"copying items of {dataset}", timeout_s=_WAIT_S):
            remove_partials(target.items_path(dataset))
            remove_partials(target.labels_path(dataset))
            report.items += copy_items(source, target, dataset, items)
            report.labels += copy_labels(source, target, dataset, items)
        progress(Progress(stage="items", done=done, total=len(portion.items)))
    for key, rows in portion.rows.items():
        folder = source.feature_set(key)
        report.feature_sets.append(copy_rows(folder, target, rows, portion.taps[key], progress))
    if portion.runs:
        copied, left_out = copy_runs(source, target, portion.rows)
        report.runs += copied
        report.runs_left_out |= left_out
