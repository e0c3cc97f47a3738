"""The catalogue's facts are those of the installed timm."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

from featstore.catalogue import CATALOGUE, find

NAMED = (
    "dinov2_s dinov2_b dinov2_l dinov2_g dinov2_s_reg dinov2_b_reg dinov2_l_reg dinov2_g_reg "
    "dinov3_s dinov3_b dinov3_l dino_b mae_b hiera_bp clip_b clip_l metaclip_b siglip_b_224 "
    "siglip_b_384 siglip_b_512 siglip_so siglip2_b aimv2_l vitamin_l2 supervised_b sam2_bp "
    "convnext_l bioclip2 efficientnet_lite0"
).split()


def test_every_promised_name_is_there():
    assert set(NAMED) <= set(CATALOGUE)
    assert find("dinov2") is None


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_an_entry_agrees_with_timm(entry):
    architecture = entry.timm_name.partition(".")[0]
    config = get_pretrained_cfg(entry.timm_name)
    assert config is not None, "timm knows the tag"
    side = entry.default_size
    options = {"img_size": side} if config.fixed_input_size else {}
    with torch.device("meta"):
        model = timm.create_model(architecture, pretrained=False, num_classes=0, **options).eval()
        maps = model.forward_intermediates(torch.zeros(1, 3, side, side), intermediates_only=True)
    assert tuple(maps[-1].shape) == (1, entry.width, side // entry.stride, side // entry.stride)
    levels = [(level["num_chs"], level["reduction"]) for level in model.feature_info]
    assert len(levels) == entry.depth
    assert levels[-1] == (entry.width, entry.stride)
    assert (entry.unit == "block") == (len(set(levels)) == 1)
    assert (getattr(model, "num_prefix_tokens", 0) or 0) == entry.n_prefix
    assert config.input_size[1] == entry.native_size
    assert side % entry.stride == 0
    # A weight file trained with QuickGELU says so here; timm's plain twin computes other numbers.
    is_quick = "natively QuickGELU" in " ".join(config.notes or ())
    assert not is_quick or "quickgelu" in architecture
    assert "." in entry.timm_name or entry.hub, "the tag is pinned"
    if not entry.hub or entry.hub.startswith("package:"):
        assert (config.license or entry.licence) == entry.licence
