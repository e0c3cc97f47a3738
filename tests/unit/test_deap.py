from __future__ import annotations

import functools
import math

import pytest
import torch
from plain_heads import plain_deap

from featstore.errors import InvalidInputError, NotFoundError
from featstore.types import TapShape
from heads.base import TapTokens, shift_output_biases
from heads.blocks import (
    MIN_SIGMA,
    LocalityMask,
    Upscale,
    masked_attention,
    position_encoding,
    squared_distances,
)
from heads.build import build_head
from heads.deap import Deap

COLUMNS = ("instances", "boundaries", "detection", "voc", "coco_stuff", "depth")
# DeAP (TMLR 2025), tables 3 and 4: width of the backbone's last tap, P_learn in thousands.
PRINTED = {
    "Random": (768, 53, 43, 87, 47, 88, 43),
    "ImageNet": (768, 53, 43, 87, 47, 88, 43),
    "SAM V2 B+": (256, 28, 18, 35, 22, 62, 18),
    "MoCo V3": (768, 53, 43, 87, 47, 88, 43),
    "Dino": (768, 53, 43, 87, 47, 88, 43),
    "Dino V2": (768, 53, 43, 87, 47, 88, 43),
    "Dino V2 (ViT-L)": (1024, 66, 56, 112, 60, 101, 56),
    "MAE": (768, 53, 43, 87, 47, 88, 43),
    "Hiera B+": (896, 60, 50, 99, 54, 94, 50),
    "CLIP": (768, 53, 43, 87, 47, 88, 43),
    "CLIP (ViT-L)": (1024, 66, 56, 112, 60, 101, 56),
    "MetaCLIP": (768, 53, 43, 87, 47, 88, 43),
    "SigLIP-224": (768, 53, 43, 87, 47, 88, 43),
    "SigLIP-384": (768, 53, 43, 87, 47, 88, 43),
    "SigLIP-512": (768, 53, 43, 87, 47, 88, 43),
    "SigLIP-SO": (1152, 73, 62, 125, 66, 107, 62),
    "Aim2": (1024, 66, 56, 112, 60, 101, 56),
    "ViTamin": (1024, 66, 56, 112, 60, 101, 56),
}
# Outputs of each readout of a task, and the channels of its CNN where they do not follow the rule.
READOUTS = {
    "instances": ((32, None),),
    "boundaries": ((1, None),),
    "detection": ((1, None), (2, None)),
    "voc": ((21, None),),
    "coco_stuff": ((200, 32),),
    "depth": ((1, None),),
}
CLOSED_FORMS = {
    "instances": (50, 14952),
    "boundaries": (50, 4886),
    "detection": (100, 9794),
    "voc": (50, 8872),
    "coco_stuff": (50, 49304),
    "depth": (50, 4886),
}


def make_head(*, width=24, grid=(4, 5), n_outputs=1, **options):
    torch.manual_seed(0)
    tap = TapShape(tap="norm", dim=width, grid=grid)
    return build_head("deap", taps=[tap], n_outputs=n_outputs, options=options)


def make_tokens(*, batch=3, width=24, grid=(4, 5), dtype=torch.float32, valid=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randn(batch, grid[0] * grid[1], width, generator=generator, dtype=dtype)
    return TapTokens(patch=patch, grid=grid, valid=valid)


@functools.cache
def count(task, width):
    return sum(
        make_head(width=width, n_outputs=n, dc=dc).n_parameters() for n, dc in READOUTS[task]
    )


def test_the_tables_have_108_cells():
    assert sum(len(row) - 1 for row in PRINTED.values()) == 108


@pytest.mark.parametrize("backbone", PRINTED)
def test_every_printed_count_of_learnable_parameters_is_met(backbone):
    width, *printed = PRINTED[backbone]
    assert [round(count(task, width) / 1000) for task in COLUMNS] == printed


@pytest.mark.parametrize("task", CLOSED_FORMS)
def test_the_closed_form_of_the_count_is_met_to_the_parameter(task):
    slope, constant = CLOSED_FORMS[task]
    assert [count(task, width) for width in (64, 384, 768)] == [
        slope * width + constant for width in (64, 384, 768)
    ]


def test_the_depth_head_of_width_768_has_43286_parameters_1552_of_them_dead():
    head = make_head(width=768)
    assert (head.n_parameters(), head.dead_parameters()) == (43_286, 1_552)
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in head.named_children()
    }
    assert parts["norm_inp"] == 1_552
    assert parts["key_value"] == 12_432 + 24_864
    assert (parts["query"], parts["mask"], parts["ffn"]) == (144, 8, 3_184)


