"""The convolutional baseline of MAXA: self-attention over the tokens, then a CNN on their grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, Head, TapTokens, check_inputs
from heads.blocks import (
    POSITION_DIM,
    Upscale,
    feed_forward,
    position_encoding,
    project_tokens,
    split_heads,
    upscaling_cnn,
)
from heads.joining import join, joined_shape
from heads.query_head import UPSCALE

_FACTORS = (4, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfAttentionOptions:
    """Choices of a self-attention head; the defaults are those of MAXA's base model.

    There is no choice of the output's size: it is 8 pixels a token.
    """

    dim: int = 32
    heads: int = 8
    dc: int | None = None  # channels of the CNN; None: max(dim // 4, n_outputs)

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise invalid("heads", self.heads, "a positive number")
        if self.dim < 4 or self.dim % self.heads:
            raise invalid("dim", self.dim, f"at least 4 and a multiple of heads ({self.heads})")
        if self.dc is not None and self.dc < 1:
            raise invalid("dc", self.dc, "a positive number of channels, or auto")

    def cnn_channels(self, n_outputs: int) -> int:
        """Give the channels inside the CNN."""
        return self.dc if self.dc is not None else max(self.dim // 4, n_outputs)


@HEADS.register("self_attention.v1")
class SelfAttention(Head):
    """Let the tokens attend to each other, then enlarge their grid by MAXA's CNN and skip.

    With the defaults, ``32 * width + 13066`` parameters for one output; several taps count with
    their widths together on the finest grid. Unlike MAXA's, the output grows with the grid of
    tokens, as the paper says of this baseline.

    The paper has one sentence on it, no code and no count: self-attention for context, then a
    CNN of transposed convolutions. All else is inferred: tokens and their fixed positions are
    projected to `dim` channels as in MAXA's equation 1; one normalised attention of MAXA's
    number of heads is added to them (without that sum, a place would be lost in the average of
    all); perceptron, CNN and skip are MAXA's own (A.6). Padded tokens are neither read nor
    shown to the CNN.

    Source:
        MAXA, ICLR 2025 submission zV6D212c7Q, section 4.3 (figure 3), equation 1 and A.6.
    """

    OPTIONS = SelfAttentionOptions

    def __init__(self, *, taps: Sequence[TapShape], n_outputs: int, **options: int | None) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = SelfAttentionOptions(**options)  # type: ignore[arg-type]
        shape = joined_shape(taps, head="self_attention")
        assert shape.grid is not None
        self._widths, self._grid = tuple(tap.dim for tap in taps), shape.grid
        dim = chosen.dim
        self.project = nn.Linear(shape.dim + POSITION_DIM, dim)
        self.norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.mix = nn.Linear(dim, dim)
        self.ffn = feed_forward(dim, dim)
        inner = chosen.cnn_channels(n_outputs)
        self.cnn = upscaling_cnn(dim, inner, n_outputs, factors=_FACTORS)
        self.skip = nn.Conv2d(dim, n_outputs, 1)
        self.upscale = Upscale(UPSCALE)

    @property
    def output_hw(self) -> tuple[int, int]:
        """Rows and columns of the output: 8 pixels a token of the grid it was made for."""
        return UPSCALE * self._grid[0], UPSCALE * self._grid[1]

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the biases of the skip and of the CNN's last layer."""
        return (self.skip.get_parameter("bias"), self.cnn[-1].get_parameter("bias"))

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 8 * rows, 8 * columns) of the grid of the tokens."""
        check_inputs(inputs, self._widths)
        tokens = join(inputs, self.project.weight.dtype)
        positions_tc = position_encoding(tokens.grid, like=self.project.weight)
        projected_btd = project_tokens(self.project, tokens, positions_tc).mT
        answer_btd = self.ffn(projected_btd + self._attend(projected_btd, tokens.valid))
        if tokens.valid is not None:
            answer_btd = answer_btd * tokens.valid[:, :, None]
        map_bdyx = answer_btd.mT.reshape(answer_btd.shape[0], -1, *tokens.grid)
        output: Tensor = self.upscale(self.skip(map_bdyx)) + self.cnn(map_bdyx)
        return output

    def _attend(self, tokens_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """Give (batch, tokens, dim): what each token gathers from all that are valid."""
        mixed_bdt = self.query_key_value(self.norm(tokens_btd)).mT
        query, key, value = (split_heads(part, self.options.heads).mT for part in
                             mixed_bdt.chunk(3, dim=1))  # fmt: skip
        mask = None if valid_bt is None else valid_bt[:, None, None]
        attended_bhtc = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        gathered: Tensor = self.mix(attended_bhtc.transpose(1, 2).flatten(2))
        return gathered
