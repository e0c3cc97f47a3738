"""Taking things away: what interrupted writes left, prepared targets, feature sets.

Nothing is deleted while a process that may need it holds its lock.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from featstore.errors import ConflictError, FormatError
from featstore.feature_sets import find_feature_set
from featstore.files import PARTIAL, exclusive, fsync_path, storage_errors
from featstore.latency import latency_path
from featstore.remote.location import refuse_remote
from featstore.store import FeatureSetFolder, StoreFolder, open_folder
from featstore.types import TapShape

_REMOVED = ".removed"
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # FormatError aside
_RUN_LOCKS = (".lock", ".lock.holder")
_PURPOSE = "collecting waste"


@dataclass(kw_only=True, slots=True)
class CleanReport:
    """What was taken away, or would be."""

    store: str
    removed: list[str] = field(default_factory=list)  # relative to the store
    bytes: int = 0
    busy: list[str] = field(default_factory=list)  # left alone: another process writes there

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


def gc(store_path: str | Path, *, dry_run: bool = False, targets: bool = False) -> CleanReport:
    """Delete what no committed row, item or run needs.

    These are files of interrupted writes, shards that were written but never committed, and what
    interrupted removals left. Whatever another process is writing is left alone.

    Args:
        store_path: Store.
        dry_run: Only list.
        targets: Delete the prepared targets too; the next training makes them again.

    Raises:
        NotFoundError: There is no store.
        FormatError: The attributes of a feature set are damaged, so nobody knows what it needs.
        StorageError: The disk refused.
    """
    store = open_folder(Path(store_path))
    refuse_remote(store.path, "gc")
    sweep = _Sweep(store, dry_run=dry_run)
    for path in _folders(store.path / "feature_sets"):
        lock = store.locks_path / f"{path.name}.lock"
        sweep.do(lock, path.name, partial(_feature_set_waste, path))
    for path in _folders(store.path / _REMOVED):
        key = path.name.partition(".")[0]
        sweep.do(store.locks_path / f"{key}.lock", key, partial(_files, path), folder=path)
    data_sets = [*_folders(store.path / "items"), *_folders(store.path / "labels")]
    for name in sorted({path.name for path in data_sets}):
        lock = store.locks_path / f"items-{name}.lock"
        sweep.do(lock, f"items-{name}", partial(_data_set_waste, store, name))
    for path in _folders(store.runs_path):
        if any(_run_waste(path)):  # so that no lock file is made in a run that needs none
            is_run = (path / "run.json").exists()
            folder = None if is_run else path
            sweep.do(path / ".lock", f"runs/{path.name}", partial(_run_waste, path), folder=folder)
    for path in _folders(store.targets_path):
        key = path.name.partition(".")[0]
        if key and (targets or path.name.endswith(PARTIAL)):
            lock = store.targets_path / ".locks" / f"{key}.lock"
            sweep.do(lock, f"targets/{key}", partial(_files, path), folder=path)
    lock = store.locks_path / "index.lock"
    sweep.do(lock, "index", lambda: sorted(store.path.glob(f"index.duckdb.*{PARTIAL}*")))
    return sweep.report


class _Sweep:
    """One collection: where, whether for real, and what it took so far."""

    def __init__(self, store: StoreFolder, *, dry_run: bool) -> None:
        self.store = store
        self.dry_run = dry_run
        self.report = CleanReport(store=str(store.path))

    def do(
        self,
        lock: Path,
        name: str,
        find: Callable[[], Iterable[Path]],
        *,
        folder: Path | None = None,
    ) -> None:
        """Delete the files that `find` gives, and then `folder`, under a lock.

        Where another process holds it, `name` is reported as busy instead.
        """
        if self.dry_run and not self.store.is_writable:
            self._list(find())  # nobody can be writing it
            return
        try:
            with exclusive(lock, purpose=_PURPOSE):
                paths = list(find())
                self._list(paths)
                if not self.dry_run:
                    _delete(paths, folder)
        except ConflictError:
            self.report.busy.append(name)

    def _list(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self.report.removed.append(path.relative_to(self.store.path).as_posix())
            self.report.bytes += path.lstat().st_size


def _delete(paths: Iterable[Path], folder: Path | None) -> None:
    for path in paths:
        with storage_errors(path):
            path.unlink(missing_ok=True)
    if folder is not None:
        with storage_errors(folder):
            shutil.rmtree(folder)


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir() and not path.is_symlink())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def _partials(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if path.name.endswith(PARTIAL)]


def _data_set_waste(store: StoreFolder, dataset: str) -> list[Path]:
    return [p for kind in ("items", "labels") for p in _partials(store.path / kind / dataset)]


def _run_waste(folder: Path) -> list[Path]:
    """List leftovers; all of a folder without its record, which is no run."""
    files = [path for path in _files(folder) if path.name not in _RUN_LOCKS]
    return _partials(folder) if (folder / "run.json").exists() else files


def _feature_set_waste(path: Path) -> Iterator[Path]:
    yield from _partials(path)
    if not (path / "zarr.json").exists():
        return  # begun and never made, or damaged: `verify` tells which
    folder = FeatureSetFolder(path)
    for tap, shape in _taps(folder).items():
        ledgers = folder.ledger_path(tap, 0).parent.glob("*.parquet")
        committed = {int(path.stem) for path in ledgers if path.stem.isdecimal()}
        for array in shape.arrays:
            for file in _files(folder.array_path(tap, array) / "c"):
                shard = file.relative_to(folder.array_path(tap, array)).parts[1]
                is_shard = shard.isdecimal() and file == folder.shard_file(tap, array, int(shard))
                if is_shard and int(shard) not in committed:
                    yield file


def _taps(folder: FeatureSetFolder) -> dict[str, TapShape]:
    try:
        return folder.taps
    except _UNREADABLE as error:
        raise FormatError(f"{folder.path}/zarr.json is damaged. Restore it from a copy.") from error


def remove_feature_set(store_path: str | Path, name: str) -> CleanReport:
    """Delete one feature set for good; items, labels and runs stay.

    It is moved aside first, in one step: whatever happens then, it is gone or whole.

    Args:
        store_path: Store.
        name: Key, unique prefix of one, or name.

    Raises:
        NotFoundError: There is no such feature set.
        ConflictError: Another process is writing it.
        StorageError: The disk refused.
    """
    store = open_folder(Path(store_path))
    refuse_remote(store.path, "Removing a feature set")
    folder = find_feature_set(store, name)
    report = CleanReport(store=str(store.path))
    purpose = f"removing feature set {folder.key}"
    aside = store.path / _REMOVED / f"{folder.key}.{os.getpid()}-{secrets.token_hex(4)}"
    with exclusive(store.locks_path / f"{folder.key}.lock", purpose=purpose):
        report.bytes = sum(path.lstat().st_size for path in _files(folder.path))
        report.removed.append(folder.path.relative_to(store.path).as_posix())
        with storage_errors(folder.path):
            aside.parent.mkdir(exist_ok=True)
            folder.path.rename(aside)
            fsync_path(folder.path.parent)
            shutil.rmtree(aside)
            latency_path(store.path, folder.key).unlink(missing_ok=True)
    return report
