"""The identity-token head: its counts, its decoder against torch's, its tokens and its margin."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from cli.common import exit_code
from cli.heads_app import heads as program
from featstore.errors import InvalidInputError
from featstore.types import TapShape
from heads.base import HEADS, TapTokens
from heads.blocks import position_encoding
from heads.build import build_head
from heads.identity_token import draw_other

GRID, WIDTH, K = (3, 4), 16, 3
TAP = TapShape(tap="norm", dim=WIDTH, grid=GRID)


class Points:
    """A task of keypoints, as small as can be."""

    def losses(self, output, targets):
        return (output[:, :, 0, 0] - targets["points"]).square().mean(dim=1)

    def loss(self, output, targets):
        return self.losses(output, targets).mean()


def make_head(*, n_outputs=2 * K, taps=(TAP,), seed=0, **options):
    torch.manual_seed(seed)
    options = {"heads": 2, "ff": 24, "hidden": 5, "tokens": "a|b|c", **options}
    return build_head("identity_token", taps=taps, n_outputs=n_outputs, options=options)


def make_tokens(*, batch=4, width=WIDTH, grid=GRID, valid=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randn(batch, grid[0] * grid[1], width, generator=generator)
    return TapTokens(patch=patch, grid=grid, valid=valid)


def make_targets(identity=(0, 1, 2, 0), seed=1):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(len(identity), 2 * K, generator=generator)
    return {"points": points, "identity": torch.tensor(identity)}


def test_the_head_is_described_with_the_specified_count(capsys):
    words = ["describe", "identity_token", "--width", "768", "--grid", "16x16", "--outputs", "17"]
    assert exit_code(program, [*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 7_940_290
    parts = {"queries": 13_056, "decoder": 7_877_888, "project": 49_346}
    assert found["parameters_by_part"] == parts
    assert found["output_shape"] == [34, 1, 1]


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"tokens": "a|b|c"}, 3 * 768),
        ({"numbers": 3}, 65),
        ({"token_proj": True}, 768 * 769),
        ({"injection": "film"}, 2 * 768 * 769),
        ({"injection": "film_queries"}, 2 * 768 * 769),
        ({"layers": 2}, 7_877_888),
        ({"positions": "none"}, 0),
    ],
)
def test_an_option_adds_the_parameters_that_it_says(options, more):
    tap = TapShape(tap="norm", dim=768, grid=(2, 2))
    n_outputs = 17 * options.get("numbers", 2)
    with torch.device("meta"):
        head = build_head("identity_token", taps=[tap], n_outputs=n_outputs, options=options)
    assert head.n_parameters() == 7_940_290 + more


def torch_layer(layer):
    """Give torch's own layer the weights of ours."""
    theirs = nn.TransformerDecoderLayer(WIDTH, 2, dim_feedforward=24, dropout=0, batch_first=True)
    pairs = [(layer.own, theirs.self_attn), (layer.cross, theirs.multihead_attn)]
    with torch.no_grad():
        for ours, other in pairs:
            three = (ours.query, ours.key, ours.value)
            other.in_proj_weight.copy_(torch.cat([each.weight for each in three]))
            other.in_proj_bias.copy_(torch.cat([each.bias for each in three]))
            other.out_proj.load_state_dict(ours.mix.state_dict())
    theirs.linear1.load_state_dict(layer.feed_forward[0].state_dict())
    theirs.linear2.load_state_dict(layer.feed_forward[2].state_dict())
    for number, norm in enumerate((layer.norm_own, layer.norm_cross, layer.norm_out), 1):
        getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
    return theirs


@pytest.mark.parametrize("layers", [1, 3])
def test_it_is_torchs_decoder_over_the_token_and_the_patches(layers):
    head = make_head(layers=layers)
    with torch.no_grad():  # biases and norms begin as zeros and ones: that would hide mistakes
        for parameter in head.decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[1, 7:] = False
    tokens, identity = make_tokens(valid=valid), torch.tensor([2, 0, -1, 1])
    places_td = position_encoding(GRID, dim=WIDTH)
    own = torch.stack([head.tokens[2], head.tokens[0], head.tokens.mean(0), head.tokens[1]])
    memory = torch.cat([own[:, None], tokens.filled(torch.float32) + places_td], dim=1)
    hidden = torch.cat([torch.zeros(4, 1, dtype=torch.bool), ~valid], dim=1)
    answer = head.queries.expand(4, -1, -1)
    for layer in head.decoder.layers:
        answer = torch_layer(layer)(answer, memory, memory_key_padding_mask=hidden)
    expected = head.project(answer).flatten(1)
    torch.testing.assert_close(head([tokens], identity)[:, :, 0, 0], expected)


def test_attention_begins_as_torchs_does():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 2).in_proj_weight
    ours = make_head(taps=[TapShape(tap="norm", dim=64, grid=GRID)]).decoder.layers[0].own
    for part in (ours.query, ours.key, ours.value):
        largest = part.weight.abs().max().item()
        assert largest == pytest.approx(theirs.abs().max().item(), rel=0.01)
        assert not part.bias.any()


