"""The unit of work: one shard, from encoded images to committed ledgers.

The serial path and a cluster worker run the same function, `run_jobs`. Decoding runs ahead in
threads, the forward pass in the caller's thread, writing in a thread of its own; every queue
between them is bounded, so memory does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from featstore.arrays import chunk_crc32c, fill_block, write_shard
from featstore.errors import BadImageError
from featstore.ledger import SCHEMA, write_ledger
from featstore.store import FeatureSetFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """One decoded row: what the source computes from (an image, or imported features)."""

    value: Any
    pixel_hash: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TapBlock:
    """What one batch gives for one tap, in the store's dtype, and what was seen on the way."""

    arrays: Mapping[str, np.ndarray]  # "patch", "prefix", "pooled" -> (batch, ...)
    abs_max: np.ndarray  # (batch,) float32; NaN or inf where a number was not finite
    mean: np.ndarray
    std: np.ndarray


class Source(Protocol):
    """Where rows come from: a backbone that runs on images, or features that are imported."""

    def load(self, line: Mapping[str, Any]) -> Loaded:
        """Load one line of an assignment; called from threads. BadImageError rejects the row."""
        ...

    def submit(
        self, values: Sequence[Any], taps: Sequence[str]
    ) -> Callable[[], dict[str, TapBlock]]:
        """Start computing one batch and give the call that waits for its numbers."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardJob:
    """One shard and the taps that it lacks."""

    folder: FeatureSetFolder
    shard: int
    lines: Sequence[Mapping[str, Any]]
    taps: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class ShardResult:
    """What became of one shard."""

    job: ShardJob
    rejected: dict[int, str] = field(default_factory=dict)  # row -> reason


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    job: ShardJob
    lines: Sequence[Mapping[str, Any]]
    loads: Sequence[Future[Loaded]]
    is_last: bool  # of its shard


def run_jobs(
    jobs: Sequence[ShardJob],
    source: Source,
    *,
    batch_size: int,
    n_threads: int,
    limit: float,
    on_batch: Callable[[int], None],
) -> Iterator[ShardResult]:
    """Do the jobs in order and yield each result once its ledgers are written.

    Args:
        jobs: Shards to do.
        source: Gives the numbers.
        batch_size: Rows a forward pass. A batch never crosses a shard.
        n_threads: Threads that decode.
        limit: Largest magnitude that the store's dtype holds.
        on_batch: Called with the number of rows of each batch when it is computed.

    Raises:
        StorageError: The disk refused a write; the shards yielded so far are committed.
    """
    with ThreadPoolExecutor(n_threads) as loaders, ThreadPoolExecutor(1) as writer:
        pending: list[Future[ShardResult]] = []
        flight: _Flight | None = None
        work: _ShardWork | None = None
        try:
            for batch in _batches(jobs, source, loaders, batch_size, n_threads):
                work = work or _ShardWork(batch.job)
                following = work.start(batch, source)
                work = None if batch.is_last else work
                # The next batch is under way on the device before this one is fetched.
                if flight is not None:
                    yield from _land(flight, pending, writer, limit, on_batch)
                flight = following
            if flight is not None:
                yield from _land(flight, pending, writer, limit, on_batch)
            for future in pending:
                yield future.result()
        finally:
            loaders.shutdown(wait=False, cancel_futures=True)
            # What is being written is committed, not torn: it costs less than doing it again.
            for future in pending:
                with contextlib.suppress(Exception):
                    future.result()


def _land(
    flight: _Flight,
    pending: list[Future[ShardResult]],
    writer: ThreadPoolExecutor,
    limit: float,
    on_batch: Callable[[int], None],
) -> Iterator[ShardResult]:
    """Fetch a computed batch; at the end of a shard hand it to the writer."""
    flight.work.finish(flight, limit)
    on_batch(len(flight.batch.lines))
    if flight.batch.is_last:
        # Two shards in memory at most: one that is computed and one that is written.
        while pending:
            yield pending.pop(0).result()
        pending.append(writer.submit(flight.work.commit))


def _batches(
    jobs: Sequence[ShardJob],
    source: Source,
    loaders: ThreadPoolExecutor,
    batch_size: int,
    n_threads: int,
) -> Iterator[_Batch]:
    """Load ahead of the forward pass, over the borders of shards, two batches and a bit."""
    ahead = 2 + n_threads // batch_size
    queue: deque[_Batch] = deque()
    for job in jobs:
        for start in range(0, len(job.lines), batch_size):
            lines = job.lines[start : start + batch_size]
            loads = [loaders.submit(source.load, line) for line in lines]
            is_last = start + batch_size >= len(job.lines)
            queue.append(_Batch(job=job, lines=lines, loads=loads, is_last=is_last))
            if len(queue) > ahead:
                yield queue.popleft()
    yield from queue


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    """One batch under way."""

    work: _ShardWork
    batch: _Batch
    rows: Sequence[int]
    fetch: Callable[[], dict[str, TapBlock]]


class _ShardWork:
    """Collects one shard in memory and commits it."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.rejected: dict[str, dict[int, str]] = {tap: {} for tap in job.taps}
        self.pixel_hashes: dict[int, str | None] = {}
        self.statistics: dict[tuple[str, int], tuple[float, float, float]] = {}
        shapes = job.folder.taps
        self.blocks = {
            (tap, array): fill_block(job.folder, item)
            for tap in job.taps
            for array, item in shapes[tap].arrays.items()
        }

    def start(self, batch: _Batch, source: Source) -> _Flight:
        """Send one batch to the source, without those of its rows that do not load."""
        rows: list[int] = []
        values: list[Any] = []
        for line, load in zip(batch.lines, batch.loads, strict=True):
            try:
                loaded = load.result()
            except (BadImageError, OSError) as error:
                for tap in self.job.taps:
                    self.rejected[tap][line["row"]] = str(error)
                continue
            self.pixel_hashes[line["row"]] = loaded.pixel_hash
            rows.append(line["row"])
            values.append(loaded.value)
        fetch = source.submit(values, self.job.taps) if rows else dict
        return _Flight(work=self, batch=batch, rows=rows, fetch=fetch)

    def finish(self, flight: _Flight, limit: float) -> None:
        """Put what the source computed into the shard."""
        for tap, block in flight.fetch().items():
            self._place(tap, flight.rows, block, limit)

    def _place(self, tap: str, rows: Sequence[int], block: TapBlock, limit: float) -> None:
        slots = np.array([self.job.folder.layout.slot_of(row) for row in rows])
        is_good = block.abs_max <= limit  # false for NaN too
        for array, values in block.arrays.items():
            if is_good.all():
                self.blocks[tap, array][slots] = values
            else:
                self.blocks[tap, array][slots[is_good]] = values[is_good]
        for place, row in enumerate(rows):
            if is_good[place]:
                self.statistics[tap, row] = (
                    float(block.abs_max[place]),
                    float(block.mean[place]),
                    float(block.std[place]),
                )
            else:
                self.rejected[tap][row] = _overflow(tap, block.abs_max[place], limit)

    def commit(self) -> ShardResult:
        """Write every array, then the ledgers: only they make the shard exist."""
        folder, shard = self.job.folder, self.job.shard
        for (tap, array), block in self.blocks.items():
            write_shard(folder, tap, array, shard, block)
        for tap in self.job.taps:
            write_ledger(folder, tap, shard, self._ledger(tap))
        rejected = {row: why for tap in self.job.taps for row, why in self.rejected[tap].items()}
        self.blocks.clear()
        return ShardResult(job=self.job, rejected=rejected)

    def _ledger(self, tap: str) -> pa.Table:
        arrays = self.job.folder.taps[tap].arrays
        shared = chunk_crc32c(self.blocks[tap, "pooled"]) if "pooled" in arrays else None
        return pa.Table.from_pylist(
            [self._ledger_line(tap, line, arrays, shared) for line in self.job.lines],
            schema=SCHEMA,
        )

    def _ledger_line(
        self, tap: str, line: Mapping[str, Any], arrays: Mapping[str, Any], shared: int | None
    ) -> dict[str, Any]:
        row = line["row"]
        reason = self.rejected[tap].get(row)
        entry = {
            "row": row,
            "image_key": line["image_key"],
            "crop": line["crop"],
            "view": line["view"],
            "status": "ok" if reason is None else "rejected",
            "reason": reason,
            "pixel_hash": self.pixel_hashes.get(row),
        }
        if reason is not None:
            return entry
        slot = self.job.folder.layout.slot_of(row)
        for array in arrays:
            block = self.blocks[tap, array]
            entry[f"{array}_crc32c"] = shared if array == "pooled" else chunk_crc32c(block[slot])
        entry["abs_max"], entry["mean"], entry["std"] = self.statistics[tap, row]
        return entry


def _overflow(tap: str, abs_max: float, limit: float) -> str:
    if not np.isfinite(abs_max):
        return f"{tap} gave a number that is not finite. Check the weights, or leave the image out."
    return (
        f"{tap} reached {abs_max:.6g}, more than the stored dtype's {limit:g}. "
        "Extract with --dtype bfloat16, which holds it."
    )
