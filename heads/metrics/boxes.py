"""COCO average precision of class-agnostic boxes, from short lists that each image keeps.

pycocotools matches the boxes of each image; its decisions are kept, so that precision can be
added up over any choice of images. The sum over all of them is what pycocotools itself gives.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from featstore.errors import invalid
from heads.bootstrap import bootstrap_weights
from heads.box_labels import COUNTED, CROWD
from heads.metrics.base import Metric, Stats, named_metrics

MAX_BOXES = 100
RANGES = {"all": (0.0, 1e10), "lg": (96.0**2, 1e10)}
"""Areas in square pixels that count, by name, as COCO has them."""

_RECALLS = np.linspace(0, 1, 101)
_N_IOUS = 10  # 0.50, 0.55 ... 0.95
_BITS = 2 ** np.arange(_N_IOUS)
_N_RESAMPLES = 1000


def box_stats(
    boxes_n4: np.ndarray,
    scores_n: np.ndarray,
    true_m4: np.ndarray,
    area_m: np.ndarray,
    *,
    frame: str,
    kind_m: np.ndarray | None = None,
    void_n: np.ndarray | None = None,
) -> dict[str, float | list[float]]:
    """Match the boxes of one image in one frame.

    A box that matches what is left out counts neither way, and a thing that is left out need not
    be found: COCO's rule of crowds, any number of boxes to a crowd, their overlap being the share
    of the box that lies on it; and VOC's of difficult things, which match as others do.

    Args:
        boxes_n4: (n, 4) x0, y0, x1, y1 in pixels of the frame, the highest score first.
        scores_n: (n,).
        true_m4: (m, 4), likewise.
        area_m: (m,) area of each thing, square pixels of the frame.
        frame: Name that ends the names of the lists.
        kind_m: (m,) `COUNTED`, `CROWD` or `DIFFICULT` of `heads.box_labels`; None: all count.
        void_n: (n,) share of each box on pixels without a label, which are taken as one crowd.

    Returns:
        For each range of areas, ``n_true_RANGE_FRAME``, and one number a box,
        ``hits_RANGE_FRAME`` and ``ignored_RANGE_FRAME``: a bit for each IoU from 0.50 to 0.95.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(iouType="bbox")
    judge.params.imgIds, judge.params.catIds = [1], [1]
    kinds = np.full(len(true_m4), COUNTED) if kind_m is None else kind_m
    judge._gts[1, 1] = [
        _thing(i + 1, box, area, int(kind))
        for i, (box, area, kind) in enumerate(zip(true_m4, area_m, kinds, strict=True))
    ]
    has_void = void_n is not None and bool((void_n > 0).any())
    if has_void:
        judge._gts[1, 1].append(_thing(len(true_m4) + 1, np.zeros(4), 0.0, CROWD))
    judge._dts[1, 1] = [
        {"id": i + 1, "bbox": _xywh(box), "score": float(s), "area": float(_area(box))}
        for i, (box, s) in enumerate(zip(boxes_n4, scores_n, strict=True))
    ]
    ious = judge.computeIoU(1, 1)
    if has_void:
        ious[:, -1] = void_n
    judge.ious = {(1, 1): ious}
    stats: dict[str, float | list[float]] = {}
    for name, limits in RANGES.items():
        found = judge.evaluateImg(1, 1, list(limits), MAX_BOXES)
        empty = np.zeros((_N_IOUS, 0), dtype=bool)
        hits = empty if found is None else np.asarray(found["dtMatches"]) > 0
        ignored = empty if found is None else np.asarray(found["dtIgnore"]) > 0
        n_true = 0 if found is None else int((np.asarray(found["gtIgnore"]) == 0).sum())
        stats[f"n_true_{name}_{frame}"] = float(n_true)
        stats[f"hits_{name}_{frame}"] = (_BITS @ hits).astype(float).tolist()
        stats[f"ignored_{name}_{frame}"] = (_BITS @ ignored).astype(float).tolist()
    return stats