@pytest.mark.parametrize("injection", ["memory", "film", "film_queries"])
@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_seen_once_answers_for_any_token_as_the_whole_head_does(injection, layers):
    head = make_head(injection=injection, layers=layers, token_proj=True)
    if head.film is not None:
        nn.init.normal_(head.film.weight, std=0.1)
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[2, :5] = False
    inputs = [make_tokens(valid=valid)]
    seen = head.see(inputs)
    for token in torch.randn(2, WIDTH):
        head.set_token(token)
        expected = head(inputs)
        assert torch.equal(head.answer(seen, token.expand(4, -1)), expected)
        if injection != "film":
            index = torch.tensor([2, 2, 0])
            some = head.answer(seen.rows(index), token.expand(3, -1))
            torch.testing.assert_close(some, expected[index])


@pytest.mark.parametrize("injection", ["memory", "film", "film_queries"])
def test_the_token_and_nothing_else_tells_identities_apart(injection):
    head, inputs = make_head(injection=injection), [make_tokens()]
    if head.film is not None:
        # It begins as if there were no token.
        assert torch.equal(head(inputs), head(inputs, torch.tensor([0, 1, 2, 0])))
        nn.init.normal_(head.film.weight, std=0.1)
    mean = head(inputs)
    torch.testing.assert_close(head(inputs, torch.tensor([-1] * 4)), mean)
    assert not torch.allclose(head(inputs, torch.tensor([0] * 4)), mean, atol=1e-4)
    head.set_token(head.tokens[0])
    torch.testing.assert_close(head(inputs), head(inputs, torch.tensor([0] * 4)))
    head.set_token(None)
    assert torch.equal(head(inputs), mean)


def test_a_token_that_cannot_be_is_refused():
    head = make_head()
    with pytest.raises(InvalidInputError, match="16 finite numbers, as wide as the head"):
        head.set_token(torch.zeros(17))
    with pytest.raises(InvalidInputError, match="16 finite numbers"):
        head.set_token(torch.full((16,), float("nan")))


def test_scales_come_after_all_places():
    two, three = make_head(), make_head(n_outputs=3 * K, numbers=3)
    state = {**three.state_dict(), **two.state_dict()}
    for name in ("project.2.weight", "project.2.bias"):
        state[name] = torch.cat([two.state_dict()[name], three.state_dict()[name][2:]])
    three.load_state_dict(state)
    inputs = [make_tokens()]
    output = three(inputs)
    assert output.shape == (4, 9, 1, 1)
    torch.testing.assert_close(output[:, :6], two(inputs))


