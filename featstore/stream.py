"""Going through stored rows in batches, and reading some of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.errors import InvalidInputError, NotFoundError, invalid
from featstore.order import Cursor, Shuffle, digest_rows, mixing, order_rows, part_of
from featstore.prefetch import Prefetcher
from featstore.rows import RowReader, find_array
from featstore.select import as_rows, check_rows, select_rows
from featstore.store import FeatureSetFolder

if TYPE_CHECKING:
    import dask.array

Buffers = Mapping[str, np.ndarray]
PREFETCH_BYTES = 128 * 2**20
N_THREADS = 2
_BYTES_WORTH_THREADS = 4 * 2**20


class Batch:
    """Some rows of every tap asked for.

    The arrays belong to the stream: they hold their numbers until the next batch is taken, the
    stream is closed, or its iterator dropped. Copy what must live longer.
    """

    def __init__(self, rows: np.ndarray, arrays: dict[str, np.ndarray], cursor: Cursor) -> None:
        self.rows = rows
        self.arrays = arrays
        self.cursor = cursor  # resumes after this batch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.arrays[name]
        except KeyError:
            known = ", ".join(self.arrays)
            raise NotFoundError(f"The batch has no {name!r}, only {known}.") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """How a stream goes through the selected rows; see `open_stream`."""

    batch_size: int = 64
    shuffle: Shuffle = False
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    dtype: str | None = None
    drop_last: bool = False
    prefetch_bytes: int = PREFETCH_BYTES

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("seed", 0), ("epoch", 0), ("prefetch_bytes", 0)):
            if getattr(self, name) < least:
                raise invalid(name, getattr(self, name), f"{least} or more")
        if self.dtype not in (None, "float32"):
            raise invalid("dtype", self.dtype, 'None (as stored) or "float32"')


class Stream:
    """One epoch, or the rest of it. Each ``for`` over it starts at the same place.

    Memory is bounded by `prefetch_bytes`, and never below two batches.
    """

    def __init__(
        self,
        folder: FeatureSetFolder,
        names: Sequence[str],
        selected: np.ndarray,
        options: StreamOptions,
        *,
        cursor: Cursor | None = None,
        start: int = 0,
        out: Sequence[Buffers] | None = None,
    ) -> None:
        self._folder = folder
        self.names = tuple(names)
        self.options = options
        self._shard_rows = folder.layout.shard_rows
        ordered = order_rows(
            selected,
            shuffle=options.shuffle,
            shard_rows=self._shard_rows,
            seed=options.seed,
            epoch=options.epoch,
        )
        self.rows = part_of(
            ordered, rank=options.rank, world_size=options.world_size, shuffle=options.shuffle
        )
        self.start = Cursor(
            seed=options.seed,
            epoch=options.epoch,
            position=min(start * options.batch_size, len(self.rows)),
            batch_size=options.batch_size,
            digest=digest_rows(folder.key, selected),
            shuffle=options.shuffle,
            rank=options.rank,
            world_size=options.world_size,
        )
        if start and cursor is not None:
            raise InvalidInputError("Give `start` or `cursor`, not both.")
        n_batches = -(-len(self.rows) // options.batch_size)
        if not 0 <= start <= n_batches:
            raise invalid("start", start, f"0 to {n_batches}, the batches of the epoch")
        if cursor is not None:
            cursor.check_fit(self.start, len(self.rows))
            self.start = cursor
        self._out = None if out is None else [dict(buffers) for buffers in out]
        with _Readers(folder, self.names, options.dtype) as readers:
            if self._out is not None:
                _check_buffers(self._out, readers, options.batch_size)

    def __len__(self) -> int:
        """Count the batches."""
        left = len(self.rows) - self.start.position
        size = self.options.batch_size
        return left // size if self.options.drop_last else -(-left // size)

    @property
    def mixing(self) -> float:
        """How well the order mixes the shards, measured; 1 is as good as a true permutation."""
        return mixing(self.rows, shard_rows=self._shard_rows, batch_size=self.options.batch_size)

    def __iter__(self) -> BatchIterator:
        readers = _Readers(self._folder, self.names, self.options.dtype)
        size = self.options.batch_size
        slots = self._out
        if slots is None:
            n_slots = max(2, self.options.prefetch_bytes // max(1, readers.batch_bytes(size)))
            slots = [readers.empty(size) for _ in range(min(n_slots, len(self) + 1))]
        return BatchIterator(self, readers, slots)

    def piece(self, number: int) -> np.ndarray:
        """Give the rows of batch `number`, counted from the start."""
        first = self.start.position + number * self.options.batch_size
        return self.rows[first : first + self.options.batch_size]

    def after(self, number: int, n_rows: int) -> np.ndarray:
        """Give the rows from batch `number` on, at most so many."""
        first = self.start.position + number * self.options.batch_size
        return self.rows[first : first + n_rows]

    def cursor_after(self, number: int) -> Cursor:
        """Give the cursor that stands behind batch `number`, counted from the start."""
        position = self.start.position + (number + 1) * self.options.batch_size
        return replace(self.start, position=min(position, len(self.rows)))


class BatchIterator(Iterator[Batch]):
    """Gives the batches of a stream; `close` it, leave its ``with``, or just drop it."""

    def __init__(
        self, stream: Stream, readers: _Readers, slots: list[dict[str, np.ndarray]]
    ) -> None:
        self._stream = stream
        self._number = 0
        piece, after = stream.piece, stream.after

        def fill(number: int, slot: dict[str, np.ndarray], is_stopped: Any) -> None:
            # With those of a thread that is slower, so that neighbours stay together.
            readers.expect(after(max(0, number - N_THREADS + 1), readers.n_expected))
            readers.read_into(piece(number), slot, is_stopped)

        self._prefetcher = Prefetcher(
            len(stream), slots, fill, n_threads=N_THREADS, release=readers.close
        )

    def __next__(self) -> Batch:
        slot = self._prefetcher.next()
        if slot is None:
            raise StopIteration
        rows = self._stream.piece(self._number)
        cursor = self._stream.cursor_after(self._number)
        self._number += 1
        arrays = {name: slot[name][: len(rows)] for name in self._stream.names}
        return Batch(rows, arrays, cursor)

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; the arrays of the last batch are no longer valid."""
        self._prefetcher.close()


