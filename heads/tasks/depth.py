"""Metric depth: metres from each pixel to the camera's plane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featstore.errors import invalid
from featstore.geometry import resize_masked, to_source_map
from featstore.types import Placement
from heads.metrics import Metric, Stats
from heads.metrics.depth import depth_sums, summarise_depth
from heads.tasks.base import TASKS, Task, TaskSettings
from heads.tasks.colours import paint

MIN_DEPTH_M = 1e-3
MAX_DEPTH_M = 10.0
EIGEN_HW = (480, 640)
EIGEN_ROWS = slice(45, 471)
EIGEN_COLUMNS = slice(41, 601)
_CROPS = ("auto", "eigen", "none")
_LOG_OFFSET = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthOptions:
    """Choices of the depth task.

    `crop` decides which pixels are measured: "eigen" is rows 45:471 and columns 41:601 of labels
    of 480 x 640 and refuses others, "none" is all, "auto" is "eigen" for labels of that size from
    data of format nyu and "none" elsewhere. Training always uses all pixels.
    """

    crop: str = "auto"

    def __post_init__(self) -> None:
        if self.crop not in _CROPS:
            raise invalid("crop", self.crop, f"one of {', '.join(_CROPS)}")


@TASKS.register("depth.v1")
class DepthTask(Task):
    """Learn depth by the scale-invariant log loss; measure it in metres at label resolution.

    Labels count from 1e-3 to 10 m, predictions are clamped to that range.
    """

    OPTIONS = DepthOptions
    label_kind = "depth"
    stage = "depth"
    unit = "m"
    meaning = "depth in metres"
    primary_metric = "rmse"
    is_lower_better = True

    def __init__(self, **options: str) -> None:
        self.options = DepthOptions(**options)
        self.n_outputs = 1
        # At its own rate, 3e-2, a linear readout overshoots by metres before it comes back.
        self.settings = TaskSettings(output_bias=1.0, head_lrs={"linear.v1": 1e-2})

    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Average the valid depths under each output cell.

        Returns:
            ``depth`` (Ho, Wo) float32 metres, 0 where not valid, and ``valid`` (Ho, Wo) bool.

        Raises:
            InvalidInputError: The label has another size than the image, or no valid pixel.
        """
        _check_size(values_hw, placement)
        depth, valid = resize_masked(
            values_hw, _in_range(values_hw, valid_hw), placement, output_hw
        )
        if not valid.any():
            expected = (
                f"at least one value from {MIN_DEPTH_M} to {MAX_DEPTH_M:g} m in the input frame"
            )
            raise invalid("depth", "none", expected)
        return {"depth": depth, "valid": valid}

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give SigLoss, ``sqrt(var(g) + 0.15 mean(g)^2)``, pooled over the batch.

        ``g = log(relu(p) + 1e-3) - log(y + 1e-3)`` at the valid pixels of all images of the batch
        together (not image by image), and var is the unbiased variance, as in the release.

        Raises:
            InvalidInputError: The batch has fewer than two valid pixels.

        Source:
            Eigen et al. 2014, arXiv:1406.2283, equation 4; constants of HEADS.md 1.5.
        """
        valid = targets["valid"][:, None]
        count = valid.sum()
        if count < 2:
            raise invalid("targets", int(count), "at least two valid depths in a batch")
        truth = torch.where(valid, targets["depth"][:, None], 1.0)
        log_ratio = (output.relu() + _LOG_OFFSET).log() - (truth + _LOG_OFFSET).log()
        g = torch.where(valid, log_ratio, 0.0)
        mean = g.sum() / count
        variance = torch.where(valid, g - mean, 0.0).square().sum() / (count - 1)
        return (variance + 0.15 * mean.square()).sqrt()

    def middle(self, targets: Mapping[str, np.ndarray]) -> np.ndarray:
        """Give the geometric mean of the valid depths, the best constant by the loss.

        The loss hardly says how large all depths are (0.15 of it), so that a head that begins at
        another scale takes long to leave it.
        """
        logs = np.log(targets["depth"][targets["valid"]].astype(np.float64) + _LOG_OFFSET)
        return np.array([np.exp(logs.mean()) - _LOG_OFFSET], dtype=np.float32)

    def predict(self, output: Tensor) -> Tensor:
        """Give metres, clamped to the range of valid depths."""
        return output.clamp(MIN_DEPTH_M, MAX_DEPTH_M)

    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Bring metres to the image's own resolution, bilinearly; NaN outside of a crop."""
        values, _ = to_source_map(prediction_chw, placement)
        return np.asarray(np.clip(values[0], MIN_DEPTH_M, MAX_DEPTH_M), dtype=np.float32)

    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float | list[float]]:
        """Add up errors over the valid pixels that the input covered and the crop keeps.

        Raises:
            InvalidInputError: The label has another size than the image, or the Eigen crop is
                asked for on labels that are not 480 x 640.
        """
        _check_size(values_hw, placement)
        prediction = self.at_source(prediction_chw, placement)
        measured = _in_range(values_hw, valid_hw) & ~np.isnan(prediction)
        rows, columns = self._crop(values_hw.shape, dataset_format)
        kept = measured[rows, columns]
        return depth_sums(prediction[rows, columns][kept], values_hw[rows, columns][kept])

    def summarise(
        self,
        per_image: Sequence[Stats],
        groups: Sequence[str | None],
        *,
        seed: int = 0,
    ) -> list[Metric]:
        """Give rmse, delta1..3, absrel, log10 and silog, as means over images and pooled."""
        return summarise_depth(per_image, groups, seed=seed)

    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe the range, the crop, the averaging and the source of the labels."""
        return {
            "label_sources": sorted(set(label_sources)),
            "range_m": [MIN_DEPTH_M, MAX_DEPTH_M],
            "crop": self.options.crop,
            "resolution": "label, prediction enlarged bilinearly",
            "average": "mean over images; *_pooled over all pixels",
            "loss": "SigLoss, pooled over the valid pixels of a batch",
        }

    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Paint metres from the nearest to the farthest of this image."""
        return paint(prediction, np.isfinite(prediction), _span(prediction))

    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Paint both depths in the truth's range, and the absolute error from 0 to 1 m."""
        valid = _in_range(values_hw, valid_hw)
        has_prediction = np.isfinite(prediction)
        span = _span(values_hw[valid]) if valid.any() else _span(prediction)
        error = np.abs(prediction - np.where(valid, values_hw, 0.0))
        return {
            "prediction": paint(prediction, has_prediction, span),
            "truth": paint(values_hw, valid, span),
            "error": paint(error, valid & has_prediction, (0.0, 1.0)),
        }

    def _crop(self, size_hw: tuple[int, ...], dataset_format: str) -> tuple[slice, slice]:
        fits = size_hw == EIGEN_HW
        if self.options.crop == "eigen" and not fits:
            hint = "Use crop=none or crop=auto."
            raise invalid("crop", "eigen", f"for labels of 480 x 640, not {size_hw}", hint=hint)
        is_nyu = dataset_format.partition(".")[0] == "nyu"
        if self.options.crop == "eigen" or (self.options.crop == "auto" and fits and is_nyu):
            return EIGEN_ROWS, EIGEN_COLUMNS
        return slice(None), slice(None)


def _check_size(values_hw: np.ndarray, placement: Placement) -> None:
    if values_hw.shape != placement.source_hw:
        raise invalid("depth", values_hw.shape, f"of its image's size {placement.source_hw}")


def _in_range(values_hw: np.ndarray, valid_hw: np.ndarray) -> np.ndarray:
    """Keep valid depths inside the range; a NaN is outside."""
    return np.asarray(valid_hw & (values_hw >= MIN_DEPTH_M) & (values_hw <= MAX_DEPTH_M))


def _span(values: np.ndarray) -> tuple[float, float]:
    """Give the range of the finite values, at least a centimetre wide."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return (MIN_DEPTH_M, MAX_DEPTH_M)
    low = float(finite.min())
    return (low, max(float(finite.max()), low + 0.01))