def test_several_taps_are_read_together_and_positions_follow_the_frame():
    taps = [TAP, TapShape(tap="block:1", dim=8, grid=GRID)]
    head = make_head(taps=taps)
    assert head.width == 24
    assert head([make_tokens(), make_tokens(width=8)]).shape == (4, 6, 1, 1)
    # Twice as fine a grid of the same tokens is the same picture, up to the steps of positions.
    head = make_head()
    coarse = make_tokens()
    fine_btd = coarse.patch.reshape(4, 3, 4, -1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    fine = TapTokens(patch=fine_btd.reshape(4, 48, -1), grid=(6, 8))
    assert (head([fine]) - head([coarse])).abs().max() < 0.2
    without = make_head(positions="none")
    torch.testing.assert_close(without([fine])[:, 0], without([coarse])[:, 0], atol=0.2, rtol=1)


def test_identities_and_numbers_are_filled_in_once():
    options = {"tokens": "", "numbers": 2, "heads": 8}
    kind = HEADS["identity_token"]
    filled = kind.with_identities(options, ["fox", "dog"], numbers=3)
    assert filled == {"tokens": "fox|dog", "numbers": 3, "heads": 8}
    assert kind.with_identities(filled, ["fox", "dog"], numbers=3) == filled
    with pytest.raises(InvalidInputError, match=r"'dog\|fox', as trained"):
        kind.with_identities(filled, ["dog", "fox"])
    with pytest.raises(InvalidInputError, match=r"names without \|"):
        kind.with_identities(options, ["a|b"])
    assert HEADS["linear_pool"].with_identities({"pool": "cls"}, ["a"]) == {"pool": "cls"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "a divisor of the width 16"),
        ({"ff": 0}, "a positive number"),
        ({"positions": "learned"}, "one of sincos, none"),
        ({"injection": "both"}, "one of memory, film, film_queries"),
        ({"margin_unit": "px"}, "one of relative, absolute"),
        ({"margin": -1.0}, "0 or more"),
        ({"tokens": "a|a"}, "each once"),
        ({"tokens": "a|"}, "each once"),
        ({"numbers": 4}, "2 .x, y. or 3"),
        ({"numbers": 3, "n_outputs": 4}, "a multiple of 3"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_right(options, message):
    with pytest.raises(InvalidInputError, match=message):
        make_head(**options)


def test_a_width_that_has_no_positions_is_said():
    tap = TapShape(tap="norm", dim=18, grid=GRID)
    with pytest.raises(InvalidInputError, match=r"none for the width 18\. .*positions=none"):
        make_head(taps=[tap])
    assert make_head(taps=[tap], positions="none").width == 18


def test_the_margin_is_the_loss_that_wrong_tokens_lack():
    head, inputs, task = make_head(margin=0.5, margin_weight=2.0), [make_tokens()], Points()
    targets = make_targets((0, 1, 0, -1))  # nobody knows the last one: it has no margin
    torch.manual_seed(3)
    found = head.learn(inputs, targets, task)
    torch.manual_seed(3)
    wrong = head._wrong_tokens(targets["identity"])
    own_b = task.losses(head(inputs, targets["identity"]), targets)
    wrong_b = task.losses(head.answer(head.see(inputs), wrong), targets)
    lacking = (0.5 * own_b + own_b - wrong_b).clamp(min=0)[:3].mean()
    assert lacking > 0
    torch.testing.assert_close(found, own_b.mean() + 2 * lacking)
    absolute = make_head(margin=0.5, margin_weight=2.0, margin_unit="absolute")
    torch.manual_seed(3)
    found = absolute.learn(inputs, targets, task)
    torch.testing.assert_close(found, own_b.mean() + 2 * (0.5 + own_b - wrong_b)[:3].relu().mean())


def test_without_a_margin_identities_or_tokens_the_loss_is_the_tasks():
    inputs, task = [make_tokens()], Points()
    targets = make_targets()
    for head in (make_head(margin_weight=0.0), make_head(tokens="")):
        expected = task.loss(head(inputs, targets["identity"]), targets)
        assert torch.equal(head.learn(inputs, targets, task), expected)
    head = make_head()
    del targets["identity"]
    assert torch.equal(head.learn(inputs, targets, task), task.loss(head(inputs), targets))


def test_wrong_tokens_are_the_mean_half_of_the_time_and_others_of_the_batch():
    head = make_head()
    torch.manual_seed(0)
    identity = torch.tensor([0, 1, 2, 2])
    drawn = torch.cat([head._wrong_tokens(identity) for _ in range(200)])
    is_mean = torch.isclose(drawn, head.mean_token()).all(dim=1)
    assert 0.45 < is_mean.float().mean() < 0.55
    own = head.tokens[identity].repeat(200, 1)
    assert not (drawn == own).all(dim=1).any()
    others = torch.cat([draw_other(identity) for _ in range(200)]).view(200, 4)
    # Of the first image's three others, two are of identity 2.
    counts = functional.one_hot(others[:, 0], 3).float().mean(dim=0)
    torch.testing.assert_close(counts, torch.tensor([0.0, 1 / 3, 2 / 3]), atol=0.1, rtol=0)
    assert draw_other(torch.tensor([1, 1, -1])).tolist() == [-1, -1, 1]


def test_the_spread_over_random_tokens_is_measured_and_vanishes_with_the_tokens_influence():
    head, inputs = make_head(n_outputs=3 * K, numbers=3), [make_tokens(batch=12)]
    assert "token_std" not in head.learned()
    found = head.diagnose(inputs)["token_std"]
    generator = torch.Generator().manual_seed(0)
    answers = []
    for token in head.random_tokens(32, generator):
        head.set_token(token)
        answers.append(head([make_tokens(batch=12)])[:8, : 2 * K, 0, 0])
    assert found == pytest.approx(torch.stack(answers).std(dim=0).mean().item(), rel=1e-5)
    assert head.learned() == {
        "token_std": pytest.approx(found),
        "token_parameters": 3 * WIDTH,
        "decoder_parameters": head.n_parameters() - 3 * WIDTH,
    }
    again = make_head(n_outputs=3 * K, numbers=3, seed=5)
    again.load_state_dict(head.state_dict())  # the measurement goes with the weights
    assert again.learned() == head.learned()
    with torch.no_grad():
        head.tokens.zero_()
    assert head.diagnose(inputs)["token_std"] == 0.0


def test_random_tokens_have_the_size_of_the_trained_ones():
    head = make_head()
    with torch.no_grad():
        head.tokens.mul_(7)
    drawn = head.random_tokens(500, torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx(head.tokens.square().mean().sqrt().item(), rel=0.03)
    alone = make_head(tokens="")
    assert alone.random_tokens(500, torch.Generator().manual_seed(0)).std() == pytest.approx(
        1, rel=0.03
    )


def test_only_tokens_of_the_batch_and_the_mean_get_a_gradient_without_margin():
    head = make_head(margin_weight=0.0)
    head.learn([make_tokens()], make_targets((0, 0, 1, 1)), Points()).backward()
    assert head.tokens.grad[:2].any(dim=1).all()
    assert not head.tokens.grad[2].any()
