"""The bytes of a shard file: its index, its chunks, their checksums.

A shard is a Zarr v3 `sharding_indexed` chunk: inner chunks (little-endian numbers, then their
crc32c in 4 bytes), in any order, then the index: offset and size of each inner chunk as uint64,
little-endian, then the index's own crc32c. An absent chunk has all ones for both.

One `preadv` takes a chunk and its checksum from the page cache to where the caller wants them. A
memory map copies a third faster once its pages have been touched, and slower before. So a file
that a second reader asks for is mapped and stays so, and the map is used where nothing comes from
the disk: a disk that fails under a map, or a file that is cut off, would end the process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import google_crc32c
import numpy as np

from featstore.errors import FeatstoreError, FormatError, StorageError
from featstore.store import FeatureSetFolder

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

ABSENT = 2**64 - 1
CRC_BYTES = 4
_READ_AHEAD = 128 * 1024
# Shards of 256 rows: a million rows of a tap are read in any order from open files.
_MAX_OPEN = 4096
REPAIR = "Run `featstore verify --repair`."
_NO_HANDLE: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_PLAIN = [("bytes", {"endian": "little"}), ("crc32c", {})]
_DATA_TYPES = {"float16": "float16", "float32": "float32", "bfloat16": "uint16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardLayout:
    """What the shards of one array look like; `find_layout` gives it where it is understood."""

    n_chunks: int  # a shard
    chunk_bytes: int  # without the checksum


def find_layout(folder: FeatureSetFolder, tap: str, array: str) -> ShardLayout | None:
    """Parse an array's metadata; None where anything in it is not what this module reads.

    Raises:
        FormatError: The metadata is missing, does not parse, or is of another shape.
        StorageError: The system refused to open it.
    """
    path = folder.array_path(tap, array) / "zarr.json"
    shard_rows, item = folder.layout.shard_rows, folder.taps[tap].arrays[array]
    try:
        metadata = json.loads(path.read_text())
        shape, data_type = metadata["shape"], metadata["data_type"]
        is_ours = list(shape[1:]) == list(item) and data_type == _DATA_TYPES[folder.dtype]
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path} (tap {tap} of feature set {folder.key}) is damaged. {REPAIR}"
        ) from error
    if not is_ours:
        raise FormatError(
            f"{path} describes {data_type} of shape {shape}, and feature set {folder.key} has "
            f"{folder.dtype} of shape {list(item)} a row for tap {tap}. {REPAIR}"
        )
    chunk_rows = _chunk_rows(metadata, shard_rows, item)
    is_fitting = chunk_rows == (shard_rows if array == "pooled" else 1)
    if chunk_rows is None or not is_fitting:
        return None
    n_bytes = chunk_rows * int(np.prod(item)) * folder.store_dtype.itemsize
    return ShardLayout(n_chunks=shard_rows // chunk_rows, chunk_bytes=n_bytes)


def _chunk_rows(metadata: Any, shard_rows: int, item: tuple[int, ...]) -> int | None:
    """Give the rows of an inner chunk, or None where the metadata asks for more than we do."""
    try:
        (sharding,) = metadata["codecs"]
        grid, keys = metadata["chunk_grid"], metadata["chunk_key_encoding"]
        inside = sharding["configuration"]
        chunk_rows = int(inside["chunk_shape"][0])
        is_known = (
            metadata["zarr_format"] == 3
            and metadata["node_type"] == "array"
            and not metadata.get("storage_transformers")
            and grid["name"] == "regular"
            and list(grid["configuration"]["chunk_shape"]) == [shard_rows, *item]
            and keys["name"] == "default"
            and keys.get("configuration", {}).get("separator", "/") == "/"
            and sharding["name"] == "sharding_indexed"
            and list(inside["chunk_shape"][1:]) == list(item)
            and _codecs(inside["codecs"]) == _PLAIN
            and _codecs(inside["index_codecs"]) == _PLAIN
            and inside.get("index_location", "end") == "end"
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return chunk_rows if is_known else None


def _codecs(codecs: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        (codec, {}) if isinstance(codec, str) else (codec["name"], codec.get("configuration") or {})
        for codec in codecs
    ]


def crc32c(flat: np.ndarray) -> int:
    """Checksum a contiguous uint8 array."""
    return int(google_crc32c.value(flat))


def _unreadable(path: Path, error: OSError) -> FeatstoreError:
    """Build the error for a file that does not open; only an absent one is damage to repair."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
        return FormatError(f"{path} cannot be read ({error.strerror}). {REPAIR}")
    return StorageError(
        f"{path} cannot be opened ({error.strerror}). It need not be damaged: check its "
        "permission and the limit of open files (`ulimit -n`), then run this again."
    )


