"""Linear probing: one matrix for each token, the map enlarged bilinearly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, Head, TapTokens, check_inputs
from heads.blocks import normalise_tokens
from heads.joining import join, joined_shape


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearOptions:
    """Choices of a linear head.

    `size` is the side of the square output in pixels. With `cls` each tap's class token is
    appended to every token of it.
    """

    size: int = 224
    cls: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.size <= 2048:
            raise invalid("size", self.size, "from 2 to 2048 pixels a side", hint="Try 224.")


@HEADS.register("linear.v1")
class Linear(Head):
    """Batch normalisation and a 1x1 convolution on the tokens of one tap or several.

    Its learning rate is 3e-2 where none is named: no layer before the last lends it scale, so at a
    small one a few hundred steps do not reach the mean of the labels.

    ``2 * width + (width + 1) * n_outputs`` parameters, where width is that of all taps together,
    twice that with the class tokens. The normalisation leaves padded tokens out.

    Source:
        Oquab et al. 2023, DINOv2, section 7.4: "lin. 1" reads the last layer, "lin. 4" four.
    """

    OPTIONS = LinearOptions
    LR = 3e-2

    def __init__(self, *, taps: Sequence[TapShape], n_outputs: int, **options: int | bool) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = LinearOptions(**options)  # type: ignore[arg-type]
        shape = joined_shape(taps, head="linear")
        without = [tap.tap for tap in taps if not tap.n_prefix]
        if chosen.cls and without:
            raise invalid("cls", True, f"false for taps without a class token ({without[0]})")
        self._widths = tuple(tap.dim for tap in taps)
        width = shape.dim * (2 if chosen.cls else 1)
        self.norm = nn.BatchNorm1d(width)
        self.project = nn.Linear(width, n_outputs)

    @property
    def output_hw(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return (self.options.size,) * 2

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the one bias of the projection."""
        return (self.project.bias,)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, size, size)."""
        check_inputs(inputs, self._widths)
        dtype = self.project.weight.dtype
        tokens = join([_with_cls(each) for each in inputs] if self.options.cls else inputs, dtype)
        values_btn = self.project(normalise_tokens(self.norm, tokens, dtype))
        map_bnyx = values_btn.mT.reshape(values_btn.shape[0], -1, *tokens.grid)
        return functional.interpolate(
            map_bnyx, size=self.output_hw, mode="bilinear", align_corners=False
        )


def _with_cls(tokens: TapTokens) -> TapTokens:
    assert tokens.prefix is not None
    cls_btd = tokens.prefix[:, :1].expand_as(tokens.patch)
    patch = torch.cat([tokens.patch, cls_btd], dim=2)
    return TapTokens(patch=patch, grid=tokens.grid, valid=tokens.valid)
