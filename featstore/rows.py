"""Rows of named arrays, each checked against the ledger, copied into the caller's buffers.

A name is "TAP" (the patch tokens of a dense tap, or a pooled tap) or "TAP/prefix".
"""

from __future__ import annotations

import contextlib
import mmap
import resource
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from featstore.arrays import open_array
from featstore.codecs import decode
from featstore.errors import FormatError, NotFoundError, not_found
from featstore.ledgers import NO_CRC, LedgerShard, check_stored, ledgers_of, listed, not_there
from featstore.remote.chunks import RemoteChunks, Wanted, WrongChunkError, open_remote
from featstore.shards import (
    REPAIR,
    Recent,
    ShardFile,
    crc32c,
    find_layout,
    max_open_shards,
    open_shard,
)
from featstore.store import FeatureSetFolder

MAX_POOLED_BYTES = 32 * 2**20
"""Kept of a pooled tap's chunks by one reader, so that a chunk is not checked again a row."""
_REMOTE_BYTES = 64 * 2**20  # asked of an object store at once


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayName:
    """One array of a feature set, as the caller names it."""

    name: str
    tap: str
    array: str  # "patch", "prefix" or "pooled"
    item_shape: tuple[int, ...]


def find_array(folder: FeatureSetFolder, name: str) -> ArrayName:
    """Find the array that `name` means.

    Raises:
        NotFoundError: The feature set has no such tap, or the tap no prefix tokens.
    """
    taps = folder.taps
    tap, _, part = name.partition("/")
    known = [*taps, *(f"{key}/prefix" for key, shape in taps.items() if "prefix" in shape.arrays)]
    if name not in known:
        raise not_found(f"tap of feature set {folder.key}", name, known)
    arrays = taps[tap].arrays
    array = part or ("pooled" if "pooled" in arrays else "patch")
    return ArrayName(name=name, tap=tap, array=array, item_shape=arrays[array])


