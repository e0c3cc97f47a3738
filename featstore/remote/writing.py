"""Sending what is written below a mirror to its store: there first, then here.

So a file that lies in the mirror is in the store too, whenever a process is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from featstore.errors import NotFoundError
from featstore.files import PARTIAL, storage_errors
from featstore.remote.client import Entry, client_of
from featstore.remote.location import Mirror, find_mirror
from featstore.remote.mirror import append_log, write_lock

_NUMBERED = re.compile(r"(?!.*/ledger/).*\d+\.parquet")


@contextlib.contextmanager
def sent_first(mirror: Mirror, path: Path, data: bytes | memoryview) -> Iterator[None]:
    """Write a small file to the store; inside of the ``with`` the caller writes it here.

    Numbered tables are never overwritten, so that of two processes that choose one number only
    the first is in the store. A ledger is: a repair writes it anew.

    Raises:
        ConflictError: Another process wrote a numbered table first, with other bytes.
        InvalidInputError: The store can only be read.
        StorageError: The store refused, or did not answer within the stated time.
    """
    key, whole = mirror.key(path), bytes(data)
    is_new = _NUMBERED.fullmatch(key) is not None
    version = client_of(mirror.remote).write(key, whole, is_new=is_new)
    with write_lock(mirror):
        yield
        append_log(mirror, Entry(key=key, size=len(whole), version=version))


def move_shard(mirror: Mirror, partial: Path, path: Path) -> None:
    """Send a finished shard file to where `path` says, and delete it here.

    Raises:
        InvalidInputError: The store can only be read.
        StorageError: The store refused, or did not answer within the stated time.
    """
    client_of(mirror.remote).upload(mirror.key(path), partial)
    partial.unlink()


def remove(mirror: Mirror, path: Path) -> None:
    """Delete what a path stands for in the store, if it is there."""
    client_of(mirror.remote).delete(mirror.key(path))


@contextlib.contextmanager
def at_hand(path: Path) -> Iterator[None]:
    """Have a shard file on this disk inside of the ``with``: a URL's is downloaded for the time.

    One that the store has not is not there either.

    Raises:
        StorageError: The store did not answer within the stated time.
    """
    mirror = find_mirror(path)
    if mirror is None:
        yield
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.look{PARTIAL}")
    try:
        with storage_errors(path), contextlib.suppress(NotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            client_of(mirror.remote).download(mirror.key(path), partial)
            partial.replace(path)
        yield
    finally:
        partial.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
