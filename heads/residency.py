"""Rows kept in memory, on the device or beside it, so that they are read from the store once.

Kept rows hold the stored numbers in the stored dtype: what is served from here is, bit for bit,
what a read gives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featstore.errors import InvalidInputError, invalid

CACHES = ("auto", "ram", "gpu", "none")
SHARE = 0.5
"""Of the free memory: as much as `auto` takes."""
_GB = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One stored array as a tensor."""

    item_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.item_shape)) * self.dtype.itemsize


def choose_place(cache: str, device: torch.device, n_bytes: int) -> torch.device | None:
    """Choose where rows are kept; None: nowhere.

    Args:
        cache: "auto" is the device of the head where half of its free memory is enough, else the
            main memory likewise, else nowhere; "ram", "gpu", "none".
        device: Where the head computes.
        n_bytes: Of all rows that would be kept.

    Raises:
        InvalidInputError: It is none of these, the head does not compute on a GPU, or the memory
            that was asked for is too small.
    """
    if cache not in CACHES:
        raise invalid("cache", cache, f"one of {', '.join(CACHES)}")
    cpu = torch.device("cpu")
    if cache == "none":
        return None
    if cache == "auto":
        places = [device] if device.type == "cpu" else [device, cpu]
        return next((place for place in places if n_bytes <= SHARE * free_bytes(place)), None)
    if cache == "gpu" and device.type == "cpu":
        raise invalid("cache", cache, "ram or none where the head computes on the CPU")
    place = device if cache == "gpu" else cpu
    free = free_bytes(place)
    if n_bytes > free:
        raise InvalidInputError(
            f"The rows take {n_bytes / _GB:.1f} GB and {free / _GB:.1f} GB are free for "
            f"--cache {cache}. Use --cache auto or none, or fewer taps."
        )
    return place


def free_bytes(place: torch.device) -> int:
    """Measure how much memory is free on a device, or for this process."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    if place.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(_free_in_system(), _free_in_group())


def _free_in_system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        # Not Linux. What is free at this moment would leave out what the system can give back.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_in_group(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Measure what a container may still take; the page cache can be given back, so it counts."""
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - used + int(stat.get("file", 0))
    except (OSError, ValueError):  # no limit reads as "max"
        return 2**62


class Residency:
    """Rows of some arrays in memory, filled as they are first read."""

    def __init__(
        self, rows: Sequence[int], specs: Mapping[str, ArraySpec], place: torch.device
    ) -> None:
        self.place = place
        self._slots = {row: slot for slot, row in enumerate(dict.fromkeys(rows))}
        self._is_kept = np.zeros(len(self._slots), bool)
        # Memory is only taken from the system as rows are written.
        self._tensors = {
            name: torch.empty((len(self._slots), *spec.item_shape), dtype=spec.dtype, device=place)
            for name, spec in specs.items()
        }

    def is_for(self, rows: Sequence[int]) -> bool:
        """Tell whether all rows were announced, so that they can be kept."""
        return all(row in self._slots for row in rows)

    def missing(self, rows: Sequence[int]) -> list[int]:
        """List those of `rows`, all announced, that are not kept yet, each once."""
        return [row for row in dict.fromkeys(rows) if not self._is_kept[self._slots[row]]]

    def put(self, rows: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Keep rows, all announced."""
        slots = [self._slots[row] for row in rows]
        target = torch.tensor(slots, device=self.place)
        for name, kept in self._tensors.items():
            kept[target] = tensors[name].to(self.place)
        self._is_kept[slots] = True

    def get(self, rows: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Give kept rows in their order, at `place`."""
        slots = torch.tensor([self._slots[row] for row in rows], device=self.place)
        return {name: self._tensors[name].index_select(0, slots) for name in names}
