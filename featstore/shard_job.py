"""The unit of work: one shard, from encoded images to committed ledgers.

The serial path and a cluster worker run the same function, `run_jobs`. Decoding runs ahead in
threads, the forward pass in the caller's thread, writing in a thread of its own, batch by batch;
every queue between them is bounded, so memory grows neither with the number of images nor with
the rows of a shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from featstore.claims import Claim
from featstore.errors import BadImageError, StorageError
from featstore.ledger import SCHEMA, write_ledger
from featstore.ledgers import REMOVED
from featstore.shard_writer import fill_block, open_writer
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
    """One shard that this process has claimed, and the taps that it lacks."""

    folder: FeatureSetFolder
    shard: int
    lines: Sequence[Mapping[str, Any]]
    taps: tuple[str, ...]
    claim: Claim
    removed: frozenset[int] = frozenset()  # rows whose image is not looked at any more


@dataclass(kw_only=True, slots=True)
class ShardResult:
    """What became of one shard."""

    job: ShardJob
    rejected: dict[int, str] = field(default_factory=dict)  # row -> reason
    is_lost: bool = False  # the claim went to another process, and nothing was committed


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How a shard is worked at: nothing here decides which numbers are wanted."""

    batch_size: int  # rows a forward pass; a batch never crosses a shard
    n_threads: int  # that decode
    limit: float  # largest magnitude that the store's dtype holds


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    job: ShardJob
    lines: Sequence[Mapping[str, Any]]
    loads: Sequence[Future[Loaded]]
    is_last: bool  # of its shard


def run_jobs(
    jobs: Iterable[ShardJob],
    source: Source,
    *,
    pace: Pace,
    on_batch: Callable[[int], None],
) -> Generator[ShardResult, None, None]:
    """Do the jobs in order and yield each result once its ledgers are written.

    Args:
        jobs: Shards to do; the next is asked for when its first batch can be loaded, so that a
            shard is claimed no earlier than it is begun.
        source: Gives the numbers.
        pace: Batches, threads and the largest magnitude.
        on_batch: Called with the number of rows of each batch when it is computed.

    Raises:
        StorageError: The disk refused a write; the shards yielded so far are committed.
    """
    with ThreadPoolExecutor(pace.n_threads) as loaders, ThreadPoolExecutor(1) as pool:
        writing = _Writing(pool)
        flight: _Flight | None = None
        work: _ShardWork | None = None
        try:
            for batch in _batches(jobs, source, loaders, pace):
                work = work or _ShardWork(batch.job)
                following = work.start(batch, source)
                work = None if batch.is_last else work
                # The next batch is under way on the device before this one is fetched.
                if flight is not None:
                    yield from _land(flight, writing, pace.limit, on_batch)
                flight = following
            if flight is not None:
                yield from _land(flight, writing, pace.limit, on_batch)
            yield from writing.finished(all_of_them=True)
        finally:
            loaders.shutdown(wait=False, cancel_futures=True)
            # A shard that is whole is committed, not torn: it costs less than doing it again.
            writing.end()


