"""Confidence intervals by resampling whole groups, from sums that each image adds to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from featstore.errors import invalid

_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Values with their bounds; `note` says how the bounds were made, or why there are none."""

    value: np.ndarray  # (metrics,) float64
    low: np.ndarray | None
    high: np.ndarray | None
    note: str


def bootstrap_groups(
    sums: np.ndarray,
    groups: Sequence[str | None],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Give metrics of all images, with percentile bootstrap intervals over groups of images.

    Images of one group (one video, scene or animal) are alike, so that resampling images would
    give intervals far too narrow. A group is drawn whole, as many groups as there are, with
    replacement. With one group nothing can be said about others, and the bounds are None.

    Args:
        sums: (images, columns) float64: what each image adds to sums over images.
        groups: Group of each image; an image of None is a group of its own.
        statistic: From sums over images, (resamples, columns), to metrics, (resamples, metrics).
        n_resamples: How many draws, at least 1,000.
        level: Share of the draws between the bounds.
        seed: Of the draws; the same seed gives the same bounds on every machine.

    Raises:
        InvalidInputError: There is no image, too few draws, or a group is missing.

    Source:
        Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile).
    """
    if len(sums) == 0 or len(groups) != len(sums):
        raise invalid("groups", len(groups), f"one group for each of {len(sums)} images, not 0")
    if n_resamples < 1000 or not 0 < level < 1:
        given = (n_resamples, level)
        raise invalid("n_resamples, level", given, "at least 1,000, and between 0 and 1")
    value = statistic(sums.sum(axis=0, keepdims=True))[0]
    group_sums = _sum_groups(sums, groups)
    if len(group_sums) < 2:
        note = f"no interval: all {len(sums)} images are of one group"
        return Interval(value=value, low=None, high=None, note=note)
    drawn = _draw(group_sums, statistic, n_resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    note = (
        f"{100 * level:g} % percentile bootstrap over {len(group_sums)} groups "
        f"({len(sums)} images), {n_resamples} resamples, seed {seed}"
    )
    return Interval(value=value, low=low, high=high, note=note)


def _sum_groups(sums: np.ndarray, groups: Sequence[str | None]) -> np.ndarray:
    """Add up the images of each group, (groups, columns), in the order groups first appear."""
    number: dict[tuple[str, str | int], int] = {}
    index = [
        number.setdefault(("image", i) if group is None else ("group", group), len(number))
        for i, group in enumerate(groups)
    ]
    group_sums = np.zeros((len(number), sums.shape[1]))
    np.add.at(group_sums, index, sums)
    return group_sums


def _draw(
    group_sums: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    n_resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Give (resamples, metrics): how often each group is drawn, times its sums."""
    n_groups = len(group_sums)
    shares = np.full(n_groups, 1 / n_groups)
    rows = max(1, _NUMBERS_AT_ONCE // n_groups)
    parts = []
    for start in range(0, n_resamples, rows):
        size = min(rows, n_resamples - start)
        counts = rng.multinomial(n_groups, shares, size=size).astype(np.float64)
        parts.append(statistic(counts @ group_sums))
    return np.concatenate(parts)
