"""Semantic segmentation: the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import BadImageError, InvalidInputError, invalid
from featstore.geometry import sample_nearest, to_source_map
from featstore.types import Placement
from heads.metrics import Metric, Stats
from heads.metrics.classes import PARTS, class_sums, summarise_classes
from heads.tasks.base import TASKS, LabelFacts, Task, TaskSettings
from heads.tasks.colours import class_colours, dimmed, lay_over

FRAME_HW = (224, 224)
"""Where the papers score, whatever the output's size."""

_VOID = -1
_CHANNELS_AT_ONCE = 16  # of a map at the image's resolution
_OPACITY = 0.65
_WRONG = (230, 60, 50)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationOptions:
    """Choices of the segmentation task.

    `classes` counts the classes, which are numbered from 0; where it is not named, the data set's
    own classes are taken, and their names, parted by "|".
    """

    classes: int | None = None
    names: str = ""

    def __post_init__(self) -> None:
        if self.classes is not None and self.classes < 2:
            raise invalid("classes", self.classes, "at least 2")
        n_names = len(self.names.split("|")) if self.names else 0
        if n_names > (self.classes or 0):
            raise invalid("names", f"{n_names} names", f"at most one a class ({self.classes})")


@TASKS.register("segmentation.v1")
class SegmentationTask(Task):
    """Learn classes by cross-entropy; measure IoU over all pixels of all images together.

    `predict` gives log-probabilities, `at_source` the class of each pixel (int32).
    """

    OPTIONS = SegmentationOptions
    label_kind = "classes"
    meaning = "log-probability of each class"
    primary_metric = "miou@native"
    is_lower_better = False
    predicts_logs = True

    def __init__(self, **options: Any) -> None:
        self.options = SegmentationOptions(**options)
        if self.options.classes is None:
            raise InvalidInputError(
                "segmentation needs to know how many classes there are, and the data set names "
                "none. Say it: --set classes=N."
            )
        self.n_outputs = self.options.classes
        known = self.options.names.split("|") if self.options.names else []
        self.class_names = (*known, *map(str, range(len(known), self.n_outputs)))
        self.settings = TaskSettings()

    @classmethod
    def completed(cls, options: Mapping[str, Any], facts: LabelFacts) -> dict[str, Any]:
        """Take the number of classes, and their names, from the data set."""
        class_names = facts.class_names
        if class_names is None or options["names"]:
            return dict(options)
        names = "|".join(name.replace("|", "/") for name in class_names)
        classes = len(class_names) if options["classes"] is None else options["classes"]
        return {**options, "classes": classes, "names": names}

    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Take the class under the centre of each output cell.

        Returns:
            ``classes`` (Ho, Wo) int16, -1 where there is none.

        Raises:
            BadImageError: A class is not declared, or no pixel of the input has one.
        """
        classes_yx = self._in_frame(values_hw, valid_hw, placement, output_hw)
        if (classes_yx == _VOID).all():
            raise BadImageError("Its label has no class at any pixel of the input frame.")
        return {"classes": classes_yx}

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean cross-entropy over the pixels of the batch that have a class."""
        return functional.cross_entropy(output, targets["classes"].long(), ignore_index=_VOID)

    def predict(self, output: Tensor) -> Tensor:
        """Give log-probabilities."""
        return output.log_softmax(dim=1)

    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Enlarge bilinearly and take the likeliest class: int32, -1 outside of a crop."""
        best = np.full(placement.source_hw, -np.inf, dtype=np.float32)
        classes = np.full(placement.source_hw, _VOID, dtype=np.int32)
        for start in range(0, len(prediction_chw), _CHANNELS_AT_ONCE):
            part, covered = to_source_map(
                prediction_chw[start : start + _CHANNELS_AT_ONCE], placement
            )
            found = np.where(covered, part.argmax(axis=0), 0)
            value = np.take_along_axis(part, found[None], axis=0)[0]
            is_better = covered & (value > best)
            best[is_better] = value[is_better]
            classes[is_better] = (start + found)[is_better]
        return classes

    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float | list[float]]:
        """Count pixels by class at 224 x 224 of the input and at the label's resolution.

        Raises:
            BadImageError: A class is not declared.
        """
        truth_yx = self._in_frame(values_hw, valid_hw, placement, FRAME_HW)
        log_p = _at_frame(prediction_chw)
        known = truth_yx != _VOID
        truth = truth_yx[known].astype(np.int64)
        log_p_np = log_p[:, known]
        sums: dict[str, float | list[float]] = {
            "n_pixels_224": float(truth.size),
            "sum_ce_224": float(-log_p_np[truth, np.arange(truth.size)].sum(dtype=np.float64)),
        }
        prediction = self.at_source(prediction_chw, placement)
        measured = valid_hw & (prediction != _VOID)
        native = class_sums(prediction[measured], values_hw[measured], self.n_outputs)
        small = class_sums(log_p_np.argmax(axis=0), truth, self.n_outputs)
        for frame, counts in (("224", small), ("native", native)):
            for part, line in zip(PARTS, counts, strict=True):
                sums[f"{part}_{frame}"] = line.astype(float).tolist()
        return sums

    def summarise(
        self, per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
    ) -> list[Metric]:
        """Give mIoU at the label's resolution and at 224, cross-entropy, accuracy, each IoU."""
        return summarise_classes(per_image, groups, names=self.class_names, seed=seed)

    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe the frames, the averaging and the source of the labels."""
        return {
            "label_sources": sorted(set(label_sources)),
            "classes": self.n_outputs,
            "resolution": "*@native: label, log-probabilities enlarged bilinearly; *@224 and ce: "
            "224 x 224 of the input frame, labels by the pixel under the centre",
            "average": "over all pixels of all images; miou over the classes that are predicted "
            "or present",
            "loss": "cross-entropy over the labelled pixels of a batch",
        }

    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Paint classes over the image."""
        return self._paint(prediction, prediction != _VOID, image_hwc)

    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Paint both class maps, and in red the pixels where they differ."""
        is_wrong = valid_hw & (prediction != _VOID) & (prediction != values_hw)
        wrong = lay_over(dimmed(image_hwc), np.array(_WRONG), is_wrong, 0.9)
        return {
            "prediction": self.render(prediction, image_hwc),
            "truth": self._paint(values_hw, valid_hw, image_hwc),
            "error": np.where(valid_hw[..., None], wrong, np.uint8(0)),
        }

    def legend(self, values_hw: np.ndarray) -> dict[str, tuple[int, int, int]]:
        """Name the classes that are there, the largest first."""
        found, counts = np.unique(values_hw[values_hw != _VOID], return_counts=True)
        known = [int(c) for c in found[np.argsort(-counts)] if 0 <= c < self.n_outputs]
        colours = class_colours(self.n_outputs)
        return {self.class_names[c]: tuple(map(int, colours[c])) for c in known}  # type: ignore[misc]

    def _paint(
        self, classes_hw: np.ndarray, where_hw: np.ndarray, image_hwc: np.ndarray
    ) -> np.ndarray:
        colours = class_colours(self.n_outputs)[np.clip(classes_hw, 0, self.n_outputs - 1)]
        painted = lay_over(image_hwc, colours, where_hw, _OPACITY)
        return np.where(where_hw[..., None], painted, np.uint8(0))

    def _in_frame(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> np.ndarray:
        """Show the classes in the input frame: (Ho, Wo) int16, -1 where there is none."""
        found = values_hw[valid_hw]
        if found.size and (int(found.min()) < 0 or int(found.max()) >= self.n_outputs):
            given = f"{int(found.min())} to {int(found.max())}"
            raise BadImageError(
                f"The classes of its label must be from 0 to {self.n_outputs - 1}, or void. Got "
                f"{given}. See --set classes=N."
            )
        known = np.where(valid_hw, values_hw, _VOID)
        classes, is_inside = sample_nearest(known, placement, output_hw)
        return np.where(is_inside, classes, _VOID).astype(np.int16)


def _at_frame(log_p_chw: np.ndarray) -> np.ndarray:
    """Bring log-probabilities to `FRAME_HW`, bilinearly, and make them sum to 1 again."""
    if log_p_chw.shape[1:] == FRAME_HW:
        return log_p_chw
    resized = functional.interpolate(
        torch.from_numpy(np.ascontiguousarray(log_p_chw))[None], size=FRAME_HW, mode="bilinear"
    )
    return resized.log_softmax(dim=1)[0].numpy()
