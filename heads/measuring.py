"""Measuring predictions one by one, each at its label's own resolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featstore.errors import BadImageError, InvalidInputError
from featstore.types import Label, Placement
from heads.feed import Feed
from heads.labels import LabelSource
from heads.selection import Pair
from heads.targets import checked_label, in_threads
from heads.tasks import Task


def measure_window(
    task: Task,
    feed: Feed,
    window: Sequence[tuple[Pair, Label]],
    labels: LabelSource,
    predictions: np.ndarray,
) -> list[dict[str, Any] | str]:
    """Measure the predictions of some pairs in threads: what the task keeps, or why it cannot."""
    placements = feed.placements([pair.row for pair, _ in window])

    def call(index: int) -> Callable[[], dict[str, Any] | str]:
        pair, label = window[index]
        return lambda: _measure(
            task,
            predictions[index],
            placements[pair.row],
            label,
            labels.format_of(pair.dataset),
        )

    return list(in_threads(call(index) for index in range(len(window))))


def _measure(
    task: Task, prediction_chw: np.ndarray, placement: Placement, label: Label, dataset_format: str
) -> dict[str, Any] | str:
    try:
        values, valid = checked_label(label, placement)
    except InvalidInputError as error:
        return str(error)
    try:
        return task.measure(
            prediction_chw,
            placement=placement,
            values_hw=values,
            valid_hw=valid,
            dataset_format=dataset_format,
        )
    except BadImageError as error:  # this label alone; a protocol that fits none is no such error
        return str(error)
