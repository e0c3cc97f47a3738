"""What a store takes on the disk, part by part, and what of it could be freed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featstore.cleanup import gc
from featstore.occupancy import removed_bytes
from featstore.remote.location import refuse_remote
from featstore.store import StoreFolder, locate, open_folder
from featstore.tombstones import read_tombstones

_TOP = ("items", "labels", "targets", "runs")


@dataclass(kw_only=True, slots=True)
class FeatureSetUsage:
    """Bytes of one feature set."""

    key: str
    name: str
    bytes: int
    taps: dict[str, dict[str, int]]  # tap -> array -> bytes of its shards
    tables: int  # ledgers, assignments and tombstones
    other: int  # the norm, the tail, attributes
    removed_rows: int
    removed_bytes: int  # of removed rows, not freed yet
    compact_bytes: int  # of these, in shards that hold other rows: `compact` moves those


@dataclass(kw_only=True, slots=True)
class Usage:
    """Bytes of a store."""

    store: str
    bytes: int
    feature_sets: list[FeatureSetUsage] = field(default_factory=list)
    items: dict[str, int] = field(default_factory=dict)  # by data set
    labels: dict[str, int] = field(default_factory=dict)  # by "data set/kind", thumbnails too
    targets: int = 0
    runs: int = 0
    index: int = 0
    other: int = 0
    waste: int = 0  # that `gc` would free now
    waiting: int = 0  # that it will once the grace period is over
    removed: int = 0  # of removed rows, not freed yet: part of it in `waste` and `waiting`

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


def measure_usage(store_path: str | Path) -> Usage:
    """Measure what a store takes on the disk.

    Raises:
        NotFoundError: There is no store.
        FormatError: The attributes of a feature set, or its tombstones, are damaged.
    """
    store = open_folder(locate(store_path))
    refuse_remote(store.path, "Measuring the parts of a store")
    freeable = gc(store.path, dry_run=True)
    usage = Usage(
        store=str(store.path),
        bytes=_below(store.path),
        items=_by_data_set(store.path / "items"),
        labels=_labels(store.path / "labels"),
        targets=_below(store.targets_path),
        runs=_below(store.runs_path),
        index=_sizes(store.path.glob(f"{store.index_path.name}*")),
        waste=freeable.bytes,
        waiting=freeable.waiting_bytes,
    )
    for key in store.feature_set_keys():
        usage.feature_sets.append(_feature_set(store, key))
    sets = _below(store.path / "feature_sets")
    named = sum(_below(store.path / name) for name in _TOP) + sets + usage.index
    own = sum(one.bytes for one in usage.feature_sets)
    usage.other = usage.bytes - named + sets - own
    usage.removed = sum(one.removed_bytes for one in usage.feature_sets)
    return usage


def _feature_set(store: StoreFolder, key: str) -> FeatureSetUsage:
    folder = store.feature_set(key)
    taps = {
        tap: {array: _below(folder.array_path(tap, array)) for array in shape.arrays}
        for tap, shape in folder.taps.items()
    }
    tables = sum(_below(folder.path / name) for name in ("ledger", "assignments", "tombstones"))
    total = _below(folder.path)
    removed = read_tombstones(folder).rows
    whole, part = removed_bytes(folder, removed)
    return FeatureSetUsage(
        key=key,
        name=str(folder.attributes["name"]),
        bytes=total,
        taps=taps,
        tables=tables,
        other=total - tables - sum(sum(arrays.values()) for arrays in taps.values()),
        removed_rows=len(removed),
        removed_bytes=whole + part,
        compact_bytes=part,
    )


def _by_data_set(folder: Path) -> dict[str, int]:
    return {path.name: _below(path) for path in sorted(folder.glob("*/"))}


def _labels(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*/*.parquet")):
        name = f"{path.parent.name}/{path.stem.rpartition('-')[0]}"
        found[name] = found.get(name, 0) + path.stat().st_size
    return found


def _below(folder: Path) -> int:
    return _sizes(folder.rglob("*"))


def _sizes(paths: Iterable[Path]) -> int:
    return sum(path.lstat().st_size for path in paths if path.is_file() or path.is_symlink())
