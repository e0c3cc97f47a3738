"""The convolutional baseline of DeAP: a projection and a resize in place of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, TapTokens, check_inputs, only_dense_tap
from heads.blocks import POSITION_DIM
from heads.query_head import QueryHead, check_readout_options

_POSITION_SIDE = 28  # of the learned encoding, whatever the grid of queries
_GROUPS_IN, _GROUPS_OUT = 16, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvOptions:
    """Choices of a conv head; the defaults are those of the release.

    `queries` is the side of the square map that tokens are resized to; the output is ``8 *
    queries`` a side.
    """

    dim: int = 48
    queries: int = 28
    dc: int | None = None  # channels of the CNN; None: max((dim + 8) // 4, n_outputs // 2)

    def __post_init__(self) -> None:
        if self.dim < 8 or self.dim % _GROUPS_OUT:
            raise invalid("dim", self.dim, f"a multiple of {_GROUPS_OUT}, at least 8")
        check_readout_options(self.queries, self.dc)


@HEADS.register("conv.v1")
class Conv(QueryHead):
    """Normalise, project by two 1x1 convolutions, resize, add positions, then DeAP's CNN and skip.

    At width 768, 60,276 parameters for one output and 61,716 for 21: those of the release. Its
    second convolution is called strided there; the counts fit one of 1x1, which is taken here
    with a stride of 1. Padded tokens enter as zeros, after the norm as well.

    Source:
        Lueddecke & Ecker, TMLR 2025, section 4 (baselines); `ConvDecoder` of the release as of
        HEADS.md 1.3 and 1.5.
    """

    OPTIONS = ConvOptions

    def __init__(self, *, taps: Sequence[TapShape], n_outputs: int, **options: int | None) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = ConvOptions(**options)  # type: ignore[arg-type]
        self.width = only_dense_tap(taps, head="conv").dim
        if self.width % _GROUPS_IN:
            expected = f"a multiple of {_GROUPS_IN} for the head conv"
            raise invalid("width of the tap", self.width, expected, hint="Use another head.")
        dim = chosen.dim + POSITION_DIM
        self.norm = nn.GroupNorm(_GROUPS_IN, self.width)
        self.project = nn.Conv2d(self.width, chosen.dim, 1)
        self.mix = nn.Conv2d(chosen.dim, chosen.dim, 1)
        shape = (POSITION_DIM, _POSITION_SIDE, _POSITION_SIDE)
        self.positions = nn.Parameter(0.02 * torch.randn(shape))
        self.norm_out = nn.GroupNorm(_GROUPS_OUT, dim)
        inner = chosen.dc if chosen.dc is not None else max(dim // 4, n_outputs // 2)
        self.build_readout(dim, inner, n_outputs)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 8 * queries, 8 * queries)."""
        check_inputs(inputs, (self.width,))
        (tokens,) = inputs
        patch_btd = tokens.filled(self.project.weight.dtype)
        batch = patch_btd.shape[0]
        map_bdyx = patch_btd.mT.reshape(batch, -1, *tokens.grid)
        normed = self.norm(map_bdyx)
        if tokens.valid is not None:
            normed = normed * tokens.valid.view(batch, 1, *tokens.grid)
        mixed = self.mix(functional.relu(self.project(normed)))
        resized, positions = self._at_queries(mixed), self._at_queries(self.positions[None])
        both = torch.cat([resized, positions.expand(batch, -1, -1, -1)], dim=1)
        return self.readout(self.norm_out(both).flatten(2).mT)

    def _at_queries(self, map_bdyx: Tensor) -> Tensor:
        size = (self.side, self.side)
        return functional.interpolate(map_bdyx, size=size, mode="bilinear", align_corners=False)
