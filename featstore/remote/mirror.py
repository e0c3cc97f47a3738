"""Bringing the small files of a store behind a URL into its mirror.

What is new or changed is downloaded, what is gone is deleted; runs, prepared targets, the index
and locks belong to this machine and are left alone. Beside the mirror lies a log of the versions
that it holds, a line a file, to which writers append. It may be lost: then everything is fetched
again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from featstore.errors import InvalidInputError, NotFoundError
from featstore.files import exclusive, storage_errors, write_bytes, write_json
from featstore.remote.client import Client, Entry, client_of
from featstore.remote.location import (
    REMOTE_FILE,
    Mirror,
    Remote,
    cache_folder,
    is_shard_folder,
    is_small,
    parse_url,
)

_LOCK_WAIT_S = 600.0
_LEFT_S = 3600.0  # what a killed `verify` left of a shard is older than this
_LOCAL = ("runs", "targets", ".locks", ".removed")


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What bringing a mirror up to date took."""

    n_files: int
    n_downloaded: int
    n_deleted: int


def open_mirror(url: str | Path) -> Path:
    """Give the mirror of a store behind a URL, up to date.

    Raises:
        InvalidInputError: The URL is none, or something else lies there.
        StorageError: The store refuses, or does not answer within the stated time.
    """
    mirror = mirror_of(parse_url(url))
    synchronise(mirror)
    return mirror.root


def mirror_of(remote: Remote) -> Mirror:
    """Give the mirror of a store, made if there is none, as it is."""
    root = cache_folder().absolute() / "mirrors" / remote.name
    if not (root / REMOTE_FILE).exists():
        write_json(root / REMOTE_FILE, {"url": remote.url, "options": dict(remote.options)})
    return Mirror(root=root, remote=remote)


def synchronise(mirror: Mirror) -> SyncReport:
    """Make the small files of a mirror those of its store.

    Raises:
        InvalidInputError: There is something else than a store.
        StorageError: The store refuses, or does not answer within the stated time.
    """
    client = client_of(mirror.remote)
    lock = mirror.root.with_name(f"{mirror.root.name}.lock")
    with exclusive(lock, purpose=f"mirroring {mirror.remote.url}", timeout_s=_LOCK_WAIT_S):
        began = time.time()
        found = _list_small(client)
        known, log_bytes = read_log(mirror), _log_bytes(mirror)
        changed = [entry for entry in found.values() if not _is_held(mirror, entry, known)]
        # The last to come commits what came before it.
        ledgers = [entry for entry in changed if "/ledger/" in entry.key]
        others = [entry for entry in changed if "/ledger/" not in entry.key]
        fetched: dict[str, Entry] = {}
        for part in (others, ledgers):
            for entry in client.map(partial(_fetch, client, mirror, log_bytes), part):
                if entry is not None:
                    fetched[entry.key] = entry
        n_deleted = _sweep(mirror, found, began)
        if changed or n_deleted or len(known) > 2 * len(found):
            held = {key: known[key] for key in found if key in known} | fetched
            _write_log(mirror, held.values())
    return SyncReport(n_files=len(found), n_downloaded=len(fetched), n_deleted=n_deleted)


def _list_small(client: Client) -> dict[str, Entry]:
    """List the small objects; ledgers first, so that what they refer to is in the list too."""
    files, folders = client.list_folder("")
    if "zarr.json" not in {entry.key for entry in files}:
        if files or folders:
            raise InvalidInputError(
                f"{client.remote.url} holds other files and no store. Name the store's own "
                f"folder, such as {client.remote.url}/features.zarr."
            )
        return {}
    _, keys = client.list_folder("feature_sets")
    ledgers = _walk(client, [f"{key}/ledger" for key in keys])
    others = _walk(client, [folder for folder in folders if folder not in _LOCAL], files)
    found = {entry.key: entry for entry in [*ledgers, *others] if is_small(entry.key)}
    looked = client.map(client.look, found.values())
    return {entry.key: entry for entry in looked if entry is not None}


