"""Backbones of every kind of block, small enough for a test, with weights that all matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from featstore.backbones import Backbone, load_backbone

_SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}
# Name -> timm's architecture, arguments, pixels of the input.
TINY: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "plain": ("vit_tiny_patch16_224", {}, (32, 48)),
    "registers and LayerScale": ("vit_small_patch14_reg4_dinov2", {}, (42, 28)),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", {}, (28, 28)),
    "no prefix": ("vit_medium_patch16_gap_240", {}, (32, 48)),
    "tanh GELU, attention pooling": ("vit_base_patch16_siglip_224", {}, (32, 32)),
    "quick GELU, norm before the blocks": ("vit_base_patch16_clip_quickgelu_224", {}, (32, 32)),
    "DINOv3": ("vit_small_patch16_dinov3", {}, (48, 32)),
    "DINOv3 with aligned SwiGLU": ("vit_huge_plus_patch16_dinov3_qkvb", {}, (32, 48)),
    "EVA-02": ("eva02_tiny_patch14_336", {"swiglu_mlp": True}, (28, 42)),
    "EVA-02 base": ("eva02_base_patch14_448", {}, (28, 42)),
    "EVA after the norm": ("eva_giant_patch14_clip_224", {"use_post_norm": True}, (28, 28)),
    "rows and columns swapped": ("vit_small_patch16_rope_224", {}, (48, 32)),
    "grouped queries": (
        "vit_base_patch16_sapiens2",
        {"num_heads": 4, "num_kv_heads": 2, "patch_size": 16},
        (32, 48),
    ),
    "AIMv2": ("aimv2_large_patch14_224", {}, (28, 42)),
    "parallel": ("vit_base_patch16_xp_224", {}, (32, 48)),
    "norm after": ("vit_base_patch16_rpn_224", {}, (32, 32)),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, (32, 32)),
    "ViTamin": ("vitamin_small_224", {"embed_dim": 384, "num_heads": 6}, (64, 32)),
}


def tiny_backbone(folder: Path, name: str, **options: Any) -> Backbone:
    """Load one, whose weights and biases are all random."""
    architecture, arguments, image_size = TINY[name]
    path = folder / name.replace(" ", "_")
    write_backbone(path, architecture, {**_SMALL, **arguments})
    return load_backbone(f"local-dir:{path}", image_size=image_size, device="cpu", **options)


def write_backbone(path: Path, architecture: str, arguments: dict[str, Any]) -> None:
    """Write what ``local-dir:`` reads, once."""
    if path.exists():
        return
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    path.mkdir(parents=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path / "model.safetensors")
    config = {"architecture": architecture, "num_classes": 0, "model_args": arguments}
    config["pretrained_cfg"] = {
        key: model.pretrained_cfg[key]
        for key in ("input_size", "fixed_input_size", "mean", "std")
        if key in model.pretrained_cfg
    }
    (path / "config.json").write_text(json.dumps(config))
