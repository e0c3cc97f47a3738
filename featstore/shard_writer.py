"""Writing a shard file: chunks as they come, then the index, then its final name.

The bytes are those that zarr-python writes for the same numbers; see `featstore.shards` for the
format. A shard grows on the disk while its rows are computed, so that none of it waits in memory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from featstore.arrays import BFLOAT16_NAN, chunk_crc32c
from featstore.files import fsync_path, partial_path, remove_file, storage_errors
from featstore.remote.location import find_mirror
from featstore.remote.writing import move_shard
from featstore.shards import ABSENT, CRC_BYTES
from featstore.store import FeatureSetFolder


class ShardFileWriter:
    """One shard file under construction; without `publish` it never gets its name."""

    def __init__(self, path: Path, n_chunks: int, nonce: str) -> None:
        self._path = path
        self._partial = partial_path(path, nonce)
        self._index = np.full((n_chunks, 2), ABSENT, "<u8")
        self._end = 0
        self._file: BinaryIO | None = None

    def append(self, chunk: int, values: np.ndarray) -> int:
        """Write one chunk.

        Args:
            chunk: Its number in the shard; none is written twice.
            values: Its numbers, contiguous.

        Returns:
            Their crc32c.

        Raises:
            StorageError: The disk refused.
        """
        found = chunk_crc32c(values)
        with storage_errors(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("wb")
            little = values.astype(values.dtype.newbyteorder("<"), copy=False)
            self._file.write(little.reshape(-1).view(np.uint8).data)
            self._file.write(found.to_bytes(CRC_BYTES, "little"))
        self._index[chunk] = self._end, values.nbytes + CRC_BYTES
        self._end += values.nbytes + CRC_BYTES
        return found

    def finish(self) -> None:
        """Write the index and force the file to the disk; it still has no name.

        Raises:
            StorageError: The disk refused.
        """
        if self._file is None:
            return
        with storage_errors(self._path):
            index = self._index.reshape(-1).view(np.uint8)
            self._file.write(index.data)
            self._file.write(chunk_crc32c(index).to_bytes(CRC_BYTES, "little"))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def publish(self, root: Path) -> None:
        """Give the finished file its name.

        A shard without chunks has no file: one that lay there is removed. In the mirror of a store
        behind a URL the file moves to that store.

        Args:
            root: Folder of the array; the folders below it are forced to the disk too.

        Raises:
            StorageError: The disk refused.
        """
        with storage_errors(self._path):
            if self._file is None:
                remove_file(self._path)
                return
            mirror = find_mirror(self._path)
            if mirror is not None:
                move_shard(mirror, self._partial, self._path)
                return
            self._partial.replace(self._path)
            for parent in self._path.relative_to(root).parents:
                fsync_path(root / parent)

    def discard(self) -> None:
        """Delete what was written so far; after `publish` there is nothing to delete."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk, which refuses what is buffered
                self._file.close()
            self._partial.unlink(missing_ok=True)


def open_writer(
    folder: FeatureSetFolder, tap: str, array: str, shard: int, *, nonce: str | None = None
) -> ShardFileWriter:
    """Begin a shard of an array; a pooled one is a single chunk, others have a chunk a row.

    `nonce` is that of the claim on the shard; None: nobody else knows of the folder.
    """
    n_chunks = 1 if array == "pooled" else folder.layout.shard_rows
    nonce = nonce or secrets.token_hex(8)
    return ShardFileWriter(folder.shard_file(tap, array, shard), n_chunks, nonce)


def fill_block(folder: FeatureSetFolder, item_shape: Sequence[int]) -> np.ndarray:
    """Make a shard-sized block that is all holes."""
    value = BFLOAT16_NAN if folder.dtype == "bfloat16" else np.nan
    return np.full((folder.layout.shard_rows, *item_shape), value, dtype=folder.store_dtype)


def is_hole(folder: FeatureSetFolder, block: np.ndarray) -> bool:
    """Tell whether every number is the fill value: such a chunk is not written."""
    if folder.dtype == "bfloat16":
        return bool((block == BFLOAT16_NAN).all())
    return bool(np.isnan(block).all())


def write_shard(
    folder: FeatureSetFolder, tap: str, array: str, shard: int, block: np.ndarray
) -> None:
    """Write one whole shard of one array, then force it to the disk.

    Args:
        folder: Feature set.
        tap: Tap.
        array: "patch", "prefix" or "pooled".
        shard: Number of the shard.
        block: (shard_rows, ...) in the store's dtype; a row of fill values becomes a hole.
    """
    writer = open_writer(folder, tap, array, shard)
    chunks = [block] if array == "pooled" else block
    for number, chunk in enumerate(chunks):
        if not is_hole(folder, chunk):
            writer.append(number, np.ascontiguousarray(chunk))
    writer.finish()
    writer.publish(folder.array_path(tap, array))
