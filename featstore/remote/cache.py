"""Chunks that were read, kept on the local disk within a limit of bytes.

A file a shard of an array: a flag a chunk, then a place for each chunk, empty until it is read. A
flag is set after its chunk was written, and the reader compares the chunk with the ledger, so that
nothing here is ever trusted: processes share the folder without waiting for each other. When the
limit is reached, the shards that were used longest ago go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from featstore.remote.location import cache_bytes, cache_folder
from featstore.shards import ShardLayout, crc32c

_PAGE = 4096
_BLOCK = 512  # of st_blocks
_LOCK_WAIT_S = 10.0
_ROOM = 0.9  # of the limit, after shards were deleted
_LOOK = 16  # looks at what others wrote once this part of the limit was written here


class MemoryChunks:
    """Chunks that a reader is going to ask for, at most so many bytes of them."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._chunks: OrderedDict[tuple[str, int], tuple[np.ndarray, int]] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def held(self, key: str, layout: ShardLayout) -> set[int]:
        """Tell which chunks of a shard are here."""
        with self._lock:
            return {chunk for shard, chunk in self._chunks if shard == key}

    def get(self, key: str, chunk: int, out: np.ndarray, layout: ShardLayout) -> int | None:
        """Copy a chunk to `out` and give its crc32c; None if it is not here."""
        with self._lock:
            found = self._chunks.get((key, chunk))
        if found is None:
            return None
        np.copyto(out, found[0])
        return found[1]

    def put(self, key: str, chunk: int, data: np.ndarray, layout: ShardLayout) -> None:
        """Keep a chunk; those that came first make room."""
        if len(data) > self.limit_bytes:
            return
        with self._lock:
            if (key, chunk) not in self._chunks:
                self._chunks[key, chunk] = data.copy(), crc32c(data)
                self._n_bytes += len(data)
            while self._n_bytes > self.limit_bytes:
                _, (gone, _) = self._chunks.popitem(last=False)
                self._n_bytes -= len(gone)

    def drop(self, key: str, chunk: int, layout: ShardLayout) -> None:
        """Forget a chunk that turned out to be wrong."""
        with self._lock:
            gone = self._chunks.pop((key, chunk), None)
            self._n_bytes -= 0 if gone is None else len(gone[0])


class DiskChunks:
    """Chunks on the local disk, shared by all processes that name the same folder."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._known_bytes = -1  # in the folder when it was last looked at; -1: never
        self._written_bytes = 0  # by this process, since
        self._lock = threading.Lock()

    def held(self, key: str, layout: ShardLayout) -> set[int]:
        """Tell which chunks of a shard are here."""
        with self._open(key, layout, os.O_RDONLY) as handle:
            if handle is None:
                return set()
            flags = np.frombuffer(os.pread(handle, layout.n_chunks, 0), np.uint8)
            return set(np.flatnonzero(flags).tolist())

    def get(self, key: str, chunk: int, out: np.ndarray, layout: ShardLayout) -> int | None:
        """Copy a chunk to `out` and give its crc32c; None if it is not here."""
        with self._open(key, layout, os.O_RDONLY) as handle:
            if handle is None or os.pread(handle, 1, chunk) != b"\1":
                return None
            if os.preadv(handle, [out.data], self._start(chunk, layout)) != len(out):
                return None
            with contextlib.suppress(OSError):  # a folder that can only be read
                os.utime(handle)
            return crc32c(out)

    def put(self, key: str, chunk: int, data: np.ndarray, layout: ShardLayout) -> None:
        """Keep a chunk, unless the disk refuses: then it is read again another time."""
        n_bytes = _rounded(len(data)) + _PAGE
        if not self._make_room(n_bytes):
            return
        with (
            contextlib.suppress(OSError),
            self._open(key, layout, os.O_RDWR | os.O_CREAT) as handle,
        ):
            if handle is None:
                return
            os.pwrite(handle, data.data, self._start(chunk, layout))
            os.pwrite(handle, b"\1", chunk)
        with self._lock:
            self._written_bytes += n_bytes

    def drop(self, key: str, chunk: int, layout: ShardLayout) -> None:
        """Forget a chunk that turned out to be wrong."""
        with contextlib.suppress(OSError), self._open(key, layout, os.O_RDWR) as handle:
            if handle is not None:
                os.pwrite(handle, b"\0", chunk)

    @contextlib.contextmanager
    def _open(self, key: str, layout: ShardLayout, flags: int) -> Iterator[int | None]:
        """Open the file of a shard; None where there is none and none is made."""
        told = f"{key} {layout.n_chunks} {layout.chunk_bytes}"
        name = hashlib.sha256(told.encode()).hexdigest()
        path = self.folder / name[:2] / name[2:34]
        if flags & os.O_CREAT:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o644)
        except FileNotFoundError:
            yield None
            return
        try:
            yield handle
        finally:
            os.close(handle)

    @staticmethod
    def _start(chunk: int, layout: ShardLayout) -> int:
        return _rounded(layout.n_chunks) + chunk * layout.chunk_bytes

    def _make_room(self, n_bytes: int) -> bool:
        """Tell whether so many bytes fit into the limit, deleting shards if need be."""
        with self._lock:
            is_full = self._known_bytes + self._written_bytes + n_bytes > self.limit_bytes
            is_old = self._known_bytes < 0 or self._written_bytes * _LOOK > self.limit_bytes
            if not (is_full or is_old):
                return True
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / "lock", timeout=_LOCK_WAIT_S):
                    self._known_bytes = self._evict(n_bytes)
            except (OSError, Timeout):  # no disk for it, or others are at it
                return False
            self._written_bytes = 0
            return self._known_bytes + n_bytes <= self.limit_bytes

    def _evict(self, n_bytes: int) -> int:
        """Delete what was used longest ago until there is room; give the bytes that are left."""
        files = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                files.append((about.st_mtime_ns, about.st_blocks * _BLOCK, path))
        total = sum(size for _, size, _ in files)
        if total + n_bytes <= self.limit_bytes:
            return total
        for _, size, path in sorted(files):
            if total + n_bytes <= _ROOM * self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // _PAGE) * _PAGE


Chunks = MemoryChunks | DiskChunks
"""Where chunks wait that were read before they were asked for."""

_disks: dict[tuple[Path, int, int], DiskChunks] = {}


def open_chunks(memory_bytes: int) -> Chunks:
    """Give the disk's cache, or so much memory where the environment allows no disk."""
    limit, folder = cache_bytes(), cache_folder() / "chunks"
    if limit == 0:
        return MemoryChunks(memory_bytes)
    return _disks.setdefault((folder, limit, os.getpid()), DiskChunks(folder, limit))
