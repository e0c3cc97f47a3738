"""Copying rows of a feature set into another store's feature set of the same key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from featstore import index
from featstore.claims import Claims, sweep_partials
from featstore.feature_sets import NORM_FILE, add_taps, grow_arrays, read_final_norm
from featstore.files import exclusive, write_bytes
from featstore.lines import Assigned, Lines, RowKey
from featstore.occupancy import committed_taps, stored_rows
from featstore.removal import LOCK_WAIT_S
from featstore.store import FeatureSetFolder, StoreFolder, write_attributes
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
        plan = _Plan(source, folder, rows, taps, report)
        plan.make()
    total = sum(len(lines) for _, lines, _ in plan.tasks)
    done = 0
    with Claims(target, source.key, purpose=purpose) as claims:
        for job in plan.jobs():
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
        self.live = live_rows(source)
        chosen = set(rows.tolist())
        self.wanted = {key: row for key, row in self.live.items() if row in chosen}
        self.gone = rows_out_of_force(target)
        self.tasks: list[tuple[int, Lines, frozenset[str]]] = []

    def make(self) -> None:
        """Assign rows to what has none, grow the arrays, and list the shards to copy.

        Call it under the writer lock of the target.
        """
        self._assign()
        grow_arrays(self.target, sorted(self.taps))
        committed = committed_taps(self.target)
        for shard, lines in self._shards():
            there = committed.get(shard, frozenset())
            keys = [key for row, key in lines.keyed() if row not in self.gone]
            own = [key for key in keys if key in self.wanted]
            lacking = frozenset().union(*(self._available(self.wanted[k]) for k in own)) - there
            if not there:  # begun by a copy of before: what the source lost since, is left out
                keys = [key for key in keys if key in self.live]
            possible = self._possible(keys, lacking)
            if possible:
                self.tasks.append((shard, lines, possible))
            if lacking - possible:
                self.report.left_out += len(own)
            elif possible:
                self.report.new_rows += len(own)
            else:
                self.report.reused_rows += len(own)

    def jobs(self) -> Iterator[CopyJob]:
        """Give what is to be copied, shard by shard."""
        for shard, lines, taps in self.tasks:
            keyed = [(row, key) for row, key in lines.keyed() if row not in self.gone]
            yield CopyJob(
                source=self.source,
                target=self.target,
                shard=shard,
                lines=lines,
                sources={row: self.live[key] for row, key in keyed if key in self.live},
                taps=tuple(sorted(taps)),
            )

    def _shards(self) -> Iterator[tuple[int, Lines]]:
        return Assigned(self.target).shards(self.target.layout.shard_rows)

    def _available(self, row: int) -> frozenset[str]:
        """Give those of the taps that the source has of a row's shard."""
        shard = self.source.layout.shard_of(row)
        return self.committed.get(shard, frozenset()) & self.taps

    def _possible(self, keys: Sequence[RowKey], taps: frozenset[str]) -> frozenset[str]:
        """Give those of the taps that the source has of every row of a target's shard."""
        for key in keys if taps else ():
            row = self.live.get(key)
            taps &= frozenset() if row is None else self._available(row)
        return taps

    def _assign(self) -> None:
        """Give rows to what the target lacks; rows with other taps never share a shard."""
        known = {
            key for _, lines in self._shards() for row, key in lines.keyed() if row not in self.gone
        }
        groups: dict[tuple[str, ...], list[int]] = {}
        for key, row in self.wanted.items():
            if key not in known:
                groups.setdefault(tuple(sorted(self._available(row))), []).append(row)
        assigned = self.source.assignments() if groups else None
        for taps, members in sorted(groups.items()):
            rows = np.array(sorted(members), np.int64)
            is_stored = np.zeros(len(rows), bool)
            for tap in taps:
                is_stored |= self._are_stored(tap, rows)
            self.report.left_out += int((~is_stored).sum())
            if assigned is not None and is_stored.any():
                is_new = np.isin(assigned["row"].to_numpy(), rows[is_stored])
                add_assignment(self.target, assigned.filter(pa.array(is_new, pa.bool_())))

    def _are_stored(self, tap: str, rows: np.ndarray) -> np.ndarray:
        """Tell for rows, ascending, whether a tap has them."""
        shards, starts = np.unique(rows // self.source.layout.shard_rows, return_index=True)
        parts = np.split(rows, starts[1:])
        found = [
            stored_rows(self.source, tap, shard, part)
            for shard, part in zip(shards.tolist(), parts, strict=True)
        ]
        return np.concatenate(found)


def live_rows(folder: FeatureSetFolder) -> dict[RowKey, int]:
    """Give every row in `samples` by what it is."""
    live = index.sample_rows(folder.path.parent.parent, None, folder.key)
    return {key: row for row, key in keyed_rows(Assigned(folder).keys(live))}


def keyed_rows(table: pa.Table) -> Iterator[tuple[int, RowKey]]:
    """Give the row and the key of each line of an assignment."""
    keys = zip(*(table[name].to_pylist() for name in ("image_key", "crop", "view")), strict=True)
    return zip(table["row"].to_pylist(), keys, strict=True)
