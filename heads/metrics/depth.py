"""Metrics of depth, from sums that each image keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featstore.errors import invalid
from heads.bootstrap import bootstrap_groups
from heads.metrics.base import Metric, Stats, named_metrics

DEPTH_SUMS = (
    "n_pixels",
    "sum_squared_error",  # (p - y)^2, square metres
    "sum_relative_error",  # |p - y| / y
    "sum_log10_error",  # |log10 p - log10 y|
    "sum_log_difference",  # ln p - ln y
    "sum_squared_log_difference",  # (ln p - ln y)^2
    "n_delta1",  # pixels with max(p / y, y / p) < 1.25
    "n_delta2",  # < 1.25^2
    "n_delta3",  # < 1.25^3
)
DEPTH_METRICS = ("rmse", "delta1", "delta2", "delta3", "absrel", "log10", "silog")


def depth_sums(prediction_p: np.ndarray, truth_p: np.ndarray) -> dict[str, float | list[float]]:
    """Add up what depth metrics need over the pixels of one image.

    Args:
        prediction_p: (pixels,), positive metres.
        truth_p: (pixels,), positive metres.
    """
    prediction = np.asarray(prediction_p, dtype=np.float64)
    truth = np.asarray(truth_p, dtype=np.float64)
    error = prediction - truth
    log_difference = np.log(prediction) - np.log(truth)
    size = np.abs(log_difference)
    sums = (
        error.size,
        (error * error).sum(),
        (np.abs(error) / truth).sum(),
        size.sum() / np.log(10),
        log_difference.sum(),
        (log_difference * log_difference).sum(),
        *((size < power * np.log(1.25)).sum() for power in (1, 2, 3)),
    )
    return {name: float(value) for name, value in zip(DEPTH_SUMS, sums, strict=True)}


def depth_metrics(sums: np.ndarray) -> np.ndarray:
    """Turn sums into metrics, row by row.

    ``silog`` is ``100 sqrt(mean(g^2) - mean(g)^2)`` with ``g = ln p - ln y``: the standard
    deviation of the log error, in per cent.

    Args:
        sums: (rows, 9), in the order of `DEPTH_SUMS`, of one image a row or of many.

    Returns:
        (rows, 7) float64, in the order of `DEPTH_METRICS`.

    Source:
        Eigen et al. 2014, arXiv:1406.2283; silog as in Lee et al. 2019, arXiv:1907.10326 (BTS).
    """
    n, squared, relative, log10, log_difference, squared_log, *deltas = sums.T
    mean_log = log_difference / n
    variance = np.maximum(squared_log / n - mean_log**2, 0)  # rounding can bring it below 0
    columns = (
        np.sqrt(squared / n),
        *(delta / n for delta in deltas),
        relative / n,
        log10 / n,
        100 * np.sqrt(variance),
    )
    return np.stack(columns, axis=1)


def summarise_depth(
    per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
) -> list[Metric]:
    """Give each depth metric as the mean over images, and pooled over all pixels.

    An image without a single pixel to measure is left out of both.

    Args:
        per_image: Sums of each image, by the names of `DEPTH_SUMS`.
        groups: Group of each image, or None: intervals resample groups.
        seed: Of the resampling.

    Returns:
        ``rmse``, ``delta1`` ... and then ``rmse_pooled``, ``delta1_pooled`` ...

    Raises:
        InvalidInputError: No image has a pixel to measure.
    """
    all_sums = np.array([[stats[name] for name in DEPTH_SUMS] for stats in per_image], np.float64)
    kept = [i for i, sums in enumerate(all_sums) if sums[0] > 0]
    if not kept:
        raise invalid("per_image", f"{len(all_sums)} images", "at least one with a valid pixel")
    sums = all_sums[kept]
    n_metrics = len(DEPTH_METRICS)
    columns = np.concatenate([depth_metrics(sums), np.ones((len(sums), 1)), sums], axis=1)

    def statistic(totals: np.ndarray) -> np.ndarray:
        means = totals[:, :n_metrics] / totals[:, n_metrics : n_metrics + 1]
        return np.concatenate([means, depth_metrics(totals[:, n_metrics + 1 :])], axis=1)

    found = bootstrap_groups(columns, [groups[i] for i in kept], statistic, seed=seed)
    names = (*DEPTH_METRICS, *(f"{name}_pooled" for name in DEPTH_METRICS))
    return named_metrics(names, found)
