"""Which rows of each shard still count, and what the others take on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.errors import NotFoundError
from featstore.ledgers import ledgers_of
from featstore.lines import read_columns
from featstore.rejected import read_rejections
from featstore.remote.location import find_mirror
from featstore.shards import CRC_BYTES
from featstore.store import FeatureSetFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """One shard that holds removed rows."""

    shard: int
    rows: np.ndarray  # assigned to it, ascending
    is_removed: np.ndarray  # bool, by row
    is_live: np.ndarray  # bool: stored for at least one tap, and not removed

    @property
    def is_empty(self) -> bool:
        """Whether no number in it counts any more; rejected rows have none."""
        return not self.is_live.any()

    @property
    def dead_part(self) -> float:
        """Part of its rows that are removed or were rejected, 0 to 1."""
        return 1 - float(self.is_live.mean())


def assigned_rows(folder: FeatureSetFolder) -> np.ndarray:
    """List every row that an assignment names, ascending: int64."""
    return read_columns(folder, ["row"])["row"].to_numpy()


def occupied(folder: FeatureSetFolder, removed: np.ndarray) -> list[Occupancy]:
    """Look at each shard that holds some of the rows `removed`, ascending.

    Raises:
        FormatError: A ledger is damaged.
    """
    rows = assigned_rows(folder)
    shards = rows // folder.layout.shard_rows
    is_removed = np.isin(rows, removed)
    touched = np.unique(shards[is_removed])
    starts = np.searchsorted(shards, touched, "left")
    stops = np.searchsorted(shards, touched, "right")
    if not len(touched):
        return []
    stored = _Stored(folder)
    found = []
    for shard, start, stop in zip(touched.tolist(), starts, stops, strict=True):
        own, is_gone = rows[start:stop], is_removed[start:stop]
        is_live = np.zeros(len(own), bool)
        for tap in folder.taps:
            is_live |= stored.are_stored(tap, shard, own)
        found.append(
            Occupancy(shard=shard, rows=own, is_removed=is_gone, is_live=is_live & ~is_gone)
        )
    return found


class _Stored:
    """Which rows the ledgers have, without a look into those that the index knows."""

    def __init__(self, folder: FeatureSetFolder) -> None:
        self._committed, self._rejected = read_rejections(folder, list(folder.taps))

    def are_stored(self, tap: str, shard: int, rows: np.ndarray) -> np.ndarray:
        """Tell which of a shard's assigned rows are stored for a tap: bool."""
        if shard not in self._committed.get(tap, ()):
            return np.zeros(len(rows), bool)
        lines = self._rejected.get((tap, shard), ())
        return ~np.isin(rows, [line["row"] for line in lines])


def stored_rows(folder: FeatureSetFolder, tap: str, shard: int, rows: np.ndarray) -> np.ndarray:
    """Tell which rows of a shard its ledger of a tap has; none where it is not committed."""
    try:
        ledger = ledgers_of(folder).shard(tap, shard)
    except NotFoundError:
        return np.zeros(len(rows), bool)
    return ledger.is_stored[rows % folder.layout.shard_rows]


def committed_taps(folder: FeatureSetFolder) -> dict[int, frozenset[str]]:
    """Tell for each shard which taps are committed; shards without any are missing."""
    found: dict[int, set[str]] = {}
    for tap in folder.taps:
        for shard in folder.committed_shards(tap):
            found.setdefault(shard, set()).add(tap)
    return {shard: frozenset(taps) for shard, taps in found.items()}


def shard_files(folder: FeatureSetFolder, shard: int) -> dict[Path, int]:
    """Give the files of one shard that exist, with their bytes: its arrays, over all taps.

    Raises:
        StorageError: A store behind a URL did not answer.
    """
    paths = [
        folder.shard_file(tap, array, shard)
        for tap, shape in folder.taps.items()
        for array in shape.arrays
    ]
    mirror = find_mirror(folder.path)
    if mirror is None:
        return {path: path.stat().st_size for path in paths if path.is_file()}
    from featstore.remote.client import client_of  # obstore only where it is needed

    sizes = client_of(mirror.remote).sizes([mirror.key(path) for path in paths])
    return {path: size for path, size in zip(paths, sizes, strict=True) if size is not None}


def files_to_free(folder: FeatureSetFolder, one: Occupancy) -> dict[Path, int]:
    """Give the files of a shard in which nothing counts any more, in the order to delete them.

    The ledgers go first: what is left of a shard without them is waste like any other. Where rows
    were rejected they stay, since they tell why.

    Returns:
        Their bytes.

    Raises:
        StorageError: A store behind a URL did not answer.
    """
    ledgers = [folder.ledger_path(tap, one.shard) for tap in folder.taps]
    gone = [path for path in ledgers if path.is_file()] if one.is_removed.all() else []
    return {path: path.stat().st_size for path in gone} | shard_files(folder, one.shard)


def removed_bytes(folder: FeatureSetFolder, removed: np.ndarray) -> tuple[int, int]:
    """Count what removed rows take on the disk.

    Returns:
        Bytes of shards in which nothing counts any more, which `gc` frees, and bytes of removed
        rows in the other shards, which `compact` frees.
    """
    whole = part = 0
    stored = _Stored(folder)
    for one in occupied(folder, removed):
        if one.is_empty:
            whole += sum(files_to_free(folder, one).values())
            continue
        for tap, shape in folder.taps.items():
            if shape.grid is None:
                continue  # its rows share one chunk
            rows = one.rows[one.is_removed]
            n_stored = int(stored.are_stored(tap, one.shard, rows).sum())
            size = shape.bytes_per_row(folder.store_dtype.itemsize) + CRC_BYTES * len(shape.arrays)
            part += n_stored * size
    return whole, part
