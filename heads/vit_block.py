"""Transformer blocks of our own, filled from a stored tail: the last blocks of a backbone.

A `VitBlock` gives what timm's block gives, but needs no timm: `featstore.tail.BlockSpec` says
what it is made of. `load_tail` builds the last blocks and the final norm from a feature set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featstore.errors import invalid
from featstore.tail import BlockSpec, NormSpec, RopeSpec, TailSpec, plain_block

if TYPE_CHECKING:
    from featstore.api import FeatureSet

__all__ = ["BlockSpec", "NormSpec", "Rope", "Tail", "TailSpec", "VitBlock", "load_tail"]
__all__ += ["plain_block"]

Rotation = tuple[Tensor, Tensor]
"""Sines and cosines, (patch tokens, channels of a head) each."""


class RmsNorm(nn.Module):
    """Divide by the root of the mean square of the last axis, and perhaps scale."""

    def __init__(self, dim: int, *, eps: float, has_weight: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if has_weight else None
        self._eps = eps

    def forward(self, tokens_bnd: Tensor) -> Tensor:
        """Give tokens of the same shape."""
        return _rms_norm(tokens_bnd, self.weight, self._eps)


def _rms_norm(tokens_bnd: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    # Autocast, which knows `layer_norm`, does not cast for this one.
    tokens_bnd = tokens_bnd if weight is None else tokens_bnd.to(weight.dtype)
    return F.rms_norm(tokens_bnd, tokens_bnd.shape[-1:], weight, eps)


def build_norm(spec: NormSpec | None, dim: int) -> nn.Module:
    """Build a norm over `dim` channels; the identity for None."""
    if spec is None:
        return nn.Identity()
    if spec.kind == "rms_norm":
        return RmsNorm(dim, eps=spec.eps, has_weight=spec.has_weight)
    return nn.LayerNorm(dim, eps=spec.eps, elementwise_affine=spec.has_weight, bias=spec.has_bias)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


class Attention(nn.Module):
    """Self-attention of one block.

    `added`, if a module is put there, changes queries, keys and values before they are parted
    into heads: it is called with the tokens and these, one after another in the last axis.
    """

    added: nn.Module | None

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self._spec = spec
        n_queries, n_keys = (n * spec.head_dim for n in (spec.n_heads, spec.n_kv_heads))
        self.widths = (n_queries, n_keys, n_keys)
        self.n_heads, self.scale = spec.n_heads, spec.attention_scale
        self.qkv = nn.Linear(spec.dim, sum(self.widths), bias=spec.qkv_bias == "all")
        self.register_module("added", None)
        if spec.qkv_bias == "q_v":
            self.q_bias = nn.Parameter(torch.zeros(n_queries))
            self.v_bias = nn.Parameter(torch.zeros(n_keys))
        self.q_norm = build_norm(spec.qk_norm, spec.head_dim)
        self.k_norm = build_norm(spec.qk_norm, spec.head_dim)
        self.norm = build_norm(spec.attention_norm, n_queries)
        self.proj = nn.Linear(n_queries, spec.dim, bias=spec.proj_bias)

    def _bias(self) -> Tensor | None:
        if self._spec.qkv_bias != "q_v":
            return self.qkv.bias
        no_bias = torch.zeros_like(self.v_bias)  # a bias of the key would be no parameter of timm's
        return torch.cat([self.q_bias, no_bias, self.v_bias])

    def forward(self, tokens_bnd: Tensor, rotation: Rotation | None) -> Tensor:
        """Give (batch, tokens, dim)."""
        return self.join(self.attend(tokens_bnd, rotation))

    def attend(self, tokens_bnd: Tensor, rotation: Rotation | None) -> Tensor:
        """Give (batch, heads, tokens, channels)."""
        query, key, value = self.heads(tokens_bnd)
        if rotation is not None:
            query, key = (rotate(one, rotation, self._spec.rope) for one in (query, key))
        # Under autocast the norms and the rotation give float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return F.scaled_dot_product_attention(query, key, value, scale=self.scale)

    def heads(self, tokens_bnd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give normed queries and keys, not yet turned, and values.

        Returns:
            (batch, heads, tokens, channels) each; heads that share a key have it each.
        """
        mixed = F.linear(tokens_bnd, self.qkv.weight, self._bias())
        if self.added is not None:
            mixed = self.added(tokens_bnd, mixed)
        parts = torch.split(mixed, list(self.widths), dim=2)
        heads = [
            part.view(*part.shape[:2], -1, self._spec.head_dim).transpose(1, 2) for part in parts
        ]
        query, key, value = self.q_norm(heads[0]), self.k_norm(heads[1]), heads[2]
        repeats = self._spec.n_heads // self._spec.n_kv_heads
        if repeats > 1:
            key, value = (one.repeat_interleave(repeats, dim=1) for one in (key, value))
        return query, key, value

    def join(self, attended_bhnc: Tensor) -> Tensor:
        """Mix what the heads attended to: (batch, tokens, dim)."""
        joined: Tensor = self.proj(self.norm(attended_bhnc.transpose(1, 2).flatten(2)))
        return joined


