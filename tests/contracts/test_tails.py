"""Stored blocks, fed what the block before them gave, end where the backbone itself ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featstore.backbones import Backbone, load_backbone
from featstore.backbones.tail import automatic_blocks
from featstore.errors import InvalidInputError
from featstore.tail import TailSpec
from heads.vit_block import Tail
from tests.tiny_backbones import TINY, tiny_backbone, write_backbone

N_BLOCKS = 2


@pytest.fixture(scope="module", params=TINY)
def backbone(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    taps = ["block:1", "block:3", "norm"]
    return tiny_backbone(folder, request.param, taps=taps, tail=N_BLOCKS)


@pytest.fixture(scope="module")
def outputs(backbone):
    shape = (2, *backbone.input_hw, 3)
    return backbone.forward(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def sequence(outputs, tap):
    prefix = outputs.get(f"{tap}/prefix")
    patch = outputs[tap]
    return patch if prefix is None else torch.cat([prefix, patch], dim=1)


@pytest.fixture(scope="module")
def tail(backbone):
    built = Tail(backbone.tail.spec)
    weights = {name: torch.from_numpy(one.copy()) for name, one in backbone.tail.tensors.items()}
    built.load_state_dict(weights)
    return built


def test_the_tail_continues_as_the_backbone_does(backbone, outputs, tail):
    grid = backbone.tap_shapes["norm"].grid
    expected = sequence(outputs, "norm")
    start = sequence(outputs, "block:1")
    with torch.inference_mode():
        exact, stored = tail(start, grid), tail(start.half(), grid)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    # 0.0007 and less was found: a step of float16 in the input.
    assert (stored - expected).abs().max() < 0.002 * expected.abs().max()
    assert (tail.norm(start) - expected).abs().max() > 0.1 * expected.abs().max()


def test_it_runs_in_half_the_precision_too(backbone, outputs, tail):
    grid, start = backbone.tap_shapes["norm"].grid, sequence(outputs, "block:1")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = tail(start, grid)
    expected = sequence(outputs, "norm")
    assert (found - expected).abs().mean() < 0.02 * expected.abs().max()


def test_its_description_survives_json(backbone):
    spec = backbone.tail.spec
    assert TailSpec.from_json(spec.to_json()) == spec
    assert spec.input_tap == "block:1"
    assert spec.n_prefix == backbone.n_prefix
    assert spec.last(1).first == 3


def test_one_block_is_the_end_of_two(backbone, outputs, tail, tmp_path):
    one = Tail(backbone.tail.spec.last(1))
    weights = {
        name.replace("blocks.1.", "blocks.0."): value
        for name, value in tail.state_dict().items()
        if not name.startswith("blocks.0.")
    }
    one.load_state_dict(weights)
    grid = backbone.tap_shapes["norm"].grid
    with torch.inference_mode():
        whole = tail(sequence(outputs, "block:1"), grid)
        middle = tail.blocks[0](
            sequence(outputs, "block:1"), None if tail.rope is None else tail.rope(grid)
        )
        torch.testing.assert_close(one(middle, grid), whole)


def test_every_weight_of_the_blocks_trains_and_the_rest_is_frozen(backbone, outputs, tail):
    tail.zero_grad()
    tail(
        sequence(outputs, "block:1").clone(), backbone.tap_shapes["norm"].grid
    ).square().sum().backward()
    without = [name for name, p in tail.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(name.startswith("blocks.") for name, _ in tail.named_parameters())
    assert {name for name, _ in tail.named_buffers()} >= {"norm.weight"}


SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
STAGES = {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 1)}


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}, "hiera_tiny_224 has no tail.*windows"),
        ("swin_tiny_patch4_window7_224", STAGES, "swin_tiny.*within windows"),
        ("samvit_base_patch16", SMALL, "samvit_base_patch16.*within windows"),
        ("convnext_atto", {}, "convnext_atto has no tail.*CNN"),
        ("vit_small_patch16_rope_mixed_224", SMALL, "positions are RotaryEmbeddingMixed"),
        ("vit_dwee_patch16_reg1_gap_256", SMALL, "attention is DiffAttention"),
        ("vit_small_patch16_18x2_224", SMALL, "class ParallelThingsBlock"),
        ("beit_base_patch16_224", SMALL, "Beit is"),
    ],
)
def test_what_has_no_words_is_refused_with_the_reason(
    monkeypatch, tmp_path, name, arguments, match
):
    monkeypatch.setattr(Backbone, "_dry_shapes", lambda self: pytest.fail("an image was run"))
    write_backbone(tmp_path / "it", name, arguments)
    with pytest.raises(InvalidInputError, match=match):
        load_backbone(f"local-dir:{tmp_path / 'it'}", weights="random", device="cpu", tail=1)


@pytest.mark.parametrize("tail", [0, 4, -1, "some"])
def test_a_number_that_the_backbone_does_not_have_is_refused(tmp_path, tail):
    with pytest.raises(InvalidInputError, match="`tail` must be"):
        tiny_backbone(tmp_path, "plain", tail=tail)


@pytest.mark.parametrize(
    ("taps", "n_blocks"),
    [
        (["block:8"], 3),
        (["block:2", "block:8", "block:11"], 3),
        (["block:7", "block:8"], 4),
        (["block:6"], 0),
        (["block:11", "norm"], 0),
        (["block:9.mean", "block:10"], 1),
        (["stage:2"], 0),
    ],
)
def test_auto_takes_the_most_blocks_that_a_tap_feeds(taps, n_blocks):
    assert automatic_blocks(taps, 12) == n_blocks


def test_auto_says_why_there_is_no_tail():
    backbone = load_backbone("convnext_atto", weights="random", device="cpu", tail="auto")
    assert backbone.tail is None
    assert "None of the taps" in backbone.tail_note


def test_tokens_of_another_grid_are_refused(tail):
    with pytest.raises(InvalidInputError, match="prefix tokens and 9 x 9 others"):
        tail(torch.zeros(1, 5, tail.spec.dim), (9, 9))
