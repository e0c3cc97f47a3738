"""Boundaries between things, and between things and what surrounds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from featstore.errors import InvalidInputError, invalid
from featstore.geometry import to_source_map
from featstore.types import Placement
from heads.metrics import Metric, Stats
from heads.metrics.boundaries import boundary_sums, summarise_boundaries
from heads.tasks.base import TASKS, PreparedTargets, Task, TaskSettings
from heads.tasks.colours import dimmed, lay_over
from heads.tasks.regions import VOID, find_boundaries, ids_in_frame

_UNKNOWN = 255
_HIT, _FALSE, _MISSED = (90, 200, 90), (235, 70, 60), (70, 140, 255)
_PREDICTED, _TRUE = (255, 200, 40), (70, 220, 255)


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryOptions:
    """Choices of the boundary task.

    Boundaries are learned widened by a hundredth of the output's height to each side, as in the
    release. For F, a boundary pixel is found if one was predicted within `tolerance` of the
    diagonal (0.0075 is that of BSDS).
    """

    tolerance: float = 0.0075

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 0.1:
            raise invalid("tolerance", self.tolerance, "a share of the diagonal between 0 and 0.1")


@TASKS.register("boundaries.v1")
class BoundaryTask(Task):
    """Learn where instances end, by binary cross-entropy; all is measured in the input frame.

    `at_source` gives the probability of a boundary at each pixel (float32).

    Source:
        Lueddecke & Ecker, TMLR 2025, section 4; HEADS.md 1.5.
    """

    OPTIONS = BoundaryOptions
    label_kind = "instances"
    meaning = "probability of a boundary"
    primary_metric = "f_ods"
    is_lower_better = False

    def __init__(self, **options: Any) -> None:
        self.options = BoundaryOptions(**options)
        self.n_outputs = 1
        self.settings = TaskSettings()

    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Mark the boundaries at the output's resolution.

        Returns:
            ``boundary`` (Ho, Wo) uint8: 1, 0, or 255 where nothing is known.

        Raises:
            InvalidInputError: The label has another size than the image, or nothing is known.
        """
        _, wide, known = _truth(values_hw, valid_hw, placement, output_hw)
        return {"boundary": np.where(known, wide, _UNKNOWN).astype(np.uint8)}

    def fit_to(self, targets: PreparedTargets) -> None:
        """Check that there is something to learn.

        Raises:
            InvalidInputError: No image has a boundary.
        """
        if not any((image == 1).any() for image in targets.arrays["boundary"]):
            raise InvalidInputError(
                "No label has a boundary: each shows one thing, or none. Use labels with at least "
                "one border between an instance and something else."
            )

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean binary cross-entropy over the known pixels of the batch."""
        boundary = targets["boundary"][:, None]
        known = boundary != _UNKNOWN
        loss = functional.binary_cross_entropy_with_logits(
            output, boundary.to(output.dtype), weight=known.to(output.dtype), reduction="sum"
        )
        return loss / known.sum()

    def predict(self, output: Tensor) -> Tensor:
        """Give probabilities."""
        return output.sigmoid()

    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Bring probabilities to the image's own resolution, bilinearly; NaN outside of a crop."""
        values, _ = to_source_map(prediction_chw, placement)
        return np.asarray(values[0], dtype=np.float32)

    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float | list[float]]:
        """Count hits at the output's resolution."""
        output_hw = (prediction_chw.shape[1], prediction_chw.shape[2])
        thin, wide, known = _truth(values_hw, valid_hw, placement, output_hw)
        return boundary_sums(prediction_chw[0], thin, wide, known, tolerance=self.options.tolerance)

    def summarise(
        self, per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
    ) -> list[Metric]:
        """Give f_ods, f_ois, iou (at a probability of 0.5) and ce."""
        return summarise_boundaries(per_image, groups, seed=seed)

    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe boundaries, tolerance and averaging."""
        return {
            "label_sources": sorted(set(label_sources)),
            "resolution": "the output's, in the input frame",
            "boundary": "pixels with another instance at one of four sides; for iou and ce, and "
            "in training, widened by height // 100 pixels",
            "tolerance": f"{self.options.tolerance:g} of the diagonal; predictions not thinned",
            "average": "counts added over all images",
            "loss": "binary cross-entropy",
        }

    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Paint boundaries over the darkened image, the brighter the more probable."""
        strength = np.nan_to_num(prediction)[..., None]
        mixed = (1 - strength) * dimmed(image_hwc) + strength * np.array(_PREDICTED)
        return np.rint(mixed).astype(np.uint8)

    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Paint the prediction, the true boundaries, and where the two agree."""
        true = ndimage.binary_dilation(find_boundaries(np.where(valid_hw, values_hw, VOID)))
        near = ndimage.binary_dilation(true, iterations=max(1, true.shape[0] // 100))
        predicted = np.nan_to_num(prediction) > 0.5
        found = ndimage.binary_dilation(predicted, iterations=max(1, true.shape[0] // 100))
        overlay = dimmed(image_hwc)
        for where, colour in (
            (predicted & near, _HIT),
            (predicted & ~near, _FALSE),
            (true & ~found, _MISSED),
        ):
            overlay = lay_over(overlay, np.array(colour), where, 0.9)
        return {
            "prediction": self.render(prediction, image_hwc),
            "truth": lay_over(dimmed(image_hwc), np.array(_TRUE), true, 0.9),
            "at 0.5: green hit, red false, blue missed": overlay,
        }


def _truth(
    values_hw: np.ndarray, valid_hw: np.ndarray, placement: Placement, output_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give thin and widened boundaries, and the known pixels: (Ho, Wo) bool each."""
    ids = ids_in_frame(values_hw, valid_hw, placement, output_hw)
    thin = find_boundaries(ids)
    n_pixels = output_hw[0] // 100
    wide = ndimage.binary_dilation(thin, iterations=n_pixels) if n_pixels else thin
    return thin, wide, ids != VOID
