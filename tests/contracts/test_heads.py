"""What every head meets by being registered."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featstore.errors import InvalidInputError, NotFoundError
from featstore.types import TapShape
from featstore.vit_sizes import VitSize
from heads.base import Head, TapTokens
from heads.build import HEADS, build_head
from heads.describe import taps_on
from heads.options import option_defaults

DIM, GRID, BATCH = 16, (3, 4), 4
TAP = TapShape(tap="norm", dim=DIM, grid=GRID, n_prefix=1)
N_TOKENS = GRID[0] * GRID[1]


def read(name: str) -> dict:
    """What a head reads that is given one tap: that one, and those that it adds to it."""
    kind = HEADS[name]
    size = VitSize(width=DIM, depth=5, n_heads=2, n_prefix=1, hidden=32)
    defaults = option_defaults(kind.OPTIONS)
    taps, tail = taps_on(kind, size, grid=GRID, named=[TAP.tap], options=defaults)
    return {"taps": taps, "tail": tail}


def make(name: str, *, seed: int = 0, n_outputs: int = 2) -> Head:
    torch.manual_seed(seed)
    return build_head(name, n_outputs=n_outputs, **read(name))


def make_inputs(name: str, *args, **options) -> list[TapTokens]:
    return [make_tokens(*args, **options) for _ in read(name)["taps"]]


def make_tokens(rows: slice = slice(None), *, valid: torch.Tensor | None = None) -> TapTokens:
    generator = torch.Generator().manual_seed(0)
    patch = torch.randn(BATCH, N_TOKENS, DIM, generator=generator)
    prefix = torch.randn(BATCH, 1, DIM, generator=generator)
    return TapTokens(
        patch=patch[rows],
        prefix=prefix[rows],
        grid=GRID,
        valid=None if valid is None else valid[rows],
    )


@pytest.fixture(params=list(HEADS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_there_is_a_head_to_test():
    assert "deap.v1" in HEADS


def test_the_output_has_the_promised_shape(name):
    head = make(name)
    assert head(make_inputs(name)).shape == (BATCH, 2, *head.output_hw)


def test_every_live_parameter_gets_a_gradient_and_no_dead_one_does(name):
    head = make(name, n_outputs=4)  # two keypoints: one alone has none to confer with
    head(make_inputs(name)).square().sum().backward()
    without = {n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()}
    dead = {n for n, _ in head.named_parameters() if n.startswith(tuple(head.UNUSED) or ("-",))}
    assert without == dead
    counted = sum(p.numel() for n, p in head.named_parameters() if n in dead)
    assert head.dead_parameters() == counted


def test_one_image_gives_the_same_map_alone_as_in_a_batch(name):
    head = make(name).eval()
    with torch.no_grad():
        together, alone = head(make_inputs(name)), head(make_inputs(name, slice(2, 3)))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-6)


def test_one_image_gives_the_same_map_alone_as_in_a_batch_with_padding(name):
    head = make(name).eval()
    valid = torch.ones(BATCH, N_TOKENS, dtype=torch.bool)
    valid[0, 4:], valid[2, :4] = False, False
    with torch.no_grad():
        together = head(make_inputs(name, valid=valid))
        alone = head(make_inputs(name, slice(2, 3), valid=valid))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name):
    first, second, other = make(name), make(name), make(name, seed=1)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in first.state_dict().items())


def test_weights_saved_and_loaded_give_the_same_map(name):
    head, other = make(name).eval(), make(name, seed=1).eval()
    other.load_state_dict(head.state_dict())
    with torch.no_grad():
        assert torch.equal(head(make_inputs(name)), other(make_inputs(name)))


def test_output_biases_are_parameters_of_the_head(name):
    head = make(name)
    own = {id(p) for p in head.parameters()}
    assert head.output_biases()
    assert all(id(bias) in own for bias in head.output_biases())


def test_options_are_a_frozen_dataclass_with_defaults(name):
    kind = HEADS[name].OPTIONS
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert set(option_defaults(kind)) == {f.name for f in dataclasses.fields(kind)}


def test_an_unknown_option_names_the_known_ones(name):
    known = sorted(option_defaults(HEADS[name].OPTIONS))
    with pytest.raises(NotFoundError, match=", ".join(known)):
        build_head(name, n_outputs=1, options={"zzz": 1}, **read(name))


def test_an_unknown_head_offers_the_nearest(name):
    short = name.rpartition(".v")[0]
    with pytest.raises(NotFoundError, match=f"Did you mean '{short}'"):
        build_head(short + "x", taps=[TAP], n_outputs=1)


def test_tokens_of_another_width_or_number_of_taps_are_refused(name):
    head = make(name)
    narrow = TapTokens(patch=torch.zeros(1, N_TOKENS, DIM - 1), grid=GRID)
    good = make_inputs(name)
    with pytest.raises(InvalidInputError, match="tokens of width"):
        head([narrow, *good[1:]])
    with pytest.raises(InvalidInputError, match="one entry a tap"):
        head([*good, good[0]])


def test_no_output_channel_is_refused(name):
    with pytest.raises(InvalidInputError, match="n_outputs"):
        build_head(name, n_outputs=0, **read(name))


def test_a_default_tap_is_one_of_those_available(name):
    assert HEADS[name].default_taps({"norm": TAP}, input_hw=(48, 64)) == ("norm",)


def test_tokens_that_do_not_fill_the_grid_or_are_all_padding_are_refused():
    with pytest.raises(InvalidInputError, match=r"\(batch, 12, dim\)"):
        TapTokens(patch=torch.zeros(2, 11, DIM), grid=GRID)
    with pytest.raises(InvalidInputError, match="bool of shape"):
        TapTokens(patch=torch.zeros(2, 12, DIM), grid=GRID, valid=torch.ones(2, 11).bool())
    half = torch.tensor([True, False])[:, None].expand(2, 12)
    with pytest.raises(InvalidInputError, match="image 1"):
        TapTokens(patch=torch.zeros(2, 12, DIM), grid=GRID, valid=half)


def test_heads_load_where_timm_cannot_be_imported():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "import heads.build, heads.tasks, heads.reference, heads.describe\n"
        "assert not [m for m in sys.modules if m.startswith('featstore.backbones')]"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
