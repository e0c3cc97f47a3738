"""What lies in a store: the files that the index is folded from, by path, time and size."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from featstore.store import StoreFolder

Stamp = tuple[int, int]
"""When a file was last changed (ns) and its size in bytes."""
Files = dict[str, Stamp]
"""Path below the store (with "/") to the file's stamp."""

_RUN = re.compile(r"run\.json|metrics\.parquet|curves\.parquet")
_TABLE = re.compile(r".+\.parquet")
_NUMBERED = re.compile(r"\d+\.parquet")
_SETTLED_S = 0.02  # longer than a tick of the clock that stamps files


class Vanished(Exception):  # noqa: N818
    """A file was removed after it had been listed: list and read again."""


def scan(store: StoreFolder) -> Files:
    """List the files that the index is made of.

    A file is listed before those that must exist if it does: whatever is written meanwhile, a
    listed ledger has its assignment and its items in the list too.
    """
    found: Files = {}
    for folder in _folders(store.path / "feature_sets"):
        found.update(_feature_set(folder))
    for folder in _folders(store.path / "items"):
        tables = list(_stamped(folder, _TABLE))
        about = list(_stamped(folder, re.compile(r"dataset\.json")))
        found.update([*tables, *about] if about else [])
    for folder in _folders(store.runs_path):
        files = dict(_stamped(folder, _RUN))
        # Without its record a half deleted folder is no run.
        found.update(files if str(folder / "run.json") in files else {})
    start = len(str(store.path)) + 1
    return {path[start:].replace(os.sep, "/"): stamp for path, stamp in found.items()}


def settled_scan(store: StoreFolder) -> Files:
    """List the files as `scan` does, none of them changed within the clock's last tick.

    A file that is replaced twice within one tick by files of one size bears the same stamp twice.
    """
    found = scan(store)
    newest = max((mtime_ns for mtime_ns, _ in found.values()), default=0)
    if abs(time.time_ns() - newest) < _SETTLED_S * 1e9:
        time.sleep(_SETTLED_S)
        found = scan(store)
    return found


def _feature_set(folder: Path) -> Files:
    found = dict(_stamped(folder / "tombstones", _TABLE))
    for tap in _folders(folder / "ledger"):
        found.update(_stamped(tap, _NUMBERED))
    found.update(_stamped(folder / "assignments", _NUMBERED))
    about = dict(_stamped(folder, re.compile(r"zarr\.json")))
    return {**found, **about} if about else {}


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _stamped(folder: Path, name: re.Pattern[str]) -> Iterator[tuple[str, Stamp]]:
    """Give the full paths and stamps of the files in a folder that bear such a name."""
    try:
        with os.scandir(folder) as entries:
            chosen = [entry for entry in entries if name.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in chosen:
        try:
            about = entry.stat()
        except FileNotFoundError:  # removed meanwhile
            continue
        yield entry.path, (about.st_mtime_ns, about.st_size)
