"""Metrics of keypoints, from the distances that each image (one animal) keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from featstore.errors import invalid
from heads.bootstrap import bootstrap_weights
from heads.metrics.base import Metric, Stats, named_metrics

SHARE = 0.05
"""Of what a distance is measured against: a keypoint that is nearer is correct."""

UNKNOWN = -1.0
"""Stands in lists of distances where a keypoint is not marked, and for what cannot be told."""

OKS_LIMITS = np.linspace(0.5, 0.95, 10)
READINGS = {"pck@0.05": "of_diagonal", "pck@0.05u": "distance", "pck@0.05box": "of_box"}
"""Names of PCK, by what its distances are measured against, see `keypoint_stats`."""

_RECALLS = np.linspace(0, 1, 101)
_N_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One animal's keypoints, predicted and true, in the order of the skeleton."""

    frame_k2: np.ndarray  # predicted less true, in shares of the input frame
    source_k2: np.ndarray  # likewise, in source pixels
    is_marked: np.ndarray  # (K,) bool
    diagonal: float  # of what the input shows of the image, in source pixels
    box_side: float  # the longer one of the animal's box, in source pixels; NaN: not known
    area: float  # of the animal, in square source pixels; NaN: not known


def keypoint_stats(
    judged: Judged,
    *,
    sigmas: Sequence[float] | None,
    scale_k: np.ndarray | None,
    confidence_k: np.ndarray | None,
) -> dict[str, float | list[float]]:
    """Keep what metrics need of one animal.

    Returns:
        Lists of one number a keypoint, `UNKNOWN` where it is not marked: ``distance`` in shares
        of the input frame (each axis of its side), ``of_diagonal`` and ``of_box`` in source pixels
        over `Judged.diagonal` and `Judged.box_side`; with scales also ``scale``. And ``oks``,
        COCO's object keypoint similarity (`UNKNOWN` without sigmas or area), and ``score``, the
        mean confidence, 1 without scales.

    Source:
        `COCOeval.computeOks` of pycocotools.
    """
    pixels = np.hypot(*judged.source_k2.T)
    stats: dict[str, float | list[float]] = {
        "distance": _known(np.hypot(*judged.frame_k2.T), judged.is_marked),
        "of_diagonal": _known(pixels / judged.diagonal, judged.is_marked),
        "of_box": _known(pixels / judged.box_side, judged.is_marked & (judged.box_side > 0)),
        "oks": UNKNOWN,
        "score": 1.0 if confidence_k is None else float(np.mean(confidence_k)),
    }
    if sigmas is not None and judged.area > 0:
        spread = judged.area * (2 * np.asarray(sigmas)) ** 2
        similar = np.exp(-(pixels**2) / (2 * spread))
        stats["oks"] = float(similar[judged.is_marked].mean())
    if scale_k is not None:
        stats["scale"] = _known(scale_k, judged.is_marked)
    return stats


def _known(values: np.ndarray, is_known: np.ndarray) -> list[float]:
    known: list[float] = np.where(is_known, values, UNKNOWN).astype(np.float64).tolist()
    return known


def summarise_keypoints(
    per_image: Sequence[Stats],
    groups: Sequence[str | None],
    *,
    names: Sequence[str],
    seed: int = 0,
) -> list[Metric]:
    """Give metrics over all marked keypoints of all animals together.

    Args:
        per_image: What `keypoint_stats` gave of each.
        groups: Group of each, the image where several animals are in one: intervals resample them.
        names: Of the keypoints.
        seed: Of the resampling.

    Returns:
        ``rmse``, the root of the mean squared distance, and ``distance``, the mean one, in shares
        of the input frame; ``pck@0.05`` over the diagonal of what the input shows, ``pck@0.05u``
        over the side of the input frame, ``pck@0.05box`` over the longer side of the animal's box;
        with sigmas ``oks_ap``, ``oks_ap50`` and ``oks_ap75``; with scales ``aurc``, the area under
        the curve of mean distance against coverage, the surest first, which a scale that tells
        nothing leaves at ``distance``; and ``pck@0.05/NAME`` of each keypoint.

    Raises:
        InvalidInputError: There is no image.
    """
    if not per_image:
        raise invalid("per_image", "none", "at least one image")
    parts: list[tuple[list[str], Callable[[np.ndarray], np.ndarray]]] = [_of_distances(per_image)]
    if any(line["oks"] != UNKNOWN for line in per_image):
        parts.append((["oks_ap", "oks_ap50", "oks_ap75"], _SimilarityPrecision(per_image)))
    if "scale" in per_image[0]:
        parts.append((["aurc"], _RiskCoverage(per_image)))
    parts.append(_of_each_keypoint(per_image, names))

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.concatenate([of_weights(weights) for _, of_weights in parts], axis=1)

    found = bootstrap_weights(groups, statistic, n_resamples=_N_RESAMPLES, seed=seed)
    return named_metrics([name for named, _ in parts for name in named], found)


