"""The self-attention head: MAXA's convolutional baseline."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from featstore.errors import InvalidInputError
from featstore.types import TapShape
from heads.base import TapTokens
from heads.blocks import position_encoding
from heads.build import build_head

GRID = (4, 5)


def make_head(*, width=24, grid=GRID, n_outputs=1, taps=None, **options):
    torch.manual_seed(0)
    taps = taps or [TapShape(tap="norm", dim=width, grid=grid)]
    return build_head("self_attention", taps=taps, n_outputs=n_outputs, options=options)


def make_tokens(*, batch=3, width=24, grid=GRID, valid=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randn(batch, math.prod(grid), width, generator=generator)
    return TapTokens(patch=patch, grid=grid, valid=valid)


@pytest.mark.parametrize("width", [24, 384, 768])
def test_the_count_follows_the_formula_of_the_docstring(width):
    """The paper prints no count of its baseline to compare with."""
    assert make_head(width=width).n_parameters() == 32 * width + 13_066
    assert make_head(width=width).dead_parameters() == 0


def test_the_cnn_and_skip_are_as_large_as_those_of_maxa():
    tap = TapShape(tap="norm", dim=24, grid=GRID)
    maxa = build_head("maxa", taps=[tap], n_outputs=21, options={})
    ours = make_head(n_outputs=21)
    for part in ("cnn", "skip"):
        sizes = [[p.shape for p in getattr(head, part).parameters()] for head in (ours, maxa)]
        assert sizes[0] == sizes[1]


def test_the_head_is_attention_of_the_tokens_added_to_them_and_what_follows():
    head, tokens = make_head(n_outputs=3, dim=16, heads=4), make_tokens()
    images = []
    for patch_td in tokens.patch:
        projected = head.project(torch.cat([patch_td, position_encoding(GRID)], dim=1))
        query, key, value = head.query_key_value(head.norm(projected)).split(16, dim=1)
        parts = [
            (q @ k.T / math.sqrt(4)).softmax(dim=1) @ v
            for q, k, v in zip(query.split(4, 1), key.split(4, 1), value.split(4, 1), strict=True)
        ]
        answer_td = head.ffn(projected + head.mix(torch.cat(parts, dim=1)))
        map_1dyx = answer_td.T.reshape(1, 16, *GRID)
        skip = functional.interpolate(map_1dyx, size=(32, 40), mode="bilinear", antialias=True)
        images.append(head.skip(skip) + head.cnn(map_1dyx))
    torch.testing.assert_close(head([tokens]), torch.cat(images), rtol=1e-4, atol=1e-5)


def test_the_output_grows_with_the_grid():
    head = make_head()
    assert head.output_hw == (32, 40)
    assert make_head(grid=(7, 3)).output_hw == (56, 24)
    assert head([make_tokens(grid=(6, 2))]).shape == (3, 1, 48, 16)


def test_every_token_can_reach_every_other():
    head, tokens = make_head(), make_tokens(batch=1)
    tokens.patch.requires_grad_(True)
    head([tokens])[0, 0, 0, 0].backward()
    assert tokens.patch.grad[0, -1].abs().sum() > 0


def test_two_taps_count_as_their_widths_together_on_the_finer_grid():
    taps = [TapShape(tap="a", dim=4, grid=(4, 4)), TapShape(tap="b", dim=6, grid=(2, 2))]
    head = make_head(taps=taps)
    assert head.n_parameters() == 32 * 10 + 13_066
    inputs = [make_tokens(width=4, grid=(4, 4)), make_tokens(width=6, grid=(2, 2))]
    assert head(inputs).shape == (3, 1, *head.output_hw) == (3, 1, 32, 32)


def test_padded_tokens_change_nothing_whatever_they_hold():
    head = make_head()
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[:, 15:] = False
    clean, dirty = make_tokens(batch=2, valid=valid), make_tokens(batch=2, valid=valid)
    dirty.patch[:, 15:] = float("nan")
    assert torch.isfinite(head([clean])).all()
    torch.testing.assert_close(head([dirty]), head([clean]), rtol=0, atol=0)
    shown = []
    head.cnn.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    head([clean])
    assert not shown[0][:, :, 3].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 12}, "multiple of heads"),
        ({"heads": 0}, "`heads` must be a positive number"),
        ({"dc": 0}, "positive number of channels"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_right(options, message):
    with pytest.raises(InvalidInputError, match=message):
        make_head(**options)


def test_another_number_of_queries_is_refused():
    with pytest.raises(InvalidInputError, match="SelfAttention has no grid of queries"):
        make_head().ask_on(56)
