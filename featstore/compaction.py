"""Rewriting shards in which much was removed: what is left moves to new shards.

A move is published in three steps, each of which is whole or absent: an assignment gives the rows
new numbers and says what they are copies of; the copies are committed, shard by shard; then one
file of tombstones removes the old rows and says where each lies now. Until that file is there the
old rows count and the copies do not (of equal rows the lowest holds), from then on it is the other
way round. A move that was interrupted is finished by the next call.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featstore.claims import Claims, claims_lock, live_claims, sweep_partials
from featstore.errors import InvalidInputError, invalid
from featstore.feature_sets import grow_arrays
from featstore.files import exclusive
from featstore.lines import Assigned
from featstore.occupancy import (
    Occupancy,
    assigned_rows,
    committed_taps,
    occupied,
    removed_bytes,
    stored_rows,
)
from featstore.remote.location import refuse_remote
from featstore.removal import LOCK_WAIT_S, chosen_feature_sets
from featstore.shards import find_layout
from featstore.store import ASSIGNMENT_SCHEMA, FeatureSetFolder, StoreFolder, locate, open_folder
from featstore.tombstones import (
    NOWHERE,
    Move,
    read_tombstones,
    unfinished_moves,
    write_tombstones,
)
from featstore.transfer import CopyJob, add_assignment, copy_shard
from featstore.types import Progress, ProgressCallback, ignore_progress

MIN_REMOVED = 0.3
_POLL_S = 0.2
_STEP_SHARDS = 64  # new ones of one move: what an interruption leaves to be finished


@dataclass(kw_only=True, slots=True)
class CompactReport:
    """What was rewritten."""

    store: str
    shards: int = 0  # old ones, which `gc` frees once the grace period is over
    new_shards: int = 0
    rows: int = 0  # that moved
    written_bytes: int = 0
    gc_bytes: int = 0  # that `gc` frees then, over what it would have freed before
    left_bytes: int = 0  # of removed rows in shards of which less was removed than asked for
    feature_sets: dict[str, int] = field(default_factory=dict)  # key -> rows that moved

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


def compact(
    store_path: str | Path,
    *,
    feature_set: str | None = None,
    min_removed: float = MIN_REMOVED,
    progress: ProgressCallback = ignore_progress,
) -> CompactReport:
    """Move what is left in shards of which much was removed to new shards.

    The old row numbers go on to be read: they lead to the new ones. The old shards are freed by
    `gc`. Rows that were rejected are not taken along; the next extraction tries them again.

    Args:
        store_path: Store.
        feature_set: Key, prefix of one, or name; None: all feature sets.
        min_removed: Least part of a shard's rows that are removed or were rejected, above 0 to 1.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: There is no such store or feature set.
        InvalidInputError: An array has a codec that featstore reads and does not write.
        FormatError: Bytes to be moved are damaged.
        ConflictError: Another process is writing the feature set.
        StorageError: The disk refused; run it again, nothing is lost.
    """
    if not 0 < min_removed <= 1:
        raise invalid("min_removed", min_removed, "a part of a shard, above 0 to 1")
    store = open_folder(locate(store_path))
    refuse_remote(store.path, "Compaction")
    report = CompactReport(store=str(store.path))
    for folder in chosen_feature_sets(store, feature_set):
        purpose = f"compacting feature set {folder.key}"
        with exclusive(store.locks_path / f"{folder.key}.compact.lock", purpose=purpose):
            _Compaction(store, folder, min_removed, report, progress).run()
    return report


class _Compaction:
    """The moves of one feature set; one process makes them at a time."""

    def __init__(
        self,
        store: StoreFolder,
        folder: FeatureSetFolder,
        min_removed: float,
        report: CompactReport,
        progress: ProgressCallback,
    ) -> None:
        self.store = store
        self.folder = folder
        self.purpose = f"compacting feature set {folder.key}"
        self.lock = store.locks_path / f"{folder.key}.lock"
        self.min_removed = min_removed
        self.report = report
        self.progress = progress

    def run(self) -> None:
        """Finish what was begun before, then move what is worth it."""
        before, _ = removed_bytes(self.folder, read_tombstones(self.folder).rows)
        with self._locked():
            sweep_partials(self.store, self.folder)
            moves = unfinished_moves(self.folder, read_tombstones(self.folder))
            if moves:
                grow_arrays(self.folder, list(self.folder.taps))
        for begun in moves:
            self._finish(begun)
        for shards in self._steps():
            move = self._begin(shards)
            if move is not None:
                self._finish(move)
        after, left = removed_bytes(self.folder, read_tombstones(self.folder).rows)
        self.report.gc_bytes += max(0, after - before)
        self.report.left_bytes += left

    def _locked(self) -> Any:
        return exclusive(self.lock, purpose=self.purpose, timeout_s=LOCK_WAIT_S)

    def _steps(self) -> Iterator[list[int]]:
        """Group the shards that are worth it: equal taps together, some at a time."""
        chosen = [one for one in self._candidates() if one.dead_part >= self.min_removed]
        if not chosen:
            return
        self._check_codecs()
        committed = committed_taps(self.folder)
        by_taps: dict[frozenset[str], list[Occupancy]] = {}
        for one in chosen:
            by_taps.setdefault(committed[one.shard], []).append(one)
        limit = _STEP_SHARDS * self.folder.layout.shard_rows
        for _, members in sorted(by_taps.items(), key=lambda each: sorted(each[0])):
            step: list[int] = []
            n_rows = 0
            for one in members:
                n_live = int(one.is_live.sum())
                if step and n_rows + n_live > limit:
                    yield step
                    step, n_rows = [], 0
                step.append(one.shard)
                n_rows += n_live
            yield step

    def _candidates(self) -> list[Occupancy]:
        found = occupied(self.folder, read_tombstones(self.folder).rows)
        return [one for one in found if not one.is_empty]

    def _check_codecs(self) -> None:
        for tap, shape in self.folder.taps.items():
            for array in shape.arrays:
                path = self.folder.array_path(tap, array)
                if (path / "zarr.json").exists() and find_layout(self.folder, tap, array) is None:
                    raise InvalidInputError(
                        f"{path} has a codec that featstore reads and does not write. Copy the "
                        "store with `featstore copy`, which leaves removed rows out."
                    )

    def _begin(self, shards: Sequence[int]) -> Move | None:
        """Assign new rows to what is live in some shards; None: nothing is any more."""
        folder = self.folder
        with self._locked():
            candidates = {one.shard: one for one in self._candidates()}
            live = [one.rows[one.is_live] for s in shards if (one := candidates.get(s))]
            if not live:
                return None
            sources = np.concatenate(live)
            lines = Assigned(folder).lines(sources)
            table = pa.Table.from_pylist(lines, schema=ASSIGNMENT_SCHEMA)
            new = add_assignment(folder, table, moved_from=sources)
            grow_arrays(folder, list(folder.taps))
        return Move(rows=new, sources=sources)

    def _finish(self, move: Move) -> None:
        """Copy until the copies have every tap that the old rows have; then swap them."""
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            with Claims(self.store, self.folder.key, purpose=self.purpose) as claims:
                self._copy(move, claims)
            with self._locked():
                if self._settle(move, is_last=time.monotonic() > deadline):
                    return
            time.sleep(_POLL_S)

    def _copy(self, move: Move, claims: Claims) -> None:
        """Copy, shard by shard, the taps that all old rows of a shard have."""
        folder, committed = self.folder, committed_taps(self.folder)
        parts = folder.layout.split_by_shard(move.rows)
        lines = self._lines(parts)
        for done, (shard, rows) in enumerate(parts.items(), 1):
            sources = move.sources[np.searchsorted(move.rows, rows)]
            taps = _common(committed, self._shards(sources))
            lacking = tuple(sorted(taps - committed.get(shard, frozenset())))
            if lacking:
                job = CopyJob(
                    source=folder,
                    target=folder,
                    shard=shard,
                    lines=lines[shard],
                    sources=dict(zip(rows.tolist(), sources.tolist(), strict=True)),
                    taps=lacking,
                )
                self.report.written_bytes += copy_shard(job, claims)
                self.report.new_shards += 1
            self.progress(Progress(stage="compact", done=done, total=len(parts)))

    def _lines(self, shards: Collection[int]) -> dict[int, list[dict[str, Any]]]:
        """Give the assignment's lines of some shards, removed rows too."""
        assigned = Assigned(self.folder)
        found = {}
        for shard in shards:
            span = self.folder.layout.rows_of(shard)
            start, stop = np.searchsorted(assigned.rows, [span.start, span.stop]).tolist()
            found[shard] = assigned.lines(assigned.rows[start:stop])
        return found

    def _shards(self, rows: np.ndarray) -> list[int]:
        return np.unique(rows // self.folder.layout.shard_rows).tolist()

    def _settle(self, move: Move, *, is_last: bool) -> bool:
        """Put the copies in the place of the old rows; call it under the writer lock.

        Where another process is about to give the old rows another tap, it is waited for, and
        where this is the last time, the rows stay where they are.

        Returns:
            False: another process works at the old rows, or gave them a tap that is to be copied.
        """
        with claims_lock(self.store, self.folder.key, purpose=self.purpose):
            busy = live_claims(self.store, self.folder.key)
            if not busy.keys().isdisjoint(self._shards(move.sources)):
                return is_last and self._give_up(move.rows)
            return self._swap(move)

    def _swap(self, move: Move) -> bool:
        folder = self.folder
        tombstones = read_tombstones(folder)
        is_left = ~tombstones.are_removed(move.rows) & ~tombstones.are_removed(move.sources)
        rows, sources = move.rows[is_left], move.sources[is_left]
        if not len(rows):
            return True
        committed = committed_taps(folder)
        for shard, own in folder.layout.split_by_shard(rows).items():
            old = self._shards(sources[np.searchsorted(rows, own)])
            taps = _common(committed, old)
            if any(committed.get(each, frozenset()) != taps for each in old):
                return self._give_up(rows)
            if not taps <= committed.get(shard, frozenset()):
                return False
        others = np.setdiff1d(assigned_rows(folder), [*sources, *tombstones.rows])
        others = others[np.isin(others // folder.layout.shard_rows, self._shards(sources))]
        if any(self._is_stored(row) for row in others.tolist()):
            return self._give_up(rows)
        write_tombstones(
            folder,
            np.concatenate([sources, others]),
            np.concatenate([rows, np.full(len(others), NOWHERE, np.int64)]),
        )
        self.report.shards += len(self._shards(sources))
        self.report.rows += len(rows)
        counts = self.report.feature_sets
        counts[folder.key] = counts.get(folder.key, 0) + len(rows)
        return True

    def _is_stored(self, row: int) -> bool:
        rows = np.array([row])
        shard = self.folder.layout.shard_of(row)
        return any(stored_rows(self.folder, tap, shard, rows)[0] for tap in self.folder.taps)

    def _give_up(self, rows: np.ndarray) -> bool:
        """Remove the copies: part of the old rows gained a tap, or rows, that others lack."""
        write_tombstones(self.folder, rows)
        text = "Rows were left where they are: an extraction changed their shards meanwhile."
        self.progress(Progress(stage="compact", message=text))
        return True


def _common(committed: Mapping[int, frozenset[str]], shards: Iterable[int]) -> frozenset[str]:
    """Give the taps that all of some shards have."""
    return frozenset.intersection(*(committed.get(shard, frozenset()) for shard in shards))