def _lists(per_image: Sequence[Stats], name: str) -> np.ndarray:
    return np.array([line[name] for line in per_image], dtype=np.float64)


def _of_distances(
    per_image: Sequence[Stats],
) -> tuple[list[str], Callable[[np.ndarray], np.ndarray]]:
    """Give the metrics that follow from sums over keypoints."""
    distance = _lists(per_image, "distance")
    is_marked = distance >= 0
    sums = [np.where(is_marked, distance**2, 0).sum(axis=1), (is_marked * distance).sum(axis=1)]
    counts = [is_marked.sum(axis=1)] * 2
    for list_name in READINGS.values():
        values = _lists(per_image, list_name)
        sums.append(((values >= 0) & (values <= SHARE)).sum(axis=1))
        counts.append((values >= 0).sum(axis=1))

    def statistic(weights: np.ndarray) -> np.ndarray:
        means = _ratio(weights @ np.stack(sums, axis=1), weights @ np.stack(counts, axis=1))
        means[:, 0] = np.sqrt(means[:, 0])
        return means

    return ["rmse", "distance", *READINGS], statistic


def _of_each_keypoint(
    per_image: Sequence[Stats], names: Sequence[str]
) -> tuple[list[str], Callable[[np.ndarray], np.ndarray]]:
    shares = _lists(per_image, "of_diagonal")
    is_correct = ((shares >= 0) & (shares <= SHARE)).astype(np.float64)
    is_marked = (shares >= 0).astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        return _ratio(weights @ is_correct, weights @ is_marked)

    return [f"pck@0.05/{name}" for name in names], statistic


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Divide; NaN where nothing is counted."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


class _SimilarityPrecision:
    """COCO's average precision where each animal was predicted from its own box.

    A prediction is judged against the animal of its box, and is right where their similarity
    reaches the limit. Animals of one score are ranked together, so that their order decides
    nothing: where there are no scales, all of them.

    Source:
        `COCOeval.accumulate`: precision made falling, read off at 101 recalls.
    """

    def __init__(self, per_image: Sequence[Stats]) -> None:
        oks, score = (
            np.array([line[name] for line in per_image], float) for name in ("oks", "score")
        )
        known = np.flatnonzero(oks != UNKNOWN)
        self._order = known[np.argsort(-score[known], kind="stable")]
        self._ends = _ends_of_ties(score[self._order])
        self._is_right = oks[self._order] >= OKS_LIMITS[:, None]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        precision = np.array([self._precision(weight[self._order]) for weight in weights])
        return np.stack([precision.mean(axis=1), precision[:, 0], precision[:, 5]], axis=1)

    def _precision(self, weight: np.ndarray) -> np.ndarray:
        """Give the average precision at each limit: (10,)."""
        total = weight.sum()
        if not total:
            return np.full(len(OKS_LIMITS), np.nan)
        right = np.cumsum(self._is_right * weight, axis=1)[:, self._ends]
        told = np.cumsum(weight)[self._ends]
        precision = right / np.maximum(told, np.spacing(1))
        falling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        found = np.zeros(len(OKS_LIMITS))
        for number, (recall, line) in enumerate(zip(right / total, falling, strict=True)):
            place = np.searchsorted(recall, _RECALLS, side="left")
            found[number] = line[place[place < len(line)]].sum() / len(_RECALLS)
        return found


def similarity_precision(oks: Sequence[float], scores: Sequence[float]) -> float:
    """Give COCO's average precision of some animals, each of which counts once.

    Args:
        oks: Object keypoint similarity of each, `UNKNOWN` where it cannot be told.
        scores: Mean confidence of each.

    Returns:
        NaN where no similarity is known.
    """
    lines: list[Stats] = [{"oks": o, "score": s} for o, s in zip(oks, scores, strict=True)]
    return float(_SimilarityPrecision(lines)(np.ones((1, len(lines))))[0, 0])


class _RiskCoverage:
    """The area under the mean distance of the surest keypoints, against their share of all."""

    def __init__(self, per_image: Sequence[Stats]) -> None:
        scale, distance = (_lists(per_image, name) for name in ("scale", "distance"))
        number, column = np.nonzero(distance >= 0)
        scales = scale[number, column]
        order = np.argsort(scales, kind="stable")
        self._image = number[order]
        self._distance = distance[number, column][order]
        self._ends = _ends_of_ties(scales[order])

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return np.array([[self._area(weight[self._image])] for weight in weights])

    def _area(self, weight: np.ndarray) -> float:
        covered = np.cumsum(weight)[self._ends]
        if not len(covered) or not covered[-1]:
            return float("nan")
        risk = np.cumsum(weight * self._distance)[self._ends] / np.maximum(covered, 1e-300)
        return float(np.diff(covered, prepend=0.0) @ risk / covered[-1])


def _ends_of_ties(ordered: np.ndarray) -> np.ndarray:
    """Give the last place of each run of equal numbers."""
    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])