def test_the_8_dim_variant_has_the_count_of_the_ablation():
    assert make_head(width=768, dim=8).n_parameters() == 21_392


@pytest.mark.parametrize("mask_form", ["code", "paper"])
@pytest.mark.parametrize("grid", [(4, 5), (7, 3), (1, 6), (1, 1)])
@pytest.mark.parametrize(("n_outputs", "dc"), [(1, None), (5, 3)])
def test_output_and_gradients_equal_those_of_the_plain_form(mask_form, grid, n_outputs, dc):
    head = make_head(grid=grid, n_outputs=n_outputs, mask_form=mask_form, queries=6, dc=dc).double()
    _spread_weights(head)
    tokens = make_tokens(grid=grid, dtype=torch.float64)
    target = torch.randn(3, n_outputs, 48, 48, dtype=torch.float64)

    ours, our_gradients = _run(head, lambda: head([tokens]), target)
    plain, plain_gradients = _run(
        head, lambda: plain_deap(head, tokens.patch, grid, mask_form), target
    )

    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-8, atol=1e-10)


def _spread_weights(head):
    """Make content matter against the mask, and the widths differ from head to head."""
    with torch.no_grad():
        head.query.weight.mul_(4)
        head.key_value.weight.mul_(4)
        head.mask.sigma.copy_(torch.linspace(0.03, 0.6, 8))


def _run(head, forward, target):
    head.zero_grad()
    output = forward()
    (output * target).mean().backward()
    gradients = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def test_gradients_with_padded_tokens_are_those_of_finite_differences():
    torch.manual_seed(0)
    query, mask = torch.randn(2, 5, 2).double(), torch.randn(2, 5, 6).double()
    key, value = torch.randn(3, 2, 2, 6).double(), torch.randn(3, 2, 3, 6).double()
    bias = torch.zeros(3, 6).double()
    bias[1, 2:] = -math.inf
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, mask)]
    assert torch.autograd.gradcheck(lambda q, k, v, m: masked_attention(q, k, v, m, bias), inputs)


