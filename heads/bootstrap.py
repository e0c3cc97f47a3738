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
    group_sums = _sum_groups(sums, groups)
    value = statistic(sums.sum(axis=0, keepdims=True))[0]
    return _interval(
        value,
        lambda counts: statistic(counts @ group_sums),
        n_groups=len(group_sums),
        n_images=len(sums),
        n_resamples=n_resamples,
        level=level,
        seed=seed,
    )


def bootstrap_weights(
    groups: Sequence[str | None],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Do as `bootstrap_groups` for metrics that are no function of sums over images.

    Args:
        groups: Group of each image; an image of None is a group of its own.
        statistic: From how often each image counts, (resamples, images), to metrics, (resamples,
            metrics).
        n_resamples: How many draws, at least 1,000.
        level: Share of the draws between the bounds.
        seed: Of the draws.

    Raises:
        InvalidInputError: There is no image, or too few draws.
    """
    if not groups:
        raise invalid("groups", 0, "at least one image")
    index = np.array(_numbered(groups))
    return _interval(
        statistic(np.ones((1, len(index))))[0],
        lambda counts: statistic(counts[:, index]),
        n_groups=int(index.max()) + 1,
        n_images=len(index),
        n_resamples=n_resamples,
        level=level,
        seed=seed,
    )


def _interval(
    value: np.ndarray,
    of_counts: Callable[[np.ndarray], np.ndarray],
    *,
    n_groups: int,
    n_images: int,
    n_resamples: int,
    level: float,
    seed: int,
) -> Interval:
    if n_resamples < 1000 or not 0 < level < 1:
        given = (n_resamples, level)
        raise invalid("n_resamples, level", given, "at least 1,000, and between 0 and 1")
    if n_groups < 2:
        note = f"no interval: all {n_images} images are of one group"
        return Interval(value=value, low=None, high=None, note=note)
    drawn = _draw(n_groups, of_counts, n_resamples, np.random.default_rng(seed))
    low, high = _quantiles(drawn, [(1 - level) / 2, (1 + level) / 2])
    note = (
        f"{100 * level:g} % percentile bootstrap over {n_groups} groups "
        f"({n_images} images), {n_resamples} resamples, seed {seed}"
    )
    return Interval(value=value, low=low, high=high, note=note)


def _quantiles(drawn: np.ndarray, places: Sequence[float]) -> np.ndarray:
    """Give quantiles of each column; a draw without a value (a class it lost) does not count."""
    is_missing = np.isnan(drawn)
    if not is_missing.any():
        return np.quantile(drawn, places, axis=0)
    is_empty = is_missing.all(axis=0)
    found = np.nanquantile(np.where(is_empty, 0.0, drawn), places, axis=0)
    return np.where(is_empty, np.nan, found)


def _numbered(groups: Sequence[str | None]) -> list[int]:
    """Number the groups in the order they first appear; an image of None is its own."""
    number: dict[tuple[str, str | int], int] = {}
    return [
        number.setdefault(("image", i) if group is None else ("group", group), len(number))
        for i, group in enumerate(groups)
    ]


def _sum_groups(sums: np.ndarray, groups: Sequence[str | None]) -> np.ndarray:
    """Add up the images of each group, (groups, columns)."""
    index = _numbered(groups)
    group_sums = np.zeros((max(index) + 1, sums.shape[1]))
    np.add.at(group_sums, index, sums)
    return group_sums


def _draw(
    n_groups: int,
    of_counts: Callable[[np.ndarray], np.ndarray],
    n_resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Give (resamples, metrics) of how often each group is drawn."""
    shares = np.full(n_groups, 1 / n_groups)
    rows = max(1, _NUMBERS_AT_ONCE // n_groups)
    parts = []
    for start in range(0, n_resamples, rows):
        size = min(rows, n_resamples - start)
        counts = rng.multinomial(n_groups, shares, size=size).astype(np.float64)
        parts.append(of_counts(counts))
    return np.concatenate(parts)
