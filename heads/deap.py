"""Dense attentive probing: position queries attend to one tap, a small CNN enlarges the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, TapTokens, check_inputs, only_dense_tap
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
from heads.query_head import QueryHead, check_readout_options

VARIANTS = ("full", "8-dim", "no-sigma", "no-indiv-sigma", "only-mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeapOptions:
    """Choices of a DeAP head; the defaults are those of the release.

    `queries` is the side of the square query grid, whatever the shape of the frame: the output is
    ``8 * queries`` a side (28 gives 224, 56 gives 448) and costs no parameters.

    `variant` names an ablation: ``8-dim`` has half the channels; ``no-sigma`` has no mask,
    ``no-indiv-sigma`` one sigma for all heads; ``only-mask`` reads tokens by their distance alone,
    without keys (HEADS.md 1.5).
    """

    mask_form: str = "code"
    variant: str = "full"
    dim: int = 16
    heads: int = 8
    queries: int = 28
    dc: int | None = None  # channels of the CNN; None: max(dim // 4, n_outputs // 2)

    def __post_init__(self) -> None:
        if self.mask_form not in MASK_FORMS:
            raise invalid("mask_form", self.mask_form, f"one of {', '.join(MASK_FORMS)}")
        if self.variant not in VARIANTS:
            raise invalid("variant", self.variant, f"one of {', '.join(VARIANTS)}")
        if self.heads < 1:
            raise invalid("heads", self.heads, "a positive number")
        if self.inner_dim < 4 or self.inner_dim % self.heads:
            expected = f"at least 4 and a multiple of heads ({self.heads})"
            raise invalid("dim", self.inner_dim, expected)
        check_readout_options(self.queries, self.dc)

    @property
    def inner_dim(self) -> int:
        """Give the channels of the queries and keys."""
        return 8 if self.variant == "8-dim" else self.dim

    def cnn_channels(self, n_outputs: int) -> int:
        """Give the channels inside the CNN."""
        return self.dc if self.dc is not None else max(self.inner_dim // 4, n_outputs // 2)


@HEADS.register("deap.v1")
class Deap(QueryHead):
    """One masked cross-attention from fixed position queries, an MLP, and a CNN with a skip.

    With the defaults, ``50 * width + 4886`` parameters for one output. Of them the norm over the
    tap, ``2 * (width + 8)``, is never applied: the release creates and counts it, and leaves the
    call commented out.

    Keys and values come straight from the tap and its position encoding. Two rewritings give
    the numbers of the plain form in less time: the positions' share of keys and values is the
    same for all images, and the 1x1 skip convolution comes before the enlarging, with which it
    commutes.

    Source:
        Lueddecke & Ecker, Dense Attentive Probing, TMLR 2025, section 3; details of the released
        `CrossAttLayer3`, `CrossAtt3`, `DecoderCA` as of HEADS.md 1.2 and 1.3.
    """

    OPTIONS = DeapOptions

    def __init__(
        self, *, taps: Sequence[TapShape], n_outputs: int, **options: int | str | None
    ) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = DeapOptions(**options)  # type: ignore[arg-type]
        self.width = only_dense_tap(taps, head="deap").dim
        token_dim = self.width + POSITION_DIM
        self.norm_inp = nn.LayerNorm(token_dim)
        dim, only_mask = chosen.inner_dim, chosen.variant == "only-mask"
        # The release keeps the query's weights where nothing asks.
        self.UNUSED = ("norm_inp", "query") if only_mask else ("norm_inp",)
        self.query = nn.Linear(POSITION_DIM, dim)
        self.key_value = nn.Linear(token_dim, (2 if only_mask else 3) * dim)
        self.mask = self._make_mask() if chosen.variant != "no-sigma" else None
        self.ffn = feed_forward(2 * dim, dim)
        self.build_readout(dim, chosen.cnn_channels(n_outputs), n_outputs)

    def _make_mask(self) -> LocalityMask:
        is_shared = self.options.variant == "no-indiv-sigma"
        options = self.options
        return LocalityMask(n_heads=options.heads, form=options.mask_form, is_shared=is_shared)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 8 * queries, 8 * queries); any grid of tokens will do."""
        check_inputs(inputs, (self.width,))
        attended_bdq = self._attend(inputs[0])
        tokens_bqd = self.ffn(attended_bdq.mT)
        return self.readout(tokens_bqd)

    def _attend(self, tokens: TapTokens) -> Tensor:
        """Give (batch, 2 * dim, queries): the heads' answers, one after another."""
        dim, heads = self.options.inner_dim, self.options.heads
        positions_tc = position_encoding(tokens.grid, like=self.query.weight)
        mixed_bdt = project_tokens(self.key_value, tokens, positions_tc)
        value_bhvt = split_heads(mixed_bdt[:, -2 * dim :], heads)
        mask_hqt = self._mask(tokens.grid)
        bias_bt = minus_infinity_outside(tokens.valid)
        if self.options.variant == "only-mask":
            logits_bhqt = mask_hqt if bias_bt is None else mask_hqt + bias_bt[:, None, None]
            attended: Tensor = value_bhvt @ logits_bhqt.softmax(dim=-1).mT
            return attended.flatten(1, 2)
        query_hqc = position_queries(
            self.query, n_heads=heads, side=self.side, step=self.position_step
        )
        key_bhct = split_heads(mixed_bdt[:, :dim], heads)
        return masked_attention(query_hqc, key_bhct, value_bhvt, mask_hqt, bias_bt).flatten(1, 2)

    def _mask(self, grid: tuple[int, int]) -> Tensor:
        """Give (heads, queries, tokens) logits."""
        heads, side, like = self.options.heads, self.side, self.query.weight
        return mask_logits(self.mask, n_heads=heads, side=side, grid=grid, like=like)
