"""What the ledgers say, parsed once and kept as long as somebody reads a feature set."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featstore.errors import FormatError, NotFoundError
from featstore.ledger import read_ledger
from featstore.shards import REPAIR
from featstore.store import FeatureSetFolder
from featstore.tombstones import Tombstones, read_tombstones, tombstone_paths

NO_CRC = -1
"""Stands where a ledger names no checksum."""
REMOVED = "removed"
"""Why a row that a tombstone names cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerShard:
    """What the ledger says of one shard of one tap, by slot."""

    stamp: tuple[int, ...]  # of the file it was read from
    reasons: tuple[str | None, ...]  # why a slot cannot be read; None where it can
    is_stored: np.ndarray  # bool by slot
    crcs: dict[str, np.ndarray]  # array -> int64 checksum by slot, or NO_CRC


class Ledgers:
    """The ledgers and tombstones of one feature set, parsed once, read again when they change."""

    def __init__(self, path: Path) -> None:
        self._folder = FeatureSetFolder(path)
        self._shards: dict[tuple[str, int], LedgerShard] = {}
        self._removed: tuple[Any, Tombstones, frozenset[int]] | None = None
        self._lock = threading.Lock()

    def shard(self, tap: str, shard: int) -> LedgerShard:
        """Give the parsed ledger of one shard of one tap.

        Raises:
            NotFoundError: It is not committed.
            FormatError: It is damaged.
        """
        stamp = _stamp(self._folder.ledger_path(tap, shard))
        found = self._shards.get((tap, shard))
        if found is None or found.stamp != stamp:
            found = self._parse(tap, shard, stamp)
            self._shards[tap, shard] = found
        return found

    def removed_rows(self) -> frozenset[int]:
        """Give the rows that were removed logically."""
        return self._buried()[1]

    def tombstones(self) -> Tombstones:
        """Give what was removed, and where what was moved lies now."""
        return self._buried()[0]

    def _buried(self) -> tuple[Tombstones, frozenset[int]]:
        paths = tombstone_paths(self._folder)
        stamp = tuple((path.name, *_stamp(path)) for path in paths)
        with self._lock:
            if self._removed is None or self._removed[0] != stamp:
                found = read_tombstones(self._folder)
                self._removed = (stamp, found, frozenset(found.rows.tolist()))
            return self._removed[1:]

    def is_parsed(self, tap: str, shard: int) -> bool:
        """Tell whether a ledger has been parsed, though perhaps since changed."""
        return (tap, shard) in self._shards

    def _parse(self, tap: str, shard: int, stamp: tuple[int, ...]) -> LedgerShard:
        folder = self._folder
        table = read_ledger(folder, tap, shard)
        n_rows, first = folder.layout.shard_rows, folder.layout.rows_of(shard).start
        slots = [row - first for row in table["row"].to_pylist()]
        if any(not 0 <= slot < n_rows for slot in slots):
            path = folder.ledger_path(tap, shard)
            raise FormatError(f"{path} lists rows of another shard. {REPAIR}")
        reasons: list[str | None] = ["never assigned"] * n_rows
        lines = zip(slots, table["status"].to_pylist(), table["reason"].to_pylist(), strict=True)
        for slot, status, reason in lines:
            reasons[slot] = None if status == "ok" else f"rejected: {reason}"
        is_stored = np.array([reason is None for reason in reasons])
        crcs = {}
        for array in folder.taps[tap].arrays:
            found = table[f"{array}_crc32c"].cast(pa.int64()).fill_null(NO_CRC)
            crcs[array] = np.full(n_rows, NO_CRC)
            crcs[array][slots] = found.to_numpy()
        return LedgerShard(stamp=stamp, reasons=tuple(reasons), is_stored=is_stored, crcs=crcs)


_ledgers: weakref.WeakKeyDictionary[FeatureSetFolder, Ledgers] = weakref.WeakKeyDictionary()


def ledgers_of(folder: FeatureSetFolder) -> Ledgers:
    """Give the parsed ledgers of a feature set; they live as long as `folder` and hold no file."""
    found = _ledgers.get(folder)
    if found is None:
        found = _ledgers.setdefault(folder, Ledgers(folder.path))
    return found


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def check_stored(folder: FeatureSetFolder, tap: str, rows: np.ndarray) -> None:
    """Refuse rows that a tap's ledgers do not have, or that were removed; a moved one is there.

    Raises:
        NotFoundError: The message names them.
    """
    ledgers, shard_rows = ledgers_of(folder), folder.layout.shard_rows
    removed = ledgers.removed_rows()
    wrong: dict[int, str] = {}
    wanted = np.unique(ledgers.tombstones().current(rows))
    shards, starts = np.unique(wanted // shard_rows, return_index=True)
    parts = np.split(wanted, starts[1:]) if len(wanted) else []
    for shard, members in zip(shards.tolist(), parts, strict=True):
        try:
            ledger = ledgers.shard(tap, shard)
        except NotFoundError:
            wrong.update(dict.fromkeys(members.tolist(), "not committed"))
            continue
        for row in members[~ledger.is_stored[members % shard_rows]].tolist():
            wrong[row] = ledger.reasons[row % shard_rows] or ""
    if removed:
        wrong.update(dict.fromkeys(removed.intersection(wanted.tolist()), REMOVED))
    if wrong:
        raise not_there(folder, tap, wrong)


def not_there(folder: FeatureSetFolder, tap: str, wrong: Mapping[int, str]) -> NotFoundError:
    """Build the error for rows that are not stored; `wrong` tells why."""
    row = min(wrong)
    way_out = "Choose rows with `where`, or extract them."
    if set(wrong.values()) == {REMOVED}:
        way_out = "Choose others with `where`; their images, extracted again, get new rows."
    return NotFoundError(
        f"{len(wrong)} of the rows are not stored for tap {tap} in feature set {folder.key}: "
        f"{listed(sorted(wrong))} (row {row}: {wrong[row]}). {way_out}"
    )


def listed(rows: Sequence[int]) -> str:
    """Write the first ten row numbers."""
    shown = ", ".join(str(row) for row in rows[:10])
    return f"{shown}, ..." if len(rows) > 10 else shown
