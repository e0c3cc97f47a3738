"""What an extraction has to do: which rows are there, which shards lack which taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from featstore.assign import (
    Framing,
    RowKey,
    ShardState,
    Wanted,
    assign,
    assignment_line,
    shard_states,
    wanted_rows,
)
from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError
from featstore.feature_sets import grow_arrays
from featstore.items import BadImage, FoundItem, skeleton_of
from featstore.plan import RunOptions
from featstore.shard_job import Source
from featstore.shared_shards import ShardTask
from featstore.store import FeatureSetFolder
from featstore.taps import missing_taps
from featstore.types import Item, Reader
from featstore.views import HFLIP, is_jitter


def select_items(readers: Sequence[Reader], options: RunOptions) -> dict[str, list[Item]]:
    """Choose the items of each data set by split and limit.

    A limit draws a seeded random part, so that every split has its share.

    Raises:
        InvalidInputError: Nothing is left, a split exists nowhere, mirror images are asked for
            of keypoints that nobody can mirror, or jittered boxes of items without a box.
    """
    _check_mirrors(readers, options.views)
    selected: dict[str, list[Item]] = {}
    seen: set[str] = set()
    for reader in readers:
        items = list(reader.items())
        seen |= {split for item in items for split in item.splits}
        if options.splits:
            wanted = set(options.splits)
            items = [item for item in items if wanted & set(item.splits)]
        selected[reader.name] = items
    _check_splits(options, seen, selected)
    _check_boxes(selected, options.views)
    return _limited(selected, options)


def _check_mirrors(readers: Sequence[Reader], views: Sequence[str]) -> None:
    """Refuse mirror images of keypoints where nobody knows which are left and right of a pair."""
    for reader in readers if HFLIP in views else ():
        skeleton = skeleton_of(reader)
        if skeleton is not None and skeleton.swaps is None:
            raise InvalidInputError(
                f"The keypoints of {reader.name!r} must be named left and right, as in left_eye "
                f"and right_eye, for a mirror image exchanges them. Got "
                f"{', '.join(skeleton.names)}; leave out --views hflip, or rename them."
            )


def _check_boxes(selected: Mapping[str, Sequence[Item]], views: Sequence[str]) -> None:
    """Refuse jittered boxes of items that show a whole image: there is no box to move."""
    jitters = [view for view in views if is_jitter(view)]
    for name, items in selected.items() if jitters else ():
        whole = next((item.path for item in items if item.crop is None), None)
        if whole is not None:
            raise InvalidInputError(
                f"{jitters[0]} moves the crop around a box, and items of {name!r} show the whole "
                f"image, such as {whole}. Leave out --views jitter, or use crops:N, parts of it."
            )


def _check_splits(
    options: RunOptions, seen: set[str], selected: Mapping[str, Sequence[Item]]
) -> None:
    absent = sorted(set(options.splits) - seen)
    if absent:
        raise InvalidInputError(
            f"No image is in split {absent[0]!r}. Splits here: {', '.join(sorted(seen))}."
        )
    if not any(selected.values()):
        raise InvalidInputError(
            f"No images in {', '.join(selected)}. Check the path given to --data."
        )


def _limited(selected: dict[str, list[Item]], options: RunOptions) -> dict[str, list[Item]]:
    total = sum(len(items) for items in selected.values())
    if options.limit is None or options.limit >= total:
        return selected
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(total)
    chosen = set(order[: options.limit].tolist())
    kept: dict[str, list[Item]] = {}
    start = 0
    for name, items in selected.items():
        kept[name] = [item for i, item in enumerate(items, start) if i in chosen]
        start += len(items)
    return kept


@dataclass(kw_only=True, slots=True)
class Work:
    """What there is to do, and what is there already."""

    tasks: list[ShardTask]
    wanted: Mapping[RowKey, Wanted]
    reused: set[RowKey] = field(default_factory=set)  # complete for every tap
    rejected: dict[RowKey, str] = field(default_factory=dict)  # key -> reason
    awaited: set[RowKey] = field(default_factory=set)  # have a row that was never tried
    untried: set[RowKey] = field(default_factory=set)  # did not decode, and may do now


def plan_work(
    folder: FeatureSetFolder,
    framing: Framing,
    taps: Sequence[str],
    found: Mapping[str, Sequence[FoundItem]],
    *,
    options: RunOptions,
    tried: Mapping[RowKey, bool],
) -> Work:
    """Assign rows to what has none, grow the arrays, and list the shards to do.

    Call it under the feature set's writer lock, which is no place to read images: where some of
    the rejected ones are not in `tried`, nothing is assigned, and `untried` of the answer names
    them.

    A shard is done whole, so that a tap added later covers all of its rows. An image that was
    rejected because it did not decode is tried again, and gets a new row if it does now, unless
    another process gave it one already.

    Args:
        folder: Feature set.
        framing: How images are placed into the input.
        taps: Taps to store.
        found: Items by data set.
        options: Views and seed.
        tried: Whether images that did not decode do now.
    """
    wanted = wanted_rows(found, options.views)
    states = shard_states(folder, taps)
    work = Work(tasks=[], wanted=wanted)
    unassigned = dict(wanted)
    for state in states:
        _sort_rows(state, taps, wanted, unassigned, work)
    for key, reason in list(work.rejected.items()):
        if key in work.reused | work.awaited:
            del work.rejected[key]
        elif reason.startswith(_RETRY) and key not in tried:
            work.untried.add(key)
        elif reason.startswith(_RETRY) and tried[key]:
            unassigned[key] = wanted[key]
            del work.rejected[key]
    if work.untried:
        return work
    if unassigned:
        assign(folder, framing, unassigned.values(), seed=options.seed)
        known = {state.shard for state in states}
        states += [s for s in shard_states(folder, taps) if s.shard not in known]
    grow_arrays(folder, taps)
    work.tasks = _tasks(states, taps, wanted, work.reused)
    work.rejected = {key: why.removeprefix(_RETRY) for key, why in work.rejected.items()}
    return work


_RETRY = "\x00"
"""Marks, inside this file only, a reason that may pass: the image did not decode."""


def _sort_rows(
    state: ShardState,
    taps: Sequence[str],
    wanted: Mapping[RowKey, Wanted],
    unassigned: dict[RowKey, Wanted],
    work: Work,
) -> None:
    """File each wanted row of one shard under reused, rejected or still to do."""
    is_complete = not missing_taps(taps, state.committed)
    for row, key in state.lines.keyed():
        if key not in wanted or row in state.removed:
            continue
        unassigned.pop(key, None)
        rejections = [by_key[key] for by_key in state.rejected.values() if key in by_key]
        if rejections:
            first = rejections[0]
            mark = _RETRY if first["pixel_hash"] is None else ""
            work.rejected[key] = mark + str(first["reason"])
        elif is_complete:
            work.reused.add(key)
        else:
            work.awaited.add(key)


def decodes(source: Source, row: Wanted, framing: Framing) -> bool:
    """Tell whether an image that was rejected can be read now."""
    try:
        source.load(assignment_line(framing, row))
    except (BadImageError, OSError):
        return False
    return True


def _tasks(
    states: Sequence[ShardState],
    taps: Sequence[str],
    wanted: Mapping[RowKey, Wanted],
    reused: set[RowKey],
) -> list[ShardTask]:
    return [
        ShardTask(shard=state.shard, lines=state.lines, taps=lacking, removed=state.removed)
        for state in states
        if (lacking := missing_taps(taps, state.committed))
        and any(
            key in wanted and key not in reused
            for row, key in state.lines.keyed()
            if row not in state.removed
        )
    ]


def bad_rows(
    work: Work, rejected: Mapping[RowKey, str], *, only_new: bool = False
) -> list[BadImage]:
    """List the wanted rows that were rejected: in `rejected`, and, if not only_new, before."""
    reasons = dict(rejected) if only_new else {**work.rejected, **rejected}
    return [
        BadImage(
            dataset=work.wanted[key].dataset, path=work.wanted[key].found.item.path, reason=reason
        )
        for key, reason in sorted(reasons.items())
        if key in work.wanted
    ]


def open_readers(data: Sequence[str | Reader]) -> list[Reader]:
    """Open the data sets; their names must differ.

    Raises:
        InvalidInputError: None is given, or two have one name.
    """
    if not data:
        raise InvalidInputError("No data set was given. Name one with --data FORMAT:PATH.")
    readers = [open_dataset(one) if isinstance(one, str) else one for one in data]
    names = [reader.name for reader in readers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidInputError(
            f"Two data sets are named {twice[0]!r}. Name them apart: --data NAME=FORMAT:PATH."
        )
    return readers
