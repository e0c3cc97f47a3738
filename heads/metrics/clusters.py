"""Metrics of instance discrimination: how well clusters of embeddings match the instances."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from featstore.errors import invalid
from heads.bootstrap import bootstrap_groups
from heads.metrics.base import Metric, Stats, named_metrics

MIN_LARGE = 3  # large instances that make an image count for the metrics "@large"


def cluster(embedding_pd: np.ndarray, n_clusters: int, *, restarts: int) -> np.ndarray:
    """Cluster pixels by k-means, the best of several starts: (pixels,) int32 from 0.

    Args:
        embedding_pd: (pixels, dim).
        n_clusters: How many; fewer pixels make fewer clusters.
        restarts: How often to start.
    """
    count = min(n_clusters, len(embedding_pd))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
        found = KMeans(count, n_init=restarts, random_state=0).fit_predict(embedding_pd)
    return np.asarray(found, dtype=np.int32)


def cluster_stats(
    embedding_pd: np.ndarray, ids_p: np.ndarray, *, large_pixels: float, restarts: int
) -> dict[str, float | list[float]]:
    """Score the clusters of one image by the adjusted Rand index over its instances.

    Args:
        embedding_pd: (pixels, dim), the known pixels.
        ids_p: (pixels,), 0 for background.
        large_pixels: More pixels than this make an instance large.
        restarts: Of k-means.

    Returns:
        ``n_instances``, ``n_large``, ``ari_fg`` (instances alone are clustered, into as many
        clusters) and ``ari_all`` (all is clustered, background being one more cluster); both are
        measured on the pixels of instances, and are 0 where there are fewer than two.
    """
    found, counts = np.unique(ids_p[ids_p > 0], return_counts=True)
    stats: dict[str, float | list[float]] = {
        "n_instances": float(len(found)),
        "n_large": float((counts > large_pixels).sum()),
        "ari_fg": 0.0,
        "ari_all": 0.0,
    }
    if len(found) < 2:
        return stats
    is_thing = ids_p > 0
    of_things = cluster(embedding_pd[is_thing], len(found), restarts=restarts)
    n_all = len(found) + int((~is_thing).any())
    of_all = cluster(embedding_pd, n_all, restarts=restarts)[is_thing]
    truth = ids_p[is_thing]
    stats["ari_fg"] = float(adjusted_rand_score(truth, of_things))
    stats["ari_all"] = float(adjusted_rand_score(truth, of_all))
    return stats


def summarise_clusters(
    per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
) -> list[Metric]:
    """Give the mean over images with two instances or more, and "@large" with three large ones.

    Raises:
        InvalidInputError: No image shows two instances.
    """
    names = ("n_instances", "n_large", "ari_fg", "ari_all")
    lines = np.array([[line[name] for name in names] for line in per_image], dtype=np.float64)
    lines = lines.reshape(-1, 4)
    counts = lines[:, :1] >= 2
    large = counts & (lines[:, 1:2] >= MIN_LARGE)
    if not counts.any():
        raise invalid("per_image", f"{len(lines)} images", "at least one with two instances")
    columns = np.concatenate([counts, large, lines[:, 2:] * counts, lines[:, 2:] * large], axis=1)

    def statistic(totals: np.ndarray) -> np.ndarray:
        n, n_large = totals[:, :1], totals[:, 1:2]
        missing = np.full((len(totals), 2), np.nan)
        every = np.divide(totals[:, 2:4], n, out=missing.copy(), where=n > 0)
        of_large = np.divide(totals[:, 4:6], n_large, out=missing, where=n_large > 0)
        return np.concatenate([every, of_large], axis=1)

    found = bootstrap_groups(columns.astype(np.float64), groups, statistic, seed=seed)
    return named_metrics(("ari_fg", "ari_all", "ari_fg@large", "ari_all@large"), found)
