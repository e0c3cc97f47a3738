"""The bicubic baseline of DeAP: interpolation in place of the attention, the rest alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, TapTokens, check_inputs, only_dense_tap
from heads.blocks import feed_forward
from heads.query_head import QueryHead, check_readout_options


@dataclass(frozen=True, kw_only=True, slots=True)
class BicubicOptions:
    """Choices of a bicubic head; the defaults are those of the release.

    `queries` is the side of the square map that tokens are interpolated to; the output is ``8 *
    queries`` a side.
    """

    dim: int = 48
    queries: int = 28
    dc: int | None = None  # channels of the CNN; None: max(dim // 4, n_outputs // 2)

    def __post_init__(self) -> None:
        if self.dim < 4:
            raise invalid("dim", self.dim, "at least 4")
        check_readout_options(self.queries, self.dc)


@HEADS.register("bicubic.v1")
class Bicubic(QueryHead):
    """Project the tokens to a few channels, interpolate, then DeAP's perceptron, CNN and skip.

    At width 768, 56,006 parameters for one output and 57,246 for 21. At the border the outermost
    tokens are repeated.

    Source:
        Lueddecke & Ecker, TMLR 2025, section 4 (baselines); counts of the release's `BI-ff` as of
        HEADS.md 1.5.
    """

    OPTIONS = BicubicOptions

    def __init__(self, *, taps: Sequence[TapShape], n_outputs: int, **options: int | None) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = BicubicOptions(**options)  # type: ignore[arg-type]
        self.width = only_dense_tap(taps, head="bicubic").dim
        self.project = nn.Linear(self.width, chosen.dim)
        self.ffn = feed_forward(chosen.dim, chosen.dim)
        inner = chosen.dc if chosen.dc is not None else max(chosen.dim // 4, n_outputs // 2)
        self.build_readout(chosen.dim, inner, n_outputs)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 8 * queries, 8 * queries)."""
        check_inputs(inputs, (self.width,))
        (tokens,) = inputs
        patch_btd = tokens.filled(self.project.weight.dtype)
        side = self.side
        map_bdyx = self.project(patch_btd).mT.reshape(patch_btd.shape[0], -1, *tokens.grid)
        resized = functional.interpolate(
            map_bdyx, size=(side, side), mode="bicubic", align_corners=True
        )
        tokens_bqd = self.ffn(resized.flatten(2).mT)
        return self.readout(tokens_bqd)
