"""The linear, the bicubic and the conv head: what attention has to beat."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from featstore.errors import InvalidInputError
from featstore.types import TapShape
from heads.base import TapTokens
from heads.build import build_head

GRID = (4, 5)


def make_head(name, *, width=24, n_outputs=1, n_prefix=0, taps=None, **options):
    torch.manual_seed(0)
    taps = taps or [TapShape(tap="norm", dim=width, grid=GRID, n_prefix=n_prefix)]
    return build_head(name, taps=taps, n_outputs=n_outputs, options=options)


def make_tokens(*, batch=3, width=24, grid=GRID, n_prefix=0, valid=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randn(batch, grid[0] * grid[1], width, generator=generator)
    prefix = torch.randn(batch, n_prefix, width, generator=generator) if n_prefix else None
    return TapTokens(patch=patch, grid=grid, prefix=prefix, valid=valid)


@pytest.mark.parametrize(("n_outputs", "count"), [(1, 56_006), (21, 57_246)])
def test_the_bicubic_head_has_the_count_of_the_release(n_outputs, count):
    assert make_head("bicubic", width=768, n_outputs=n_outputs).n_parameters() == count


@pytest.mark.parametrize(("n_outputs", "count"), [(1, 60_276), (21, 61_716)])
def test_the_conv_head_has_the_count_of_the_release(n_outputs, count):
    assert make_head("conv", width=768, n_outputs=n_outputs).n_parameters() == count


def test_the_conv_head_is_convolutions_around_a_resize():
    head, tokens = make_head("conv", width=32, queries=6, n_outputs=3), make_tokens(width=32)
    images = []
    for patch_td in tokens.patch:
        groups = patch_td.T.reshape(16, -1)  # channels of a group lie together
        mean, var = groups.mean(1, keepdim=True), groups.var(1, unbiased=False, keepdim=True)
        normed_dt = ((groups - mean) / (var + 1e-5).sqrt()).reshape(32, -1)
        hidden = (head.project.weight[:, :, 0, 0] @ normed_dt + head.project.bias[:, None]).relu()
        mixed = head.mix.weight[:, :, 0, 0] @ hidden + head.mix.bias[:, None]
        parts = [mixed.reshape(1, -1, *GRID), head.positions[None]]
        large = [functional.interpolate(p, size=(6, 6), mode="bilinear") for p in parts]
        map_1dyx = functional.group_norm(
            torch.cat(large, 1), 8, head.norm_out.weight, head.norm_out.bias
        )
        skip = functional.interpolate(map_1dyx, size=(48, 48), mode="bilinear", antialias=True)
        images.append(head.skip(skip) + head.cnn(map_1dyx))
    torch.testing.assert_close(head([tokens]), torch.cat(images), rtol=1e-4, atol=1e-5)


def test_the_conv_head_refuses_widths_it_cannot_group():
    with pytest.raises(InvalidInputError, match="a multiple of 16 for the head conv"):
        make_head("conv", width=24)
    with pytest.raises(InvalidInputError, match="a multiple of 8"):
        make_head("conv", width=32, dim=20)


@pytest.mark.parametrize("n_outputs", [1, 21])
def test_the_linear_head_has_a_matrix_and_a_norm(n_outputs):
    head = make_head("linear", width=768, n_outputs=n_outputs)
    assert head.n_parameters() == 2 * 768 + 769 * n_outputs


def test_the_bicubic_head_is_an_interpolation_and_what_follows_it():
    head, tokens = make_head("bicubic", queries=6, n_outputs=3), make_tokens()
    images = []
    for patch_td in tokens.patch:
        map_1dyx = head.project(patch_td).T.reshape(1, -1, *GRID)
        large = functional.interpolate(map_1dyx, size=(6, 6), mode="bicubic", align_corners=True)
        answer_qd = head.ffn(large[0].flatten(1).T)
        map_1dyx = answer_qd.T.reshape(1, -1, 6, 6)
        skip = functional.interpolate(map_1dyx, size=(48, 48), mode="bilinear", antialias=True)
        images.append(head.skip(skip) + head.cnn(map_1dyx))
    torch.testing.assert_close(head([tokens]), torch.cat(images), rtol=1e-4, atol=1e-5)


def test_the_linear_head_is_a_matrix_on_normalised_tokens():
    head, tokens = make_head("linear", size=40, n_outputs=3), make_tokens()
    flat = tokens.patch.flatten(0, 1)
    normalised = (flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    values = head.project(normalised).reshape(3, *GRID, 3).permute(0, 3, 1, 2)
    expected = functional.interpolate(values, size=(40, 40), mode="bilinear")
    torch.testing.assert_close(head([tokens]), expected)


def test_the_linear_head_reads_several_taps_and_their_class_tokens():
    taps = [
        TapShape(tap="block:3", dim=4, grid=GRID, n_prefix=1),
        TapShape(tap="norm", dim=6, grid=GRID, n_prefix=1),
    ]
    head = make_head("linear", taps=taps, cls=True, size=20)
    assert head.n_parameters() == 2 * 20 + 21
    inputs = [make_tokens(width=4, n_prefix=1), make_tokens(width=6, n_prefix=1, seed=1)]
    seen = []
    head.norm.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    head(inputs)
    rows = [torch.cat([each.patch[0, 7], each.prefix[0, 0]]) for each in inputs]
    torch.testing.assert_close(seen[0][7], torch.cat(rows))


def test_a_class_token_that_is_not_there_is_an_error():
    with pytest.raises(InvalidInputError, match=r"without a class token \(norm\)"):
        make_head("linear", cls=True)


@pytest.mark.parametrize("name", ["linear", "bicubic"])
def test_padded_tokens_change_nothing_whatever_they_hold(name):
    head = make_head(name)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[:, 15:] = False
    clean, dirty = make_tokens(batch=2, valid=valid), make_tokens(batch=2, valid=valid)
    dirty.patch[:, 15:] = float("nan")
    assert torch.isfinite(head([clean])).all()
    torch.testing.assert_close(head([dirty]), head([clean]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"size": 1}, "from 2 to 2048"),
        ("bicubic", {"dim": 2}, "at least 4"),
        ("bicubic", {"queries": 300}, "from 2 to 256"),
        ("bicubic", {"dc": 0}, "positive number of channels"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_right(name, options, message):
    with pytest.raises(InvalidInputError, match=message):
        make_head(name, **options)