def _thing(number: int, box: np.ndarray, area: float, kind: int) -> dict[str, Any]:
    """Describe a true box as pycocotools has it after its own preparation."""
    is_left_out = {"iscrowd": int(kind == CROWD), "ignore": int(kind != COUNTED)}
    return {"id": number, "bbox": _xywh(box), "area": float(area), **is_left_out}


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(each) for each in box)
    return [x0, y0, x1 - x0, y1 - y0]


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


class PooledBoxes:
    """The boxes of many images in one order of scores, ready to be weighted image by image."""

    def __init__(self, per_image: Sequence[Stats], suffix: str) -> None:
        def lists(name: str) -> list[np.ndarray]:
            return [np.asarray(line[name], dtype=np.float64) for line in per_image]

        scores = lists("scores")
        order = np.argsort(-np.concatenate([*scores, np.zeros(0)]), kind="mergesort")
        numbers = [np.full(len(each), i) for i, each in enumerate(scores)]
        self._image = np.concatenate([*numbers, np.zeros(0)]).astype(np.int64)[order]
        hits, ignored = (
            _bits(np.concatenate([*lists(f"{name}_{suffix}"), np.zeros(0)])[order])
            for name in ("hits", "ignored")
        )
        self._is_true, self._is_false = hits & ~ignored, ~hits & ~ignored
        self._n_true = np.array([line[f"n_true_{suffix}"] for line in per_image], dtype=np.float64)

    def precision(self, weight_i: np.ndarray) -> np.ndarray:
        """Give the average precision at each IoU, (10,), an image counting `weight_i` times.

        NaN where there is nothing to find.

        Source:
            `COCOeval.accumulate`: precision made falling, read off at 101 recalls.
        """
        n_true = float(weight_i @ self._n_true)
        if n_true == 0:
            return np.full(_N_IOUS, np.nan)
        weight = weight_i[self._image]
        true = np.cumsum(self._is_true * weight, axis=1)
        false = np.cumsum(self._is_false * weight, axis=1)
        precision = true / np.maximum(true + false, np.spacing(1))
        falling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        found = np.zeros(_N_IOUS)
        for number, (recall, line) in enumerate(zip(true / n_true, falling, strict=True)):
            place = np.searchsorted(recall, _RECALLS, side="left")
            found[number] = line[place[place < len(line)]].sum() / len(_RECALLS)
        return found


def _bits(numbers: np.ndarray) -> np.ndarray:
    """Give (10, n) bool."""
    return (numbers.astype(np.int64)[None] & _BITS[:, None]) > 0


def summarise_boxes(
    per_image: Sequence[Stats],
    groups: Sequence[str | None],
    *,
    metrics: Mapping[str, tuple[str, int | None]],
    seed: int = 0,
) -> list[Metric]:
    """Give average precisions over all images together.

    Args:
        per_image: Of each image ``scores`` and what `box_stats` gave.
        groups: Group of each image, or None: intervals resample groups.
        metrics: Name to the range and frame, such as "all_native", and the IoU's number, or
            None for the mean over all ten.
        seed: Of the resampling.

    Raises:
        InvalidInputError: There is no image.
    """
    if not per_image:
        raise invalid("per_image", "none", "at least one image")
    pools = {suffix: PooledBoxes(per_image, suffix) for suffix, _ in metrics.values()}

    def statistic(weights: np.ndarray) -> np.ndarray:
        lines = []
        for weight in weights:
            found = {suffix: pool.precision(weight) for suffix, pool in pools.items()}
            lines.append(
                [
                    found[suffix].mean() if number is None else found[suffix][number]
                    for suffix, number in metrics.values()
                ]
            )
        return np.array(lines)

    found = bootstrap_weights(groups, statistic, n_resamples=_N_RESAMPLES, seed=seed)
    return named_metrics(list(metrics), found)
