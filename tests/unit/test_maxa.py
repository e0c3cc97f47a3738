from __future__ import annotations

import pytest
import torch
from plain_heads import plain_maxa

from featstore.errors import InvalidInputError
from featstore.types import TapShape
from heads.base import TapTokens, shift_output_biases
from heads.blocks import position_encoding
from heads.build import build_head

COLUMNS = ("instances", "boundaries", "distance", "voc", "coco_stuff", "depth")
# MAXA, tables 2 and 3: width and side of the tap's grid, P_learn in thousands.
PRINTED = {
    "Random": (768, 14, 221, 184, 184, 200, 337, 184),
    "ImageNet": (768, 14, 221, 184, 184, 200, 337, 184),
    "SAM V2 B+": (256, 64, 151, 115, 115, 130, 267, 115),
    "MoCo V3": (768, 14, 221, 184, 184, 200, 337, 184),
    "Dino": (768, 28, 225, 188, 188, 204, 341, 188),
    "Dino V2": (768, 37, 230, 193, 193, 209, 346, 193),
    "Dino V2 (ViT-L)": (1024, 37, 280, 243, 243, 259, 396, 243),
    "MAE": (768, 14, 221, 184, 184, 200, 337, 184),
    "Hiera B+": (896, 7, 244, 208, 208, 223, 360, 208),
    "CLIP": (768, 14, 221, 184, 184, 200, 337, 184),
    "CLIP (ViT-L)": (1024, 24, 274, 237, 237, 253, 390, 237),
    "MetaCLIP": (768, 14, 221, 184, 184, 200, 337, 184),
    "SigLIP-224": (768, 14, 221, 184, 184, 200, 337, 184),
    "SigLIP-384": (768, 24, 224, 187, 187, 203, 340, 187),
    "SigLIP-512": (768, 32, 227, 190, 190, 206, 343, 190),
    "SigLIP-SO": (1152, 36, 305, 268, 268, 284, 421, 268),
    "Aim2": (1024, 24, 274, 237, 237, 253, 390, 237),
    "ViTamin": (1024, 24, 274, 237, 237, 253, 390, 237),
    "ConvNeXt": (1536, 10, 370, 333, 333, 349, 486, 333),
    "ConvNeXt (2 layers)": (768 + 1536, 20, 523, 486, 486, 502, 639, 486),
    "Phi-3.5V": (1024, 24, 274, 237, 237, 253, 390, 237),
}
N_OUTPUTS = {"instances": 32, "voc": 21, "coco_stuff": 200}
CONSTANTS = {"depth": 31570, "voc": 47412, "instances": 68488, "coco_stuff": 184408}


def make_head(*, width=24, grid=(4, 5), n_outputs=1, taps=None, **options):
    torch.manual_seed(0)
    taps = taps or [TapShape(tap="norm", dim=width, grid=grid)]
    return build_head("maxa", taps=taps, n_outputs=n_outputs, options=options)


def make_tokens(*, batch=3, width=24, grid=(4, 5), dtype=torch.float32, valid=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randn(batch, grid[0] * grid[1], width, generator=generator, dtype=dtype)
    return TapTokens(patch=patch, grid=grid, valid=valid)


def count(task, width, side):
    options = {"dc": 64} if task == "coco_stuff" else {}
    head = make_head(width=width, grid=(side, side), n_outputs=N_OUTPUTS.get(task, 1), **options)
    return head.n_parameters()


def test_the_tables_have_126_cells():
    assert sum(len(row) - 2 for row in PRINTED.values()) == 126


@pytest.mark.parametrize("backbone", PRINTED)
def test_every_printed_count_of_learnable_parameters_is_met(backbone):
    width, side, *printed = PRINTED[backbone]
    assert [round(count(task, width, side) / 1000) for task in COLUMNS] == printed


@pytest.mark.parametrize("task", CONSTANTS)
def test_the_closed_form_of_the_count_is_met_to_the_parameter(task):
    for width, side in ((64, 3), (384, 16), (768, 37)):
        assert count(task, width, side) == 196 * width + 8 * side**2 + CONSTANTS[task]


def test_the_norms_over_the_tap_are_dead():
    assert make_head(width=768).dead_parameters() == 2 * 2 * 776
    assert make_head(width=768, variant="single-layer").dead_parameters() == 2 * 776


@pytest.mark.parametrize("mask_form", ["code", "paper"])
@pytest.mark.parametrize("grid", [(4, 5), (7, 3), (1, 6)])
@pytest.mark.parametrize("n_outputs", [1, 5])
def test_output_and_gradients_equal_those_of_the_plain_form(mask_form, grid, n_outputs):
    head = make_head(grid=grid, n_outputs=n_outputs, mask_form=mask_form, queries=6).double()
    with torch.no_grad():  # content matters against the mask, and the widths differ
        head.first.query.weight.mul_(4)
        head.first.key_value.weight.mul_(4)
        head.second.key_value.weight.mul_(4)
        head.first.mask.sigma.copy_(torch.linspace(0.03, 0.6, 8))
    tokens = make_tokens(grid=grid, dtype=torch.float64)
    target = torch.randn(3, n_outputs, 48, 48, dtype=torch.float64)
    found = []
    for forward in (
        lambda: head([tokens]),
        lambda: plain_maxa(head, tokens.patch, grid, mask_form),
    ):
        head.zero_grad()
        output = forward()
        (output * target).mean().backward()
        gradients = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
        found.append((output.detach(), gradients))
    (ours, our_gradients), (plain, plain_gradients) = found
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-8, atol=1e-10)


