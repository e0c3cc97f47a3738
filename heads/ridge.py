"""Ridge regression from tokens to a task's targets, in closed form: a probe without steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featstore.errors import invalid
from heads.base import TapTokens
from heads.tasks import Task
from heads.token_targets import Batches, TokenReading, token_reading

LAMBDAS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ridge:
    """A linear map from a token to its values, enlarged bilinearly to the output."""

    reading: TokenReading
    weight_dn: Tensor
    bias_n: Tensor
    strength: float  # the chosen lambda, in units of the features' mean variance
    output_hw: tuple[int, int]

    def predict(self, tokens: TapTokens) -> Tensor:
        """Map each token and enlarge the grid: (batch, n, Ho, Wo), as a head gives it."""
        values_btn = self.reading.features(tokens) @ self.weight_dn + self.bias_n
        return self.reading.output(values_btn, tokens, self.output_hw)


def fit_ridge(
    task: Task,
    train: Batches,
    validation: Batches,
    *,
    output_hw: tuple[int, int],
    lambdas: Sequence[float] = LAMBDAS,
) -> Ridge:
    """Solve ridge regression at the resolution of the grid, in closed form.

    Classes are regressed as shares of the pixels under a token, which is regression of one-hot
    pixels; the largest is the answer. Only normal equations are kept, so that memory does not
    grow with the data. A token weighs as much as its share of known pixels. The lambda with the
    least squared error on `validation` is taken, one for all outputs; its error follows from the
    normal equations of that part.

    Args:
        task: Decides what is regressed.
        train: Batches to solve on, with targets of `Task.prepare`, stacked.
        validation: Batches to choose lambda on: images (groups) that `train` has not.
        output_hw: Rows and columns of what `predict` gives.
        lambdas: To choose from, relative to the mean variance of the features.

    Raises:
        InvalidInputError: A part knows nothing, or the task has no values at tokens.
    """
    reading = token_reading(task)
    fitted = _normal_equations(reading, train, "train")
    held_out = _normal_equations(reading, validation, "validation")
    mean_d, mean_n = fitted.means()
    covariance, cross_dn = fitted.centred()
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    rotated = vectors.mT @ cross_dn
    best: tuple[float, float, Tensor, Tensor] | None = None
    for strength in lambdas:
        weight_dn = vectors @ (rotated / (values + strength * values.mean())[:, None])
        bias_n = mean_n - mean_d @ weight_dn
        error = held_out.squared_error(weight_dn, bias_n)
        if best is None or error < best[0]:
            best = (error, strength, weight_dn, bias_n)
    if best is None:
        raise invalid("lambdas", tuple(lambdas), "at least one number")
    _, strength, weight_dn, bias_n = best
    return Ridge(
        reading=reading,
        weight_dn=weight_dn.float(),
        bias_n=bias_n.float(),
        strength=strength,
        output_hw=output_hw,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _NormalEquations:
    """Weighted sums over tokens x (with a 1 appended) and values y, in float64."""

    moment: Tensor  # sum of w [x 1]^T [x 1]
    cross: Tensor  # sum of w [x 1]^T y
    square: Tensor  # sum of w |y|^2

    def means(self) -> tuple[Tensor, Tensor]:
        """Give the means of x and of y."""
        total = self.moment[-1, -1]
        return self.moment[:-1, -1] / total, self.cross[-1] / total

    def centred(self) -> tuple[Tensor, Tensor]:
        """Give the covariance of x, and of x with y."""
        total, (mean_d, mean_n) = self.moment[-1, -1], self.means()
        covariance = self.moment[:-1, :-1] / total - mean_d[:, None] * mean_d
        return covariance, self.cross[:-1] / total - mean_d[:, None] * mean_n

    def squared_error(self, weight_dn: Tensor, bias_n: Tensor) -> float:
        """Sum the weighted squared errors of a linear map."""
        full = torch.cat([weight_dn, bias_n[None]])
        explained = (full * (self.moment @ full)).sum() - 2 * (full * self.cross).sum()
        return float(self.square + explained)


def _normal_equations(reading: TokenReading, batches: Batches, name: str) -> _NormalEquations:
    moment = cross = square = torch.zeros((), dtype=torch.float64)
    for tokens, targets in batches:
        rows = reading.rows(tokens, targets)
        features = rows.features_btd.double().flatten(0, 1)
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        values = rows.values_btn.double().flatten(0, 1)
        weight = rows.weight_bt.double().flatten()[:, None]
        moment = moment + features.mT @ (features * weight)
        cross = cross + (features * weight).mT @ values
        square = square + (weight * values.square()).sum()
    if moment.ndim == 0 or moment[-1, -1] == 0:
        raise invalid(name, f"no known {reading.task}", "batches with at least one known value")
    return _NormalEquations(moment=moment, cross=cross, square=square)
