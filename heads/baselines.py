"""What a depth head has to beat: the mean map, a linear map of each token, its nearest tokens.

Each is fitted from an iterator of (tokens of the tap, targets) and then gives metres over the
input frame like a head's `predict`, so that the same `measure` scores it. Targets are those of
`DepthTask.prepare`, stacked: ``depth`` (batch, Ho, Wo) and ``valid`` (batch, Ho, Wo).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import invalid
from heads.base import TapTokens

Batches = Iterable[tuple[TapTokens, Mapping[str, Tensor]]]

LAMBDAS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
NEIGHBOURS = (5, 10, 20)
_SCORES_AT_ONCE = 1 << 24


class Baseline(Protocol):
    """A fitted baseline."""

    def predict(self, tokens: TapTokens) -> Tensor:
        """Give (batch, 1, Ho, Wo) metres over the input frame."""
        ...


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Ridge:
    """A linear map from a token to its depth, enlarged bilinearly to the output."""

    weight_d: Tensor
    bias: float
    strength: float  # the chosen lambda, in units of the features' mean variance
    output_hw: tuple[int, int]

    def predict(self, tokens: TapTokens) -> Tensor:
        """Map each token and enlarge the grid."""
        depth_bt = _features(tokens) @ self.weight_d + self.bias
        return _enlarge(depth_bt, tokens, self.output_hw)


def fit_ridge(train: Batches, validation: Batches, *, lambdas: Sequence[float] = LAMBDAS) -> Ridge:
    """Solve ridge regression of depth at the resolution of the grid, in closed form.

    Only normal equations are kept, so that memory does not grow with the data. A token weighs as
    much as its share of valid pixels. The lambda with the least squared error on `validation` is
    taken; its error follows from the normal equations of that part.

    Args:
        train: Batches to solve on.
        validation: Batches to choose lambda on: images (groups) that `train` has not.
        lambdas: To choose from, relative to the mean variance of the features.

    Raises:
        InvalidInputError: A part has no valid depth.
    """
    fitted, held_out = (
        _normal_equations(train, "train"),
        _normal_equations(validation, "validation"),
    )
    mean_d, mean_depth = fitted.mean_d, fitted.mean_depth
    covariance, cross = fitted.centred()
    values, vectors = torch.linalg.eigh(covariance)
    scale = values.clamp(min=0).mean()
    rotated = vectors.mT @ cross
    best: tuple[float, float, Tensor, float] | None = None
    for strength in lambdas:
        weight = vectors @ (rotated / (values.clamp(min=0) + strength * scale))
        bias = float(mean_depth - mean_d @ weight)
        error = held_out.squared_error(weight, bias)
        if best is None or error < best[0]:
            best = (error, strength, weight, bias)
    if best is None:
        raise invalid("lambdas", tuple(lambdas), "at least one number")
    _, strength, weight, bias = best
    return Ridge(weight_d=weight.float(), bias=bias, strength=strength, output_hw=fitted.output_hw)


@dataclass(frozen=True, kw_only=True, slots=True)
class _NormalEquations:
    """Weighted sums over tokens x (with a 1 appended) and depths y, in float64."""

    moment: Tensor  # sum of w [x 1] [x 1]^T
    cross: Tensor  # sum of w y [x 1]
    square: Tensor  # sum of w y^2
    output_hw: tuple[int, int]

    @property
    def mean_d(self) -> Tensor:
        return self.moment[:-1, -1] / self.moment[-1, -1]

    @property
    def mean_depth(self) -> Tensor:
        return self.cross[-1] / self.moment[-1, -1]

    def centred(self) -> tuple[Tensor, Tensor]:
        """Give the covariance of x, and of x with y."""
        total, mean = self.moment[-1, -1], self.mean_d
        covariance = self.moment[:-1, :-1] / total - mean[:, None] * mean
        return covariance, self.cross[:-1] / total - mean * self.mean_depth

    def squared_error(self, weight: Tensor, bias: float) -> float:
        """Sum the weighted squared errors of a linear map."""
        full = torch.cat([weight, weight.new_tensor([bias])])
        return float(self.square - 2 * full @ self.cross + full @ self.moment @ full)


def _normal_equations(batches: Batches, name: str) -> _NormalEquations:
    moment = cross = square = torch.zeros((), dtype=torch.float64)
    output_hw = (0, 0)
    for tokens, targets in batches:
        depth_bt, share_bt = _to_grid(targets, tokens)
        output_hw = (targets["depth"].shape[1], targets["depth"].shape[2])
        features = _features(tokens).double().flatten(0, 1)
        rows = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        depth, share = depth_bt.double().flatten(), share_bt.double().flatten()
        weighted = rows * share[:, None]
        moment = moment + rows.mT @ weighted
        cross = cross + weighted.mT @ depth
        square = square + (share * depth * depth).sum()
    if moment.ndim == 0 or moment[-1, -1] == 0:
        raise invalid(name, "no valid depth", "batches with at least one valid depth")
    return _NormalEquations(moment=moment, cross=cross, square=square, output_hw=output_hw)


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestPatches:
    """The mean depth of the training tokens most alike by cosine: nothing is learned."""

    bank_md: Tensor  # unit length
    depth_m: Tensor
    k: int
    output_hw: tuple[int, int]

    def predict(self, tokens: TapTokens) -> Tensor:
        """Average the depth of the `k` nearest tokens of the bank, and enlarge the grid."""
        nearest = _nearest_depths(self.bank_md, self.depth_m, tokens, self.k)
        return _enlarge(nearest.mean(dim=2), tokens, self.output_hw)


def fit_nearest_patches(
    train: Batches,
    validation: Batches,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    bank_size: int = 20_000,
    seed: int = 0,
) -> NearestPatches:
    """Keep a random bank of training tokens with their depth; choose k on `validation`.

    Args:
        train: Batches to draw the bank from; each token with a valid depth is as likely.
        validation: Batches to choose k on, by squared error: images that `train` has not.
        neighbours: Values of k to choose from.
        bank_size: Most tokens to keep.
        seed: Of the draw.

    Raises:
        InvalidInputError: A part has no valid depth, or k exceeds the bank.
    """
    bank, depth, output_hw = _draw_bank(train, bank_size, seed)
    ks = sorted(neighbours)
    if not ks or ks[0] < 1 or ks[-1] > len(bank):
        raise invalid("neighbours", tuple(neighbours), f"from 1 to the bank's {len(bank)} tokens")
    errors = torch.zeros(len(ks), dtype=torch.float64)
    for tokens, targets in validation:
        depth_bt, share_bt = _to_grid(targets, tokens)
        nearest_btk = _nearest_depths(bank, depth, tokens, ks[-1])
        for i, k in enumerate(ks):
            difference = nearest_btk[:, :, :k].mean(dim=2) - depth_bt
            errors[i] += (share_bt * difference.square()).sum()
    best = ks[int(errors.argmin())]
    return NearestPatches(bank_md=bank, depth_m=depth, k=best, output_hw=output_hw)


def _draw_bank(batches: Batches, size: int, seed: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Sample tokens evenly from a stream: each gets a random key, the smallest keys stay."""
    generator = torch.Generator().manual_seed(seed)
    keys, bank, depth = torch.empty(0), torch.empty(0), torch.empty(0)
    output_hw = (0, 0)
    for tokens, targets in batches:
        depth_bt, share_bt = _to_grid(targets, tokens)
        output_hw = (targets["depth"].shape[1], targets["depth"].shape[2])
        chosen = share_bt.flatten() > 0
        new = _unit_features(tokens).flatten(0, 1)[chosen]
        keys = torch.cat([keys, torch.rand(len(new), generator=generator)])
        bank = torch.cat([bank.reshape(-1, new.shape[1]), new])
        depth = torch.cat([depth, depth_bt.flatten()[chosen]])
        kept = keys.argsort()[:size]
        keys, bank, depth = keys[kept], bank[kept], depth[kept]
    if not len(bank):
        raise invalid("train", "no valid depth", "batches with at least one valid depth")
    return bank, depth, output_hw


