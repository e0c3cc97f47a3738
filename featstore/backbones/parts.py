"""Reading a timm model: its prefix tokens, how it knows positions, its final norm."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalNormWeights:
    """The final norm as plain numbers."""

    kind: str  # "layer_norm" or "rms_norm"
    eps: float
    weight: np.ndarray  # (dim,) float32
    bias: np.ndarray | None


def _holders(model: Any) -> list[Any]:
    """List where a model keeps its tokens and positions: itself, or NaFlex's embedding."""
    return [model, *[one for one in (getattr(model, "embeds", None),) if one is not None]]


def _has(model: Any, attribute: str) -> bool:
    return any(getattr(holder, attribute, None) is not None for holder in _holders(model))


def prefix_order(model: Any) -> tuple[str, ...]:
    """Name the prefix tokens in their order: CLS, DeiT's distillation token, registers."""
    parameters = inspect.signature(model.forward_intermediates).parameters
    if "return_prefix_tokens" not in parameters:
        return ()
    n_prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    kinds = (("cls", "cls_token"), ("distillation", "dist_token"))
    named = [kind for kind, attribute in kinds if _has(model, attribute)]
    return tuple([*named, *["register"] * (n_prefix - len(named))][:n_prefix])


def position_rule(model: Any, native: tuple[int, int], hw: tuple[int, int]) -> str:
    """Name the rule by which timm brought position embeddings to this size."""
    rules = ["rope"] if getattr(model, "rope", None) is not None else []
    if _has(model, "pos_embed_window"):
        rules.append("timm bicubic")  # of SAM 2, at any size
    elif _has(model, "pos_embed"):
        rules.append("native" if native == hw else "timm bicubic antialias")
    return ", ".join(rules) or "none"


def final_norm(model: Any) -> Any:
    """Give the backbone's final norm: `norm`, or `fc_norm` where `norm` does nothing."""
    for name in ("norm", "fc_norm"):
        norm = getattr(model, name, None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return norm
    return None