def read_shard_index(path: Path, n_chunks: int) -> np.ndarray:
    """Read the index of a shard file: uint64 (n_chunks, 2), offset and bytes of each chunk.

    Raises:
        FormatError: The file is missing or too short, or its index is damaged.
        StorageError: The system refused to open it.
    """
    n_bytes = 16 * n_chunks + CRC_BYTES
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - n_bytes))
            tail = np.frombuffer(file.read(n_bytes), np.uint8)
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse_shard_index(path, tail, n_chunks=n_chunks, size=size)


def parse_shard_index(path: Path, tail: np.ndarray, *, n_chunks: int, size: int) -> np.ndarray:
    """Check and parse the last bytes of a shard file of `size` bytes; see `read_shard_index`."""
    n_bytes = 16 * n_chunks + CRC_BYTES
    if size < n_bytes or len(tail) != n_bytes:
        raise FormatError(f"Shard file {path} is truncated: {size} bytes. {REPAIR}")
    if crc32c(tail[:-CRC_BYTES]) != int.from_bytes(tail[-CRC_BYTES:].tobytes(), "little"):
        raise FormatError(f"The index of shard file {path} is damaged or truncated. {REPAIR}")
    index = np.frombuffer(tail[:-CRC_BYTES].tobytes(), "<u8").reshape(n_chunks, 2)
    is_there = ~(index == ABSENT).all(axis=1)
    offsets, sizes = index[is_there, 0], index[is_there, 1]
    end = np.uint64(size - n_bytes)
    # Written so that no sum can pass 2**64.
    if (offsets > end).any() or (sizes > end - np.minimum(offsets, end)).any():
        raise FormatError(f"The index of shard file {path} points outside the file. {REPAIR}")
    return index


