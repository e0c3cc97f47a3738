"""Pose: where the keypoints of an animal are, in the crop that shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import BadImageError, InvalidInputError
from featstore.geometry import to_input, to_source
from featstore.types import Placement
from heads.keypoint_labels import KEYPOINTS
from heads.metrics import Metric, Stats
from heads.metrics.keypoints import SHARE, Judged, keypoint_stats, summarise_keypoints
from heads.tasks.base import TASKS, LabelFacts, Task, TaskSettings
from heads.tasks.pose_options import PoseOptions, as_options, check_names, joined, parts_of
from heads.tasks.pose_picture import draw_errors, draw_pose, side_colours

_MIDDLE = 0.5  # of the frame: where every keypoint begins
_FIRST_LOG_SCALE = math.log(0.1) - _MIDDLE  # on what a head says, which begins at `_MIDDLE`
_LEAST_LOG_SCALE = math.log(1e-3)


@TASKS.register("pose.v1")
class PoseTask(Task):
    """Learn where keypoints are by regression, with a head that gives one answer an image.

    A head gives x and y of each keypoint in turn, in shares of the input frame, and with scales
    then one number a keypoint, the logarithm of its scale less a constant. Every marked keypoint
    is learned and measured, hidden or seen, inside of the crop or outside of it. `predict` gives
    places and scales in shares of the frame; `at_source` gives (K, 3) float32: x and y in source
    pixels, and a confidence, NaN without scales: how likely a keypoint is nearer than 0.05 of the
    frame (along each axis, for the Laplace distribution), by what the head says of its scale.

    Source:
        HEADS.md 3.1 (inferred from an abstract); the threshold of smooth L1 is our choice.
    """

    OPTIONS = PoseOptions
    label_kind = KEYPOINTS
    stage = "pooled"
    meaning = "x and y of each keypoint, then perhaps its scale, as shares of the frame"
    primary_metric = "rmse"
    is_lower_better = True

    def __init__(self, **options: Any) -> None:
        self.options = PoseOptions(**options)
        if not self.options.names:
            raise InvalidInputError(
                "pose needs the names of the keypoints, and the data set tells none. Name them: "
                "--set names=nose|tail."
            )
        self.skeleton = self.options.skeleton()
        self.identities = parts_of(self.options.identities)
        self.n_keypoints = len(self.skeleton.names)
        self.numbers = 3 if self.options.scales else 2
        self.n_outputs = self.numbers * self.n_keypoints
        # Its own rate is that of classification, and makes places worse than their mean.
        self.settings = TaskSettings(output_bias=_MIDDLE, head_lrs={"linear_pool.v1": 3e-4})

    @classmethod
    def completed(cls, options: Mapping[str, Any], facts: LabelFacts) -> dict[str, Any]:
        """Take the skeleton and the identities from the data.

        Raises:
            InvalidInputError: The data has other keypoints than those that are named.
        """
        filled = dict(options)
        if not filled["identities"]:
            filled["identities"] = joined("identities", facts.identities)
        if facts.skeleton is None:
            return filled
        told = as_options(facts.skeleton)
        if filled["names"]:
            check_names(facts.skeleton.names, parts_of(filled["names"]))
        defaults = PoseOptions()
        return filled | {
            name: text for name, text in told.items() if filled[name] == getattr(defaults, name)
        }

    def check(self, facts: LabelFacts) -> None:
        """Refuse labels of other keypoints, or of another order of them."""
        if facts.skeleton is not None:
            check_names(facts.skeleton.names, self.skeleton.names)

    def prepare(
        self,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        placement: Placement,
        output_hw: tuple[int, int],
    ) -> dict[str, np.ndarray]:
        """Bring marked keypoints to the input frame; in a mirror image, left is right.

        Returns:
            ``points`` (K, 2) float32, shares of the frame, 0 where not marked; ``visible`` (K,)
            float32, 1 where marked; ``identity`` () int64, its number, -1 where not trained on.

        Raises:
            BadImageError: It has another number of keypoints.
            InvalidInputError: Nobody knows which keypoints a mirror image exchanges.
        """
        points, is_marked = self._truth(values_hw, placement)
        who = str(values_hw["identity"])
        return {
            "points": np.where(is_marked[:, None], points, 0.0).astype(np.float32),
            "visible": is_marked.astype(np.float32),
            "identity": np.array(self.identities.index(who) if who in self.identities else -1),
        }

    def _truth(self, values: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
        """Give keypoints as a head shall see them: (K, 2) shares of the frame, (K,) marked."""
        keypoints = values[KEYPOINTS]
        if len(keypoints) != self.n_keypoints:
            raise BadImageError(
                f"It has {len(keypoints)} keypoints, and {self.n_keypoints} are learned "
                f"({', '.join(self.skeleton.names[:3])} ...)."
            )
        points = to_input(placement, keypoints[:, :2]) / _size(placement)
        is_marked = keypoints[:, 2] > 0
        if placement.is_flipped:
            order = self._mirror_order()
            return points[order], is_marked[order]
        return points, is_marked

    def _mirror_order(self) -> list[int]:
        order = self.skeleton.mirror_order()
        if order is None:
            raise InvalidInputError(
                "Nobody knows which keypoints a mirror image exchanges. Say it, such as "
                "--set swaps=0-1|2-3 (none of them: --set swaps=), or leave out the view hflip."
            )
        return list(order)

    def loss(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean over images of `losses`."""
        return self.losses(output, targets).mean()

    def losses(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Give the mean loss of the marked keypoints of each image: (batch,)."""
        points_bk2, log_scale_bk = self._read(output)
        error = points_bk2 - targets["points"].to(points_bk2.dtype)
        each_bk = self._distance(error).mean(dim=2)
        if log_scale_bk is not None:
            power = 1 if self.options.loss == "smooth_l1" else 2
            each_bk = each_bk / log_scale_bk.mul(power).exp() + log_scale_bk + self._constant()
        visible_bk = targets["visible"].to(each_bk.dtype)
        return (each_bk * visible_bk).sum(dim=1) / visible_bk.sum(dim=1).clamp(min=1)

    def _distance(self, error: Tensor) -> Tensor:
        if self.options.loss == "l2":
            return error.square() * (0.5 if self.options.scales else 1.0)
        zero = torch.zeros_like(error)
        return functional.smooth_l1_loss(error, zero, beta=self.options.beta, reduction="none")

    def _constant(self) -> float:
        """Give the constant of the negative log-likelihood along one axis, at a scale of 1."""
        return math.log(2.0) if self.options.loss == "smooth_l1" else 0.5 * math.log(2 * math.pi)

    def _read(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give places, (batch, K, 2), and logarithms of scales, (batch, K)."""
        flat = output[:, :, 0, 0]
        n_places = 2 * self.n_keypoints
        # len(flat) would fix the size of the batch in an exported graph.
        points_bk2 = flat[:, :n_places].reshape(-1, self.n_keypoints, 2)
        if not self.options.scales:
            return points_bk2, None
        said = flat[:, n_places:] + _FIRST_LOG_SCALE
        # Bounded below, smoothly: a scale of 0 would make the loss infinite.
        return points_bk2, _LEAST_LOG_SCALE + functional.softplus(said - _LEAST_LOG_SCALE)

    def middle(self, targets: Mapping[str, np.ndarray]) -> np.ndarray:
        """Give the mean place of each keypoint where it is marked; scales begin as they do."""
        visible = targets["visible"][:, :, None].astype(np.float64)
        count = visible.sum(axis=0)
        mean = (targets["points"] * visible).sum(axis=0) / np.maximum(count, 1)
        places = np.where(count > 0, mean, _MIDDLE).reshape(-1)
        rest = np.full(self.n_outputs - len(places), _MIDDLE)
        return np.concatenate([places, rest]).astype(np.float32)

    def predict(self, output: Tensor) -> Tensor:
        """Give x and y in turn, then the scales, in shares of the frame."""
        points_bk2, log_scale_bk = self._read(output)
        parts = [points_bk2.flatten(1)]
        if log_scale_bk is not None:
            parts.append(log_scale_bk.exp())
        return torch.cat(parts, dim=1)[:, :, None, None]

    def unflipped(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Mirror the places inside of what the input shows, and exchange left and right."""
        points, scale = self._parted(prediction_chw)
        order = self._mirror_order()
        x0, _, x1, _ = placement.dst
        mirrored = np.stack([(x0 + x1) / placement.input_hw[1] - points[:, 0], points[:, 1]], 1)
        parts = [mirrored[order].reshape(-1), *([] if scale is None else [scale[order]])]
        return np.concatenate(parts).astype(prediction_chw.dtype)[:, None, None]

    def _parted(self, prediction_chw: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Give places, (K, 2), and scales, (K,)."""
        flat = prediction_chw[:, 0, 0]
        n_places = 2 * self.n_keypoints
        return flat[:n_places].reshape(-1, 2), flat[n_places:] if self.options.scales else None

    def _upright(
        self, prediction_chw: np.ndarray, placement: Placement
    ) -> tuple[np.ndarray, np.ndarray | None, Placement]:
        """Give places, scales and placement of the plain view."""
        if placement.is_flipped:
            prediction_chw = self.unflipped(prediction_chw, placement)
            placement = replace(placement, is_flipped=False)
        points, scale = self._parted(prediction_chw.astype(np.float64))
        return points, scale, placement

    def at_source(self, prediction_chw: np.ndarray, placement: Placement) -> np.ndarray:
        """Give x, y in source pixels and a confidence: (K, 3) float32."""
        points, scale, upright = self._upright(prediction_chw, placement)
        found = to_source(upright, points * _size(upright))
        confidence = np.full(len(found), np.nan) if scale is None else self._confidence(scale)
        return np.concatenate([found, confidence[:, None]], axis=1).astype(np.float32)

    def _confidence(self, scale: np.ndarray) -> np.ndarray:
        """Give the probability that the distance is below `SHARE` of the frame."""
        if self.options.loss == "l2":
            return 1 - np.exp(-0.5 * (SHARE / scale) ** 2)
        return (1 - np.exp(-SHARE / scale)) ** 2

    def measure(
        self,
        prediction_chw: np.ndarray,
        *,
        placement: Placement,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        dataset_format: str,
    ) -> dict[str, float | list[float]]:
        """Keep how far each marked keypoint is off.

        Raises:
            BadImageError: It has another number of keypoints.
        """
        points, scale, upright = self._upright(prediction_chw, placement)
        truth, is_marked = self._truth(values_hw, upright)
        box, shown = values_hw["box"], upright.box
        found = to_source(upright, points * _size(upright))
        judged = Judged(
            frame_k2=points - truth,
            source_k2=found - values_hw[KEYPOINTS][:, :2],
            is_marked=is_marked,
            diagonal=math.hypot(shown[2] - shown[0], shown[3] - shown[1]),
            box_side=float(max(box[2] - box[0], box[3] - box[1])),
            area=float(values_hw["area"]),
        )
        return keypoint_stats(
            judged,
            sigmas=self.skeleton.sigmas,
            scale_k=scale,
            confidence_k=None if scale is None else self._confidence(scale),
        )

    def summarise(
        self, per_image: Sequence[Stats], groups: Sequence[str | None], *, seed: int = 0
    ) -> list[Metric]:
        """Give rmse, PCK under three readings, OKS-AP and the area under risk and coverage."""
        return summarise_keypoints(per_image, groups, names=self.skeleton.names, seed=seed)

    def protocol(self, label_sources: Iterable[str]) -> dict[str, Any]:
        """Describe distances, thresholds and the averaging."""
        return {
            "label_sources": sorted(set(label_sources)),
            "keypoints": list(self.skeleton.names),
            "counted": "marked keypoints, hidden ones too, wherever they lie",
            "rmse": "root of the mean squared distance of a point, in shares of the input frame",
            "pck@0.05": "within 0.05 of the diagonal of what the input shows, in source pixels",
            "pck@0.05u": "within 0.05 of the input frame's side",
            "pck@0.05box": "within 0.05 of the longer side of the animal's box, in source pixels",
            "oks": "each animal predicted from its own box; ranked by mean confidence, "
            "equal ones together",
            "average": "over all marked keypoints of all images",
            "loss": f"{self.options.loss}{' likelihood with scales' * self.options.scales}",
        }

    def render(self, prediction: np.ndarray, image_hwc: np.ndarray) -> np.ndarray:
        """Draw the skeleton over the image."""
        return draw_pose(image_hwc, prediction, self.skeleton)

    def render_with_truth(
        self,
        prediction: np.ndarray,
        values_hw: np.ndarray,
        valid_hw: np.ndarray,
        image_hwc: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Draw the predicted and the marked keypoints, hidden ones as rings, and the errors."""
        x_y_v = values_hw[KEYPOINTS]
        truth = np.where(x_y_v[:, 2:] > 0, x_y_v[:, :2], np.nan)
        is_hidden = x_y_v[:, 2] == 1
        return {
            "prediction": self.render(prediction, image_hwc),
            "truth": draw_pose(image_hwc, truth, self.skeleton, is_hidden=is_hidden),
            "error": draw_errors(image_hwc, prediction, truth),
        }

    def legend(self, values_hw: np.ndarray) -> dict[str, tuple[int, int, int]]:
        """Name the colours of the animal's sides."""
        return side_colours(self.skeleton)


def _size(placement: Placement) -> np.ndarray:
    """Give width and height of the input frame."""
    return np.array(placement.input_hw[::-1], dtype=np.float64)
