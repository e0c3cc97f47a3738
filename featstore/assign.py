"""Assignments: which row an image gets. Written before the first shard of it, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from featstore.geometry import clip_box, place
from featstore.items import FoundItem
from featstore.lines import Assigned, Lines, n_assigned_rows, publish_assignment
from featstore.lines import RowKey as RowKey  # callers name it beside `row_key`
from featstore.rejected import read_rejections
from featstore.store import (
    ASSIGNMENT_SCHEMA,
    FeatureSetFolder,
    crop_text,
    parse_crop,
    placement_columns,
)
from featstore.tombstones import rows_out_of_force
from featstore.types import Box
from featstore.views import HFLIP, PLAIN, is_jitter, jittered, region_of


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
    lines: Lines  # of the assignment, rows ascending
    committed: frozenset[str]  # taps
    rejected: Mapping[str, Mapping[RowKey, Mapping[str, Any]]]  # tap -> key -> ledger line
    removed: frozenset[int] = frozenset()  # rows that count for nothing


def shard_states(folder: FeatureSetFolder, taps: Iterable[str]) -> list[ShardState]:
    """Read how far every assigned shard is for `taps`, ascending."""
    present, rejections = read_rejections(folder, list(taps))
    rejected: dict[int, dict[str, dict[RowKey, Mapping[str, Any]]]] = {}
    for (tap, shard), told in rejections.items():
        if shard in present.get(tap, ()):
            by_key = {row_key(line): line for line in told}
            rejected.setdefault(shard, {})[tap] = by_key
    sets = {held: held for held in [frozenset(present)]}  # one object for the many equal ones
    removed = rows_out_of_force(folder)
    states = []
    for shard, lines in Assigned(folder).shards(folder.layout.shard_rows):
        committed = frozenset(tap for tap, shards in present.items() if shard in shards)
        states.append(
            ShardState(
                shard=shard,
                lines=lines,
                committed=sets.setdefault(committed, committed),
                rejected=rejected.get(shard, {}),
                removed=frozenset(removed.intersection(lines.rows.tolist()) if removed else ()),
            )
        )
    return states


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
    first = folder.layout.next_free_row(n_assigned_rows(folder))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(ordered))
    columns = list(zip(*(_values(framing, ordered[at]) for at in order.tolist()), strict=True))
    rows_column = pa.array(np.arange(first, first + len(ordered)))
    table = pa.Table.from_arrays(
        [
            rows_column if field.name == "row" else pa.array(columns[at - 1], field.type)
            for at, field in enumerate(ASSIGNMENT_SCHEMA)
        ],
        schema=ASSIGNMENT_SCHEMA,
    )
    publish_assignment(folder, table)


def assignment_line(framing: Framing, row: Wanted) -> dict[str, Any]:
    """Give the columns of one assigned row, but for its number."""
    return dict(zip(ASSIGNMENT_SCHEMA.names[1:], _values(framing, row), strict=True))


def _values(framing: Framing, row: Wanted) -> tuple[Any, ...]:
    """Give the values of one assigned row in the order of the columns, but for its number."""
    key, crop, view = row.key
    # Imported features may have no image; their frame then is the grid itself.
    source_hw = (row.found.height, row.found.width) if row.found.height else framing.input_hw
    # The image decides the place of a view that is drawn at random only.
    drawn_from = "" if view in (PLAIN, HFLIP) else key
    placement = _placement(framing, source_hw, crop, view, drawn_from)
    return (key, crop, view, *placement, row.dataset, row.found.item.path)


@lru_cache(maxsize=4096)
def _placement(
    framing: Framing, source_hw: tuple[int, int], crop: str, view: str, drawn_from: str
) -> tuple[Any, ...]:
    placement = place(
        source_hw=source_hw,
        crop=_region(view, drawn_from, crop, source_hw),
        input_hw=framing.input_hw,
        resize=framing.resize,
        view=view,
    )
    columns = placement_columns(placement)
    return tuple(columns[name] for name in ASSIGNMENT_SCHEMA.names if name in columns)


def _region(view: str, key: str, crop: str, source_hw: tuple[int, int]) -> Box:
    """Give the part of the image that a row shows; a jittered one may hang over."""
    box = parse_crop(crop)
    if is_jitter(view):
        assert box is not None, "`planning.select_items` refuses items without a crop"
        return jittered(view, key, box, source_hw)
    return region_of(view, key, clip_box(box, source_hw))
