"""The last blocks of a timm model in the words of `featstore.tail`, or why that cannot be.

Modules are told by their exact class: a class that is not listed here is refused, for its
attributes may have the same names and mean something else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.layers.attention import Attention, AttentionRope
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vitamin import GeGluMlp
from torch import nn

from featstore.errors import InvalidInputError, invalid
from featstore.tail import BlockSpec, NormSpec, RopeSpec, TailSpec, TailWeights
from featstore.taps import parse_tap

MAX_AUTO = 4
_WINDOWED = {
    "DaVit",
    "EfficientVitMsra",
    "GlobalContextVit",
    "Hiera",
    "HieraDet",
    "MaxxVit",
    "Nest",
    "SwinTransformer",
    "SwinTransformerV2",
    "SwinTransformerV2Cr",
    "TinyVit",
    "Twins",
    "VisionTransformerSAM",
}
_MODELS = (VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit)
_NORMS: dict[type[nn.Module], str] = {
    nn.LayerNorm: "layer_norm",
    LayerNorm: "layer_norm",
    LayerNormFp32: "layer_norm",
    RmsNorm: "rms_norm",
    RmsNormFp32: "rms_norm",
}
_ACTIVATIONS: dict[type[nn.Module], str] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}


class _InexpressibleError(Exception):
    """A part of a model that `featstore.tail` has no words for; the text says which."""


def choose_tail(
    model: Any, wanted: int | str | None, *, taps: Sequence[str], depth: int, **about: Any
) -> tuple[TailWeights | None, str]:
    """Take the blocks that the user asks for; "auto" takes what can be had.

    Args:
        model: timm's model, nothing pruned.
        wanted: How many blocks, "auto" or None.
        taps: Taps that are asked for, positive.
        depth: Blocks of the model.
        about: What `read_tail_of` needs besides.

    Returns:
        The tail or None, and why "auto" gave none.

    Raises:
        InvalidInputError: The model has no such blocks, or has parts that cannot be described.
    """
    if wanted is None:
        return None, ""
    if wanted != "auto":
        if not isinstance(wanted, int):
            raise invalid("tail", wanted, "a number of blocks, or auto")
        return read_tail_of(model, wanted, **about), ""
    n_blocks = automatic_blocks(taps, depth)
    if not n_blocks:
        return None, f"None of the taps is the output of a block before the last {MAX_AUTO}."
    try:
        return read_tail_of(model, n_blocks, **about), ""
    except InvalidInputError as error:
        return None, str(error)


def automatic_blocks(taps: Sequence[str], depth: int) -> int:
    """Choose how many blocks to store where the user says "auto".

    The most, up to 4, that one of the taps can feed: dense ``block:N`` feeds those after it.

    Returns:
        0 where no tap can feed any.
    """
    fed = [depth - 1 - index for tap in taps if (index := _dense_block(tap)) is not None]
    return max((n for n in fed if 1 <= n <= MAX_AUTO), default=0)


def _dense_block(tap: str) -> int | None:
    parsed = parse_tap(tap)
    return parsed.index if parsed.unit == "block" and not parsed.pool else None


def read_tail_of(
    model: Any, n_blocks: int, *, architecture: str, n_prefix: int, norm: nn.Module | None
) -> TailWeights:
    """Describe the last blocks of a timm model and take their weights.

    Call it before anything is pruned. On the processor the arrays share memory with the model.

    Args:
        model: timm's model.
        n_blocks: How many blocks.
        architecture: Its name, for messages.
        n_prefix: Its prefix tokens.
        norm: Its final norm.

    Raises:
        InvalidInputError: The model has no such blocks, or has parts that cannot be described.
    """
    try:
        _check_model(model)
        depth = len(model.blocks)
        if not 1 <= n_blocks < depth:
            raise invalid(
                "tail", n_blocks, f"from 1 to {depth - 1} for the {depth} blocks of {architecture}"
            )
        return _read(model, n_blocks, n_prefix, norm)
    except _InexpressibleError as error:
        raise InvalidInputError(
            f"{architecture} has no tail that can be stored: {error}. Leave out --tail, or take "
            "a plain ViT."
        ) from None


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if name in _WINDOWED:
        raise _InexpressibleError(f"its blocks ({name}) attend within windows of the grid")
    if type(model) not in _MODELS:
        raise _InexpressibleError(f"{name} is a CNN, or another net than a ViT of one grid")


def _read(model: Any, n_blocks: int, n_prefix: int, norm: nn.Module | None) -> TailWeights:
    tensors: dict[str, torch.Tensor] = {}
    rope = _rope(getattr(model, "rope", None), _Part(tensors, "rope."))
    blocks = []
    for number, block in enumerate(list(model.blocks)[-n_blocks:]):
        part = _Part(tensors, f"blocks.{number}.")
        blocks.append(_block(block, part, n_prefix=n_prefix, has_rope=rope is not None))
    spec = TailSpec(
        first=len(model.blocks) - n_blocks,
        blocks=tuple(blocks),
        n_prefix=n_prefix,
        norm=_Part(tensors, "").norm("norm", norm),
        rope=rope,
    )
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    return TailWeights(spec=spec, tensors=arrays)


class _Part:
    """Takes the weights of one part of a model, under names that start alike."""

    def __init__(self, tensors: dict[str, torch.Tensor], start: str) -> None:
        self._tensors = tensors
        self._start = start

    def below(self, name: str) -> _Part:
        """Give a part inside this one."""
        return _Part(self._tensors, f"{self._start}{name}.")

    def keep(self, name: str, tensor: torch.Tensor | None) -> bool:
        """Take one tensor, if there is one; tell whether there was."""
        if tensor is not None:
            self._tensors[f"{self._start}{name}"] = tensor
        return tensor is not None

    def linear(self, name: str, *layers: Any) -> bool:
        """Take one linear layer, or several one above the other; tell whether it has a bias."""
        if any(type(layer) is not nn.Linear for layer in layers):
            raise _InexpressibleError(
                f"{name} is {' and '.join(type(one).__name__ for one in layers)}"
            )
        self.keep(f"{name}.weight", torch.cat([layer.weight for layer in layers]))
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) not in (0, len(layers)):
            raise _InexpressibleError(f"only a part of {name} has a bias")
        return self.keep(f"{name}.bias", torch.cat(biases) if biases else None)

    def norm(self, name: str, norm: Any) -> NormSpec | None:
        """Take a norm over the last axis; None and the identity are none."""
        if norm is None or type(norm) is nn.Identity:
            return None
        kind = _NORMS.get(type(norm))
        if kind is None or len(norm.normalized_shape) != 1:
            raise _InexpressibleError(f"its {name} is {type(norm).__name__}")
        return NormSpec(
            kind=kind,
            eps=float(norm.eps),
            has_weight=self.keep(f"{name}.weight", norm.weight),
            has_bias=self.keep(f"{name}.bias", getattr(norm, "bias", None)),
        )


def _block(block: Any, part: _Part, *, n_prefix: int, has_rope: bool) -> BlockSpec:
    if type(block) is ParallelScalingBlock:
        return _parallel_block(block, part)
    if type(block) not in (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm):
        raise _InexpressibleError(f"its blocks are of the class {type(block).__name__}")
    attention = _attention(block.attn, part.below("attention"), n_prefix, has_rope=has_rope)
    gammas = [_gamma(block, number) for number in (1, 2)]
    norms = [part.norm(name, getattr(block, name)) for name in ("norm1", "norm2")]
    if None in norms:
        raise _InexpressibleError("its blocks lack a norm")
    return BlockSpec(
        residual="post" if type(block) in (ResPostBlock, EvaBlockPostNorm) else "pre",
        norm1=norms[0] or NormSpec(),
        norm2=norms[1],
        attention_layer_scale=part.keep("gamma1", gammas[0]),
        mlp_layer_scale=part.keep("gamma2", gammas[1]),
        **attention,
        **_mlp(block.mlp, part.below("mlp")),
    )


def _gamma(block: Any, number: int) -> torch.Tensor | None:
    """Give the LayerScale of a branch: a layer in ViT's blocks, a parameter in EVA's."""
    layer = getattr(block, f"ls{number}", None)
    if layer is None or type(layer) is nn.Identity:
        return getattr(block, f"gamma_{number}", None)
    if type(layer) is not LayerScale:
        raise _InexpressibleError(f"its LayerScale is {type(layer).__name__}")
    return layer.gamma


def _attention(attention: Any, part: _Part, n_prefix: int, *, has_rope: bool) -> dict[str, Any]:
    if type(attention) not in (Attention, AttentionRope, EvaAttention):
        raise _InexpressibleError(f"its attention is {type(attention).__name__}")
    if attention.gate is not None:
        raise _InexpressibleError("its attention is gated")
    turns = has_rope and type(attention) is not Attention
    if turns and attention.num_prefix_tokens != n_prefix:
        raise _InexpressibleError("rotary positions reach its prefix tokens")
    spec = {
        "n_heads": attention.num_heads,
        "head_dim": attention.head_dim,
        "n_kv_heads": getattr(attention, "num_kv_heads", attention.num_heads),
        "attention_scale": float(attention.scale),
        "rope": ("half" if attention.rotate_half else "interleaved") if turns else None,
        "qkv_bias": _qkv(attention, part),
        "qk_norm": part.norm("q_norm", attention.q_norm),
        "attention_norm": part.norm("norm", attention.norm),
        "proj_bias": part.linear("proj", attention.proj),
    }
    if part.norm("k_norm", attention.k_norm) != spec["qk_norm"]:
        raise _InexpressibleError("the norms of its queries and keys differ")
    return spec


def _qkv(attention: Any, part: _Part) -> str:
    """Take queries, keys and values as one layer; tell which of them have a bias."""
    if attention.qkv is not None:
        has_all = part.linear("qkv", attention.qkv)
        q_bias, v_bias = (getattr(attention, name, None) for name in ("q_bias", "v_bias"))
    else:
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        q_bias, k_bias, v_bias = (layer.bias for layer in layers)
        if k_bias is not None or q_bias is None:
            return "all" if part.linear("qkv", *layers) else "none"
        part.keep("qkv.weight", torch.cat([layer.weight for layer in layers]))
        has_all = False
    if q_bias is None:
        return "all" if has_all else "none"
    part.keep("q_bias", q_bias)
    part.keep("v_bias", v_bias)
    return "q_v"


def _mlp(mlp: Any, part: _Part) -> dict[str, Any]:
    if type(mlp) is Mlp:
        first, last, gated = [mlp.fc1], mlp.fc2, False
    elif type(mlp) is GluMlp and not mlp.gate_last:
        first, last, gated = [mlp.fc1], mlp.fc2, True
    elif type(mlp) is SwiGLU:
        first, last, gated = [mlp.fc1_g, mlp.fc1_x], mlp.fc2, True
    elif type(mlp) is GeGluMlp:
        first, last, gated = [mlp.w0, mlp.w1], mlp.w2, True
    else:
        raise _InexpressibleError(f"its MLP is {type(mlp).__name__}")
    has_biases = (part.linear("fc1", *first), part.linear("fc2", last))
    return {
        "dim": last.out_features,
        "hidden": last.in_features,
        "mlp": "gated" if gated else "plain",
        "activation": _activation(mlp.act),
        "mlp_bias": has_biases,
        "mlp_norm": part.norm("norm", mlp.norm),
        "mlp_norm_at": "input" if type(mlp) is GeGluMlp else "hidden",
    }


def _activation(activation: Any) -> str:
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    name = _ACTIVATIONS.get(type(activation))
    if name is None:
        raise _InexpressibleError(f"its activation is {type(activation).__name__}")
    return name


def _parallel_block(block: Any, part: _Part) -> BlockSpec:
    """Take a block that mixes attention and MLP in one layer, each with its rows of it."""
    dim, hidden = block.in_proj.in_features, block.in_split[0]
    attention, mlp = part.below("attention"), part.below("mlp")
    weight, bias = block.in_proj.weight, block.in_proj.bias
    mlp.keep("fc1.weight", weight[:hidden])
    attention.keep("qkv.weight", weight[hidden:])
    mlp.keep("fc1.bias", block.mlp_bias if bias is None else bias[:hidden])
    has_bias = attention.keep("qkv.bias", None if bias is None else bias[hidden:])
    if block.out_proj is None:
        proj_bias = attention.linear("proj", block.attn_out_proj)
        last_bias = mlp.linear("fc2", block.mlp_out_proj)
    else:
        attention.keep("proj.weight", block.out_proj.weight[:, :dim])
        mlp.keep("fc2.weight", block.out_proj.weight[:, dim:])
        proj_bias, last_bias = attention.keep("proj.bias", block.out_proj.bias), False
    norm = part.norm("norm1", block.in_norm)
    qk_norm = attention.norm("q_norm", block.q_norm)
    attention.norm("k_norm", block.k_norm)
    scale = None if type(block.ls) is nn.Identity else block.ls.gamma
    return BlockSpec(
        residual="parallel",
        dim=dim,
        n_heads=block.num_heads,
        n_kv_heads=block.num_heads,
        head_dim=block.head_dim,
        hidden=hidden,
        norm1=norm or NormSpec(),
        norm2=None,
        qkv_bias="all" if has_bias else "none",
        qk_norm=qk_norm,
        attention_scale=float(block.scale),
        proj_bias=proj_bias,
        activation=_activation(block.mlp_act),
        mlp_bias=(True, last_bias),
        attention_layer_scale=part.keep("gamma1", scale),
    )


def _rope(rope: Any, part: _Part) -> RopeSpec | None:
    if rope is None:
        return None
    frequencies: torch.Tensor
    if type(rope) is RotaryEmbeddingDinoV3:
        frequencies = 2 * math.pi / rope.get_buffer("periods")
        grid, reference = "centered", None
    elif type(rope) is RotaryEmbeddingCat:
        frequencies = rope.get_buffer("bands")
        grid, reference = rope.grid_type, rope.ref_feat_shape
    else:
        raise _InexpressibleError(f"its rotary positions are {type(rope).__name__}")
    positions = {"index": "index", "centered": "centred"}.get(grid)
    if positions is None:
        raise _InexpressibleError(f"its rotary positions are counted by {grid}")
    part.keep("frequencies", frequencies.float())
    return RopeSpec(
        n_frequencies=len(frequencies),
        positions=positions,
        offset=float(rope.grid_offset),
        reference=None if reference is None else (int(reference[0]), int(reference[1])),
        divisor=rope.normalize_coords,
        is_x_first=rope.grid_indexing == "xy",
    )