@pytest.mark.parametrize("at_once", [1, 2])
def test_gradients_do_not_depend_on_how_the_inputs_lie_in_memory(monkeypatch, at_once):
    monkeypatch.setattr("heads.blocks._images_at_once", lambda mask, batch: at_once)
    torch.manual_seed(0)
    query, mask = torch.randn(2, 5, 3), torch.randn(2, 5, 6)
    key, value = torch.randn(3, 2, 3, 6), torch.randn(3, 2, 4, 6)

    def gradients(relay):
        inputs = [relay(tensor).requires_grad_() for tensor in (query, key, value, mask)]
        masked_attention(*inputs, None).square().sum().backward()
        return [tensor.grad for tensor in inputs]

    def turned(tensor):
        order = list(range(tensor.ndim))[::-1]
        return tensor.permute(order).contiguous().permute(order)

    for ours, expected in zip(gradients(turned), gradients(torch.clone), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_batched_walk_of_a_gpu_gives_the_numbers_of_the_walk_by_image(monkeypatch):
    head, tokens = make_head(queries=4), make_tokens(batch=5)
    target = torch.randn(5, 1, 32, 32)
    alone = _run(head, lambda: head([tokens]), target)
    sizes = []
    monkeypatch.setattr("heads.blocks._images_at_once", lambda mask, batch: sizes.append(2) or 2)
    together = _run(head, lambda: head([tokens]), target)
    assert sizes == [2, 2]  # forward and backward
    torch.testing.assert_close(together[0], alone[0])
    for name, gradient in alone[1].items():
        torch.testing.assert_close(together[1][name], gradient)


def test_padded_tokens_change_nothing_whatever_they_hold():
    head = make_head(queries=4)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[:, 15:] = False  # the last row of the grid
    clean, dirty = make_tokens(batch=2, valid=valid), make_tokens(batch=2, valid=valid)
    dirty.patch[:, 15:] = math.nan
    torch.testing.assert_close(head([dirty]), head([clean]), rtol=0, atol=0)
    everything = TapTokens(patch=clean.patch, grid=(4, 5))
    assert not torch.allclose(head([clean]), head([everything]))


def test_the_position_encoding_has_x_before_y_and_sine_before_cosine():
    code = position_encoding((3, 4))[2 * 4 + 3]  # y = 2, x = 3
    angles = [3, 0.03], [2, 0.02]
    expected = [f(a) for pair in angles for f in (math.sin, math.cos) for a in pair]
    torch.testing.assert_close(code, torch.tensor(expected))


def test_distances_run_from_corner_to_corner_on_each_axis():
    distances = squared_distances((3, 3), (2, 5))
    assert distances.shape == (9, 10)
    assert distances[0, 0] == 0
    assert distances[8, 9] == 0
    assert distances[0, 9] == 2
    assert distances[4, 2] == pytest.approx(0.25)  # centre against (y 0, x 0.5)


@pytest.mark.parametrize(("form", "half_radius"), [("code", 0.2426), ("paper", 0.0589)])
def test_the_mask_peaks_at_7_98_and_falls_to_half_where_the_release_does(form, half_radius):
    mask = LocalityMask(n_heads=2, form=form)
    found = mask(torch.tensor([[0.0, half_radius**2]]))[0, 0].detach()
    assert found[0] == pytest.approx(7.979, abs=1e-3)
    assert found[1] / found[0] == pytest.approx(0.5, abs=1e-3)


def test_a_sigma_below_zero_acts_as_the_smallest_and_can_come_back():
    mask = LocalityMask(n_heads=1, form="code")
    with torch.no_grad():
        mask.sigma.fill_(-0.2)
    out = mask(torch.tensor([[0.0, 1e-4]]))
    assert torch.isfinite(out).all()
    assert mask.positive_sigma().item() == pytest.approx(MIN_SIGMA)
    out.sum().backward()
    assert mask.sigma.grad.abs() > 0


@pytest.mark.parametrize("size", [(28, 28), (3, 7), (1, 2)])
def test_upscaling_equals_antialiased_bilinear_interpolation(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    large = [8 * n for n in size]
    expected = torch.nn.functional.interpolate(x, size=large, mode="bilinear", antialias=True)
    torch.testing.assert_close(Upscale(8)(x), expected, rtol=1e-5, atol=1e-6)


def test_output_biases_are_two_and_shift_the_output_by_their_sum():
    head, tokens = make_head(queries=3), make_tokens()
    before = head([tokens])
    shift_output_biases(head, 1.0)
    torch.testing.assert_close(head([tokens]), before + 2)


def test_the_query_grid_sets_the_output_size_and_no_parameter():
    small, large = make_head(queries=28), make_head(queries=56)
    assert (small.output_hw, large.output_hw) == ((224, 224), (448, 448))
    assert small.n_parameters() == large.n_parameters()
    assert make_head(queries=5)([make_tokens()]).shape == (3, 1, 40, 40)


def test_half_precision_tokens_are_read_at_the_precision_of_the_weights():
    head, tokens = make_head(queries=3), make_tokens()
    halved = TapTokens(patch=tokens.patch.half(), grid=tokens.grid)
    output = head([halved])
    assert output.dtype == torch.float32
    rounded = TapTokens(patch=tokens.patch.half().float(), grid=tokens.grid)
    torch.testing.assert_close(output, head([rounded]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_form": "soft"}, "`mask_form` must be one of code, paper. Got 'soft'"),
        ({"dim": 12}, "multiple of heads"),
        ({"dim": 0}, "at least 4"),
        ({"heads": 0}, "`heads` must be a positive number"),
        ({"queries": 1}, "`queries` must be from 2 to 256"),
        ({"queries": "many"}, "`queries` must be of type int. Got 'many'"),
        ({"dc": -1}, "`dc` must be a positive number"),
        ({"dc": "x"}, "of type int, or auto"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_right(options, message):
    with pytest.raises(InvalidInputError, match=message):
        make_head(**options)


def test_options_are_read_from_text():
    head = make_head(dim="8", heads="4", queries="6", dc="auto", mask_form="paper")
    assert (head.options.dim, head.options.heads, head.options.queries) == (8, 4, 6)
    assert head.options.dc is None


def test_an_unknown_option_offers_the_nearest():
    with pytest.raises(NotFoundError, match=r"Unknown option 'query'. Did you mean 'queries'\?"):
        make_head(query=3)


def test_default_tap_is_the_norm_then_the_last_block_then_the_deepest_fine_stage():
    def shapes(**grids):
        return {
            name.replace("_", ":"): TapShape(tap=name.replace("_", ":"), dim=4, grid=grid)
            for name, grid in grids.items()
        }

    stages = shapes(stage_0=(56, 56), stage_1=(28, 28), stage_2=(14, 14), stage_3=(7, 7))
    assert Deap.default_taps(shapes(block_2=(4, 4), norm=(4, 4)), input_hw=None) == ("norm",)
    assert Deap.default_taps(shapes(block_2=(4, 4), block_10=(4, 4)), input_hw=None) == (
        "block:10",
    )
    assert Deap.default_taps(stages, input_hw=(224, 224)) == ("stage:2",)
    assert Deap.default_taps(shapes(stage_0=(4, 4), stage_1=(2, 2)), input_hw=(224, 224)) == (
        "stage:0",
    )
    with pytest.raises(InvalidInputError, match="--tap"):
        Deap.default_taps(stages, input_hw=None)
    with pytest.raises(InvalidInputError, match="at least one dense tap"):
        Deap.default_taps({"norm.cls": TapShape(tap="norm.cls", dim=4, grid=None)}, input_hw=None)


ABLATIONS = {"8-dim": 21_392, "no-sigma": 43_278, "no-indiv-sigma": 43_279, "only-mask": 30_854}


@pytest.mark.parametrize("variant", ABLATIONS)
def test_an_ablation_has_the_count_of_the_release(variant):
    assert make_head(width=768, variant=variant).n_parameters() == ABLATIONS[variant]


def test_without_sigma_every_distance_is_alike():
    head = make_head(queries=4, variant="no-sigma")
    with torch.no_grad():
        head.query.weight.zero_()
        head.query.bias.zero_()
    attended = head._attend(make_tokens())
    torch.testing.assert_close(attended, attended[:, :, :1].expand_as(attended))


def test_with_one_sigma_all_heads_have_its_mask():
    head = make_head(variant="no-indiv-sigma")
    mask = head._mask((4, 5))
    assert mask.shape == (8, 784, 20)
    torch.testing.assert_close(mask, mask[:1].expand_as(mask))


def test_only_the_mask_decides_what_is_read():
    head, full = make_head(queries=4, variant="only-mask"), make_head(queries=4)
    with torch.no_grad():
        full.query.weight.zero_()
        full.query.bias.zero_()
        full.key_value.weight[16:] = head.key_value.weight
        full.key_value.bias[16:] = head.key_value.bias
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[1, 12:] = False
    for tokens in (make_tokens(), make_tokens(valid=valid)):
        torch.testing.assert_close(head._attend(tokens), full._attend(tokens))
    head([make_tokens()]).sum().backward()
    assert head.query.weight.grad is None
    assert head.dead_parameters() == 2 * 32 + 9 * 16


@pytest.mark.parametrize("name", ["deap", "maxa"])
def test_a_finer_grid_of_queries_asks_the_same_in_the_places_it_shares(name):
    torch.manual_seed(0)
    tap = TapShape(tap="norm", dim=24, grid=(3, 4))
    head = build_head(name, taps=[tap], n_outputs=2, options={"queries": 5}).double().eval()
    answers = {}
    head.readout = lambda tokens_bqd: answers.update({head.side: tokens_bqd})
    tokens = TapTokens(patch=torch.randn(2, 12, 24, dtype=torch.float64), grid=(3, 4))
    for side in (5, 9):
        head.ask_on(side)
        head([tokens])
    fine = answers[9].unflatten(1, (9, 9))[:, ::2, ::2]
    torch.testing.assert_close(fine, answers[5].unflatten(1, (5, 5)))
    assert head.output_hw == (72, 72)
