"""The distance transform of instances: how deep inside of its thing a pixel lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from featstore.errors import InvalidInputError, invalid
from featstore.geometry import to_source_map
from featstore.types import Placement
from heads.bootstrap import bootstrap_groups
from heads.metrics import Metric, Stats, named_metrics
from heads.tasks.base import TASKS, PreparedTargets, Task, TaskSettings
from heads.tasks.colours import paint
from heads.tasks.regions import VOID, distance_inside, ids_in_frame

_SUMS = ("n_pixels", "sum_squared_error", "sum_absolute_error", "sum_truth", "sum_squared_truth")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistanceOptions:
    """The distance task has no choices."""


@TASKS.register("distance.v1")
class DistanceTask(Task):
    """Learn, by squared error, the distance of each pixel to the border of its instance.

    The paper says "normalised distance to the boundary"; here each instance has 1 at its
    innermost pixel and background has 0, which is our reading. All is measured in the input frame
    at the output's resolution.

    Source:
        MAXA, section 4 (tasks); HEADS.md 1.5.
    """

    OPTIONS = DistanceOptions
    label_kind = "instances"
    unit = "of the instance's largest"
    meaning = "distance to the border of the instance, from 0 to 1, its largest"
    primary_metric = "mse"
    is_lower_better = True

    def __init__(self, **options: Any) -> None:
        self.options = DistanceOptions(**options)
        self.n_outputs = 1
        self.settings = TaskSettings()

    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Transform the instances at the output's resolution.

        Returns:
            ``distance`` (Ho, Wo) float16, from 0 to 1, and -1 where nothing is known.

        Raises:
            InvalidInputError: The label has another size than the image, or nothing is known.
        """
        ids = ids_in_frame(values_hw, valid_hw, placement, output_hw)
        distance = np.where(ids == VOID, VOID, distance_inside(ids))
        return {"distance": distance.astype(np.float16)}

    def fit_to(self, targets: PreparedTargets) -> None:
        """Check that there is something to learn.

        Raises:
            InvalidInputError: No image shows an instance.
        """
        if not any((image > 0).any() for image in targets.arrays["distance"]):
            raise InvalidInputError("No label shows an instance. Use labels with at least one.")

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean squared error over the known pixels of the batch."""
        distance = targets["distance"][:, None].to(output.dtype)
        known = distance >= 0
        error = (output - distance).masked_fill(~known, 0.0)
        return error.square().sum() / known.sum()

    def predict(self, output: Tensor) -> Tensor:
        """Give distances, clamped to what they can be."""
        return output.clamp(0, 1)

    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Bring distances to the image's own resolution, bilinearly; NaN outside of a crop."""
        values, _ = to_source_map(prediction_chw, placement)
        return np.asarray(values[0], dtype=np.float32)

    def truth_map(self, values_hw: np.ndarray, valid_hw: np.ndarray) -> np.ndarray:
        """Transform the instances at the image's own resolution."""
        ids = np.where(valid_hw, values_hw, VOID)
        return np.where(valid_hw, distance_inside(ids), np.nan)

    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float | list[float]]:
        """Add up errors at the output's resolution."""
        output_hw = (prediction_chw.shape[1], prediction_chw.shape[2])
        ids = ids_in_frame(values_hw, valid_hw, placement, output_hw)
        truth = distance_inside(ids)[ids != VOID].astype(np.float64)
        error = prediction_chw[0][ids != VOID] - truth
        sums = (
            truth.size,
            (error * error).sum(),
            np.abs(error).sum(),
            truth.sum(),
            (truth * truth).sum(),
        )
        return {name: float(value) for name, value in zip(_SUMS, sums, strict=True)}

    def summarise(
        self, per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
    ) -> list[Metric]:
        """Give mse, mae and r2 over all pixels of all images together."""
        columns = np.array([[line[name] for name in _SUMS] for line in per_image], np.float64)
        if not len(columns) or not columns[:, 0].any():
            raise invalid("per_image", f"{len(columns)} images", "at least one with a known pixel")

        def statistic(totals: np.ndarray) -> np.ndarray:
            n, squared, absolute, truth, squared_truth = totals.T
            variance = np.maximum(squared_truth / n - (truth / n) ** 2, 1e-12)
            return np.stack([squared / n, absolute / n, 1 - squared / n / variance], axis=1)

        found = bootstrap_groups(columns, groups, statistic, seed=seed)
        return named_metrics(("mse", "mae", "r2"), found)

    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe the transform and the averaging."""
        return {
            "label_sources": sorted(set(label_sources)),
            "resolution": "the output's, in the input frame",
            "distance": "to the border of the pixel's instance over the largest of that "
            "instance; 0 on background",
            "average": "over all pixels of all images",
            "loss": "mean squared error",
        }

    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Paint distances from 0 to 1."""
        return paint(prediction, np.isfinite(prediction), (0.0, 1.0))

    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Paint both transforms and their absolute difference."""
        truth = self.truth_map(values_hw, valid_hw)
        error = np.abs(prediction - truth)
        return {
            "prediction": self.render(prediction, image_hwc),
            "truth": self.render(truth, image_hwc),
            "error": self.render(error, image_hwc),
        }