class RowReader:
    """Reads rows of one array; its methods may be called from threads.

    Use it in a ``with`` or call `close`; what is open also ends with the object. A reader that
    works beside others is told how many they are (`n_readers`), since they share what may be open.
    """

    def __init__(
        self,
        folder: FeatureSetFolder,
        name: str,
        *,
        as_float32: bool = False,
        n_readers: int = 1,
    ) -> None:
        self.source = find_array(folder, name)
        self.is_decoded = as_float32 and folder.dtype != "float32"
        self.dtype = np.dtype(np.float32) if as_float32 else folder.store_dtype
        self._folder = folder
        self._ledgers = ledgers_of(folder)
        self._tombstones = self._ledgers.tombstones()
        self._layout = find_layout(folder, self.source.tap, self.source.array)
        self._remote: RemoteChunks | None = None
        if self._layout is not None:
            file_of = partial(folder.shard_file, self.source.tap, self.source.array)
            self._remote = open_remote(folder.path, self._layout, file_of, n_readers=n_readers)
        self._zarr_lock = threading.Lock()
        self._zarr_array: Any = None
        self._is_cold = True  # a first look costs little where everything is in memory
        n_items = int(np.prod(self.source.item_shape))
        self._row_bytes = n_items * folder.store_dtype.itemsize
        chunk_bytes = self._row_bytes * folder.layout.shard_rows
        self._files: Recent[int, tuple[ShardFile, LedgerShard]] = Recent(
            max(1, max_open_shards() // n_readers)
        )
        self._blocks: Recent[int, tuple[np.ndarray, LedgerShard]] = Recent(
            max(1, MAX_POOLED_BYTES // chunk_bytes)
        )

    @property
    def is_direct(self) -> bool:
        """Whether rows come straight out of the shard files, not through zarr."""
        return self._layout is not None

    def close(self) -> None:
        """Close the files; rows being read by other threads are finished."""
        self._files.clear()
        self._blocks.clear()

    def empty(self, n_rows: int) -> np.ndarray:
        """Make a buffer for `n_rows` rows that starts on a page.

        Copying costs four times as much where the target lies a few bytes behind the source
        within a page, as it does with NumPy's own memory and chunks near a shard's start.
        """
        shape = (n_rows, *self.source.item_shape)
        n_bytes = int(np.prod(shape)) * self.dtype.itemsize
        memory = np.empty(n_bytes + mmap.PAGESIZE, np.uint8)
        start = -memory.ctypes.data % mmap.PAGESIZE
        return memory[start : start + n_bytes].view(self.dtype).reshape(shape)

    @property
    def n_expected(self) -> int:
        """How many rows ahead it helps to know; none where shards lie on this machine."""
        return 0 if self._remote is None else self._remote.n_expected

    def expect(self, rows: np.ndarray) -> None:
        """Name the rows that are read next, so that they may come with those before them."""
        if self._remote is not None and self.source.array != "pooled":
            shards, slots = np.divmod(rows, self._folder.layout.shard_rows)
            self._remote.expect(zip(shards.tolist(), slots.tolist(), strict=True))

    def check(self, rows: np.ndarray) -> None:
        """Refuse rows that the ledger does not have, or that were removed.

        Raises:
            NotFoundError: The message names them.
        """
        check_stored(self._folder, self.source.tap, rows)

    def read_into(
        self,
        rows: np.ndarray,
        out: np.ndarray,
        is_stopped: Callable[[], bool] | None = None,
    ) -> None:
        """Copy rows into the first places of `out`, in their order; call `check` on them first.

        Args:
            rows: int64.
            out: (at least len(rows), ...) contiguous, of `dtype`.
            is_stopped: Asked between rows; the rest is left out once it says so.

        Raises:
            FormatError: Stored bytes are damaged or not those that the ledger names.
        """
        shards, slots = np.divmod(self._tombstones.current(rows), self._folder.layout.shard_rows)
        places = list(zip(shards.tolist(), slots.tolist(), strict=True))
        if self._remote is None:
            self._read_places(places, out, is_stopped)
            return
        # Pieces, so that many rows do not come into memory at once.
        is_pooled = self.source.array == "pooled"
        step = self._blocks.limit if is_pooled else max(1, _REMOTE_BYTES // self._row_bytes)
        for start in range(0, len(places), step):
            piece, target = places[start : start + step], out[start : start + step]
            if is_stopped is not None and is_stopped():
                return
            if is_pooled:
                self._load_blocks(self._remote, {shard for shard, _ in piece})
                self._read_places(piece, target, is_stopped)
            else:
                self._read_remote(self._remote, piece, target)

    def _read_places(
        self,
        places: Sequence[tuple[int, int]],
        out: np.ndarray,
        is_stopped: Callable[[], bool] | None,
    ) -> None:
        read_row = self._row_function()
        flat = out if self.is_decoded else out.view(np.uint8).reshape(len(out), self._row_bytes)
        blocks = _blocks_from_disk()
        self._start_disk(places)
        scratch = np.empty(self._row_bytes, np.uint8)
        stored = scratch.view(self._folder.store_dtype).reshape(self.source.item_shape)
        for place, (shard, slot) in enumerate(places):
            if is_stopped is not None and is_stopped():
                return
            if self.is_decoded:
                self._read_wherever(read_row, shard, slot, scratch)
                decode(stored, self._folder.dtype, out=flat[place])
            else:
                self._read_wherever(read_row, shard, slot, flat[place])
        self._is_cold = _blocks_from_disk() > blocks

    def _read_remote(
        self, remote: RemoteChunks, places: Sequence[tuple[int, int]], out: np.ndarray
    ) -> None:
        """Read chunks of a row each from an object store, all of them at once."""
        stored = out if not self.is_decoded else np.empty(out.shape, self._folder.store_dtype)
        flat = stored.view(np.uint8).reshape(len(stored), self._row_bytes)
        ledgers = {shard: self._ledgers.shard(self.source.tap, shard) for shard, _ in places}
        wanted = [
            Wanted(shard, slot, self._committed(shard, slot, ledgers[shard]), flat[place])
            for place, (shard, slot) in enumerate(places)
        ]
        try:
            remote.read(wanted)
        except WrongChunkError as error:
            raise self._damaged(error.shard, [error.chunk], str(error)) from error
        if self.is_decoded:
            for place in range(len(places)):
                decode(stored[place], self._folder.dtype, out=out[place])

    def _start_disk(self, places: Sequence[tuple[int, int]]) -> None:
        """Ask for all chunks at once where the rows before these came from the disk."""
        if self._is_cold and self._layout is not None and self.source.array != "pooled":
            # What is damaged is told by the read, row by row.
            with contextlib.suppress(FormatError, NotFoundError):
                for shard, slot in places:
                    self._files.get(shard, self._open)[0].advise(slot)

    def _read_wherever(
        self,
        read_row: Callable[[int, int, np.ndarray], None],
        shard: int,
        slot: int,
        out: np.ndarray,
    ) -> None:
        """Read a row, also one that was moved, and whose shard was freed, a moment ago."""
        try:
            read_row(shard, slot, out)
        except (FormatError, NotFoundError) as error:
            row = self._folder.layout.rows_of(shard)[slot]
            self._tombstones = self._ledgers.tombstones()
            lies_at = int(self._tombstones.current(np.array([row]))[0])
            if lies_at in self._ledgers.removed_rows():
                raise NotFoundError(
                    f"Row {row} of tap {self.source.tap} in feature set {self._folder.key} was "
                    "removed while it was about to be read, and its space is freed. Begin again "
                    "with the rows that are left."
                ) from error
            if lies_at == row:
                raise
            read_row(*divmod(lies_at, self._folder.layout.shard_rows), out)

    def _row_function(self) -> Callable[[int, int, np.ndarray], None]:
        if self.source.array == "pooled":
            return self._read_pooled
        return self._read_row if self._layout is not None else self._read_zarr_row

    def _open(self, shard: int) -> tuple[ShardFile, LedgerShard]:
        assert self._layout is not None
        source = self.source
        path = self._folder.shard_file(source.tap, source.array, shard)
        return open_shard(path, self._layout), self._ledgers.shard(source.tap, shard)

    def _read_row(self, shard: int, slot: int, out: np.ndarray) -> None:
        try:
            file, ledger = self._files.get(shard, self._open)
            committed = self._committed(shard, slot, ledger)
            found = file.copy_chunk(slot, out, is_in_memory=not self._is_cold)
        except FormatError as error:
            raise self._damaged(shard, [slot], str(error)) from error
        if found != committed:
            raise self._damaged(shard, [slot], "It holds other bytes than were committed.")

    def _read_zarr_row(self, shard: int, slot: int, out: np.ndarray) -> None:
        row = self._folder.layout.rows_of(shard)[slot]
        ledger = self._ledgers.shard(self.source.tap, shard)
        committed = self._committed(shard, slot, ledger)
        values = self._through_zarr(shard, row, row + 1)
        out[:] = values.reshape(-1).view(np.uint8)
        if crc32c(out) != committed:
            raise self._damaged(shard, [slot], "It holds other bytes than were committed.")

    def _read_pooled(self, shard: int, slot: int, out: np.ndarray) -> None:
        block, ledger = self._blocks.get(shard, self._pooled_block)
        self._committed(shard, slot, ledger)
        out[:] = block[slot]

    def _pooled_block(self, shard: int) -> tuple[np.ndarray, LedgerShard]:
        """Read the chunk that the rows of a shard share: uint8 (shard_rows, row_bytes)."""
        if self._remote is not None:
            self._load_blocks(self._remote, {shard})
            return self._blocks.get(shard, self._pooled_block)
        layout, ledger = self._folder.layout, self._ledgers.shard(self.source.tap, shard)
        slots = [slot for slot, reason in enumerate(ledger.reasons) if reason is None]
        if self._layout is None:
            rows = layout.rows_of(shard)
            values = self._through_zarr(shard, rows.start, rows.stop)
            block = values.reshape(-1).view(np.uint8)
            found = crc32c(block)
        else:
            block = np.empty(self._layout.chunk_bytes, np.uint8)
            try:
                file, _ = self._files.get(shard, self._open)
                found = file.copy_chunk(0, block)
            except FormatError as error:
                raise self._damaged(shard, slots, str(error)) from error
        if (ledger.crcs["pooled"][slots] != found).any():
            raise self._damaged(shard, slots, "It holds other bytes than were committed.")
        return block.reshape(layout.shard_rows, -1), ledger

    def _load_blocks(self, remote: RemoteChunks, shards: set[int]) -> None:
        """Read the chunks that the rows of some shards share from an object store, all at once."""
        wanted = []
        for shard in shards:
            if shard not in self._blocks:
                ledger = self._ledgers.shard(self.source.tap, shard)
                crcs = set(ledger.crcs["pooled"][ledger.is_stored].tolist())
                if len(crcs) != 1:
                    raise self._damaged(shard, [0], "Its ledger names several checksums, or none.")
                block = np.empty(self._row_bytes * self._folder.layout.shard_rows, np.uint8)
                wanted.append(Wanted(shard, 0, crcs.pop(), block))
        try:
            remote.read(wanted)
        except WrongChunkError as error:
            raise self._damaged(error.shard, [0], str(error)) from error
        for one in wanted:
            rows = one.out.reshape(self._folder.layout.shard_rows, -1)
            self._blocks.put(one.shard, (rows, self._ledgers.shard(self.source.tap, one.shard)))

    def _committed(self, shard: int, slot: int, ledger: LedgerShard) -> int:
        """Give the checksum that the ledger has for a row; that row must be stored."""
        reason = ledger.reasons[slot]
        found = int(ledger.crcs[self.source.array][slot])
        if reason is not None:
            row = self._folder.layout.rows_of(shard)[slot]
            raise not_there(self._folder, self.source.tap, {row: reason})
        if found == NO_CRC:
            path = self._folder.ledger_path(self.source.tap, shard)
            raise FormatError(f"{path} names no checksum for a stored row. {REPAIR}")
        return found

    def _through_zarr(self, shard: int, start: int, stop: int) -> np.ndarray:
        try:
            with self._zarr_lock:
                if self._zarr_array is None:
                    self._zarr_array = open_array(self._folder, self.source.tap, self.source.array)
            values = self._zarr_array[start:stop]
        # Whatever a codec raises on bytes that it cannot decode.
        except Exception as error:
            slots = [row - self._folder.layout.rows_of(shard).start for row in range(start, stop)]
            raise self._damaged(shard, slots, f"Zarr could not read it ({error}).") from error
        if values.shape != (stop - start, *self.source.item_shape):
            raise self._damaged(shard, [0], "The array is shorter than its ledger.")
        return np.ascontiguousarray(values, dtype=self._folder.store_dtype)

    def _damaged(self, shard: int, slots: Sequence[int], problem: str) -> FormatError:
        folder, source = self._folder, self.source
        first = folder.layout.rows_of(shard).start
        return FormatError(
            f"{folder.shard_file(source.tap, source.array, shard)} is damaged at "
            f"row {listed([first + slot for slot in slots])} of tap {source.tap} in feature set "
            f"{folder.key}. {problem.removesuffix(REPAIR).rstrip()} {REPAIR}"
        )


def _blocks_from_disk() -> int:
    """Count the blocks that this thread had to get from the disk, asked for in advance or not."""
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(who).ru_inblock
