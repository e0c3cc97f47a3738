"""Rows that are gone: removed at some time, or moved to another row that has the same numbers.

A row number is never given twice, and a moved row keeps its old number as another name: whoever
wrote it down (a trained run, say) still reads the same numbers by it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featstore.errors import FormatError
from featstore.files import next_number, read_parquet, write_parquet
from featstore.store import FeatureSetFolder

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("moved_to", pa.int64()),  # the row that has its numbers now; null: none has
        ("removed_at", pa.int64()),  # seconds since 1970, UTC
    ]
)
MOVED_FROM = "moved_from"
"""Column of an assignment whose rows are copies: the row that each is a copy of."""
NOWHERE = -1


class Tombstones:
    """The removed rows of one feature set, as they were when this was read."""

    def __init__(self, rows: np.ndarray, moved_to: np.ndarray, removed_at: np.ndarray) -> None:
        """Sort them; of a row that is named twice, the earliest word holds.

        Args:
            rows: int64.
            moved_to: int64, or `NOWHERE`.
            removed_at: int64, seconds.
        """
        order = np.lexsort((removed_at, rows))
        self.rows, first = np.unique(rows[order], return_index=True)
        self.removed_at = removed_at[order][first]
        moved_to = moved_to[order][first]
        self._moved = self.rows[moved_to != NOWHERE]
        self._target = moved_to[moved_to != NOWHERE]
        while (at := np.flatnonzero(np.isin(self._target, self._moved))).size:
            self._target[at] = self._target[np.searchsorted(self._moved, self._target[at])]

    def are_removed(self, rows: np.ndarray) -> np.ndarray:
        """Tell for each row whether it was removed: bool."""
        return np.isin(rows, self.rows)

    def current(self, rows: np.ndarray) -> np.ndarray:
        """Give for each row the one that has its numbers now: itself unless it was moved."""
        if not len(self._moved):
            return rows
        place = np.minimum(np.searchsorted(self._moved, rows), len(self._moved) - 1)
        return np.where(self._moved[place] == rows, self._target[place], rows)


def tombstone_paths(folder: FeatureSetFolder) -> list[Path]:
    """List the files that remove rows, oldest first."""
    return sorted((folder.path / "tombstones").glob("*.parquet"))


def read_tombstones(folder: FeatureSetFolder) -> Tombstones:
    """Read which rows of a feature set are removed.

    Raises:
        FormatError: A file is damaged.
    """
    parts = [_read(path) for path in tombstone_paths(folder)]
    if not parts:
        parts = [(np.empty(0, np.int64),) * 3]
    return Tombstones(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = read_parquet(path)
    if "row" not in table.column_names:
        raise FormatError(f"{path} names no rows. Restore it from a copy.")
    rows = table["row"].to_numpy().astype(np.int64)
    nowhere = np.full(len(rows), NOWHERE, np.int64)
    # Format 1 had the rows alone at first.
    moved_to, removed_at = nowhere, np.full(len(rows), int(path.stat().st_mtime), np.int64)
    if "moved_to" in table.column_names:
        moved_to = table["moved_to"].fill_null(NOWHERE).to_numpy().astype(np.int64)
    if "removed_at" in table.column_names:
        removed_at = table["removed_at"].to_numpy().astype(np.int64)
    # What is moved gets a higher number, so that to follow it always ends.
    if ((moved_to != NOWHERE) & (moved_to <= rows)).any():
        raise FormatError(f"{path} moves a row to one before it. Restore it from a copy.")
    return rows, moved_to, removed_at


def write_tombstones(
    folder: FeatureSetFolder, rows: np.ndarray, moved_to: np.ndarray | None = None
) -> None:
    """Remove rows, all at once and durably; call it under the feature set's writer lock.

    Args:
        folder: Feature set.
        rows: int64.
        moved_to: Where each lies now, or `NOWHERE`; None: none was moved.
    """
    targets = np.full(len(rows), NOWHERE, np.int64) if moved_to is None else moved_to
    order = np.argsort(rows, kind="stable")
    columns = [
        pa.array(rows[order], pa.int64()),
        pa.array(targets[order], pa.int64(), mask=targets[order] == NOWHERE),
        pa.array(np.full(len(rows), int(time.time())), pa.int64()),
    ]
    number = next_number(tombstone_paths(folder))
    path = folder.path / "tombstones" / f"{number:05d}.parquet"
    write_parquet(path, pa.Table.from_arrays(columns, schema=SCHEMA))


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Rows that are being copied to new ones; in force once the old rows' tombstones say so."""

    rows: np.ndarray  # new, ascending
    sources: np.ndarray  # old, one for each


def unfinished_moves(folder: FeatureSetFolder, tombstones: Tombstones) -> list[Move]:
    """List the moves that were begun and not finished, without rows that were removed since."""
    moves = []
    for path in folder.assignment_paths():
        if MOVED_FROM not in pq.read_schema(path).names:
            continue
        table = read_parquet(path, columns=["row", MOVED_FROM])
        rows, sources = (table[name].to_numpy().astype(np.int64) for name in table.column_names)
        is_left = ~tombstones.are_removed(rows) & ~tombstones.are_removed(sources)
        if is_left.any():
            moves.append(Move(rows=rows[is_left], sources=sources[is_left]))
    return moves


def rows_out_of_force(folder: FeatureSetFolder) -> set[int]:
    """List the assigned rows that count for nothing: removed, or copies of an unfinished move."""
    tombstones = read_tombstones(folder)
    found = set(tombstones.rows.tolist())
    for move in unfinished_moves(folder, tombstones):
        found.update(move.rows.tolist())
    return found
