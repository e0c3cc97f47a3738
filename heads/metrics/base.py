"""The record of a metric, and what an image keeps for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heads.bootstrap import Interval

Stats = Mapping[str, float | list[float]]
"""What one image adds to the metrics of many: numbers, and lists such as one number a class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number with its 95 % interval; without one, the bounds are None and `note` says why."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


def named_metrics(names: Sequence[str], found: Interval) -> list[Metric]:
    """Name the values of an interval in their order; a metric that is NaN is left out."""
    return [
        Metric(
            name=name,
            value=float(found.value[i]),
            low=None if found.low is None else float(found.low[i]),
            high=None if found.high is None else float(found.high[i]),
            note=found.note,
        )
        for i, name in enumerate(names)
        if not math.isnan(found.value[i])
    ]