class ShardFile:
    """One open shard file, its index checked. It is closed when nobody refers to it any more."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path = path
        self.layout = layout
        self.n_readers = 0
        self._handle = -1
        self._map: np.ndarray | None = None
        n_bytes = 16 * layout.n_chunks + CRC_BYTES
        try:
            self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            status = os.fstat(self._handle)
            tail = os.pread(self._handle, n_bytes, max(0, status.st_size - n_bytes))
        except OSError as error:
            raise _unreadable(path, error) from error
        self._size, self._identity = status.st_size, _identity(status)
        self._index = parse_shard_index(
            path, np.frombuffer(tail, np.uint8), n_chunks=layout.n_chunks, size=self._size
        )

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    @property
    def is_mapped(self) -> bool:
        """Whether chunks that are in memory are copied from a map."""
        return self._map is not None

    def is_current(self) -> bool:
        """Tell whether the file at `path` is still this one, unchanged."""
        try:
            return _identity(self.path.stat()) == self._identity
        except OSError:
            return False

    def map(self) -> None:
        """Map the file, so that `copy_chunk` may copy from there."""
        if self._map is None:
            # The system may have no room for it; then reading stays as it is.
            with contextlib.suppress(OSError):
                mapped = mmap.mmap(self._handle, self._size, access=mmap.ACCESS_READ, **_NO_HANDLE)
                self._map = np.frombuffer(mapped, np.uint8)

    def advise(self, chunk: int) -> None:
        """Have the disk start on a chunk that is read soon; for files that are not in memory."""
        start, n_bytes = self._index[chunk].tolist()
        if start != ABSENT and hasattr(os, "posix_fadvise"):
            # In steps, for one call reads ahead no more than the device's limit.
            for step in range(start, start + n_bytes, _READ_AHEAD):
                os.posix_fadvise(self._handle, step, _READ_AHEAD, os.POSIX_FADV_WILLNEED)

    def copy_chunk(self, chunk: int, out: np.ndarray, *, is_in_memory: bool = False) -> int:
        """Copy one chunk and check it against its own checksum.

        Args:
            chunk: Number of the chunk in the shard.
            out: uint8 (chunk_bytes,), contiguous.
            is_in_memory: The page cache is likely to have it, so that a map may be used.

        Returns:
            The crc32c of the bytes in `out`.

        Raises:
            FormatError: The chunk is absent, of another size, damaged or cut off.
        """
        start, n_bytes = self._index[chunk].tolist()
        wanted = self.layout.chunk_bytes + CRC_BYTES
        if n_bytes != wanted:
            problem = "is missing" if start == n_bytes == ABSENT else f"has {n_bytes} bytes"
            raise FormatError(f"Chunk {chunk} {problem} in shard file {self.path}.")
        try:
            trailer = (
                self._copy_from_map(start, out)
                if is_in_memory and self.is_mapped
                else self._copy_from_file(start, out)
            )
        except OSError as error:
            raise FormatError(
                f"Shard file {self.path} cannot be read ({error.strerror})."
            ) from error
        # While the bytes are in the processor's cache.
        found = crc32c(out)
        if len(trailer) != CRC_BYTES or found != int.from_bytes(trailer, "little"):
            raise FormatError(f"Chunk {chunk} of shard file {self.path} is damaged or cut off.")
        return found

    def _copy_from_file(self, start: int, out: np.ndarray) -> bytes:
        """Fill `out`; give the checksum behind it, shorter where the file ends before."""
        trailer = bytearray(CRC_BYTES)
        buffers: list[Any] = [out, trailer]
        n_read = os.preadv(self._handle, buffers, start)
        return bytes(trailer[: max(0, n_read - len(out))])

    def _copy_from_map(self, start: int, out: np.ndarray) -> bytes:
        assert self._map is not None
        if os.fstat(self._handle).st_size < self._size:  # touching what was cut off is fatal
            return b""
        stop = start + len(out)
        np.copyto(out, self._map[start:stop])
        return self._map[stop : stop + CRC_BYTES].tobytes()


def open_shard(path: Path, layout: ShardLayout) -> ShardFile:
    """Give a shard file, one that an earlier reader used where it is unchanged.

    Raises:
        FormatError: See `ShardFile`.
    """
    _KEPT.limit = max_open_shards()
    file = _KEPT.get(path, lambda path: ShardFile(path, layout))
    if file.layout != layout or not file.is_current():
        file = ShardFile(path, layout)
        _KEPT.put(path, file)
    file.n_readers += 1
    if file.n_readers > 1:
        file.map()
    return file


def close_kept_shards() -> None:
    """Close the files that no reader uses now, so that the system may forget their pages."""
    _KEPT.clear()


def max_open_shards() -> int:
    """Choose how many shard files stay open: with half of the handles of a process, at most 4096.

    Before Python 3.13 a map holds a handle of its own.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MAX_OPEN
    return max(8, min(_MAX_OPEN, soft // (2 if _NO_HANDLE else 4)))


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Recent(Generic[K, V]):
    """The most recently used values by key, at most `limit`; safe to use from threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[K], V]) -> V:
        """Give the value of `key`, made outside the lock where there is none."""
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                return found
        made = make(key)
        self.put(key, made)
        return made

    def __contains__(self, key: K) -> bool:
        with self._lock:
            return key in self._values

    def put(self, key: K, value: V) -> None:
        """Keep a value as the one used last."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self.limit:
                self._values.popitem(last=False)

    def drop(self, key: K) -> None:
        """Forget one value, if it is kept."""
        with self._lock:
            self._values.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()


_KEPT: Recent[Path, ShardFile] = Recent(1)
"""The files of this process that readers used last, with their maps."""
