"""The Pareto frontier: what nothing beats with fewer parameters and a smaller error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One way to adapt, by what it trains for an identity and how far off it then is."""

    name: str
    parameters: int
    rmse: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """Give the points that no other one beats, the fewest parameters first.

    A point is beaten by one that has no more parameters and no larger error, and less of one of
    them. Equal points all stay; a point without an error is beaten.
    """
    found = [point for point in points if math.isfinite(point.rmse)]
    kept = [point for point in found if not any(_beats(other, point) for other in found)]
    return sorted(kept, key=lambda point: (point.parameters, point.rmse, point.name))


def _beats(one: Point, other: Point) -> bool:
    is_no_worse = one.parameters <= other.parameters and one.rmse <= other.rmse
    return is_no_worse and (one.parameters < other.parameters or one.rmse < other.rmse)