class Mlp(nn.Module):
    """The two layers after the attention of one block; gated ones hold the gate's half first."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self._spec = spec
        n_halves = 2 if spec.mlp == "gated" else 1
        is_first = spec.mlp_norm_at == "input"
        self.fc1 = nn.Linear(spec.dim, n_halves * spec.hidden, bias=spec.mlp_bias[0])
        self.norm = build_norm(spec.mlp_norm, spec.dim if is_first else spec.hidden)
        self.fc2 = nn.Linear(spec.hidden, spec.dim, bias=spec.mlp_bias[1])

    def forward(self, tokens_bnd: Tensor) -> Tensor:
        """Give tokens of the same shape."""
        activate = _ACTIVATIONS[self._spec.activation]
        is_first = self._spec.mlp_norm_at == "input"
        inner = self.fc1(self.norm(tokens_bnd) if is_first else tokens_bnd)
        if self._spec.mlp == "gated":
            gate, value = inner.chunk(2, dim=-1)
            inner = activate(gate) * value
        else:
            inner = activate(inner)
        outer: Tensor = self.fc2(inner if is_first else self.norm(inner))
        return outer


class VitBlock(nn.Module):
    """One transformer block, as its `BlockSpec` says."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm1 = build_norm(spec.norm1, spec.dim)
        self.attention = Attention(spec)
        self.gamma1 = nn.Parameter(torch.ones(spec.dim)) if spec.attention_layer_scale else None
        self.norm2 = build_norm(spec.norm2, spec.dim)
        self.mlp = Mlp(spec)
        self.gamma2 = nn.Parameter(torch.ones(spec.dim)) if spec.mlp_layer_scale else None

    def forward(self, tokens_bnd: Tensor, rope: Rotation | None = None) -> Tensor:
        """Give tokens of the same shape.

        Args:
            tokens_bnd: (batch, tokens, dim), prefix tokens first.
            rope: What `Rope` gives for the grid of the other tokens, where the block has one.
        """
        if (rope is None) != (self.spec.rope is None):
            raise invalid("rope", rope is not None, f"given only if the block turns: {self.spec}")
        if self.spec.residual == "parallel":
            normed = self.norm1(tokens_bnd)
            both = self.attention(normed, rope) + self.mlp(normed)
            return tokens_bnd + _scaled(both, self.gamma1)
        if self.spec.residual == "post":
            tokens_bnd = tokens_bnd + self.norm1(self.attention(tokens_bnd, rope))
            joined: Tensor = tokens_bnd + self.norm2(self.mlp(tokens_bnd))
            return joined
        attended = self.attention(self.norm1(tokens_bnd), rope)
        tokens_bnd = tokens_bnd + _scaled(attended, self.gamma1)
        return tokens_bnd + _scaled(self.mlp(self.norm2(tokens_bnd)), self.gamma2)


def _scaled(tokens_bnd: Tensor, gamma: Tensor | None) -> Tensor:
    return tokens_bnd if gamma is None else gamma * tokens_bnd


class Rope(nn.Module):
    """Rotary positions of a grid. Its frequencies are a buffer, so that training keeps them."""

    frequencies: Tensor

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        self._spec = spec
        self.register_buffer("frequencies", torch.ones(spec.n_frequencies))

    def forward(self, grid: tuple[int, int]) -> Rotation:
        """Give sines and cosines, (tokens, 2 * frequencies) each, row-major over the grid."""
        y_n, x_n = (self._positions(grid, axis) for axis in (0, 1))
        angles_y, angles_x = (one[:, None] * self.frequencies for one in (y_n, x_n))
        full = (*grid, len(self.frequencies))
        spread = [angles_y[:, None].expand(full), angles_x[None].expand(full)]
        order = spread[::-1] if self._spec.is_x_first else spread
        angles_nc = torch.cat(order, dim=-1).flatten(0, 1)
        return angles_nc.sin(), angles_nc.cos()

    def _positions(self, grid: tuple[int, int], axis: int) -> Tensor:
        spec, length = self._spec, grid[axis]
        steps = torch.arange(length, device=self.frequencies.device, dtype=torch.float32)
        if spec.positions == "index":
            steps = steps + spec.offset
            return steps if spec.reference is None else steps / length * spec.reference[axis]
        divisor = {"separate": length, "min": min(grid), "max": max(grid)}[spec.divisor]
        return (steps + 0.5 + spec.offset) / divisor * 2 - 1