def _walk(client: Client, folders: list[str], files: Iterable[Entry] = ()) -> Iterator[Entry]:
    """List what lies below folders, level by level; folders of shards are passed over."""
    yield from files
    while folders:
        following: list[str] = []
        for entries, below in client.map(client.list_folder, folders):
            yield from entries
            following += [folder for folder in below if not is_shard_folder(folder.split("/"))]
        folders = following


def _is_held(mirror: Mirror, entry: Entry, known: dict[str, Entry]) -> bool:
    try:
        size = (mirror.root / entry.key).stat().st_size
    except OSError:
        return False
    return known.get(entry.key) == entry and size == entry.size


def _fetch(client: Client, mirror: Mirror, log_bytes: int, entry: Entry) -> Entry | None:
    """Bring one file here, unless another process has written a newer one in the meantime."""
    try:
        data, got = client.read(entry.key)
    except NotFoundError:  # removed since it was listed
        return None
    with write_lock(mirror):
        if entry.key in _appended(mirror, log_bytes):
            return None
        _write_here(mirror.root / entry.key, data)
    return got


def write_lock(mirror: Mirror) -> FileLock:
    """Give the lock for as long as one file of the mirror and its line in the log are written."""
    return FileLock(mirror.root.with_name(f"{mirror.root.name}.write.lock"))


def _write_here(path: Path, data: bytes) -> None:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.sync.partial")
        temporary.write_bytes(data)
        temporary.replace(path)


def _sweep(mirror: Mirror, found: dict[str, Entry], began: float) -> int:
    """Delete mirrored files that the store has not, and shards that lie here by accident.

    A file that was written since the listing began is another process's, which wrote it to the
    store before it wrote it here.
    """
    n_deleted = 0
    for name in ("items", "labels", "feature_sets"):
        for path in (mirror.root / name).rglob("*"):
            key = mirror.key(path)
            is_gone = key not in found and is_small(key)
            is_shard = is_shard_folder(key.split("/")[:-1]) and not key.endswith(".partial")
            with storage_errors(path):
                if path.is_file() and (is_gone or is_shard):
                    age_s = began - path.stat().st_mtime
                    if age_s > (_LEFT_S if is_shard else 0):
                        path.unlink(missing_ok=True)
                        n_deleted += 1
    root = mirror.root / "zarr.json"
    if not found and root.exists() and root.stat().st_mtime < began:
        root.unlink()
        n_deleted += 1
    return n_deleted


def _log_path(mirror: Mirror) -> Path:
    return mirror.root.with_name(f"{mirror.root.name}.files.jsonl")


def _log_bytes(mirror: Mirror) -> int:
    try:
        return _log_path(mirror).stat().st_size
    except FileNotFoundError:
        return 0


def read_log(mirror: Mirror) -> dict[str, Entry]:
    """Read which version of each file the mirror holds."""
    return _appended(mirror, 0)


def _appended(mirror: Mirror, start: int) -> dict[str, Entry]:
    """Read the log from a byte on; lines cut off by a crash do not count."""
    held: dict[str, Entry] = {}
    if _log_bytes(mirror) <= start:
        return held
    with _log_path(mirror).open("rb") as file:
        file.seek(start)
        lines = file.read().splitlines()
    for line in lines:
        try:
            key, size, version = json.loads(line)
        except ValueError:
            continue
        held[key] = Entry(key=key, size=size, version=version)
    return held


def _line(entry: Entry) -> str:
    return json.dumps([entry.key, entry.size, entry.version]) + "\n"


def _write_log(mirror: Mirror, entries: Iterable[Entry]) -> None:
    write_bytes(_log_path(mirror), "".join(map(_line, entries)).encode())


def append_log(mirror: Mirror, entry: Entry) -> None:
    """Note that the mirror holds a version: one short write, whole or absent."""
    with storage_errors(_log_path(mirror)), _log_path(mirror).open("a") as file:
        file.write(_line(entry))
