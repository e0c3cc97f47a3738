"""Heads that give one answer an image: what classification learns with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, Head, TapTokens, check_inputs, start_layer_at
from heads.blocks import normalise_tokens
from heads.joining import join, joined_shape

POOLS = ("mean", "cls", "both")


class PooledHead(Head):
    """A head whose last layer is `project`, and which gives one answer an image."""

    is_pooled = True
    project: nn.Linear

    @property
    def output_hw(self) -> tuple[int, int]:
        """One answer."""
        return (1, 1)

    def start_at(self, middle: Tensor) -> None:
        """Begin with one answer: the norm before it knows little yet, so that no weight is kept."""
        start_layer_at(self.project, middle, share=0.0)

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the bias of the projection."""
        return (self.project.bias,)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPoolOptions:
    """Choices of a linear pooled head.

    `pool` is what stands for the image: the mean of its patch tokens, its class token, or both
    side by side; several taps are laid side by side as well.
    """

    pool: str = "mean"

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise invalid("pool", self.pool, f"one of {', '.join(POOLS)}")


@HEADS.register("linear_pool.v1")
class LinearPool(PooledHead):
    """Pool the tokens, normalise over the batch, map linearly.

    ``(width + 1) * n_outputs`` parameters, where width is that of all taps together, and twice
    that with ``pool=both``; the norm has none. Padded tokens do not count.

    Source:
        Oquab et al. 2023, DINOv2, section 7.1 (linear probing); He et al. 2022, arXiv:2111.06377,
        A.1, has the norm without parameters.
    """

    OPTIONS = LinearPoolOptions
    LR = 1e-2

    def __init__(self, *, taps: Sequence[TapShape], n_outputs: int, **options: str) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = LinearPoolOptions(**options)
        without = [tap.tap for tap in taps if not tap.n_prefix]
        if self.options.pool != "mean" and without:
            hint = "Use pool=mean."
            expected = f"mean for taps without a class token ({without[0]})"
            raise invalid("pool", self.options.pool, expected, hint=hint)
        self._widths = tuple(tap.dim for tap in taps)
        width = sum(self._widths) * (2 if self.options.pool == "both" else 1)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.project = nn.Linear(width, n_outputs)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 1, 1)."""
        check_inputs(inputs, self._widths)
        if self.training and inputs[0].patch.shape[0] < 2:
            raise invalid("batch size", 1, "at least 2 for the head linear_pool, which normalises")
        parts: list[Tensor] = []
        for tokens in inputs:
            if self.options.pool in ("mean", "both"):
                parts.append(_mean(tokens, self.project.weight.dtype))
            if self.options.pool in ("cls", "both"):
                assert tokens.prefix is not None
                parts.append(tokens.prefix[:, 0].to(self.project.weight.dtype))
        answer: Tensor = self.project(self.norm(torch.cat(parts, dim=1)))
        return answer[:, :, None, None]


def _mean(tokens: TapTokens, dtype: torch.dtype) -> Tensor:
    """Average the tokens that saw the image: (batch, dim)."""
    patch_btd = tokens.filled(dtype)
    if tokens.valid is None:
        return patch_btd.mean(dim=1)
    return patch_btd.sum(dim=1) / tokens.valid.sum(dim=1, keepdim=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentivePoolOptions:
    """Choices of an attentive pooled head.

    `heads` of attention; None: one for each 64 channels, at least one.
    """

    heads: int | None = None

    def __post_init__(self) -> None:
        if self.heads is not None and self.heads < 1:
            raise invalid("heads", self.heads, "a positive number")


@HEADS.register("attentive_pool.v1")
class AttentivePool(PooledHead):
    """Let one learned query attend to the tokens, and map its answer linearly.

    ``2 * width ** 2 + width + (width + 1) * n_outputs`` parameters, width being that of all taps
    together on the finest grid.

    Source:
        El-Nouby et al. 2024, AIM, arXiv:2401.08541, section 3.3 and appendix: attentive probe with
        a normalisation over the batch, keys and values without bias, one query.
    """

    OPTIONS = AttentivePoolOptions

    def __init__(self, *, taps: Sequence[TapShape], n_outputs: int, **options: int | None) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = AttentivePoolOptions(**options)
        self._widths = tuple(tap.dim for tap in taps)
        width = joined_shape(taps, head="attentive_pool").dim
        self.n_heads = chosen.heads or max(1, width // 64)
        if width % self.n_heads:
            expected = f"a divisor of the width {width}"
            raise invalid("heads", self.n_heads, expected, hint="Use --set heads=1.")
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, n_outputs)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 1, 1)."""
        check_inputs(inputs, self._widths)
        tokens = join(inputs, self.query.dtype)
        normed_btd = normalise_tokens(self.norm, tokens, self.query.dtype)
        batch, _, width = normed_btd.shape
        shape = (batch, -1, self.n_heads, width // self.n_heads)
        key_bhtc, value_bhtc = (
            layer(normed_btd).view(shape).transpose(1, 2) for layer in (self.key, self.value)
        )
        query_bhqc = self.query.view(1, self.n_heads, 1, -1).expand(batch, -1, -1, -1)
        valid = None if tokens.valid is None else tokens.valid[:, None, None]
        pooled_bhqc = functional.scaled_dot_product_attention(
            query_bhqc, key_bhtc, value_bhtc, attn_mask=valid
        )
        answer: Tensor = self.project(pooled_bhqc.reshape(batch, width))
        return answer[:, :, None, None]
