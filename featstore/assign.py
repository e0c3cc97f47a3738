"""Assignments: which row an image gets. Written before the first shard of it, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from featstore.files import next_number, write_parquet
from featstore.geometry import clip_box, place
from featstore.items import FoundItem
from featstore.ledger import read_ledger
from featstore.store import (
    ASSIGNMENT_SCHEMA,
    FeatureSetFolder,
    crop_text,
    parse_crop,
    placement_columns,
)
from featstore.types import Box
from featstore.views import is_jitter, jittered, region_of

RowKey = tuple[str, str, str]
"""Image key, crop and view: what a row is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """How images are placed into the backbone's input."""

    input_hw: tuple[int, int]
    resize: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One row that an extraction wants, and an item that gives its image."""

    dataset: str
    found: FoundItem
    view: str

    @property
    def key(self) -> RowKey:
        """What the row is."""
        return (self.found.image_key, crop_text(self.found.item.crop), self.view)


def wanted_rows(
    found: Mapping[str, Sequence[FoundItem]], views: Sequence[str]
) -> dict[RowKey, Wanted]:
    """List the rows that items of several data sets need; equal images share a row."""
    wanted: dict[RowKey, Wanted] = {}
    for dataset, entries in found.items():
        for entry in entries:
            for view in views:
                row = Wanted(dataset=dataset, found=entry, view=view)
                wanted.setdefault(row.key, row)
    return wanted


def row_key(line: Mapping[str, Any]) -> RowKey:
    """Give the key of one line of an assignment or a ledger."""
    return (line["image_key"], line["crop"], line["view"])


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardState:
    """What the ledgers of one shard say, tap by tap."""

    shard: int
    lines: tuple[Mapping[str, Any], ...]  # of the assignment, rows ascending
    committed: frozenset[str]  # taps
    rejected: Mapping[str, Mapping[RowKey, Mapping[str, Any]]]  # tap -> key -> ledger line


def shard_states(folder: FeatureSetFolder, taps: Iterable[str]) -> list[ShardState]:
    """Read how far every assigned shard is for `taps`, ascending."""
    by_shard: dict[int, list[Mapping[str, Any]]] = {}
    for line in folder.assignments().to_pylist():
        by_shard.setdefault(folder.layout.shard_of(line["row"]), []).append(line)
    present = {tap: set(folder.committed_shards(tap)) for tap in taps}
    return [
        ShardState(
            shard=shard,
            lines=tuple(lines),
            committed=frozenset(tap for tap, shards in present.items() if shard in shards),
            rejected={
                tap: _rejected(folder, tap, shard)
                for tap, shards in present.items()
                if shard in shards
            },
        )
        for shard, lines in sorted(by_shard.items())
    ]


def _rejected(folder: FeatureSetFolder, tap: str, shard: int) -> dict[RowKey, Mapping[str, Any]]:
    table = read_ledger(folder, tap, shard).to_pylist()
    return {row_key(line): line for line in table if line["status"] != "ok"}


def assign(
    folder: FeatureSetFolder, framing: Framing, rows: Iterable[Wanted], *, seed: int
) -> None:
    """Give new rows to `rows`, from the first untouched shard on, in a seeded random order.

    The order does not depend on the order of the files, so storage is already well mixed and
    equal on every machine. Call it under the feature set's writer lock.
    """
    ordered = sorted(rows, key=lambda row: row.key)
    if not ordered:
        return
    assigned = folder.assignments()
    used = 0 if assigned.num_rows == 0 else int(assigned["row"][-1].as_py()) + 1
    first = folder.layout.next_free_row(used)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(ordered))
    lines = [
        {"row": first + place_in_order, **assignment_line(framing, ordered[int(position)])}
        for place_in_order, position in enumerate(order)
    ]
    number = next_number(folder.assignment_paths())
    path = folder.path / "assignments" / f"{number:05d}.parquet"
    write_parquet(path, pa.Table.from_pylist(lines, schema=ASSIGNMENT_SCHEMA))


def assignment_line(framing: Framing, row: Wanted) -> dict[str, Any]:
    """Give the columns of one assigned row, but for its number."""
    key, crop, view = row.key
    # Imported features may have no image; their frame then is the grid itself.
    source_hw = (row.found.height, row.found.width) if row.found.height else framing.input_hw
    placement = place(
        source_hw=source_hw,
        crop=_region(row, source_hw),
        input_hw=framing.input_hw,
        resize=framing.resize,
        view=view,
    )
    return {
        "image_key": key,
        "crop": crop,
        "view": view,
        **placement_columns(placement),
        "dataset": row.dataset,
        "path": row.found.item.path,
    }


def _region(row: Wanted, source_hw: tuple[int, int]) -> Box:
    """Give the part of the image that a row shows; a jittered one may hang over."""
    key, text, view = row.key
    crop = parse_crop(text)
    if is_jitter(view):
        assert crop is not None, "`planning.select_items` refuses items without a crop"
        return jittered(view, key, crop, source_hw)
    return region_of(view, key, clip_box(crop, source_hw))
