"""Copying stored rows into new shards: within a feature set, or into another store's.

A chunk is copied as the bytes that it is. It is checked on the way, against its own checksum and
the ledger's, so that what arrives is what was committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from featstore.claims import Claim, Claims
from featstore.errors import FormatError
from featstore.ledger import SCHEMA, read_ledger, write_ledger
from featstore.ledgers import REMOVED, ledgers_of
from featstore.lines import n_assigned_rows, publish_assignment
from featstore.rows import RowReader
from featstore.shard_writer import ShardFileWriter, fill_block, open_writer
from featstore.shards import REPAIR
from featstore.store import ASSIGNMENT_SCHEMA, FeatureSetFolder
from featstore.tombstones import MOVED_FROM

_BLOCK_BYTES = 16 * 2**20  # read at once
_WAIT_S = 600.0  # for another process's shard


def add_assignment(
    folder: FeatureSetFolder, lines: pa.Table, *, moved_from: np.ndarray | None = None
) -> np.ndarray:
    """Assign new rows, from the first untouched shard on, in the order of `lines`.

    Call it under the feature set's writer lock.

    Args:
        folder: Feature set.
        lines: Columns of an assignment; their row numbers are replaced.
        moved_from: Rows that these are copies of.

    Returns:
        The new row numbers: int64.
    """
    first = folder.layout.next_free_row(n_assigned_rows(folder))
    rows = np.arange(first, first + lines.num_rows, dtype=np.int64)
    table = lines.select(ASSIGNMENT_SCHEMA.names).set_column(0, "row", pa.array(rows))
    table = table.cast(ASSIGNMENT_SCHEMA)
    if moved_from is not None:
        table = table.append_column(MOVED_FROM, pa.array(moved_from, pa.int64()))
    publish_assignment(folder, table)
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyJob:
    """One new shard, and where each of its rows is copied from."""

    source: FeatureSetFolder
    target: FeatureSetFolder
    shard: int
    lines: Sequence[Mapping[str, Any]]  # of the target's assignment, rows ascending
    sources: Mapping[int, int]  # row of the target -> row of the source; others were removed
    taps: tuple[str, ...]  # that every source has, and the target's shard lacks


def copy_shard(job: CopyJob, claims: Claims) -> int:
    """Claim a shard, copy what it still lacks and commit it; give the bytes of the rows.

    Raises:
        FormatError: Bytes of the source are damaged.
        NotFoundError: A row of the source was removed meanwhile, and its space freed.
        ConflictError: Another process works at the shard for minutes.
        StorageError: The disk refused; nothing that was committed before is touched.
    """
    while True:
        claim = claims.wait_for(job.shard, timeout_s=_WAIT_S)
        taps = [tap for tap in job.taps if not job.target.ledger_path(tap, job.shard).exists()]
        if not taps:
            claim.release()
            return 0
        work = _Copy(job, claim)
        try:
            for tap in taps:
                work.copy(tap)
            if work.commit():
                return work.n_bytes
        finally:
            work.discard()


class _Copy:
    """One shard on its way: written under names of its own, until all of it is there."""

    def __init__(self, job: CopyJob, claim: Claim) -> None:
        self.job = job
        self.claim = claim
        self.n_bytes = 0
        self._writers: dict[tuple[str, str], ShardFileWriter] = {}
        self._ledgers: dict[str, pa.Table] = {}
        self._targets = np.array(sorted(job.sources), np.int64)
        named = np.array([job.sources[row] for row in self._targets.tolist()], np.int64)
        self._sources = ledgers_of(job.source).tombstones().current(named)

    def copy(self, tap: str) -> None:
        """Copy the rows of one tap, rejected ones as such."""
        job = self.job
        found = _source_lines(job.source, tap, self._sources)
        source_of = dict(zip(self._targets.tolist(), self._sources.tolist(), strict=True))
        lines = {target: found[source] for target, source in source_of.items()}
        stored = np.array([row for row, line in lines.items() if line["status"] == "ok"], np.int64)
        wanted = np.array([source_of[row] for row in stored.tolist()], np.int64)
        crcs: dict[str, dict[int, int]] = {}
        for array in job.target.taps[tap].arrays:
            writer = open_writer(job.target, tap, array, job.shard, nonce=self.claim.nonce)
            self._writers[tap, array] = writer
            crcs[array] = _copy_array(job, tap, array, writer, (stored, wanted))
            writer.finish()
            if array != "pooled":
                _compare(job, tap, array, crcs[array], lines)
        itemsize = job.target.store_dtype.itemsize
        self.n_bytes += len(stored) * job.target.taps[tap].bytes_per_row(itemsize)
        table = [_ledger_line(line, lines, crcs) for line in job.lines]
        self._ledgers[tap] = pa.Table.from_pylist(table, schema=SCHEMA)

    def commit(self) -> bool:
        """Name the files, then write the ledgers; False: the shard was lost to another process."""
        job = self.job
        with self.claim.committing() as is_own:
            if not is_own:
                return False
            for (tap, array), writer in self._writers.items():
                writer.publish(job.target.array_path(tap, array))
            for tap, table in self._ledgers.items():
                write_ledger(job.target, tap, job.shard, table)
        return True

    def discard(self) -> None:
        """Delete what is not committed."""
        for writer in self._writers.values():
            writer.discard()


def _source_lines(
    folder: FeatureSetFolder, tap: str, rows: np.ndarray
) -> dict[int, dict[str, Any]]:
    """Give the ledger's line of each row, which its shard must have."""
    found: dict[int, dict[str, Any]] = {}
    wanted = set(rows.tolist())
    for shard in np.unique(rows // folder.layout.shard_rows).tolist():
        table = read_ledger(folder, tap, shard).to_pylist()
        found.update((line["row"], line) for line in table if line["row"] in wanted)
    if len(found) < len(wanted):
        row = min(wanted - found.keys())
        raise FormatError(f"No ledger of {tap} in {folder.path} lists row {row}. {REPAIR}")
    return found


def _copy_array(
    job: CopyJob,
    tap: str,
    array: str,
    writer: ShardFileWriter,
    rows: tuple[np.ndarray, np.ndarray],
) -> dict[int, int]:
    """Copy rows of one array, targets and sources; give the checksum of each one's chunk."""
    reader = RowReader(job.source, f"{tap}/prefix" if array == "prefix" else tap)
    try:
        copy = _copy_pooled if array == "pooled" else _copy_rows
        return copy(job, reader, writer, *rows)
    finally:
        reader.close()


def _copy_rows(
    job: CopyJob,
    reader: RowReader,
    writer: ShardFileWriter,
    targets: np.ndarray,
    sources: np.ndarray,
) -> dict[int, int]:
    crcs = {}
    size = max(1, _BLOCK_BYTES // reader.empty(1).nbytes)
    for start in range(0, len(sources), size):
        part = sources[start : start + size]
        values = reader.empty(len(part))
        reader.read_into(part, values)
        for row, chunk in zip(targets[start : start + size].tolist(), values, strict=True):
            crcs[row] = writer.append(job.target.layout.slot_of(row), chunk)
    return crcs


def _copy_pooled(
    job: CopyJob,
    reader: RowReader,
    writer: ShardFileWriter,
    targets: np.ndarray,
    sources: np.ndarray,
) -> dict[int, int]:
    """Gather rows into the one chunk that a shard of a pooled tap is."""
    if not len(sources):
        return {}
    values = reader.empty(len(sources))
    reader.read_into(sources, values)
    block = fill_block(job.target, reader.source.item_shape)
    block[targets % job.target.layout.shard_rows] = values
    return dict.fromkeys(targets.tolist(), writer.append(0, block))


def _compare(
    job: CopyJob, tap: str, array: str, crcs: Mapping[int, int], lines: Mapping[int, dict[str, Any]]
) -> None:
    """Refuse a chunk that became another one on its way."""
    for row, crc in crcs.items():
        if lines[row][f"{array}_crc32c"] != crc:
            raise FormatError(
                f"Row {lines[row]['row']} of tap {tap} in {job.source.path} changed while it was "
                f"copied. {REPAIR}"
            )


def _ledger_line(
    line: Mapping[str, Any],
    lines: Mapping[int, Mapping[str, Any]],
    crcs: Mapping[str, Mapping[int, int]],
) -> dict[str, Any]:
    row = line["row"]
    keys = {name: line[name] for name in ("row", "image_key", "crop", "view")}
    if row not in lines:
        return {**keys, "status": "rejected", "reason": REMOVED}
    own = {f"{array}_crc32c": by_row.get(row) for array, by_row in crcs.items()}
    return {**lines[row], **keys, **own}
