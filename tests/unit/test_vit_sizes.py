"""The blocks of known ViTs, beside those that timm builds."""

from __future__ import annotations

import pytest
import torch

from featstore.catalogue import CATALOGUE
from featstore.errors import NotFoundError
from featstore.vit_sizes import BLOCKS, plain_vit, vit_size
from heads.describe import describe_head
from heads.vit_block import VitBlock

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_that_of_timm(name):
    import timm

    entry, size = CATALOGUE[name], vit_size(name)
    with torch.device("meta"):
        architecture = entry.timm_name.partition(".")[0]
        theirs = timm.create_model(architecture, pretrained=False, num_classes=0)
        ours = VitBlock(size.tail(1).blocks[0])
    block = theirs.blocks[-1]
    assert len(theirs.blocks) == size.depth
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in block.parameters())
    assert block.attn.num_heads == size.n_heads
    assert ACTIVATIONS[type(block.mlp.act).__name__] == size.activation
    assert theirs.num_prefix_tokens == size.n_prefix


@pytest.mark.parametrize("name", ["dinov3_s", "dinov3_s_plus", "aimv2_l"])
def test_a_head_of_copied_blocks_is_described_without_weights(name):
    found = describe_head("vit_split", backbone=name, grid=(4, 4), options={"kt": 2})
    with torch.device("meta"):
        n_block = sum(p.numel() for p in VitBlock(vit_size(name).tail(1).blocks[0]).parameters())
    assert found["parameters_by_part"]["tail"] == 2 * n_block
    assert found["taps"][-1] == f"block:{CATALOGUE[name].depth - 3}"


def test_the_tail_of_a_known_backbone_ends_with_its_last_block():
    tail = vit_size("dinov2_l").tail(3)
    assert (tail.input_tap, tail.n_blocks, tail.dim, tail.n_prefix) == ("block:20", 3, 1024, 1)
    assert (plain_vit(384).n_heads, plain_vit(16).n_heads) == (6, 1)
    with pytest.raises(NotFoundError, match="described by their --width"):
        vit_size("convnext_l")
