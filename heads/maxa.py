"""MAXA: two masked cross-attention layers from position queries, a CNN that enlarges the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, TapTokens, check_inputs
from heads.blocks import (
    MASK_FORMS,
    POSITION_DIM,
    LocalityMask,
    feed_forward,
    mask_logits,
    masked_attention,
    minus_infinity_outside,
    position_encoding,
    position_queries,
    project_tokens,
    split_heads,
)
from heads.joining import join, joined_shape
from heads.query_head import QueryHead, check_readout_options

VARIANTS = ("full", "no-sigma", "no-indiv-sigma", "single-layer")
_FACTORS = (4, 2)
_QUERY_DIM = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class MaxaOptions:
    """Choices of a MAXA head; the defaults are those of the paper's base model.

    `queries` is the side of the square query grid: the output is ``8 * queries`` a side. `variant`
    names an ablation of the paper's table 4: ``no-sigma`` has no mask, ``no-indiv-sigma`` one
    sigma for all heads, ``single-layer`` the first layer alone.
    """

    mask_form: str = "code"
    variant: str = "full"
    dim: int = 32
    heads: int = 8
    queries: int = 28
    dc: int | None = None  # channels of the CNN; None: max(dim // 4, n_outputs)

    def __post_init__(self) -> None:
        if self.mask_form not in MASK_FORMS:
            raise invalid("mask_form", self.mask_form, f"one of {', '.join(MASK_FORMS)}")
        if self.variant not in VARIANTS:
            raise invalid("variant", self.variant, f"one of {', '.join(VARIANTS)}")
        if self.heads < 1:
            raise invalid("heads", self.heads, "a positive number")
        if self.dim < 4 or self.dim % self.heads:
            raise invalid("dim", self.dim, f"at least 4 and a multiple of heads ({self.heads})")
        check_readout_options(self.queries, self.dc)

    def cnn_channels(self, n_outputs: int) -> int:
        """Give the channels inside the CNN."""
        return self.dc if self.dc is not None else max(self.dim // 4, n_outputs)


class _Layer(nn.Module):
    """What every layer has: keys and values straight from the tokens, and a perceptron.

    `norm_inp` is created, counted and never applied, as in the release.
    """

    def __init__(self, *, width: int, options: MaxaOptions) -> None:
        super().__init__()
        token_dim = width + POSITION_DIM
        self.norm_inp = nn.LayerNorm(token_dim)
        self.key_value = nn.Linear(token_dim, 3 * options.dim)
        self.ffn = feed_forward(2 * options.dim, options.dim)
        self._options = options

    def keys_and_values(self, tokens: TapTokens, positions_tc: Tensor) -> tuple[Tensor, Tensor]:
        """Give (batch, heads, channels, tokens) of both."""
        mixed_bdt = project_tokens(self.key_value, tokens, positions_tc)
        dim, heads = self._options.dim, self._options.heads
        return split_heads(mixed_bdt[:, :dim], heads), split_heads(mixed_bdt[:, dim:], heads)


class _MaskedLayer(_Layer):
    """The first layer: queries are positions, the same for all images; near tokens count more."""

    def __init__(self, *, width: int, options: MaxaOptions) -> None:
        super().__init__(width=width, options=options)
        self.query = nn.Linear(_QUERY_DIM, options.dim)
        self.mask = (
            LocalityMask(
                n_heads=options.heads,
                form=options.mask_form,
                is_shared=options.variant == "no-indiv-sigma",
            )
            if options.variant != "no-sigma"
            else None
        )

    def forward(self, tokens: TapTokens, positions_tc: Tensor, *, side: int, step: float) -> Tensor:
        """Give (batch, queries, dim) for a grid of queries of `side`, `step` apart."""
        heads, like = self._options.heads, self.query.weight
        query_hqc = position_queries(self.query, n_heads=heads, side=side, step=step)
        key_bhct, value_bhvt = self.keys_and_values(tokens, positions_tc)
        mask_hqt = mask_logits(self.mask, n_heads=heads, side=side, grid=tokens.grid, like=like)
        bias_bt = minus_infinity_outside(tokens.valid)
        attended_bhvq = masked_attention(query_hqc, key_bhct, value_bhvt, mask_hqt, bias_bt)
        answer: Tensor = self.ffn(attended_bhvq.flatten(1, 2).mT)
        return answer


class _FreeLayer(_Layer):
    """The second layer: the first one's answers ask as they are, of every token alike."""

    def forward(self, query_bqd: Tensor, tokens: TapTokens, positions_tc: Tensor) -> Tensor:
        """Give (batch, queries, dim)."""
        key_bhct, value_bhvt = self.keys_and_values(tokens, positions_tc)
        query_bhqc = split_heads(query_bqd.mT, self._options.heads).mT
        valid = None if tokens.valid is None else tokens.valid[:, None, None]
        attended_bhqv = functional.scaled_dot_product_attention(
            query_bhqc, key_bhct.mT, value_bhvt.mT, attn_mask=valid
        )
        answer: Tensor = self.ffn(attended_bhqv.transpose(1, 2).flatten(2))
        return answer


@HEADS.register("maxa.v1")
class Maxa(QueryHead):
    """Two cross-attentions from fixed position queries, the first one masked by distance, a CNN.

    With the defaults, ``196 * width + 8 * tokens + 31570`` parameters for one output; several
    taps count with their widths together on the finest grid. The norms over the taps, ``2 * (width
    + 8)`` a layer, are counted and never applied, as in the release. The positions of the tokens
    start as sines and are learned; on another grid than the one the head was made for they are
    interpolated.

    Source:
        MAXA, ICLR 2025 submission zV6D212c7Q, section 3 and A.6; the released layer and the
        counts of tables 2 and 3 as of HEADS.md 1.1 and 1.2.
    """

    OPTIONS = MaxaOptions

    def __init__(
        self, *, taps: Sequence[TapShape], n_outputs: int, **options: int | str | None
    ) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = MaxaOptions(**options)  # type: ignore[arg-type]
        shape = joined_shape(taps, head="maxa")
        assert shape.grid is not None
        self._widths = tuple(tap.dim for tap in taps)
        self._grid = shape.grid
        self.positions = nn.Parameter(position_encoding(shape.grid))
        self.first = _MaskedLayer(width=shape.dim, options=chosen)
        is_single = chosen.variant == "single-layer"
        self.second = None if is_single else _FreeLayer(width=shape.dim, options=chosen)
        self.UNUSED = ("first.norm_inp",) if is_single else ("first.norm_inp", "second.norm_inp")
        self.build_readout(chosen.dim, chosen.cnn_channels(n_outputs), n_outputs, factors=_FACTORS)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 8 * queries, 8 * queries); any grid of tokens will do."""
        check_inputs(inputs, self._widths)
        tokens = join(inputs, self.positions.dtype)
        positions_tc = self._positions_on(tokens.grid)
        tokens_bqd = self.first(tokens, positions_tc, side=self.side, step=self.position_step)
        if self.second is not None:
            tokens_bqd = self.second(tokens_bqd, tokens, positions_tc)
        return self.readout(tokens_bqd)

    def _positions_on(self, grid: tuple[int, int]) -> Tensor:
        """Give the learned positions, (tokens, 8), on any grid."""
        if grid == self._grid:
            return self.positions
        map_1cyx = self.positions.mT.reshape(1, -1, *self._grid)
        resized = functional.interpolate(map_1cyx, size=grid, mode="bilinear", align_corners=True)
        return resized[0].flatten(1).mT
