"""What the blocks of known ViTs are made of: data only, to count parameters before any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featstore.catalogue import CATALOGUE, BackboneEntry
from featstore.errors import not_found
from featstore.tail import NormSpec, RopeSpec, TailSpec, plain_block


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSize:
    """A ViT whose blocks are all alike."""

    width: int
    depth: int
    n_heads: int
    n_prefix: int
    hidden: int  # channels between the layers of the MLP
    mlp: str = "plain"
    activation: str = "gelu"
    has_layer_scale: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)  # of `BlockSpec`, that is not usual
    norm: NormSpec = field(default_factory=NormSpec)  # after the last block
    rope: RopeSpec | None = None

    def tail(self, n_blocks: int) -> TailSpec:
        """Describe the last `n_blocks` blocks and the final norm."""
        block = plain_block(
            self.width,
            self.n_heads,
            hidden=self.hidden,
            mlp=self.mlp,
            activation=self.activation,
            attention_layer_scale=self.has_layer_scale,
            mlp_layer_scale=self.has_layer_scale,
            **self.more,
        )
        blocks = (block,) * n_blocks
        return TailSpec(
            first=self.depth - n_blocks,
            blocks=blocks,
            n_prefix=self.n_prefix,
            norm=self.norm,
            rope=self.rope,
        )


def plain_vit(width: int) -> VitSize:
    """Describe the usual ViT of a width: 12 blocks, heads of 64 channels, an MLP four times wider.

    Args:
        width: Channels of a token; less than 64, or no multiple of it, are those of one head.
    """
    n_heads = width // 64 if width % 64 == 0 else 1
    return VitSize(width=width, depth=12, n_heads=n_heads, n_prefix=0, hidden=4 * width)


# name in the catalogue: heads, hidden channels, MLP, activation, whether it has LayerScale
BLOCKS: dict[str, tuple[int, int, str, str, bool]] = {
    "dinov2_s": (6, 1536, "plain", "gelu", True),
    "dinov2_b": (12, 3072, "plain", "gelu", True),
    "dinov2_l": (16, 4096, "plain", "gelu", True),
    "dinov2_g": (24, 4096, "gated", "silu", True),
    "dinov2_s_reg": (6, 1536, "plain", "gelu", True),
    "dinov2_b_reg": (12, 3072, "plain", "gelu", True),
    "dinov2_l_reg": (16, 4096, "plain", "gelu", True),
    "dinov2_g_reg": (24, 4096, "gated", "silu", True),
    "dinov3_s": (6, 1536, "plain", "gelu", True),
    "dinov3_s_plus": (6, 1536, "gated", "silu", True),
    "dinov3_b": (12, 3072, "plain", "gelu", True),
    "dinov3_l": (16, 4096, "plain", "gelu", True),
    "dinov3_h_plus": (20, 5120, "gated", "silu", True),
    "dinov3_7b": (32, 8192, "gated", "silu", True),
    "dino_b": (12, 3072, "plain", "gelu", False),
    "mae_b": (12, 3072, "plain", "gelu", False),
    "supervised_b": (12, 3072, "plain", "gelu", False),
    "clip_b": (12, 3072, "plain", "quick_gelu", False),
    "clip_l": (16, 4096, "plain", "quick_gelu", False),
    "metaclip_b": (12, 3072, "plain", "quick_gelu", False),
    "bioclip2": (16, 4096, "plain", "gelu", False),
    "siglip_b_224": (12, 3072, "plain", "gelu", False),
    "siglip_b_384": (12, 3072, "plain", "gelu", False),
    "siglip_b_512": (12, 3072, "plain", "gelu", False),
    "siglip_so": (16, 4304, "plain", "gelu", False),
    "siglip2_b": (12, 3072, "plain", "gelu", False),
    "aimv2_l": (8, 2816, "gated", "silu", False),
}


def vit_size(name: str) -> VitSize:
    """Give the blocks of a backbone of the catalogue.

    Raises:
        NotFoundError: They are not known here; a stored tail tells them.
    """
    if name not in BLOCKS:
        hint = "Others are described by their --width."
        raise not_found("blocks of the backbone", name, BLOCKS, hint=hint)
    entry: BackboneEntry = CATALOGUE[name]
    n_heads, hidden, mlp, activation, has_layer_scale = BLOCKS[name]
    family: dict[str, Any] = {}
    if name.startswith("dinov3"):
        family = _dinov3(entry.width // n_heads)
    elif name.startswith("aimv2"):
        family = _aimv2()
    return VitSize(
        width=entry.width,
        depth=entry.depth,
        n_heads=n_heads,
        n_prefix=entry.n_prefix,
        hidden=hidden,
        mlp=mlp,
        activation=activation,
        has_layer_scale=has_layer_scale,
        **family,
    )


def _dinov3(head_dim: int) -> dict[str, Any]:
    """Queries, keys and values without bias, turned by where the middles of their tokens lie."""
    norm = NormSpec(eps=1e-5)
    return {
        "more": {"norm1": norm, "norm2": norm, "qkv_bias": "none", "rope": "half"},
        "norm": norm,
        "rope": RopeSpec(n_frequencies=head_dim // 4, positions="centred"),
    }


def _aimv2() -> dict[str, Any]:
    """Nothing but the norms' weights is added to products: there is no bias."""
    norm = NormSpec(kind="rms_norm", eps=1e-5, has_bias=False)
    biases = {"qkv_bias": "none", "proj_bias": False, "mlp_bias": (False, False)}
    return {"more": {"norm1": norm, "norm2": norm, **biases}, "norm": norm}
