"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from featstore.errors import ConflictError, FormatError, NotFoundError, StorageError
from featstore.remote.location import find_mirror

PARTIAL = ".partial"
"""Ending of a file that is still being written; any such file is waste after a crash."""


def partial_path(path: Path, nonce: str) -> Path:
    """Name a file while it is being written; `nonce` is its writer's and nobody else's."""
    return path.with_name(f"{path.name}.{nonce}{PARTIAL}")


def fsync_path(path: Path) -> None:
    """Force a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one clear error that names the file."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"Could not write {path}: {reason}. Everything committed before is safe; make room or "
            "fix the permission, then run the same command again."
        ) from error


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file atomically and durably, making its folder first.

    In the mirror of a store behind a URL it is written to that store before.
    """
    with storage_errors(path), _sent_first(path, data):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial_path(path, secrets.token_hex(8))
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


@contextlib.contextmanager
def _sent_first(path: Path, data: bytes | memoryview) -> Iterator[None]:
    mirror = find_mirror(path)
    if mirror is None or not mirror.is_mirrored(path):
        yield
        return
    from featstore.remote.writing import sent_first

    with sent_first(mirror, path, data):
        yield


def remove_file(path: Path) -> None:
    """Delete a file if it is there; in the mirror of a store behind a URL, there too."""
    mirror = find_mirror(path)
    if mirror is not None and not mirror.is_local(path):
        from featstore.remote.writing import remove

        remove(mirror, path)
    path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented and sorted, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_parquet(path: Path, table: pa.Table, *, row_group_size: int | None = None) -> None:
    """Write a Parquet file atomically; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        store_schema=False,
        row_group_size=row_group_size,
        write_page_checksum=True,
    )
    write_bytes(path, memoryview(sink.getvalue()))


def read_parquet(
    path: Path, *, columns: Sequence[str] | None = None, filters: Any = None
) -> pa.Table:
    """Read a Parquet file, every page checked against its checksum.

    Raises:
        NotFoundError: There is no file.
        FormatError: It is damaged.
    """
    try:
        return pq.read_table(
            path, columns=columns, filters=filters, page_checksum_verification=True
        )
    except FileNotFoundError:
        raise NotFoundError(f"No file at {path}.") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path} is damaged ({reason}). Run `featstore verify`.") from error


def next_number(paths: Iterable[Path]) -> int:
    """Give the number after the largest that the stems of `paths` end in; 0 for none.

    Not their count: where a file was lost, the count is a number that is taken.
    """
    stems = (path.stem.rpartition("-")[2] for path in paths)
    return max((int(stem) for stem in stems if stem.isdecimal()), default=-1) + 1


def remove_partials(folder: Path) -> int:
    """Delete what interrupted writes left below `folder`; give how many files that was."""
    leftovers = [path for path in folder.rglob(f"*{PARTIAL}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


_SOON_S = 2.0


@contextlib.contextmanager
def exclusive(
    path: Path,
    *,
    purpose: str,
    timeout_s: float = 0.0,
    on_wait: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold the lock file at `path`, which the system frees when the process dies.

    Args:
        path: Lock file; its holder's process is written beside it, for the message.
        purpose: What the holder does, in words: "extracting into feature set 3f9c".
        timeout_s: How long to wait for another holder.
        on_wait: Called once with that holder in words, if it is not done in a moment.

    Raises:
        ConflictError: Another process holds it; the message names that process.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    note = path.with_suffix(".holder")
    lock = FileLock(path)
    try:
        _acquire(lock, note, timeout_s, on_wait)
    except Timeout as error:
        raise ConflictError(
            f"{_holder(note)} holds {path.name}. Wait for it to finish, or stop it, and run this "
            "again."
        ) from error
    try:
        with contextlib.suppress(OSError):  # of a full disk; the lock holds without its note
            note.write_text(f"Process {os.getpid()} on {socket.gethostname()} ({purpose})\n")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _acquire(
    lock: FileLock, note: Path, timeout_s: float, on_wait: Callable[[str], None] | None
) -> None:
    if on_wait is None or timeout_s <= _SOON_S:
        lock.acquire(timeout=timeout_s)
        return
    try:
        lock.acquire(timeout=_SOON_S)
    except Timeout:
        on_wait(_holder(note))
        lock.acquire(timeout=timeout_s - _SOON_S)


def _holder(note: Path) -> str:
    try:
        return note.read_text().strip() or "Another process"
    except OSError:  # it is just changing
        return "Another process"
