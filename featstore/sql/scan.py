"""What lies in a store: the files that the index is folded from, by path, time and size."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from featstore.store import StoreFolder

Stamp = tuple[int, int]
"""When a file was last changed (ns) and its size in bytes."""
Files = dict[str, Stamp]
"""Path below the store (with "/") to the file's stamp."""

RUN_FILES = ("run.json", "metrics.parquet", "curves.parquet")
_SETTLED_S = 0.02  # longer than a tick of the clock that stamps files


def scan(store: StoreFolder) -> Files:
    """List the files that the index is made of.

    A file is listed before those that must exist if it does: whatever is written meanwhile, a
    listed ledger has its assignment and its items in the list too.
    """
    found: Files = {}
    for folder in _folders(store.path / "feature_sets"):
        if (folder / "zarr.json").exists():
            found.update(_feature_set(store.path, folder))
    for folder in _folders(store.path / "items"):
        if (folder / "dataset.json").exists():
            found.update(_stamped(store.path, folder, ".parquet"))
            found.update(_stamped(store.path, folder, "dataset.json"))
    for folder in _folders(store.runs_path):
        if (folder / "run.json").exists():
            found.update(_run(store.path, folder))
    return found


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


def _feature_set(root: Path, folder: Path) -> Iterator[tuple[str, Stamp]]:
    yield from _stamped(root, folder / "tombstones", ".parquet")
    for tap in _folders(folder / "ledger"):
        yield from _stamped(root, tap, ".parquet")
    yield from _stamped(root, folder / "assignments", ".parquet")
    yield from _stamped(root, folder, "zarr.json")


def _run(root: Path, folder: Path) -> Iterator[tuple[str, Stamp]]:
    for name in RUN_FILES:
        yield from _stamped(root, folder, name)


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _stamped(root: Path, folder: Path, ending: str) -> Iterator[tuple[str, Stamp]]:
    try:
        with os.scandir(folder) as entries:
            chosen = [entry for entry in entries if entry.name.endswith(ending)]
    except (FileNotFoundError, NotADirectoryError):
        return
    prefix = folder.relative_to(root).as_posix()
    for entry in chosen:
        try:
            about = entry.stat()
        except FileNotFoundError:  # removed meanwhile
            continue
        yield f"{prefix}/{entry.name}", (about.st_mtime_ns, about.st_size)
