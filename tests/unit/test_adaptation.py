"""Adapting to one more identity: what changes, that many at once are as each alone, and files."""

from __future__ import annotations

import copy

import pytest
import torch

from featstore.errors import InvalidInputError, NotFoundError
from featstore.types import TapShape
from heads.adapt_modes import MODES, count_trained, own_lr, parts_of
from heads.adaptation import Images, Recipe, Start, adapt_many
from heads.base import TapTokens
from heads.build import build_head
from heads.interpolation import descriptors, interpolated_token

GRID, WIDTH, K, N = (3, 4), 16, 3, 12
TAP = TapShape(tap="norm", dim=WIDTH, grid=GRID)


class Points:
    """A task of keypoints, as small as can be."""

    def losses(self, output, targets):
        return (output[:, :, 0, 0] - targets["points"]).square().mean(dim=1)

    def loss(self, output, targets):
        return self.losses(output, targets).mean()


def make_head(**options):
    torch.manual_seed(0)
    options = {"heads": 2, "ff": 24, "hidden": 5, "tokens": "a|b|c", **options}
    head = build_head("identity_token", taps=[TAP], n_outputs=2 * K, options=options)
    if head.film is not None:
        torch.nn.init.normal_(head.film.weight, std=0.1)
    return head


def make_images(n=N, *, seed=0, padded=False):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(n, 12, dtype=torch.bool)
    valid[1, 5:] = False
    patch = torch.randn(n, 12, WIDTH, generator=generator)
    tokens = TapTokens(patch=patch, grid=GRID, valid=valid if padded else None)
    return Images(inputs=[tokens], targets={"points": torch.rand(n, 2 * K, generator=generator)})


def make_starts(head, supports, seed=0):
    tokens = head.random_tokens(len(supports), torch.Generator().manual_seed(seed))
    return [
        Start(token=token, support=tuple(support), seed=number)
        for number, (token, support) in enumerate(zip(tokens, supports, strict=True))
    ]


def state_of(head):
    return {name: value.clone() for name, value in head.state_dict().items()}


def test_only_the_numbers_of_the_token_change_and_nothing_of_the_head():
    head, images = make_head(), make_images()
    before = state_of(head)
    starts = make_starts(head, [range(5)])
    (adapted,) = adapt_many(head, Points(), images, starts, Recipe(steps=20))
    assert adapted.weights == {}
    assert adapted.token.shape == (WIDTH,)
    assert (adapted.token != starts[0].token).sum() == WIDTH == count_trained(head, "token")
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert all(value.requires_grad for value in head.parameters())
    head.set_token(adapted.token)
    support = images.rows(torch.arange(5))
    found = Points().loss(head(support.inputs), support.targets)
    assert found < adapted.losses[-1] < adapted.losses[0]