class _Readers:
    """The readers of several arrays."""

    def __init__(self, folder: FeatureSetFolder, names: Sequence[str], dtype: str | None) -> None:
        if not names or len(set(names)) != len(names):
            raise invalid("taps", list(names), "one or more different taps")
        is_float32, n = dtype == "float32", len(names)
        self.by_name = {
            name: RowReader(folder, name, as_float32=is_float32, n_readers=n) for name in names
        }

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for reader in self.by_name.values():
            reader.close()

    def empty(self, n_rows: int) -> dict[str, np.ndarray]:
        return {name: reader.empty(n_rows) for name, reader in self.by_name.items()}

    def batch_bytes(self, n_rows: int) -> int:
        return n_rows * sum(reader.empty(1).nbytes for reader in self.by_name.values())

    @property
    def n_expected(self) -> int:
        return max(reader.n_expected for reader in self.by_name.values())

    def expect(self, rows: np.ndarray) -> None:
        for reader in self.by_name.values():
            reader.expect(rows[: reader.n_expected])

    def read_into(self, rows: np.ndarray, slot: Buffers, is_stopped: Any = None) -> None:
        for name, reader in self.by_name.items():
            reader.read_into(rows, slot[name], is_stopped)


def _check_buffers(out: Sequence[Buffers], readers: _Readers, batch_size: int) -> None:
    if not out:
        raise invalid("out", out, "one or more mappings from tap to array")
    for buffers in out:
        for name, reader in readers.by_name.items():
            shape = (batch_size, *reader.source.item_shape)
            array = buffers.get(name)
            if (
                array is None
                or array.shape != shape
                or array.dtype != reader.dtype
                or not (array.flags.c_contiguous and array.flags.writeable)
            ):
                given = None if array is None else (array.shape, str(array.dtype))
                raise invalid(
                    f"out[{name!r}]", given, f"a writeable C-ordered {reader.dtype} of {shape}"
                )


