"""Metrics of boundary maps: cross-entropy, IoU, and F within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from featstore.errors import invalid
from heads.bootstrap import bootstrap_groups
from heads.metrics.base import Metric, Stats, named_metrics

THRESHOLDS = np.round(np.arange(1, 20) / 20, 2)
"""Probabilities from which a pixel counts as boundary: 0.05, 0.10 ... 0.95."""

_COUNTS = ("n_predicted", "n_predicted_hit", "n_truth", "n_truth_hit")
_TINY = 1e-7


def boundary_sums(
    probability_yx: np.ndarray,
    thin_yx: np.ndarray,
    wide_yx: np.ndarray,
    known_yx: np.ndarray,
    *,
    tolerance: float,
) -> dict[str, float | list[float]]:
    """Add up what boundary metrics need over one image.

    A predicted pixel is a hit within the tolerance of a true boundary, a true one within the
    tolerance of a predicted one. Predictions are not thinned, and a pixel may be hit by several.

    Args:
        probability_yx: (H, W), from 0 to 1.
        thin_yx: (H, W) bool, the boundaries.
        wide_yx: (H, W) bool, the boundaries as they are learned, widened.
        known_yx: (H, W) bool, the pixels that count.
        tolerance: Distance of a hit, as a share of the diagonal.
    """
    p = np.clip(probability_yx.astype(np.float64), _TINY, 1 - _TINY)
    radius = tolerance * math.hypot(*p.shape)
    near = _disk(radius)
    is_near_truth = ndimage.binary_dilation(thin_yx, structure=near)
    highest_near = ndimage.maximum_filter(np.where(known_yx, p, 0.0), footprint=near)
    ce = np.where(wide_yx, -np.log(p), -np.log1p(-p))[known_yx]
    is_on = p > 0.5
    counts = {
        "n_predicted": _above(p[known_yx]),
        "n_predicted_hit": _above(p[known_yx & is_near_truth]),
        "n_truth": np.full(len(THRESHOLDS), float((thin_yx & known_yx).sum())),
        "n_truth_hit": _above(highest_near[thin_yx & known_yx]),
    }
    return {
        "n_pixels": float(known_yx.sum()),
        "sum_ce": float(ce.sum()),
        "n_both": float((is_on & wide_yx & known_yx).sum()),
        "n_either": float(((is_on | wide_yx) & known_yx).sum()),
        **{name: values.tolist() for name, values in counts.items()},
    }


def _disk(radius: float) -> np.ndarray:
    reach = int(radius)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    return np.asarray(y * y + x * x <= radius * radius)


def _above(values: np.ndarray) -> np.ndarray:
    """Count the values above each threshold: float64."""
    ordered = np.sort(values)
    return (len(ordered) - np.searchsorted(ordered, THRESHOLDS, side="right")).astype(np.float64)


def summarise_boundaries(
    per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
) -> list[Metric]:
    """Give ``f_ods``, ``f_ois``, ``iou`` and ``ce`` over all pixels of all images together.

    ODS takes the threshold that is best for all images, OIS that of each image; counts are added
    over images before F is made, as in the BSDS benchmark.

    Raises:
        InvalidInputError: No image has a pixel to measure.

    Source:
        Arbelaez et al. 2011, Contour Detection and Hierarchical Image Segmentation, section 3.1.
    """
    counts = np.array([[line[name] for name in _COUNTS] for line in per_image], dtype=np.float64)
    names = ("n_pixels", "sum_ce", "n_both", "n_either")
    sums = np.array([[line[name] for name in names] for line in per_image], dtype=np.float64)
    if not len(sums) or not sums[:, 0].any():
        raise invalid("per_image", f"{len(sums)} images", "at least one with a known pixel")
    best = _f(counts).argmax(axis=1)
    own = counts[np.arange(len(counts)), :, best]
    columns = np.concatenate([sums, own, counts.reshape(len(counts), -1)], axis=1)

    def statistic(totals: np.ndarray) -> np.ndarray:
        pixels, ce, both, either = totals[:, :4].T
        of_all = _f(totals[:, 8:].reshape(len(totals), 4, -1)).max(axis=1)
        of_each = _f(totals[:, 4:8, None])[:, 0]
        iou = both / np.maximum(either, 1)
        return np.stack([of_all, of_each, iou, ce / np.maximum(pixels, 1)], axis=1)

    found = bootstrap_groups(columns, groups, statistic, seed=seed)
    return named_metrics(("f_ods", "f_ois", "iou", "ce"), found)


def _f(counts: np.ndarray) -> np.ndarray:
    """Give F of (rows, 4, thresholds) counts: (rows, thresholds)."""
    predicted, predicted_hit, truth, truth_hit = counts.transpose(1, 0, 2)
    precision = predicted_hit / np.maximum(predicted, 1)
    recall = truth_hit / np.maximum(truth, 1)
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)