@pytest.mark.parametrize("injection", ["memory", "film", "film_queries"])
@pytest.mark.parametrize("layers", [1, 2])
def test_many_at_once_are_as_each_alone_and_as_the_plain_way(injection, layers):
    head, images = make_head(injection=injection, layers=layers), make_images(padded=True)
    starts = make_starts(head, [(0, 1), (1, 3, 5, 7, 9, 11, 2), (), (4,)])
    recipe = Recipe(steps=6, batch_size=3)
    together = adapt_many(head, Points(), images, starts, recipe, asked=make_images(4, seed=3))
    for one, start in zip(together, starts, strict=True):
        (alone,) = adapt_many(head, Points(), images, [start], recipe)
        torch.testing.assert_close(one.token, alone.token)
        torch.testing.assert_close(one.losses, alone.losses)
    # The plain way: the whole head in every step, on the images of a start that has few.
    head.requires_grad_(False)
    token = torch.nn.Parameter(starts[0].token.clone())
    optimizer = torch.optim.Adam([token], lr=own_lr("token"))
    support = images.rows(torch.tensor([0, 1]))
    for _ in range(6):
        output = head.answer(head.see(support.inputs), token.expand(2, -1))
        loss = Points().loss(output, support.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(together[0].token, token.detach())
    assert torch.equal(together[2].token, starts[2].token)  # from no image, nothing is learned
    head.set_token(together[1].token)
    torch.testing.assert_close(together[1].output, head(make_images(4, seed=3).inputs))


CHANGED = {
    "token": 0,
    "token+norms": 6 * WIDTH,
    "token+queries": K * WIDTH,
    "token+output": 5 * 2 + 2,
}


@pytest.mark.parametrize("mode", [*MODES, "token+lora", "lora:rank=2,targets=query+mix"])
def test_a_mode_changes_what_it_names_and_its_answers_are_those_of_the_changed_head(mode):
    head, images = make_head(), make_images()
    starts = make_starts(head, [range(6), range(3, 9)])
    asked = make_images(5, seed=4)
    before = state_of(head)
    found = adapt_many(head, Points(), images, starts, Recipe(mode=mode, steps=5), asked=asked)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    is_token, _ = parts_of(mode)
    for one, start in zip(found, starts, strict=True):
        assert (not torch.equal(one.token, start.token)) == is_token
        n_weights = sum(value.numel() for value in one.weights.values())
        assert n_weights + WIDTH * is_token == count_trained(head, mode)
        if mode in CHANGED:
            assert n_weights == CHANGED[mode]
            own = copy.deepcopy(head)
            own.load_state_dict({**before, **one.weights})
            own.set_token(one.token)
            torch.testing.assert_close(own(asked.inputs), one.output)
        assert one.losses[-1] < one.losses[0]
    if mode == "decoder":
        assert count_trained(head, mode) == head.n_parameters() - head.tokens.numel()


@pytest.mark.parametrize("mode", ["token+norms", "token+queries", "token+output", "decoder"])
def test_what_is_computed_once_changes_no_step(mode, monkeypatch):
    head, images = make_head(layers=2), make_images()
    starts = make_starts(head, [range(7)])
    recipe = Recipe(mode=mode, steps=4, batch_size=3)
    (quick,) = adapt_many(head, Points(), images, starts, recipe)
    monkeypatch.setattr("heads.adaptation._is_trained", lambda seen: True)  # compute all anew
    (slow,) = adapt_many(head, Points(), images, starts, recipe)
    torch.testing.assert_close(quick.losses, slow.losses)
    torch.testing.assert_close(quick.token, slow.token)
    for name, value in quick.weights.items():
        torch.testing.assert_close(value, slow.weights[name])


def test_batches_go_through_all_images_in_turn_and_the_seed_orders_them():
    head, images, seen = make_head(), make_images(), []

    class Noting(Points):
        def losses(self, output, targets):
            seen.append(targets["points"][:, 0].tolist())
            return super().losses(output, targets)

    start = make_starts(head, [range(N)])[0]
    recipe = Recipe(steps=6, batch_size=4)
    first = adapt_many(head, Noting(), images, [start], recipe)
    for three in (seen[:3], seen[3:6]):
        assert sorted(x for each in three for x in each) == sorted(
            images.targets["points"][:, 0].tolist()
        )
    again = adapt_many(head, Points(), images, [start], recipe)
    assert torch.equal(first[0].token, again[0].token)
    other = Start(token=start.token, support=start.support, seed=7)
    assert not torch.equal(adapt_many(head, Points(), images, [other], recipe)[0].token,
                           first[0].token)  # fmt: skip


def test_images_beyond_one_part_are_seen_as_all_at_once(monkeypatch):
    head, images = make_head(layers=2), make_images(padded=True)
    starts = make_starts(head, [range(N)])
    (whole,) = adapt_many(head, Points(), images, starts, Recipe(steps=3), asked=images)
    monkeypatch.setattr("heads.adaptation._SEEN_AT_ONCE", 5)  # padding is in the first part only
    (parts,) = adapt_many(head, Points(), images, starts, Recipe(steps=3), asked=images)
    torch.testing.assert_close(parts.token, whole.token)
    torch.testing.assert_close(parts.output, whole.output)


def test_what_cannot_be_is_said():
    head, images = make_head(), make_images()
    with pytest.raises(NotFoundError, match=r"'token.norm'\. Did you mean 'token.norms'"):
        Recipe(mode="token+norm")
    with pytest.raises(NotFoundError, match="Unknown mode 'norms'"):
        Recipe(mode="norms")
    with pytest.raises(InvalidInputError, match="at least 1"):
        Recipe(steps=0)
    with pytest.raises(InvalidInputError, match=r"positive number\. Got 0\.0\. Try 0\.01"):
        Recipe(lr=0.0)
    images.targets["points"][3] = float("nan")
    for mode in ("token", "decoder"):
        recipe = Recipe(mode=mode, steps=2)
        with pytest.raises(InvalidInputError, match=r"at step 1 .*Try a smaller --lr"):
            adapt_many(head, Points(), images, make_starts(head, [(0, 3)]), recipe)
    adapt_many(head, Points(), images, make_starts(head, [(0, 1)]), Recipe(steps=1))


def test_an_interpolated_token_is_that_of_the_identities_that_look_alike():
    # Six identities in two families: tokens are alike within a family, and so are looks.
    generator = torch.Generator().manual_seed(0)
    looks = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    looks = looks + 0.05 * torch.randn(6, 2, generator=generator)
    tokens = torch.tensor([[5.0] * 4] * 3 + [[-5.0] * 4] * 3)
    found = interpolated_token(tokens, looks, torch.tensor([0.9, 0.1]), seed=0)
    assert found.mean() > 4
    assert interpolated_token(tokens, looks, torch.tensor([0.1, 0.9]), seed=0).mean() < -4
    assert torch.equal(found, interpolated_token(tokens, looks, torch.tensor([0.9, 0.1]), seed=0))
    two = interpolated_token(tokens[2:4], looks[2:4], looks[0], seed=0)
    assert torch.equal(two, torch.zeros(4))


def test_a_descriptor_is_the_class_token_else_the_mean_of_what_is_seen():
    patch = torch.randn(2, 12, WIDTH)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 3:] = False
    prefix = torch.randn(2, 2, WIDTH)
    found = descriptors([TapTokens(patch=patch, grid=GRID, prefix=prefix)])
    torch.testing.assert_close(found, prefix[:, 0] / prefix[:, 0].norm(dim=1, keepdim=True))
    found = descriptors([TapTokens(patch=patch, grid=GRID, valid=valid)])
    mean = patch[0, :3].mean(dim=0)
    torch.testing.assert_close(found[0], mean / mean.norm())