def open_stream(
    folder: FeatureSetFolder,
    taps: Sequence[str],
    *,
    where: str | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
    cursor: Cursor | str | None = None,
    start: int = 0,
    out: Sequence[Buffers] | Buffers | None = None,
    **options: Any,
) -> Stream:
    """Go through rows in batches.

    Args:
        folder: Feature set.
        taps: What to read: "TAP" is the patch tokens or a pooled tap, "TAP/prefix" the prefix
            tokens.
        where: One SQL expression over the view `samples` that selects rows; see `select_rows`.
        rows: Row numbers instead, their order and duplicates respected.
        cursor: Where to go on (`Batch.cursor`, or its JSON), with the other options repeated.
        start: Batches of the epoch to pass over; instead of a cursor.
        out: Ring of buffers that the caller owns (pinned memory, say): mappings from tap to a
            (batch_size, ...) array. One mapping alone leaves nothing to read ahead into.
        options: Fields of `StreamOptions`: batch_size=64; shuffle=False (True is a permutation of
            all rows, "window" stays near a few shards at a time, see `Stream.mixing`); seed=0 and
            epoch=0, which decide the order; rank=0 and world_size=1, whose parts are disjoint and
            complete; dtype=None or "float32" (a bfloat16 store gives its bits as uint16
            otherwise); drop_last=False leaves a smaller last batch; prefetch_bytes bounds the
            ring.

    Raises:
        NotFoundError: A tap or row is not stored, or no row fulfils `where`.
        InvalidInputError: An option is wrong, or the cursor is of another stream.
    """
    if where is not None and rows is not None:
        raise InvalidInputError("Give `where` or `rows`, not both.")
    if isinstance(taps, str):
        raise invalid("taps", taps, "a list of taps", hint=f"Write [{taps!r}].")
    parsed = StreamOptions(**options)
    for name in taps:
        find_array(folder, name)
    if rows is None:
        selected = select_rows(folder, taps, where)
    else:
        selected = as_rows(rows)
        check_rows(folder, taps, selected)
    if isinstance(cursor, str):
        cursor = Cursor.from_json(cursor)
    ring = [out] if isinstance(out, Mapping) else out
    return Stream(folder, taps, selected, parsed, cursor=cursor, start=start, out=ring)


def read_rows(folder: FeatureSetFolder, tap: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Read rows of one array, in the given order, duplicates included.

    Args:
        folder: Feature set.
        tap: "TAP" or "TAP/prefix".
        rows: Row numbers.

    Returns:
        (len(rows), ...) in the stored dtype; the bits in uint16 for bfloat16.

    Raises:
        NotFoundError: The tap or a row is not stored.
        FormatError: Stored bytes are damaged.
    """
    wanted = as_rows(rows)
    reader = RowReader(folder, tap)
    try:
        reader.check(wanted)
        result = reader.empty(len(wanted))
        _read_in_threads(reader, wanted, result)
        return result
    finally:
        reader.close()


def _read_in_threads(reader: RowReader, rows: np.ndarray, out: np.ndarray) -> None:
    """Read rows in as many pieces as there are threads, where that many bytes are worth it."""
    n_pieces = N_THREADS if out.nbytes > _BYTES_WORTH_THREADS else 1
    cuts = [len(rows) * piece // n_pieces for piece in range(n_pieces + 1)]
    pieces = [slice(*pair) for pair in pairwise(cuts)]
    with ThreadPoolExecutor(n_pieces) as pool:
        others = [pool.submit(reader.read_into, rows[p], out[p]) for p in pieces[1:]]
        reader.read_into(rows[pieces[0]], out[pieces[0]])
        for other in others:
            other.result()


def to_numpy(folder: FeatureSetFolder, tap: str, where: str | None = None) -> np.ndarray:
    """Read a whole array, or the rows that fulfil `where`, rows ascending; see `select_rows`."""
    return read_rows(folder, tap, select_rows(folder, [tap], where))


def _read_block(path: str, tap: str, rows: np.ndarray) -> np.ndarray:
    return read_rows(FeatureSetFolder(Path(path)), tap, rows)


def to_dask(folder: FeatureSetFolder, tap: str) -> dask.array.Array:
    """Give a lazy array of the rows of `select_rows`, one block a shard; reads are checked."""
    import dask.array
    from dask.delayed import delayed

    lazy: Any = dask.array  # without types
    rows = select_rows(folder, [tap])
    reader = RowReader(folder, tap)
    blocks = []
    for members in folder.layout.split_by_shard(rows).values():
        shape = (len(members), *reader.source.item_shape)
        block = delayed(_read_block)(str(folder.path), tap, members)
        blocks.append(lazy.from_delayed(block, shape=shape, dtype=reader.dtype))
    return lazy.concatenate(blocks)
