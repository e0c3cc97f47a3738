"""What the targets of a task say about each token: the ground of baselines that learn no head.

Pixels under a token are averaged, so a class becomes the share of it. An image that has one class
is one row: its class token where there is one, else the mean of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import invalid
from featstore.registry import short_name
from heads.base import TapTokens
from heads.tasks import TASKS, Task

Batches = Iterable[tuple[TapTokens, Mapping[str, Tensor]]]
Targets = Mapping[str, Tensor]

LEAST_SHARE = 1e-3
"""What a class is given at least, so that its logarithm is finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """Features of a batch with what is known at each; a row of weight 0 is not known."""

    features_btd: Tensor  # float32, 0 for padded tokens
    values_btn: Tensor  # float32, averages over the known pixels
    weight_bt: Tensor  # share of the pixels that are known


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenReading:
    """How a task reads at tokens, and how answers at tokens become its output."""

    task: str
    n_values: int
    is_class: bool
    is_pooled: bool
    pixels: Callable[[Targets, int], tuple[Tensor, Tensor]]

    def rows(self, tokens: TapTokens, targets: Targets) -> TokenRows:
        """Give features, values and weights of a batch; ``t`` is 1 where images have one class."""
        values_bnyx, known_byx = self.pixels(targets, self.n_values)
        features_btd = self.features(tokens)
        grid = (1, 1) if self.is_pooled else tokens.grid
        share = functional.adaptive_avg_pool2d(known_byx[:, None].float(), grid).flatten(1)
        total = functional.adaptive_avg_pool2d(values_bnyx, grid).flatten(2).mT
        if tokens.valid is not None and not self.is_pooled:
            share = share * tokens.valid
        values = total / share.clamp(min=1e-9)[:, :, None] * (share > 0)[:, :, None]
        return TokenRows(features_btd=features_btd, values_btn=values, weight_bt=share)

    def features(self, tokens: TapTokens) -> Tensor:
        """Give (batch, rows, dim) float32; a padded token may hold anything and gives 0."""
        patch_btd = tokens.filled(torch.float32)
        if not self.is_pooled:
            return patch_btd
        if tokens.prefix is not None:
            return tokens.prefix[:, :1].float()
        n_valid = patch_btd.shape[1] if tokens.valid is None else tokens.valid.sum(1)[:, None, None]
        return patch_btd.sum(dim=1, keepdim=True) / n_valid

    def output(self, values_btn: Tensor, tokens: TapTokens, output_hw: tuple[int, int]) -> Tensor:
        """Give (batch, n, Ho, Wo) like a head: enlarged bilinearly, of classes the log of shares.

        The likeliest class is the one of the largest share, whatever `LEAST_SHARE` does to those
        that have none.
        """
        grid = (1, 1) if self.is_pooled else tokens.grid
        map_bnyx = values_btn.mT.reshape(values_btn.shape[0], -1, *grid)
        large = functional.interpolate(
            map_bnyx, size=output_hw, mode="bilinear", align_corners=False
        )
        return large.clamp(min=LEAST_SHARE).log() if self.is_class else large


def token_reading(task: Task) -> TokenReading:
    """Say how a task reads at tokens.

    Raises:
        InvalidInputError: Its targets are no values of single places.
    """
    name = next(short_name(name) for name, kind in TASKS.items() if kind is type(task))
    if name not in _PIXELS:
        raise invalid("task", name, f"one of {', '.join(sorted(_PIXELS))} for ridge and knn")
    is_pooled = name == "classification"
    return TokenReading(
        task=name,
        n_values=task.n_outputs,
        is_class=is_pooled or name == "segmentation",
        is_pooled=is_pooled,
        pixels=_PIXELS[name],
    )


def _of_depth(targets: Targets, n_values: int) -> tuple[Tensor, Tensor]:
    valid = targets["valid"]
    return torch.where(valid, targets["depth"], 0.0)[:, None], valid


def _of_distance(targets: Targets, n_values: int) -> tuple[Tensor, Tensor]:
    distance = targets["distance"].float()
    return distance.clamp(min=0)[:, None], distance >= 0


def _of_segmentation(targets: Targets, n_values: int) -> tuple[Tensor, Tensor]:
    classes = targets["classes"].long()
    known = classes >= 0
    one_hot = functional.one_hot(classes.clamp(min=0), n_values).movedim(3, 1).float()
    return one_hot * known[:, None], known


def _of_classification(targets: Targets, n_values: int) -> tuple[Tensor, Tensor]:
    one_hot = functional.one_hot(targets["class"].long(), n_values).float()
    return one_hot[:, :, None, None], torch.ones(len(one_hot), 1, 1, dtype=torch.bool)


_PIXELS: dict[str, Callable[[Targets, int], tuple[Tensor, Tensor]]] = {
    "classification": _of_classification,
    "depth": _of_depth,
    "distance": _of_distance,
    "segmentation": _of_segmentation,
}
