"""The bicubic baseline of DeAP: interpolation in place of the attention, the rest alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, Head, TapTokens, check_inputs, last_dense_tap, only_dense_tap
from heads.blocks import Upscale, feed_forward, upscaling_cnn

_UPSCALE = 8


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
        if not 2 <= self.queries <= 256:
            raise invalid("queries", self.queries, "from 2 to 256 a side", hint="Try 28 or 56.")
        if self.dc is not None and self.dc < 1:
            raise invalid("dc", self.dc, "a positive number of channels, or auto")


@HEADS.register("bicubic.v1")
class Bicubic(Head):
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
        if n_outputs < 1:
            raise invalid("n_outputs", n_outputs, "a positive number of output channels")
        self.width = only_dense_tap(taps, head="bicubic").dim
        self.project = nn.Linear(self.width, chosen.dim)
        self.ffn = feed_forward(chosen.dim, chosen.dim)
        inner = chosen.dc if chosen.dc is not None else max(chosen.dim // 4, n_outputs // 2)
        self.cnn = upscaling_cnn(chosen.dim, inner, n_outputs)
        self.skip = nn.Conv2d(chosen.dim, n_outputs, 1)
        self.upscale = Upscale(_UPSCALE)

    @property
    def output_hw(self) -> tuple[int, int]:
        """Rows and columns of the output: 8 pixels a query."""
        return (_UPSCALE * self.options.queries,) * 2

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the biases of the skip and of the CNN's last layer."""
        return (self.skip.get_parameter("bias"), self.cnn[-1].get_parameter("bias"))

    @classmethod
    def default_taps(
        cls, available: Mapping[str, TapShape], *, input_hw: tuple[int, int] | None
    ) -> tuple[str, ...]:
        """Choose the final norm, else the last block, else the deepest stage of stride <= 16."""
        return last_dense_tap(available, input_hw=input_hw)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 8 * queries, 8 * queries)."""
        check_inputs(inputs, (self.width,))
        (tokens,) = inputs
        patch_btd = tokens.patch.to(self.project.weight.dtype)
        if tokens.valid is not None:  # a padded token may hold anything, NaN included
            patch_btd = patch_btd.masked_fill(~tokens.valid[:, :, None], 0.0)
        side = self.options.queries
        map_bdyx = self.project(patch_btd).mT.reshape(len(patch_btd), -1, *tokens.grid)
        resized = functional.interpolate(
            map_bdyx, size=(side, side), mode="bicubic", align_corners=True
        )
        tokens_bqd = self.ffn(resized.flatten(2).mT)
        map_bdyx = tokens_bqd.mT.reshape(len(tokens_bqd), -1, side, side)
        output: Tensor = self.upscale(self.skip(map_bdyx)) + self.cnn(map_bdyx)
        return output
