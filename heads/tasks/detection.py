"""Class-agnostic detection: a centre map and a size map, read as boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from featstore.errors import BadImageError, InvalidInputError, invalid
from featstore.geometry import place, to_source
from featstore.types import Placement
from heads.base import Head, shift_output_biases
from heads.box_labels import BOXES, COUNTED, CROWD, DIFFICULT
from heads.metrics import Metric, Stats
from heads.metrics.boxes import MAX_BOXES, box_stats, summarise_boxes
from heads.side_by_side import SideBySide
from heads.tasks.base import TASKS, PreparedTargets, Task, TaskSettings
from heads.tasks.colours import class_colours
from heads.tasks.regions import (
    VOID,
    Boxes,
    boxes_of,
    ids_in_frame,
    place_boxes,
    to_frame,
    void_shares,
)

FRAME = 448
"""Side of the frame, in pixels, in which the paper measures areas and boxes."""

TRUTHS = ("instances", BOXES)
_REACH = 0.01  # of the frame: how far from a centre sizes are learned
_SPREAD = 0.12  # of the root of the area: standard deviation of a centre's peak
_METRICS: dict[str, tuple[str, int | None]] = {
    "ap@native": ("all_native", None),
    "ap50@native": ("all_native", 0),
    "ap_lg@native": ("lg_native", None),
    "ap@448": ("all_448", None),
    "ap_lg@448": ("lg_448", None),
}
_PROTOCOLS = {  # boxes, areas, what is left out
    "instances": (
        "of the visible pixels of each instance",
        "of the visible pixels",
        "pixels without a label, as COCO's crowds",
    ),
    BOXES: (
        "as the data set names them",
        "as the data set names them, else of the box",
        "crowds by COCO's rule, difficult boxes by VOC's",
    ),
}
_SHOWN = 0.3  # score from which a box is drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionOptions:
    """Choices of the detection task; how maps are read as boxes is as in the release.

    Centres are rare: their head begins at `centre_bias`, a probability of 0.1, as CenterNet's does;
    from 0.5 on the first steps are spent on falling. A peak of at least `min_score` is a box; of
    two boxes that overlap by more than `max_overlap` (IoU) the better one stays.

    `truth` is where true boxes come from: "instances" are those of the visible pixels in a map,
    "boxes" those that the data set names (VOC's XML, COCO's JSON), masks or not.
    """

    truth: str = "instances"
    centre_bias: float = -2.19
    min_score: float = 0.01
    max_overlap: float = 0.5

    def __post_init__(self) -> None:
        if self.truth not in TRUTHS:
            raise invalid("truth", self.truth, f"one of {', '.join(TRUTHS)}")
        for name in ("min_score", "max_overlap"):
            if not 0 < getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "between 0 and 1")


@TASKS.register("detection.v1")
class DetectionTask(Task):
    """Learn centres by focal loss and sizes by L1, with a head of its own for each.

    What a data set leaves out (pixels without a label, crowds, difficult boxes) is not learned, and
    boxes found there count neither way. `predict` gives the probability of a
    centre and the width and height of its box, as shares of the frame; `at_source` gives boxes,
    (n, 5) float32: x0, y0, x1, y1 in source pixels and the score, the best first.

    Source:
        Zhou et al. 2019, arXiv:1904.07850 (CenterNet); Lueddecke & Ecker, TMLR 2025; HEADS.md 1.5.
    """

    OPTIONS = DetectionOptions
    label_kind = "instances"
    meaning = "probability of a centre, width and height as shares of the frame"
    primary_metric = "ap@native"
    is_lower_better = False

    def __init__(self, **options: Any) -> None:
        self.options = DetectionOptions(**options)
        self.label_kind = self.options.truth
        self.n_outputs = 3
        self.settings = TaskSettings()

    @classmethod
    def label_kind_for(cls, options: Mapping[str, Any]) -> str:
        """Give what the option `truth` names."""
        return str(options["truth"])

    @property
    def readouts(self) -> tuple[int, ...]:
        """Give centres one head and sizes another."""
        return (1, 2)

    def start(self, head: Head) -> None:
        """Let the head of the centres begin at `centre_bias`."""
        assert isinstance(head, SideBySide)
        centres = head.heads[0]
        shift_output_biases(centres, self.options.centre_bias / len(centres.output_biases()))

    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Draw a peak at the centre of each box, and its size around the centre.

        Returns:
            ``centre`` (Ho, Wo) float16, -1 where nothing is known, and ``size`` (2, Ho, Wo)
            float16, width and height as shares of the frame, 0 where none is learned.

        Raises:
            BadImageError: Nothing of the frame is known.
        """
        if self.options.truth == BOXES:
            known = _known_around(self._truth(values_hw, valid_hw, placement), placement, output_hw)
        else:
            known = ids_in_frame(values_hw, valid_hw, placement, output_hw) != VOID
        boxes = self._truth(values_hw, valid_hw, placement).of_kind(COUNTED)
        centre = np.zeros(output_hw, dtype=np.float32)
        size = np.zeros((2, *output_hw), dtype=np.float32)
        nearest = np.full(output_hw, np.inf)
        y, x = ((np.arange(n) + 0.5) / n for n in output_hw)
        least = 0.5 / max(output_hw)  # a narrower peak would fall between the cells
        for (x0, y0, x1, y1), area in zip(boxes.frame, boxes.frame_area, strict=True):
            squared = ((y - (y0 + y1) / 2) ** 2)[:, None] + ((x - (x0 + x1) / 2) ** 2)[None]
            spread = max(_SPREAD * np.sqrt(area) * 224 / max(output_hw), least)
            np.maximum(centre, np.exp(-squared / (2 * spread**2)), out=centre)
            is_near = squared <= np.minimum(
                nearest, max(_REACH**2, 1.001 * squared.min())
            )  # or the next
            nearest = np.where(is_near, squared, nearest)
            size[:, is_near] = np.array([[x1 - x0], [y1 - y0]])
        return {
            "centre": np.where(known, centre, VOID).astype(np.float16),
            "size": np.where(known, size, 0).astype(np.float16),
        }

    def fit_to(self, targets: PreparedTargets) -> None:
        """Check that there is something to learn.

        Raises:
            InvalidInputError: No image shows an instance.
        """
        if not any(image.any() for image in targets.arrays["size"]):
            raise InvalidInputError("No label shows an instance. Use labels with at least one.")

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean focal loss of the centres plus the mean L1 of the sizes."""
        from torchvision.ops import sigmoid_focal_loss  # other tasks do without torchvision

        centre = targets["centre"][:, None].to(output.dtype)
        known = centre >= 0
        focal = sigmoid_focal_loss(output[:, :1], centre.clamp(min=0), alpha=0.25, gamma=2)
        of_centres = focal.masked_fill(~known, 0.0).sum() / known.sum()
        size = targets["size"].to(output.dtype)
        has_size = size > 0
        error = (output[:, 1:] - size).abs().masked_fill(~has_size, 0.0)
        loss: Tensor = of_centres + error.sum() / has_size.sum().clamp(min=1)
        return loss

    def predict(self, output: Tensor) -> Tensor:
        """Give probabilities of a centre, and widths and heights as shares of the frame."""
        return torch.cat([output[:, :1].sigmoid(), output[:, 1:].clamp(0, 1)], dim=1)

    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Read peaks as boxes: (n, 5) float32, cut at what the input showed of the image.

        A peak is the largest of its 3 x 3 cells.
        """
        from torchvision.ops import nms

        output_hw = (prediction_chw.shape[1], prediction_chw.shape[2])
        score_yx = np.where(_covered(placement, output_hw), prediction_chw[0], 0.0)
        is_peak = score_yx == ndimage.maximum_filter(score_yx, size=3, mode="constant")
        has_size = prediction_chw[1:].min(axis=0) > 0
        rows, columns = np.nonzero(is_peak & has_size & (score_yx > self.options.min_score))
        score = score_yx[rows, columns]
        width, height = prediction_chw[1:, rows, columns]
        x, y = (columns + 0.5) / output_hw[1], (rows + 0.5) / output_hw[0]
        frame = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
        best = np.argsort(-score, kind="stable")
        source = _to_source(frame[best], placement)
        boxes = torch.from_numpy(np.ascontiguousarray(source))
        kept = nms(
            boxes, torch.from_numpy(score[best].astype(np.float64)), self.options.max_overlap
        )
        chosen = kept.numpy()[:MAX_BOXES]
        found = np.concatenate([source[chosen], score[best][chosen][:, None]], axis=1)
        return found.astype(np.float32)

    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float | list[float]]:
        """Match boxes in source pixels and in a frame of 448 x 448."""
        found = self.at_source(prediction_chw, placement).astype(np.float64)
        truth = self._truth(values_hw, valid_hw, placement)
        in_frame, _ = to_frame(found[:, :4], placement)
        scores = found[:, 4]
        is_map = self.options.truth != BOXES
        left_out = {
            "kind_m": truth.kind,
            "void_n": void_shares(valid_hw, found[:, :4]) if is_map else None,
        }
        native = box_stats(
            found[:, :4], scores, truth.source, truth.area, frame="native", **left_out
        )
        small = box_stats(
            FRAME * in_frame,
            scores,
            FRAME * truth.frame,
            FRAME**2 * truth.frame_area,
            frame="448",
            **left_out,
        )
        return {"scores": scores.tolist(), **native, **small}

    def summarise(
        self, per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
    ) -> list[Metric]:
        """Give COCO's average precisions, in source pixels and in the 448 frame."""
        return summarise_boxes(per_image, groups, metrics=_METRICS, seed=seed)

    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe boxes, frames and how peaks are read."""
        boxes, areas, left_out = _PROTOCOLS[self.options.truth]
        return {
            "label_sources": sorted(set(label_sources)),
            "boxes": f"{boxes}, one class",
            "left out": left_out,
            "resolution": "*@native: source pixels; *@448: the input frame as 448 x 448",
            "areas": f"{areas}; lg is above 96^2",
            "reading": f"peaks of 3 x 3 cells above {self.options.min_score:g}, NMS at "
            f"{self.options.max_overlap:g}, best {MAX_BOXES}",
            "average": "COCO, over all images; matched by pycocotools",
            "loss": "focal (0.25, 2) of centres plus L1 of sizes",
        }

    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Draw the boxes with a score of at least 0.3, or the best one, on the image."""
        shown = prediction[prediction[:, 4] >= _SHOWN]
        return _draw_boxes(image_hwc, (shown if len(shown) else prediction[:1])[:, :4])

    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Draw the predicted and the true boxes."""
        size_hw = (image_hwc.shape[0], image_hwc.shape[1])
        everything = place(
            source_hw=size_hw, crop=None, input_hw=size_hw, resize="squash", view="plain"
        )
        truth = self._truth(values_hw, valid_hw, everything).of_kind(COUNTED)
        return {
            "prediction": self.render(prediction, image_hwc),
            "truth": _draw_boxes(image_hwc, truth.source),
        }

    def _truth(self, values: np.ndarray, valid: np.ndarray, placement: Placement) -> Boxes:
        """Give the true boxes and those that are left out, of a map or of a table of boxes."""
        if self.options.truth == BOXES:
            return place_boxes(values[:, :4], values[:, 4], values[:, 5], placement)
        return boxes_of(values, valid, placement)


def _known_around(boxes: Boxes, placement: Placement, output_hw: tuple[int, int]) -> np.ndarray:
    """Mark the cells on the image that no box left out covers, or a counted one does.

    Raises:
        BadImageError: There is none.
    """
    masks = []
    for chosen in (boxes.of_kind(COUNTED), boxes.of_kind(CROWD, DIFFICULT)):
        y, x = ((np.arange(n) + 0.5) / n for n in output_hw)
        x0, y0, x1, y1 = chosen.frame.T[:, :, None]
        rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
        masks.append((rows[:, :, None] & columns[:, None]).any(axis=0))
    known = _covered(placement, output_hw) & (masks[0] | ~masks[1])
    if not known.any():
        raise BadImageError("Its boxes leave nothing of the input frame to learn from.")
    return known


def _covered(placement: Placement, output_hw: tuple[int, int]) -> np.ndarray:
    """Mark the cells whose centre lies on the image: (Ho, Wo) bool."""
    x0, y0, x1, y1 = placement.dst
    y, x = (
        (np.arange(n) + 0.5) * size / n
        for n, size in zip(output_hw, placement.input_hw, strict=True)
    )
    return ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None]


def _to_source(frame_n4: np.ndarray, placement: Placement) -> np.ndarray:
    """Map boxes from shares of the frame to source pixels, cut at what the input showed."""
    height, width = placement.input_hw
    points = frame_n4.reshape(-1, 2) * np.array([width, height])
    corners = np.sort(to_source(placement, points).reshape(-1, 2, 2), axis=1)
    x0, y0, x1, y1 = placement.box
    return np.clip(corners, (x0, y0), (x1, y1)).reshape(-1, 4)


def _draw_boxes(image_hwc: np.ndarray, boxes_n4: np.ndarray) -> np.ndarray:
    """Draw frames two pixels wide or more, the largest below."""
    painted = image_hwc.copy()
    height, width = image_hwc.shape[:2]
    line = max(2, max(height, width) // 200)
    areas = (boxes_n4[:, 2] - boxes_n4[:, 0]) * (boxes_n4[:, 3] - boxes_n4[:, 1])
    colours = class_colours(max(len(boxes_n4), 1))
    for number in np.argsort(-areas, kind="stable"):
        x0, y0, x1, y1 = np.rint(boxes_n4[number]).astype(int)
        outer = np.zeros((height, width), dtype=bool)
        outer[max(y0, 0) : y1, max(x0, 0) : x1] = True
        outer[max(y0 + line, 0) : max(y1 - line, 0), max(x0 + line, 0) : max(x1 - line, 0)] = False
        painted[outer] = colours[number]
    return painted
