"""Metrics of class maps: cross-entropy, mean intersection over union, pixel accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featstore.errors import invalid
from heads.bootstrap import bootstrap_groups
from heads.metrics.base import Metric, Stats, named_metrics

PARTS = ("intersection", "predicted", "truth")


def class_sums(prediction_p: np.ndarray, truth_p: np.ndarray, n_classes: int) -> np.ndarray:
    """Count the pixels of each class: (3, n_classes), in the order of `PARTS`.

    Args:
        prediction_p: (pixels,), from 0 to below `n_classes`.
        truth_p: (pixels,), likewise.
        n_classes: How many classes.
    """
    hit = truth_p[prediction_p == truth_p]
    counts = (np.bincount(each, minlength=n_classes) for each in (hit, prediction_p, truth_p))
    return np.stack(list(counts))


def summarise_classes(
    per_image: Sequence[Stats],
    groups: Sequence[str | None],
    *,
    names: Sequence[str],
    seed: int = 0,
) -> list[Metric]:
    """Give the metrics of all pixels of all images together, as one confusion matrix would.

    A class that is neither predicted nor present is left out of the mean.

    Args:
        per_image: Of each image ``n_pixels_224`` and ``sum_ce_224``, and for the frames "224" and
            "native" lists over classes ``intersection_*``, ``predicted_*`` and ``truth_*``.
        groups: Group of each image, or None: intervals resample groups.
        names: Of the classes.
        seed: Of the resampling.

    Returns:
        ``miou@native``, ``miou@224``, ``ce``, ``accuracy@native`` and ``iou@native/CLASS``.

    Raises:
        InvalidInputError: No image has a pixel to measure.
    """
    n = len(names)
    rows = [
        [line["n_pixels_224"], line["sum_ce_224"], *_lists(line, "224"), *_lists(line, "native")]
        for line in per_image
    ]
    columns = np.array(rows, dtype=np.float64).reshape(len(rows), 2 + 6 * n)
    if not columns[:, 0].any():
        raise invalid("per_image", f"{len(rows)} images", "at least one with a valid pixel")

    def statistic(totals: np.ndarray) -> np.ndarray:
        small, native = (totals[:, 2 + 3 * n * k : 2 + 3 * n * (k + 1)] for k in (0, 1))
        iou = _iou(native, n)
        correct, truth = native[:, :n].sum(axis=1), native[:, 2 * n :].sum(axis=1)
        ce = totals[:, 1] / np.maximum(totals[:, 0], 1)
        means = (_mean(iou), _mean(_iou(small, n)), ce, correct / np.maximum(truth, 1))
        return np.concatenate([np.stack(means, axis=1), iou], axis=1)

    found = bootstrap_groups(columns, groups, statistic, seed=seed)
    fixed = ("miou@native", "miou@224", "ce", "accuracy@native")
    return named_metrics((*fixed, *(f"iou@native/{name}" for name in names)), found)


def _lists(line: Stats, frame: str) -> list[float]:
    values: list[float] = []
    for part in PARTS:
        found = line[f"{part}_{frame}"]
        assert isinstance(found, list)
        values += found
    return values


def _iou(totals: np.ndarray, n: int) -> np.ndarray:
    """Give (rows, n); NaN for a class that is neither predicted nor present."""
    hit, predicted, truth = totals[:, :n], totals[:, n : 2 * n], totals[:, 2 * n :]
    union = predicted + truth - hit
    return np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)


def _mean(iou: np.ndarray) -> np.ndarray:
    """Average over the classes that have a value."""
    known = ~np.isnan(iou)
    return np.where(known, iou, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
