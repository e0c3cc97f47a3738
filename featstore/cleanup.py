"""Taking things away: what interrupted writes left, prepared targets, feature sets.

Nothing is deleted while a process that may need it holds its lock.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featstore.claims import (
    Holder,
    claims_folder,
    claims_lock,
    holder_of,
    is_dead_partial,
    live_claims,
)
from featstore.errors import ConflictError, FormatError, invalid
from featstore.feature_sets import find_feature_set
from featstore.files import PARTIAL, exclusive, fsync_path, remove_file, storage_errors
from featstore.latency import latency_path
from featstore.occupancy import files_to_free, occupied
from featstore.remote.location import refuse_remote, shown
from featstore.store import FeatureSetFolder, StoreFolder, locate, open_folder
from featstore.tombstones import read_tombstones
from featstore.types import TapShape

_REMOVED = ".removed"
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # FormatError aside
_RUN_LOCKS = (".lock", ".lock.holder")
_PURPOSE = "collecting waste"
GRACE_S = 3600.0
"""How long the numbers of a removed row stay, for streams that were begun before."""


@dataclass(kw_only=True, slots=True)
class CleanReport:
    """What was taken away, or would be."""

    store: str
    removed: list[str] = field(default_factory=list)  # relative to the store
    bytes: int = 0
    waiting_bytes: int = 0  # of removed rows, which may be in use: their grace period runs
    waiting_s: float = 0.0  # until the last of them can go
    busy: list[str] = field(default_factory=list)  # left alone: another process writes there

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


def gc(
    store_path: str | Path,
    *,
    dry_run: bool = False,
    targets: bool = False,
    grace_s: float = GRACE_S,
) -> CleanReport:
    """Delete what no committed row, item or run needs.

    These are files of interrupted writes, shards that were written but never committed, what
    interrupted removals left, and shards of which every row was removed or moved. Whatever
    another process is writing is left alone. Of a store behind a URL these shards are deleted
    there, and of the rest what lies in its mirror.

    Args:
        store_path: Store.
        dry_run: Only list.
        targets: Delete the prepared targets too; the next training makes them again.
        grace_s: Seconds for which a removed row's numbers stay, for streams that were begun
            before; 0 deletes at once, and such a stream stops with a message.

    Raises:
        NotFoundError: There is no store.
        FormatError: The attributes of a feature set are damaged, so nobody knows what it needs.
        StorageError: The disk refused.
    """
    if not grace_s >= 0:
        raise invalid("grace_s", grace_s, "0 or more seconds")
    store = open_folder(locate(store_path))
    sweep = _Sweep(store, dry_run=dry_run)
    for path in _folders(store.path / "feature_sets"):
        sweep.feature_set(path, grace_s)
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


Guard = Callable[[Sequence[Path]], contextlib.AbstractContextManager[Sequence[Path]]]


class _Sweep:
    """One collection: where, whether for real, and what it took so far."""

    def __init__(self, store: StoreFolder, *, dry_run: bool) -> None:
        self.store = store
        self.dry_run = dry_run
        self.report = CleanReport(store=shown(store.path))
        self._sizes: dict[Path, int] = {}  # of shards of removed rows, which may lie behind a URL

    def do(
        self,
        lock: Path,
        name: str,
        find: Callable[[], Iterable[Path]],
        *,
        folder: Path | None = None,
        guard: Guard = contextlib.nullcontext,
    ) -> None:
        """Delete the files that `find` gives, and then `folder`, under a lock.

        Where another process holds it, `name` is reported as busy instead. Within `guard`, those
        that it gives of the files found are deleted.
        """
        if self.dry_run and not self.store.is_writable:
            self._list(find())  # nobody can be writing it
            return
        try:
            with exclusive(lock, purpose=_PURPOSE), guard(list(find())) as paths:
                self._list(paths)
                if not self.dry_run:
                    self._delete(paths, folder)
        except ConflictError:
            self.report.busy.append(name)

    def feature_set(self, path: Path, grace_s: float) -> None:
        """Sweep a feature set, but for what the holders of claims are writing."""
        lock = self.store.locks_path / f"{path.name}.lock"
        freed: dict[Path, int] = {}

        def find() -> Iterator[Path]:
            if (path / "zarr.json").exists():  # else begun and never made, or damaged
                folder = FeatureSetFolder(path)
                _taps(folder)
                for shard, files in _removed_shards(folder, self.report, grace_s):
                    freed.update(dict.fromkeys(files, shard))
                    self._sizes |= files
            yield from freed
            yield from _feature_set_waste(path)

        self.do(lock, path.name, find, guard=partial(self._unclaimed, path, freed))

    @contextlib.contextmanager
    def _unclaimed(
        self, path: Path, freed: Mapping[Path, int], waste: Sequence[Path]
    ) -> Iterator[Sequence[Path]]:
        """Choose what no claim protects, and keep it so for as long as the files are deleted."""
        if not waste:
            yield waste
            return
        with claims_lock(self.store, path.name, purpose=_PURPOSE):
            live = live_claims(self.store, path.name)
            if live:
                self.report.busy.append(path.name)
            yield [file for file in waste if _is_unclaimed(path, file, live, freed)]

    def _list(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self.report.removed.append(path.relative_to(self.store.path).as_posix())
            known = self._sizes.get(path)
            self.report.bytes += path.lstat().st_size if known is None else known

    def _delete(self, paths: Iterable[Path], folder: Path | None) -> None:
        for path in paths:
            with storage_errors(path):
                if path in self._sizes:
                    remove_file(path)
                else:
                    path.unlink(missing_ok=True)
                _remove_empty(path.parent)
        if folder is not None:
            with storage_errors(folder):
                shutil.rmtree(folder)


def _remove_empty(folder: Path) -> None:
    """Delete the folders of a shard, which bear numbers below `c`, if nothing is left in them."""
    if "c" not in folder.parts:
        return
    with contextlib.suppress(OSError):  # it is not empty, or gone
        while folder.name.isdecimal():
            folder.rmdir()
            folder = folder.parent


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


def _removed_shards(
    folder: FeatureSetFolder, report: CleanReport, grace_s: float
) -> Iterator[tuple[int, dict[Path, int]]]:
    """Give the shards in which nothing counts any more, with the bytes of each file."""
    tombstones = read_tombstones(folder)
    now = time.time()
    for one in occupied(folder, tombstones.rows):
        if not one.is_empty:
            continue
        places = np.searchsorted(tombstones.rows, one.rows[one.is_removed])
        wait_s = float(tombstones.removed_at[places].max()) + grace_s - now
        files = files_to_free(folder, one)
        if files and grace_s and wait_s > 0:
            report.waiting_bytes += sum(files.values())
            report.waiting_s = max(report.waiting_s, wait_s)
        elif files:
            yield one.shard, files


def _is_unclaimed(
    path: Path, file: Path, live: Mapping[int, Holder], freed: Mapping[Path, int]
) -> bool:
    """Tell whether a file that looked like waste still does, and nobody is about to commit it."""
    if file in freed:
        return freed[file] not in live
    if file.name.endswith(PARTIAL):
        return is_dead_partial(file, live)
    tap, _, _, shard, *_ = file.relative_to(path).parts
    ledger = path / "ledger" / tap / f"{int(shard):05d}.parquet"
    return int(shard) not in live and not ledger.exists()


def _taps(folder: FeatureSetFolder) -> dict[str, TapShape]:
    try:
        return folder.taps
    except _UNREADABLE as error:
        raise FormatError(f"{folder.path}/zarr.json is damaged. Restore it from a copy.") from error


def remove_feature_set(store_path: str | Path, name: str, *, dry_run: bool = False) -> CleanReport:
    """Delete one feature set for good; items, labels and runs stay.

    It is moved aside first, in one step: whatever happens then, it is gone or whole.

    Args:
        store_path: Store.
        name: Key, unique prefix of one, or name.
        dry_run: Only list.

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
    with (
        exclusive(store.locks_path / f"{folder.key}.lock", purpose=purpose),
        claims_lock(store, folder.key, purpose=purpose),
    ):
        _refuse_claimed(store, folder.key)
        report.bytes = sum(path.lstat().st_size for path in _files(folder.path))
        report.removed.append(folder.path.relative_to(store.path).as_posix())
        if dry_run:
            return report
        with storage_errors(folder.path):
            aside.parent.mkdir(exist_ok=True)
            folder.path.rename(aside)
            fsync_path(folder.path.parent)
            shutil.rmtree(aside)
            latency_path(store.path, folder.key).unlink(missing_ok=True)
            shutil.rmtree(claims_folder(store, folder.key))  # of processes that died
    return report


def _refuse_claimed(store: StoreFolder, key: str) -> None:
    for shard in live_claims(store, key):
        raise ConflictError(
            f"{holder_of(store, key, shard)}. Wait for it to finish, or stop it, and run this "
            "again."
        )
