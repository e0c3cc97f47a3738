"""What a depth head has to beat first: a map that is the same for every image.

It is fitted from an iterator of (tokens of the tap, targets) and then gives metres over the input
frame like a head's `predict`, so that the same `measure` scores it. Targets are those of
`DepthTask.prepare`, stacked: ``depth`` (batch, Ho, Wo) and ``valid`` (batch, Ho, Wo).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featstore.errors import invalid
from heads.base import TapTokens
from heads.token_targets import Batches


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanMap:
    """One depth map for every image: the training mean, of each pixel or of all."""

    depth_yx: Tensor

    def predict(self, tokens: TapTokens) -> Tensor:
        """Give the same map for each image of `tokens`."""
        return self.depth_yx.expand(len(tokens.patch), 1, *self.depth_yx.shape)


def fit_mean_map(train: Batches) -> MeanMap:
    """Average the valid depths at each pixel; one that never has any takes the mean of all.

    Raises:
        InvalidInputError: There is no valid depth.
    """
    total = count = torch.zeros(())
    for _, targets in train:
        valid = targets["valid"]
        total = total + torch.where(valid, targets["depth"], 0.0).double().sum(dim=0)
        count = count + valid.sum(dim=0)
    if not count.any():
        raise invalid("train", "no valid depth", "batches with at least one valid depth")
    depth = torch.where(count > 0, total / count.clamp(min=1), total.sum() / count.sum())
    return MeanMap(depth_yx=depth.float())


def fit_mean_depth(train: Batches) -> MeanMap:
    """Average all valid depths to one number, the same for every pixel.

    Raises:
        InvalidInputError: There is no valid depth.
    """
    total, count, shape = 0.0, 0, torch.Size()
    for _, targets in train:
        depth = targets["depth"][targets["valid"]]
        total, count = total + float(depth.double().sum()), count + depth.numel()
        shape = targets["depth"].shape[1:]
    if not count:
        raise invalid("train", "no valid depth", "batches with at least one valid depth")
    return MeanMap(depth_yx=torch.full(shape, total / count))
