"""Supervision prepared once by a task and kept as memory-mapped arrays.

``targets/<key>/`` holds one ``.npy`` a name and ``targets.json``; `key` names everything that
decides the numbers. The folder is derived and may be deleted; a damaged one is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featstore.errors import InvalidInputError
from featstore.files import PARTIAL, exclusive, fsync_path, storage_errors, write_json
from featstore.hashing import short_key
from featstore.images import decode_label
from featstore.npy import load_npy
from featstore.types import Label, Placement, Progress, ProgressCallback, ignore_progress
from heads.box_labels import BOXES, box_table
from heads.keypoint_labels import KEYPOINTS, keypoint_record
from heads.labels import CLASS, LabelSource
from heads.selection import Pair

_ABOUT = "targets.json"
_LOCK_WAIT_S = 3600.0  # another process may be preparing the same targets
_CHECK_BYTES = 1 << 24


class Prepares(Protocol):
    """The part of a task that makes supervision out of a label."""

    def prepare(
        self,
        values: np.ndarray,
        valid: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Give arrays of a fixed shape and dtype for one label."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Prepared supervision by pair, and the pairs whose label could not be used."""

    arrays: Mapping[str, np.ndarray]  # (pairs, ...), memory-mapped
    slots: Mapping[tuple[int, str], int]
    left_out: Mapping[tuple[int, str], str]

    def batch(self, keys: Sequence[tuple[int, str]]) -> dict[str, np.ndarray]:
        """Give the arrays of some pairs, stacked in their order, and their slots as ``slot``."""
        slots = [self.slots[key] for key in keys]
        batch = {name: array[slots] for name, array in self.arrays.items()}
        return {**batch, "slot": np.array(slots, dtype=np.int64)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetJob:
    """What targets are made of: everything here that decides a number is in the key."""

    task: str  # registered name
    settings: Mapping[str, Any]
    output_hw: tuple[int, int]
    feature_set: str
    pairs: Sequence[Pair]
    placements: Mapping[int, Placement]
    labels: LabelSource

    def key(self) -> str:
        """Name the targets: 16 hex digits."""
        ordered = self.ordered()
        return short_key(
            {
                "format": 1,
                "task": self.task,
                "settings": dict(self.settings),
                "output_hw": list(self.output_hw),
                "feature_set": self.feature_set,
                "pairs": [[pair.row, pair.item] for pair in ordered],
                "geometry": [asdict(self.placements[pair.row]) for pair in ordered],
                "labels": {
                    name: self.labels.version(name)
                    for name in sorted({pair.dataset for pair in ordered})
                },
            }
        )

    def ordered(self) -> list[Pair]:
        """Give the pairs in the order of the arrays, each once."""
        return sorted({pair.key: pair for pair in self.pairs}.values(), key=lambda pair: pair.key)


def prepare_targets(
    folder: Path,
    job: TargetJob,
    task: Prepares,
    *,
    progress: ProgressCallback = ignore_progress,
) -> Targets:
    """Open the targets of `job` below `folder`, preparing them if they are not there.

    Raises:
        InvalidInputError: No label of the job can be used.
        StorageError: The disk refused.
    """
    path = folder / job.key()
    found = _open(path)
    if found is None:
        lock = folder / ".locks" / f"{path.name}.lock"
        with exclusive(lock, purpose="preparing targets", timeout_s=_LOCK_WAIT_S):
            found = _open(path)  # another process may have made them while this one waited
            if found is None:
                if path.exists():
                    progress(Progress(stage="labels", message=f"{path} is damaged; made anew."))
                _write(path, job, task, progress)
                found = _open(path)
    assert found is not None
    if not found.slots:
        reasons = "; ".join(sorted(set(found.left_out.values()))[:2])
        raise InvalidInputError(
            f"None of the {len(found.left_out)} {job.labels.kind} labels can be used: {reasons}"
        )
    return found


def _open(path: Path) -> Targets | None:
    """Open checked targets; None where they are missing or damaged."""
    try:
        about = json.loads((path / _ABOUT).read_text())
        arrays = {name: _open_array(path, name, entry) for name, entry in about["arrays"].items()}
        return Targets(
            arrays=arrays,
            slots={(row, item): slot for row, item, slot in about["slots"]},
            left_out={(row, item): reason for row, item, reason in about["left_out"]},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open_array(path: Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    array = load_npy(path / f"{name}.npy", mmap_mode="r")
    if _checksum(array) != entry["crc32"] or list(array.shape) != entry["shape"]:
        raise ValueError(f"{name} is damaged")
    return array


def _checksum(array: np.ndarray) -> int:
    flat = array.reshape(-1).view(np.uint8)
    value = 0
    for start in range(0, flat.size, _CHECK_BYTES):
        value = zlib.crc32(flat[start : start + _CHECK_BYTES].data, value)
    return value


def _write(path: Path, job: TargetJob, task: Prepares, progress: ProgressCallback) -> None:
    with storage_errors(path):
        for leftover in (path, *path.parent.glob(f"{path.name}.*{PARTIAL}")):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
        temporary.mkdir(parents=True)
        try:
            _fill(temporary, job, task, progress)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(path.parent)


def _fill(path: Path, job: TargetJob, task: Prepares, progress: ProgressCallback) -> None:
    pairs = job.ordered()
    arrays: dict[str, np.memmap[Any, Any]] = {}
    slots: list[list[Any]] = []
    left_out: dict[tuple[int, str], str] = {
        pair.key: f"Its {job.labels.kind} label cannot be read." for pair in pairs
    }
    for done, (slot, result) in enumerate(_prepared(pairs, job, task), 1):
        key = pairs[slot].key
        if isinstance(result, str):
            left_out[key] = result
            continue
        del left_out[key]
        slots.append([*key, slot])
        for name, value in result.items():
            if name not in arrays:
                shape = (len(pairs), *value.shape)
                arrays[name] = np.lib.format.open_memmap(
                    path / f"{name}.npy", mode="w+", dtype=value.dtype, shape=shape
                )
            arrays[name][slot] = value
        if done % 50 == 0 or done == len(pairs):
            progress(Progress(stage="labels", done=done, total=len(pairs)))
    about: dict[str, Any] = {}
    for name, array in arrays.items():
        array.flush()
        fsync_path(path / f"{name}.npy")
        about[name] = {"shape": list(array.shape), "crc32": _checksum(array)}
    lost = [[*key, reason] for key, reason in sorted(left_out.items())]
    write_json(path / _ABOUT, {"arrays": about, "slots": sorted(slots), "left_out": lost})


def _prepared(
    pairs: Sequence[Pair], job: TargetJob, task: Prepares
) -> Iterator[tuple[int, dict[str, np.ndarray] | str]]:
    """Yield slot and arrays, or slot and the reason why not, preparing in threads."""
    by_item: dict[tuple[str, str], list[int]] = {}
    for slot, pair in enumerate(pairs):
        by_item.setdefault((pair.dataset, pair.item), []).append(slot)

    def calls() -> Iterator[Callable[[], list[tuple[int, dict[str, np.ndarray] | str]]]]:
        for dataset in sorted({dataset for dataset, _ in by_item}):
            items = [item for name, item in by_item if name == dataset]
            for item, label in job.labels.iterate(dataset, items):
                slots = by_item[dataset, item]
                yield lambda label=label, slots=slots: [  # type: ignore[misc]
                    (slot, _prepare(pairs[slot], label, job, task)) for slot in slots
                ]

    for found in in_threads(calls()):
        yield from found


def _prepare(
    pair: Pair, label: Label, job: TargetJob, task: Prepares
) -> dict[str, np.ndarray] | str:
    placement = job.placements[pair.row]
    try:
        values, valid = checked_label(label, placement)
        return task.prepare(values, valid, placement, job.output_hw)
    except InvalidInputError as error:
        return str(error)


def checked_label(label: Label, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Decode a label that must be of its image's size and hold a value.

    A class of the whole image is its name, in an array without axes; boxes are a table, see
    `heads.box_labels.box_table`; keypoints are a record without axes, see
    `heads.keypoint_labels.keypoint_record`.

    Raises:
        InvalidInputError: It does not decode, is of another size, or holds no valid value.
    """
    if label.kind == CLASS:
        return np.array(label.data.decode()), np.array(True)
    if label.kind == BOXES:
        table = box_table(label.data.decode())
        return table, np.ones(table.shape, dtype=bool)
    if label.kind == KEYPOINTS:
        return keypoint_record(label.data.decode()), np.array(True)
    values, valid = decode_label(label)
    if values.shape != placement.source_hw:
        raise InvalidInputError(
            f"Its {label.kind} label is {values.shape[0]}x{values.shape[1]} and the image is "
            f"{placement.source_hw[0]}x{placement.source_hw[1]}."
        )
    if not valid.any():
        raise InvalidInputError(f"Its {label.kind} label holds no valid value.")
    return values, valid


def in_threads(calls: Iterator[Callable[[], Any]]) -> Iterator[Any]:
    """Run calls in threads and yield their results in order, few of them waiting at a time."""
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: list[Future[Any]] = []
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > 2 * n_threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