def test_the_positions_start_as_sines_and_are_learned():
    head = make_head()
    torch.testing.assert_close(head.positions.detach(), position_encoding((4, 5)))
    head([make_tokens()]).sum().backward()
    assert head.positions.grad.abs().sum() > 0


def test_another_grid_reads_the_learned_positions_between_their_places():
    head = make_head(grid=(3, 3))
    assert head([make_tokens(grid=(6, 4))]).shape == (3, 1, 224, 224)
    positions = head._positions_on((5, 5)).reshape(5, 5, 8)
    learned = head.positions.reshape(3, 3, 8)
    torch.testing.assert_close(positions[::2, ::2], learned)
    torch.testing.assert_close(positions[0, 1], (learned[0, 0] + learned[0, 1]) / 2)


def test_two_taps_count_as_their_widths_together_on_the_finer_grid():
    taps = [
        TapShape(tap="stage:2", dim=768, grid=(20, 20)),
        TapShape(tap="stage:3", dim=1536, grid=(10, 10)),
    ]
    joined, single = make_head(taps=taps), make_head(width=2304, grid=(20, 20))
    assert joined.n_parameters() == single.n_parameters()
    fine = make_tokens(batch=1, width=768, grid=(20, 20))
    coarse = make_tokens(batch=1, width=1536, grid=(10, 10))
    map_1dyx = coarse.patch.mT.reshape(1, 1536, 10, 10)
    large = torch.nn.functional.interpolate(map_1dyx, size=(20, 20), mode="bilinear")
    patch = torch.cat([fine.patch, large.flatten(2).mT], dim=2)
    single.load_state_dict(joined.state_dict())
    with torch.no_grad():
        expected = single([TapTokens(patch=patch, grid=(20, 20))])
        torch.testing.assert_close(joined([fine, coarse]), expected)


def test_padding_of_a_coarser_tap_does_not_bleed():
    taps = [TapShape(tap="a", dim=4, grid=(4, 4)), TapShape(tap="b", dim=6, grid=(2, 2))]
    head = make_head(taps=taps, queries=4)
    valid = torch.tensor([True, True, False, False])[None]
    fine_valid = torch.tensor([True] * 8 + [False] * 8)[None]
    outputs = []
    for filler in (0.0, float("nan"), 1e4):
        fine = make_tokens(batch=1, width=4, grid=(4, 4), valid=fine_valid)
        coarse = make_tokens(batch=1, width=6, grid=(2, 2), valid=valid)
        coarse.patch[0, 2:], fine.patch[0, 8:] = filler, filler
        outputs.append(head([fine, coarse]).detach())
    assert torch.isfinite(outputs[0]).all()
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


@pytest.mark.parametrize(
    ("variant", "difference"),
    [("no-sigma", 8), ("no-indiv-sigma", 7), ("single-layer", 96 * 776 + 96 + 2 * 776 + 12512)],
)
def test_a_variant_has_so_many_parameters_less(variant, difference):
    full, less = make_head(width=768), make_head(width=768, variant=variant)
    assert full.n_parameters() - less.n_parameters() == difference


@pytest.mark.parametrize("variant", ["no-sigma", "no-indiv-sigma"])
def test_the_mask_of_a_variant(variant):
    full, less = make_head(queries=4), make_head(queries=4, variant=variant)
    with torch.no_grad():
        full.first.mask.sigma.fill_(0.3 if variant == "no-indiv-sigma" else 1e6)
        if variant == "no-indiv-sigma":
            less.first.mask.sigma.fill_(0.3)
    torch.testing.assert_close(less([make_tokens()]), full([make_tokens()]))


def test_output_biases_are_two_and_shift_the_output_by_their_sum():
    head, tokens = make_head(queries=3), make_tokens()
    before = head([tokens])
    shift_output_biases(head, 1.0)
    torch.testing.assert_close(head([tokens]), before + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_form": "soft"}, "`mask_form` must be one of code, paper"),
        ({"variant": "8-dim"}, "`variant` must be one of full, no-sigma"),
        ({"dim": 12}, "multiple of heads"),
        ({"queries": 1}, "from 2 to 256"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_right(options, message):
    with pytest.raises(InvalidInputError, match=message):
        make_head(**options)


def test_a_pooled_tap_is_refused():
    with pytest.raises(InvalidInputError, match="one dense tap or several for the head maxa"):
        make_head(taps=[TapShape(tap="norm.cls", dim=8, grid=None)])
