"""What the last blocks of a backbone are, in words and numbers that need no timm.

A `TailSpec` describes the blocks; their weights have the names of `heads.vit_block.Tail`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from featstore.errors import FormatError, invalid

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
NORMS = ("layer_norm", "rms_norm")
RESIDUALS = ("pre", "post", "parallel")
QKV_BIASES = ("none", "all", "q_v")
MLPS = ("plain", "gated")
MLP_NORMS = ("input", "hidden")
ROPE_POSITIONS = ("index", "centred")
ROPE_LAYOUTS = ("interleaved", "half")


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise invalid(name, value, f"one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormSpec:
    """One norm over the last axis."""

    kind: str = "layer_norm"
    eps: float = 1e-6
    has_weight: bool = True
    has_bias: bool = True

    def __post_init__(self) -> None:
        _check("norm kind", self.kind, NORMS)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> NormSpec:
        """Invert `asdict`."""
        return NormSpec(**value)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """One transformer block. The defaults are those of the plain ViT, whose width is not said.

    ``pre``: ``x + scale * attention(norm1(x))``, then ``x + scale * mlp(norm2(x))``. ``post``:
    ``x + norm1(attention(x))``, then ``x + norm2(mlp(x))``. ``parallel``:
    ``x + scale * (attention(norm1(x)) + mlp(norm1(x)))``.
    """

    dim: int
    n_heads: int
    head_dim: int
    n_kv_heads: int
    hidden: int  # channels between the layers of the MLP; of its value half where it is gated
    residual: str = "pre"
    norm1: NormSpec = NormSpec()
    norm2: NormSpec | None = NormSpec()  # None where attention and MLP share the first
    qkv_bias: str = "all"  # "q_v": the key has none
    qk_norm: NormSpec | None = None  # over the channels of one head
    attention_norm: NormSpec | None = None  # over the heads' joint output
    attention_scale: float = 0.125
    proj_bias: bool = True
    mlp: str = "plain"  # "gated": activation(gate) * value
    activation: str = "gelu"
    mlp_bias: tuple[bool, bool] = (True, True)  # of the first and of the last layer
    mlp_norm: NormSpec | None = None
    mlp_norm_at: str = "hidden"
    attention_layer_scale: bool = False
    mlp_layer_scale: bool = False
    rope: str | None = None  # which channels turn together: neighbours, or those of two halves

    def __post_init__(self) -> None:
        if self.rope is not None:
            _check("rope", self.rope, ROPE_LAYOUTS)
        _check("residual", self.residual, RESIDUALS)
        _check("qkv_bias", self.qkv_bias, QKV_BIASES)
        _check("mlp", self.mlp, MLPS)
        _check("activation", self.activation, ACTIVATIONS)
        _check("mlp_norm_at", self.mlp_norm_at, MLP_NORMS)
        if self.n_heads % self.n_kv_heads:
            raise invalid("n_kv_heads", self.n_kv_heads, f"a divisor of {self.n_heads} heads")
        if (self.norm2 is None) != (self.residual == "parallel"):
            raise invalid("norm2", self.norm2, "left out of a parallel block, and only there")

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return {**asdict(self), "mlp_bias": list(self.mlp_bias)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> BlockSpec:
        """Invert `to_json`."""
        norms = {
            name: None if value[name] is None else NormSpec.from_json(value[name])
            for name in ("norm1", "norm2", "qk_norm", "attention_norm", "mlp_norm")
        }
        first, last = value["mlp_bias"]
        return BlockSpec(**{**value, **norms, "mlp_bias": (first, last)})


def plain_block(dim: int, n_heads: int, **options: Any) -> BlockSpec:
    """Describe a block of the plain ViT: heads that share the width, and an MLP four times wider.

    Args:
        dim: Channels.
        n_heads: Heads of the attention.
        options: Fields of `BlockSpec` that differ.
    """
    usual = {
        "head_dim": dim // n_heads,
        "n_kv_heads": n_heads,
        "hidden": 4 * dim,
        "attention_scale": (dim // n_heads) ** -0.5,
    }
    return BlockSpec(dim=dim, n_heads=n_heads, **{**usual, **options})


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """How rotary positions are made for a grid of any size; the frequencies are a tensor.

    ``index``: 0, 1, 2 ... plus `offset`, and, with a `reference`, scaled as if the grid had that
    many tokens. ``centred``: the middles of the tokens, plus `offset`, in -1 to 1, an axis
    divided by its own size (``separate``), or both by the smaller or larger one.
    """

    n_frequencies: int
    positions: str = "index"
    offset: float = 0.0
    reference: tuple[int, int] | None = None
    divisor: str = "separate"  # or "min", "max"
    is_x_first: bool = False  # the first half of the angles belongs to the columns

    def __post_init__(self) -> None:
        _check("positions", self.positions, ROPE_POSITIONS)
        _check("divisor", self.divisor, ("separate", "min", "max"))

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> RopeSpec:
        """Invert `asdict`."""
        reference = value["reference"]
        known = None if reference is None else (int(reference[0]), int(reference[1]))
        return RopeSpec(**{**value, "reference": known})


@dataclass(frozen=True, kw_only=True, slots=True)
class TailSpec:
    """The last blocks of a backbone and its final norm, without their weights."""

    first: int  # number of the first block, from 0
    blocks: tuple[BlockSpec, ...]
    n_prefix: int
    norm: NormSpec | None = NormSpec()  # None: the backbone has no final norm
    rope: RopeSpec | None = None

    def __post_init__(self) -> None:
        if not self.blocks or self.first < 1:
            expected = "at least one block, and one block before it"
            raise invalid("tail", (self.first, len(self.blocks)), expected)

    @property
    def n_blocks(self) -> int:
        """Count the blocks."""
        return len(self.blocks)

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.blocks[0].dim

    @property
    def input_tap(self) -> str:
        """Tap whose tokens, prefix included, the first block takes."""
        return f"block:{self.first - 1}"

    def last(self, n_blocks: int) -> TailSpec:
        """Give the last `n_blocks` of the blocks."""
        n_left_out = self.n_blocks - n_blocks
        return replace(self, first=self.first + n_left_out, blocks=self.blocks[n_left_out:])

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        rope = None if self.rope is None else asdict(self.rope)
        if rope is not None and rope["reference"] is not None:
            rope["reference"] = list(rope["reference"])
        return {
            "first": self.first,
            "blocks": [block.to_json() for block in self.blocks],
            "n_prefix": self.n_prefix,
            "norm": None if self.norm is None else asdict(self.norm),
            "rope": rope,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> TailSpec:
        """Invert `to_json`.

        Raises:
            FormatError: It describes no tail.
        """
        try:
            return TailSpec(
                first=int(value["first"]),
                blocks=tuple(BlockSpec.from_json(block) for block in value["blocks"]),
                n_prefix=int(value["n_prefix"]),
                norm=None if value["norm"] is None else NormSpec.from_json(value["norm"]),
                rope=None if value["rope"] is None else RopeSpec.from_json(value["rope"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"The tail's description does not read ({error}). Update featstore, or extract "
                "the tail again."
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class TailWeights:
    """A tail with its numbers, by the names that `heads.vit_block.Tail` gives its tensors.

    Blocks are numbered from 0 within the tail: ``blocks.0.attention.qkv.weight``. The frequencies
    of rotary positions are ``rope.frequencies``, the final norm is ``norm.weight``.
    """

    spec: TailSpec
    tensors: Mapping[str, np.ndarray]

    @property
    def n_bytes(self) -> int:
        """Count the bytes of all numbers."""
        return sum(array.nbytes for array in self.tensors.values())