def _nearest_depths(bank_md: Tensor, depth_m: Tensor, tokens: TapTokens, k: int) -> Tensor:
    """Give (batch, tokens, k) depths of the bank, nearest first, in chunks of bounded size."""
    features = _unit_features(tokens).flatten(0, 1)
    rows = max(1, _SCORES_AT_ONCE // len(bank_md))
    parts = (features[start : start + rows] for start in range(0, len(features), rows))
    found = torch.cat([(part @ bank_md.mT).topk(k, dim=1).indices for part in parts])
    return depth_m[found].view(*tokens.patch.shape[:2], k)


def _to_grid(targets: Mapping[str, Tensor], tokens: TapTokens) -> tuple[Tensor, Tensor]:
    """Average the valid depths under each token, and give the share of its pixels that is valid.

    Both are (batch, tokens); a padded token has a share of 0.
    """
    valid = targets["valid"][:, None].float()
    depth = torch.where(targets["valid"], targets["depth"], 0.0)[:, None]
    share = functional.adaptive_avg_pool2d(valid, tokens.grid).flatten(1)
    total = functional.adaptive_avg_pool2d(depth, tokens.grid).flatten(1)
    if tokens.valid is not None:
        share = share * tokens.valid
    return total / share.clamp(min=1e-9) * (share > 0), share


def _features(tokens: TapTokens) -> Tensor:
    """Give float32 features, 0 for padded tokens, which may hold anything."""
    features = tokens.patch.float()
    if tokens.valid is None:
        return features
    return features.masked_fill(~tokens.valid[:, :, None], 0.0)


def _unit_features(tokens: TapTokens) -> Tensor:
    return functional.normalize(_features(tokens), dim=2)


def _enlarge(depth_bt: Tensor, tokens: TapTokens, output_hw: tuple[int, int]) -> Tensor:
    map_b1yx = depth_bt.view(-1, 1, *tokens.grid)
    return functional.interpolate(map_b1yx, size=output_hw, mode="bilinear", align_corners=False)
