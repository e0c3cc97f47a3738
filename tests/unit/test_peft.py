"""Adapting a decoder by few numbers: counts, the start, what learns and what does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from featstore.errors import InvalidInputError, NotFoundError
from featstore.types import TapShape
from heads.base import TapTokens
from heads.build import build_head
from heads.peft import METHODS, add_method, parse_method

GRID, WIDTH, K = (3, 4), 16, 3
TAP = TapShape(tap="norm", dim=WIDTH, grid=GRID)


def make_head(*, layers=2, **options):
    torch.manual_seed(0)
    options = {"heads": 2, "ff": 24, "hidden": 5, "tokens": "a|b", "layers": layers, **options}
    return build_head("identity_token", taps=[TAP], n_outputs=2 * K, options=options)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    return [TapTokens(patch=torch.randn(4, 12, WIDTH, generator=generator), grid=GRID)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(head, tokens, parameters, steps=3):
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (head(tokens) - 0.3).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("lora", 2 * 2 * 2 * 8 * 768),
        ("lora:rank=4,targets=query+key+value+mix", 2 * 4 * 2 * 4 * 768),
        ("bitfit", 12 * 768 + 2048 + 64 + 2),
        ("ia3", 4 * 768 + 2048),
        ("adaptformer", 2 * 768 * 64 + 64 + 768),
        ("adaptformer:bottleneck=8", 2 * 768 * 8 + 8 + 768),
        ("prompts", 8 * 768 + 8),
        ("prompts:count=1", 768 + 8),
    ],
)
def test_a_method_trains_as_many_numbers_as_it_says(method, count):
    torch.manual_seed(0)
    tap = TapShape(tap="norm", dim=768, grid=(2, 2))
    head = build_head("identity_token", taps=[tap], n_outputs=34, options={})
    found = add_method(head, method, generator=generator())
    assert sum(value.numel() for value in found.values()) == count


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_head_begins_as_it_was_bit_for_bit(method, layers, tokens):
    head = make_head(layers=layers)
    before = head(tokens)
    add_method(head, method, generator=generator())
    assert torch.equal(head(tokens), before)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_adds_learns_and_nothing_else_changes(method, tokens):
    head = make_head()
    add = add_method(head, method, generator=generator())
    frozen = {name: p.clone() for name, p in head.named_parameters() if name not in add}
    before, start = head(tokens).detach(), {name: p.detach().clone() for name, p in add.items()}
    trained(head, tokens, add)
    assert (head(tokens) - 0.3).square().sum() < (before - 0.3).square().sum()
    now = dict(head.named_parameters())
    assert frozen.keys() | add.keys() == now.keys()
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    same = [name for name, value in add.items() if torch.equal(value, start[name])]
    # The bias of a key moves all scores of a query alike, so nothing depends on it.
    assert all(name.endswith("key.bias") for name in same)


@pytest.mark.parametrize("method", METHODS)
def test_several_adaptations_run_side_by_side(method, tokens):
    """As `torch.func` needs it: parameters stacked, one call for all."""
    heads = []
    for seed in range(2):
        head = make_head()
        add = add_method(head, method, generator=generator(seed))
        trained(head, tokens, add, steps=2 + seed)
        heads.append((head, add))
    stacked = {name: torch.stack([add[name].detach() for _, add in heads]) for name in heads[0][1]}
    shared = copy.deepcopy(heads[0][0])
    together = vmap(lambda values: functional_call(shared, values, (tokens,)))(stacked)
    for (head, _), output in zip(heads, together, strict=True):
        torch.testing.assert_close(output, head(tokens))
    assert not torch.allclose(together[0], together[1])


def test_low_rank_is_the_merged_matrix(tokens):
    head, merged = make_head(layers=1), make_head(layers=1)
    add = add_method(head, "lora:rank=2,alpha=3", generator=generator())
    trained(head, tokens, add)
    for part in ("own", "cross"):
        for name in ("query", "value"):
            prefix = f"decoder.layers.0.{part}.{name}"
            product = add[f"{prefix}.up"] @ add[f"{prefix}.down"]
            merged.get_submodule(prefix).weight.data += 3 / 2 * product.detach()
    torch.testing.assert_close(head(tokens), merged(tokens))


def test_scales_are_the_scaled_matrices(tokens):
    head, merged = make_head(layers=1), make_head(layers=1)
    add = add_method(head, "ia3", generator=generator())
    trained(head, tokens, add)
    layer = merged.decoder.layers[0]
    for part in ("own", "cross"):
        for name in ("key", "value"):
            scale = add[f"decoder.layers.0.{part}.{name}.scale"].detach()
            linear = getattr(getattr(layer, part), name)
            linear.weight.data *= scale[:, None]
            linear.bias.data *= scale
    layer.feed_forward[2].weight.data *= add["decoder.layers.0.feed_forward.2.scale"].detach()
    torch.testing.assert_close(head(tokens), merged(tokens))


def test_a_narrow_perceptron_is_more_channels_of_the_wide_one(tokens):
    head, merged = make_head(layers=1), make_head(layers=1)
    add = add_method(head, "adaptformer:bottleneck=4,scale=0.5", generator=generator())
    trained(head, tokens, add)
    new = {name.rpartition(".")[2]: value.detach() for name, value in add.items()}
    first, _, last = merged.decoder.layers[0].feed_forward
    wide, out = nn.Linear(WIDTH, 28), nn.Linear(28, WIDTH)
    wide.weight.data = torch.cat([first.weight.data, new["down"]])
    wide.bias.data = torch.cat([first.bias.data, new["down_bias"]])
    out.weight.data = torch.cat([last.weight.data, 0.5 * new["up"]], dim=1)
    out.bias.data = last.bias.data + 0.5 * new["up_bias"]
    merged.decoder.layers[0].feed_forward = nn.Sequential(wide, nn.ReLU(), out)
    torch.testing.assert_close(head(tokens), merged(tokens))


def test_prompts_are_what_attention_to_them_alone_gives(tokens):
    head, plain = make_head(layers=1), make_head(layers=1)
    add = add_method(head, "prompts:count=3", generator=generator())
    trained(head, tokens, add)
    prompts, gate = (add[f"decoder.layers.0.cross.{name}"].detach() for name in ("prompts", "gate"))
    cross = plain.decoder.layers[0].cross
    asked = plain.decoder.layers[0].confer(plain.queries[None])
    alone = cross.glance(asked, cross.remember(prompts[None])).seen * gate[:, None, None]
    glance = plain.see(tokens).glance
    share = torch.sigmoid(
        (glance.query @ cross._split(cross.key(plain.mean_token()[None, None])).mT)[..., 0]
        - glance.mass
    )[..., None]
    value = cross._split(cross.value(plain.mean_token()[None, None]))
    seen = glance.seen + share * (value - glance.seen) + alone
    expected = cross.mix(seen.transpose(1, 2).flatten(2))
    gathered = head.decoder.layers[0].cross.gather(glance, head.mean_token().expand(4, -1))
    torch.testing.assert_close(gathered, expected)


def test_seeds_draw_other_starts():
    found = [
        add_method(make_head(), "lora", generator=generator(seed))[
            "decoder.layers.0.own.query.down"
        ]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "method",
    ["lora:rank=0", "lora:alpha=0", "lora:targets=query+query", "lora:targets=eye", "lora:rank=x",
     "adaptformer:bottleneck=0", "adaptformer:scale=-1", "prompts:count=0"],
)  # fmt: skip
def test_a_bad_option_is_refused(method):
    with pytest.raises(InvalidInputError):
        parse_method(method)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(NotFoundError, match=r"method 'lara'.*'lora'"):
        parse_method("lara")
    with pytest.raises(NotFoundError, match=r"option 'rang'.*'rank'"):
        parse_method("lora:rang=3")


def test_a_head_without_a_decoder_is_refused():
    head = build_head("linear", taps=[TAP], n_outputs=2, options={})
    with pytest.raises(InvalidInputError, match="decoder"):
        add_method(head, "ia3", generator=generator())
