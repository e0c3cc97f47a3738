"""Taking things away: what interrupted writes left, prepared targets, runs, feature sets."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featstore.errors import ConflictError
from featstore.feature_sets import find_feature_set
from featstore.files import PARTIAL, exclusive, storage_errors
from featstore.index import refresh
from featstore.store import FeatureSetFolder, StoreFolder, open_folder


@dataclass(kw_only=True, slots=True)
class CleanReport:
    """What was taken away, or would be."""

    store: str
    removed: list[str] = field(default_factory=list)  # relative to the store
    bytes: int = 0
    busy: list[str] = field(default_factory=list)  # feature sets left alone: somebody writes

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


def gc(store_path: str | Path, *, dry_run: bool = False, targets: bool = False) -> CleanReport:
    """Delete what no committed row, item or run needs.

    These are files of interrupted writes, and shards that were written but never committed.
    Feature sets that another process is writing are left alone.

    Args:
        store_path: Store.
        dry_run: Only list.
        targets: Delete the prepared targets too; the next training makes them again.

    Raises:
        NotFoundError: There is no store.
        StorageError: The disk refused.
    """
    store = open_folder(Path(store_path))
    report = CleanReport(store=str(store.path))
    for key in store.feature_set_keys():
        folder = store.feature_set(key)
        try:
            with exclusive(store.locks_path / f"{key}.lock", purpose="collecting waste"):
                _remove(store, _uncommitted(folder), report, dry_run=dry_run)
        except ConflictError:
            report.busy.append(key)
    for name in ("items", "labels"):
        for dataset in store.datasets():
            lock = store.locks_path / f"items-{dataset}.lock"
            with exclusive(lock, purpose="collecting waste", timeout_s=60):
                _remove(store, _partials(store.path / name / dataset), report, dry_run=dry_run)
    if targets and store.targets_path.is_dir():
        files = [path for path in store.targets_path.rglob("*") if path.is_file()]
        _remove(store, iter(files), report, dry_run=dry_run)
        if not dry_run:
            shutil.rmtree(store.targets_path)
    return report


def _partials(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob(f"*{PARTIAL}") if path.is_file())


def _uncommitted(folder: FeatureSetFolder) -> Iterator[Path]:
    yield from _partials(folder.path)
    for tap, shape in folder.taps.items():
        committed = set(folder.committed_shards(tap))
        for array in shape.arrays:
            chunks = folder.array_path(tap, array) / "c"
            for path in sorted(chunks.glob("*")):
                if path.name.isdigit() and int(path.name) not in committed:
                    files = [path] if path.is_file() else sorted(path.rglob("*"))
                    yield from (
                        file for file in files if file.is_file() and not file.name.endswith(PARTIAL)
                    )


def _remove(
    store: StoreFolder, paths: Iterator[Path], report: CleanReport, *, dry_run: bool
) -> None:
    for path in paths:
        report.removed.append(path.relative_to(store.path).as_posix())
        report.bytes += path.stat().st_size
        if not dry_run:
            with storage_errors(path):
                path.unlink()


def remove_feature_set(store_path: str | Path, name: str) -> CleanReport:
    """Delete one feature set for good; items, labels and runs stay.

    Args:
        store_path: Store.
        name: Key, unique prefix of one, or name.

    Raises:
        NotFoundError: There is no such feature set.
        ConflictError: Another process is writing it.
    """
    store = open_folder(Path(store_path))
    folder = find_feature_set(store, name)
    report = CleanReport(store=str(store.path))
    purpose = f"removing feature set {folder.key}"
    with exclusive(store.locks_path / f"{folder.key}.lock", purpose=purpose):
        report.bytes = sum(p.stat().st_size for p in folder.path.rglob("*") if p.is_file())
        report.removed.append(folder.path.relative_to(store.path).as_posix())
        with storage_errors(folder.path):
            # The attributes first: without them it is no feature set, whatever happens next.
            (folder.path / "zarr.json").unlink()
            shutil.rmtree(folder.path)
    refresh(store.path)
    return report