def rotate(heads_bhnc: Tensor, rotation: Rotation, layout: str | None) -> Tensor:
    """Turn pairs of channels of the last tokens by their angles; the first, prefix, stay.

    Args:
        heads_bhnc: (batch, heads, tokens, channels), prefix tokens first.
        rotation: Sines and cosines, (other tokens, channels / 2) each.
        layout: "interleaved": a pair is two neighbours; "half": a channel of each half.
    """
    sin_nc, cos_nc = rotation
    n_prefix = heads_bhnc.shape[2] - sin_nc.shape[0]
    prefix, patch = heads_bhnc[:, :, :n_prefix], heads_bhnc[:, :, n_prefix:]
    is_half = layout == "half"
    first, second = patch.chunk(2, dim=-1) if is_half else (patch[..., ::2], patch[..., 1::2])
    turned = (first * cos_nc - second * sin_nc, second * cos_nc + first * sin_nc)
    whole = torch.cat(turned, dim=-1) if is_half else torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat([prefix.to(whole.dtype), whole], dim=2)


class FrozenNorm(nn.Module):
    """The backbone's final norm; its weight and bias are buffers, so that training keeps them."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: NormSpec, dim: int) -> None:
        super().__init__()
        self._spec, self._dim = spec, dim
        self.register_buffer("weight", torch.ones(dim) if spec.has_weight else None)
        self.register_buffer("bias", torch.zeros(dim) if spec.has_bias else None)

    def forward(self, tokens_bnd: Tensor) -> Tensor:
        """Give tokens of the same shape."""
        if self._spec.kind == "rms_norm":
            return _rms_norm(tokens_bnd, self.weight, self._spec.eps)
        return F.layer_norm(tokens_bnd, (self._dim,), self.weight, self.bias, self._spec.eps)


class Tail(nn.Module):
    """The last blocks of a backbone, which train, and then its final norm, which does not."""

    def __init__(self, spec: TailSpec) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList(VitBlock(block) for block in spec.blocks)
        self.rope = None if spec.rope is None else Rope(spec.rope)
        self.norm = nn.Identity() if spec.norm is None else FrozenNorm(spec.norm, spec.dim)

    def forward(self, tokens_bnd: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give the final tokens, normed.

        Args:
            tokens_bnd: (batch, prefix + grid tokens, dim), what `spec.input_tap` gives, any float
                dtype.
            grid: Rows and columns of the tokens after the prefix.

        Raises:
            InvalidInputError: The tokens have another number or width.
        """
        n_prefix, dim = self.spec.n_prefix, self.spec.dim
        if tokens_bnd.shape[1:] != (n_prefix + grid[0] * grid[1], dim):
            expected = f"(batch, {n_prefix} prefix tokens and {grid[0]} x {grid[1]} others, {dim})"
            raise invalid("tokens", tuple(tokens_bnd.shape), expected)
        rotation = None if self.rope is None else self.rope(grid)
        tokens_bnd = tokens_bnd.to(next(self.blocks.parameters()).dtype)
        for block in self.blocks:
            tokens_bnd = block(tokens_bnd, rotation)
        normed: Tensor = self.norm(tokens_bnd)
        return normed


def load_tail(features: FeatureSet, n_blocks: int) -> Tail:
    """Build the last `n_blocks` blocks and the final norm that are stored with a feature set.

    Args:
        features: Feature set.
        n_blocks: How many blocks, at least 1.

    Raises:
        NotFoundError: No tail is stored, or a shorter one; the message has the command that adds
            it.
        FormatError: The stored tail is damaged.
    """
    stored = features.tail(n_blocks)
    # On the meta device nothing is drawn at random: a seed gives the same head after this.
    with torch.device("meta"):
        tail = Tail(stored.spec)
    tensors = {name: torch.from_numpy(array) for name, array in stored.tensors.items()}
    tail.load_state_dict(tensors, assign=True)
    return tail
