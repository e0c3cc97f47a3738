"""Copying rows of a feature set into another store's feature set of the same key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from featstore import index
from featstore.assign import row_key
from featstore.claims import Claims, sweep_partials
from featstore.feature_sets import NORM_FILE, add_taps, grow_arrays, read_final_norm
from featstore.files import exclusive, write_bytes
from featstore.lines import Assigned, RowKey
from featstore.occupancy import committed_taps, stored_rows
from featstore.removal import LOCK_WAIT_S
from featstore.store import ASSIGNMENT_SCHEMA, FeatureSetFolder, StoreFolder, write_attributes
from featstore.tail_file import find_tail, read_tail, write_tail
from featstore.tombstones import rows_out_of_force
from featstore.transfer import CopyJob, add_assignment, copy_shard
from featstore.types import Progress, ProgressCallback


@dataclass(kw_only=True, slots=True)
class CopiedFeatureSet:
    """What became of the rows of one feature set."""

    key: str
    name: str
    rows: int = 0  # asked for
    new_rows: int = 0
    reused_rows: int = 0  # that the target had already
    left_out: int = 0  # without some of the taps, which part of their shard lacks
    taps: list[str] = field(default_factory=list)
    bytes: int = 0


def copy_rows(
    source: FeatureSetFolder,
    target: StoreFolder,
    rows: np.ndarray,
    taps: Sequence[str],
    progress: ProgressCallback,
) -> CopiedFeatureSet:
    """Copy rows with some taps; those that are there already are left as they are.

    Args:
        source: Feature set.
        target: Store that has, or gets, a feature set of the same key.
        rows: Rows of `source`, from its `samples`.
        taps: Taps of `source`.
        progress: Called with reports of progress.

    Raises:
        FormatError: Bytes of the source are damaged.
        ConflictError: Another process is writing the target's feature set.
        StorageError: The disk refused; the same call goes on where it stopped.
    """
    report = CopiedFeatureSet(
        key=source.key, name=str(source.attributes["name"]), rows=len(rows), taps=list(taps)
    )
    purpose = f"copying into feature set {source.key}"
    lock = target.locks_path / f"{source.key}.lock"
    with exclusive(lock, purpose=purpose, timeout_s=LOCK_WAIT_S):
        folder = _ensure(source, target, taps)
        jobs = _Plan(source, folder, rows, taps, report).jobs()
    total = sum(len(job.lines) for job in jobs)
    done = 0
    with Claims(target, source.key, purpose=purpose) as claims:
        for job in jobs:
            report.bytes += copy_shard(job, claims)
            done += len(job.lines)
            progress(Progress(stage="copy", done=done, total=total))
    return report


def _ensure(source: FeatureSetFolder, target: StoreFolder, taps: Sequence[str]) -> FeatureSetFolder:
    """Make the feature set if it is not there, and what it lacks of norm, taps and tail."""
    path = target.path / "feature_sets" / source.key
    sweep_partials(target, FeatureSetFolder(path))
    if read_final_norm(source) is not None and not (path / NORM_FILE).exists():
        write_bytes(path / NORM_FILE, (source.path / NORM_FILE).read_bytes())
    if not (path / "zarr.json").exists():
        own = {name: v for name, v in source.attributes.items() if name not in ("taps", "tail")}
        write_attributes(path, {**own, "taps": {}})
    add_taps(FeatureSetFolder(path), [source.taps[tap] for tap in taps])
    tail = find_tail(source)
    if tail is not None:
        write_tail(FeatureSetFolder(path), read_tail(source, tail.n_blocks))
    return FeatureSetFolder(path)


class _Plan:
    """Which rows the target gets, and which shards are to be copied for them."""

    def __init__(
        self,
        source: FeatureSetFolder,
        target: FeatureSetFolder,
        rows: np.ndarray,
        taps: Sequence[str],
        report: CopiedFeatureSet,
    ) -> None:
        self.source = source
        self.target = target
        self.report = report
        self.committed = committed_taps(source)
        self.taps = frozenset(taps)
        self.assigned = Assigned(target)
        self.live = lines_by_key(source)
        chosen = set(rows.tolist())
        self.wanted = {key: line for key, line in self.live.items() if line["row"] in chosen}

    def jobs(self) -> list[CopyJob]:
        """Assign rows to what has none, grow the arrays, and list the shards to copy."""
        self._assign()
        grow_arrays(self.target, sorted(self.taps))
        self.assigned = Assigned(self.target)
        committed = committed_taps(self.target)
        jobs = []
        for shard, lines in self._target_lines().items():
            own = [row_key(line) for line in lines if row_key(line) in self.wanted]
            needed = frozenset().union(*(self._available(self.wanted[key]) for key in own))
            there = committed.get(shard, frozenset())
            lacking = needed - there
            if not there:  # begun by a copy of before: what the source lost since, is left out
                lines = [line for line in lines if row_key(line) in self.live]
            possible = self._possible(lines, lacking)
            if possible:
                jobs.append(self._job(shard, lines, possible))
            if lacking - possible:
                self.report.left_out += len(own)
            elif possible:
                self.report.new_rows += len(own)
            else:
                self.report.reused_rows += len(own)
        return jobs

    def _available(self, line: Mapping[str, Any]) -> frozenset[str]:
        """Give those of the taps that the source has of a row's shard."""
        shard = self.source.layout.shard_of(line["row"])
        return self.committed.get(shard, frozenset()) & self.taps

    def _assign(self) -> None:
        """Give rows to what the target lacks; rows with other taps never share a shard."""
        known = {row_key(line) for lines in self._target_lines().values() for line in lines}
        groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for key, line in self.wanted.items():
            if key not in known:
                groups.setdefault(tuple(sorted(self._available(line))), []).append(line)
        for taps, lines in sorted(groups.items()):
            rows = np.array([line["row"] for line in lines], np.int64)
            is_stored = np.zeros(len(rows), bool)
            for tap in taps:
                is_stored |= self._are_stored(tap, rows)
            kept = [line for line, is_kept in zip(lines, is_stored, strict=True) if is_kept]
            self.report.left_out += len(lines) - len(kept)
            if kept:
                add_assignment(self.target, pa.Table.from_pylist(kept, schema=ASSIGNMENT_SCHEMA))

    def _are_stored(self, tap: str, rows: np.ndarray) -> np.ndarray:
        found = np.zeros(len(rows), bool)
        for shard in np.unique(rows // self.source.layout.shard_rows).tolist():
            is_own = rows // self.source.layout.shard_rows == shard
            found[is_own] = stored_rows(self.source, tap, shard, rows[is_own])
        return found

    def _target_lines(self) -> dict[int, list[dict[str, Any]]]:
        """Give the target's assigned rows by shard, without those that count for nothing."""
        gone = rows_out_of_force(self.target)
        found: dict[int, list[dict[str, Any]]] = {}
        for line in self.target.assignments().to_pylist():
            if line["row"] not in gone:
                found.setdefault(self.target.layout.shard_of(line["row"]), []).append(line)
        return found

    def _possible(self, lines: Sequence[Mapping[str, Any]], taps: frozenset[str]) -> frozenset[str]:
        """Give those of the taps that the source has of every row of a target's shard."""
        for line in lines if taps else ():
            theirs = self.live.get(row_key(line))
            taps &= frozenset() if theirs is None else self._available(theirs)
        return taps

    def _job(self, shard: int, lines: Sequence[Mapping[str, Any]], taps: frozenset[str]) -> CopyJob:
        return CopyJob(
            source=self.source,
            target=self.target,
            shard=shard,
            lines=self._all_lines(shard),
            sources={line["row"]: self.live[row_key(line)]["row"] for line in lines},
            taps=tuple(sorted(taps)),
        )

    def _all_lines(self, shard: int) -> list[dict[str, Any]]:
        """Give every assigned row of a target's shard, removed ones too."""
        rows = self.assigned.rows
        return self.assigned.lines(rows[rows // self.target.layout.shard_rows == shard])


def lines_by_key(folder: FeatureSetFolder) -> dict[RowKey, dict[str, Any]]:
    """Give the assignment's line of every row in `samples`, by what the row is."""
    live = index.sample_rows(folder.path.parent.parent, None, folder.key)
    return {row_key(line): line for line in Assigned(folder).lines(live)}