class _Writing:
    """The thread that writes: two batches at most wait for it, and shards end in their order."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._batches: deque[Future[None]] = deque()
        self._shards: deque[tuple[_ShardWork, Future[ShardResult]]] = deque()
        self._open: set[_ShardWork] = set()

    def write(self, work: _ShardWork, rows: Sequence[int], blocks: Mapping[str, TapBlock]) -> None:
        """Have a batch written; waits where two are waiting already."""
        self._open.add(work)
        self._batches.append(self._pool.submit(work.write, rows, blocks))
        while len(self._batches) > 2:
            self._batches.popleft().result()

    def commit(self, work: _ShardWork) -> None:
        """Have a shard committed once its batches are written."""
        self._shards.append((work, self._pool.submit(work.commit)))

    def finished(self, *, all_of_them: bool = False) -> Iterator[ShardResult]:
        """Yield the shards that are committed, or wait for all."""
        # Batches first: where one could not be written, its shard is not to be asked for.
        while self._batches and (all_of_them or self._batches[0].done()):
            self._batches.popleft().result()
        while self._shards and (all_of_them or self._shards[0][1].done()):
            work, future = self._shards.popleft()
            result = future.result()
            self._open.discard(work)
            yield result

    def end(self) -> None:
        """Wait for what is being committed, and leave nothing of what is not."""
        self._pool.shutdown(wait=True)
        for work in self._open:
            work.discard()


def _land(
    flight: _Flight, writing: _Writing, limit: float, on_batch: Callable[[int], None]
) -> Iterator[ShardResult]:
    """Fetch a computed batch and hand it to the writer."""
    work = flight.work
    writing.write(work, flight.rows, work.judge(flight, limit))
    on_batch(len(flight.batch.lines))
    if flight.batch.is_last:
        writing.commit(work)
    yield from writing.finished()


def _batches(
    jobs: Iterable[ShardJob], source: Source, loaders: ThreadPoolExecutor, pace: Pace
) -> Iterator[_Batch]:
    """Load ahead of the forward pass, over the borders of shards, two batches and a bit."""
    batch_size = pace.batch_size
    ahead = 2 + pace.n_threads // batch_size
    queue: deque[_Batch] = deque()
    for job in jobs:
        for start in range(0, len(job.lines), batch_size):
            lines = job.lines[start : start + batch_size]
            loads = [loaders.submit(_load, source, job, line) for line in lines]
            is_last = start + batch_size >= len(job.lines)
            queue.append(_Batch(job=job, lines=lines, loads=loads, is_last=is_last))
            if len(queue) > ahead:
                yield queue.popleft()
    yield from queue


def _load(source: Source, job: ShardJob, line: Mapping[str, Any]) -> Loaded:
    if line["row"] in job.removed:
        raise BadImageError(REMOVED)
    return source.load(line)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    """One batch under way."""

    work: _ShardWork
    batch: _Batch
    rows: Sequence[int]
    fetch: Callable[[], dict[str, TapBlock]]


class _ShardWork:
    """Brings one shard to the disk, batch by batch, and commits it."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.rejected: dict[str, dict[int, str]] = {tap: {} for tap in job.taps}
        self.pixel_hashes: dict[int, str | None] = {}
        self.statistics: dict[tuple[str, int], tuple[float, float, float]] = {}
        self.crcs: dict[tuple[str, str, int], int] = {}
        arrays = {
            (tap, array): item
            for tap in job.taps
            for array, item in job.folder.taps[tap].arrays.items()
        }
        self._is_torn = False  # a batch was begun and not finished
        nonce = job.claim.nonce
        self._writers = {
            key: open_writer(job.folder, *key, job.shard, nonce=nonce) for key in arrays
        }
        # The rows of a pooled tap share one chunk, which is small.
        self._pooled = {
            tap: fill_block(job.folder, item)
            for (tap, array), item in arrays.items()
            if array == "pooled"
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

    def judge(self, flight: _Flight, limit: float) -> dict[str, TapBlock]:
        """Wait for what the source computed; a row that does not fit the dtype is rejected."""
        blocks = flight.fetch()
        for tap, block in blocks.items():
            for place, row in enumerate(flight.rows):
                if block.abs_max[place] <= limit:  # false for NaN too
                    self.statistics[tap, row] = (
                        float(block.abs_max[place]),
                        float(block.mean[place]),
                        float(block.std[place]),
                    )
                else:
                    self.rejected[tap][row] = _overflow(tap, block.abs_max[place], limit)
        return blocks

    def write(self, rows: Sequence[int], blocks: Mapping[str, TapBlock]) -> None:
        """Append the rows of one batch that were not rejected to the files of the shard."""
        self._is_torn = True
        slot_of = self.job.folder.layout.slot_of
        for tap, block in blocks.items():
            for array, values in block.arrays.items():
                for place, row in enumerate(rows):
                    if row in self.rejected[tap]:
                        continue
                    if array == "pooled":
                        self._pooled[tap][slot_of(row)] = values[place]
                    else:
                        writer = self._writers[tap, array]
                        self.crcs[tap, array, row] = writer.append(slot_of(row), values[place])
        self._is_torn = False

    def commit(self) -> ShardResult:
        """Finish every file, then write the ledgers: only they make the shard exist.

        Where the shard was lost to another process, that one's files stay as they are.
        """
        if self._is_torn:
            raise StorageError(f"Shard {self.job.shard} is not whole: a batch was not written.")
        shared: dict[str, int] = {}
        for tap, block in self._pooled.items():
            if len(self.rejected[tap]) < len(self.job.lines):
                shared[tap] = self._writers[tap, "pooled"].append(0, block)
        for writer in self._writers.values():
            writer.finish()
        with self.job.claim.committing() as is_own:
            if is_own:
                self._publish(shared)
        if not is_own:
            self.discard()
        rejected = {
            row: why
            for tap in self.job.taps
            for row, why in self.rejected[tap].items()
            if row not in self.job.removed
        }
        return ShardResult(job=self.job, rejected=rejected, is_lost=not is_own)

    def _publish(self, shared: Mapping[str, int]) -> None:
        """Name the files, then write the ledgers; `shared` gives the checksums of pooled taps."""
        folder = self.job.folder
        for (tap, array), writer in self._writers.items():
            writer.publish(folder.array_path(tap, array))
        for tap in self.job.taps:
            write_ledger(folder, tap, self.job.shard, self._ledger(tap, shared.get(tap)))

    def discard(self) -> None:
        """Delete what is not committed."""
        for writer in self._writers.values():
            writer.discard()

    def _ledger(self, tap: str, shared: int | None) -> pa.Table:
        lines = [self._ledger_line(tap, line, shared) for line in self.job.lines]
        return pa.Table.from_pylist(lines, schema=SCHEMA)

    def _ledger_line(self, tap: str, line: Mapping[str, Any], shared: int | None) -> dict[str, Any]:
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
        for array in self.job.folder.taps[tap].arrays:
            is_shared = array == "pooled"
            entry[f"{array}_crc32c"] = shared if is_shared else self.crcs[tap, array, row]
        entry["abs_max"], entry["mean"], entry["std"] = self.statistics[tap, row]
        return entry


def _overflow(tap: str, abs_max: float, limit: float) -> str:
    if not np.isfinite(abs_max):
        return f"{tap} gave a number that is not finite. Check the weights, or leave the image out."
    return (
        f"{tap} reached {abs_max:.6g}, more than the stored dtype's {limit:g}. "
        "Extract with --dtype bfloat16, which holds it."
    )
