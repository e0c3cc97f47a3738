"""Metrics of classes of whole images: accuracies and cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from featstore.errors import invalid
from heads.bootstrap import bootstrap_weights
from heads.metrics.base import Metric, Stats, named_metrics


def label_stats(log_p_n: np.ndarray, truth: int) -> dict[str, float | list[float]]:
    """Score one image.

    Args:
        log_p_n: (classes,) log-probabilities.
        truth: The true class.

    Returns:
        ``truth``, ``ce`` and ``rank``: how many classes are likelier than the true one, those as
        likely counting half.
    """
    own = log_p_n[truth]
    ties = float((log_p_n == own).sum() - 1)
    return {
        "truth": float(truth),
        "ce": float(-own),
        "rank": float((log_p_n > own).sum()) + ties / 2,
    }


def summarise_labels(
    per_image: Sequence[Stats], groups: Sequence[str | None], *, n_classes: int, seed: int = 0
) -> list[Metric]:
    """Give ``top1``, ``balanced`` (the mean over classes of their top1), ``top5``, ``ce``.

    top5 is left out where there are no more than five classes.

    Raises:
        InvalidInputError: There is no image.
    """
    if not per_image:
        raise invalid("per_image", "none", "at least one image")
    truth, ce, rank = (
        np.array([line[name] for line in per_image], dtype=np.float64)
        for name in ("truth", "ce", "rank")
    )
    index = (np.arange(len(truth)), truth.astype(np.int64))
    shape = (len(truth), n_classes)
    of_class = csr_array((np.ones(len(truth)), index), shape=shape)
    hits = csr_array(((rank < 1).astype(np.float64), index), shape=shape)
    top5 = (rank < 5) * 1.0 if n_classes > 5 else np.full(len(truth), np.nan)

    def statistic(weights: np.ndarray) -> np.ndarray:
        n = weights.sum(axis=1)
        counts, correct = weights @ of_class, weights @ hits
        is_there = counts > 0
        recall = np.divide(correct, counts, out=np.zeros_like(counts), where=is_there)
        balanced = recall.sum(axis=1) / is_there.sum(axis=1)
        columns = (correct.sum(axis=1) / n, balanced, weights @ top5 / n, weights @ ce / n)
        return np.stack(columns, axis=1)

    found = bootstrap_weights(groups, statistic, seed=seed)
    return named_metrics(("top1", "balanced", "top5", "ce"), found)
