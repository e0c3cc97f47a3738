from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from featstore.errors import InvalidInputError
from heads.base import TapTokens
from heads.baselines import fit_mean_depth, fit_mean_map
from heads.nearest import fit_nearest
from heads.ridge import fit_ridge
from heads.tasks import build_task
from heads.token_targets import LEAST_SHARE, token_reading

GRID, DIM, SIDE = (4, 5), 6, 40
DEPTH = build_task("depth")
CLASSES = build_task("segmentation", {"classes": 3})
LABELS = build_task("classification", {"names": "a|b|c"})
WEIGHT = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.1, 0.0])


def make_batches(n, *, seed, noise=0.0, batch=8):
    """Tokens whose depth is linear in them, in targets of 10 x 8 pixels a token."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        patch = torch.randn(batch, math.prod(GRID), DIM, generator=generator)
        depth_bt = patch @ WEIGHT + 4
        depth_bt = depth_bt + noise * torch.randn(depth_bt.shape, generator=generator)
        depth = depth_bt.view(batch, *GRID).repeat_interleave(10, 1).repeat_interleave(8, 2)
        valid = torch.rand(depth.shape, generator=generator) < 0.7
        depth = torch.where(valid, depth, torch.nan)
        yield TapTokens(patch=patch, grid=GRID), {"depth": depth, "valid": valid}


def ridge_of(train, validation, *, task=DEPTH, **options):
    return fit_ridge(task, train, validation, output_hw=(SIDE, SIDE), **options)


def nearest_of(train, validation, *, task=DEPTH, **options):
    return fit_nearest(task, train, validation, output_hw=(SIDE, SIDE), **options)


def centre_error(baseline, batches):
    """Root mean square error at the centre of each token, where enlarging changes least."""
    errors = []
    for tokens, _ in batches:
        predicted = baseline.predict(tokens)
        assert predicted.shape == (len(tokens.patch), 1, SIDE, SIDE)
        centres = predicted[:, 0, 5::10, 4::8].flatten(1)
        errors.append((centres - (tokens.patch @ WEIGHT + 4)).square().mean())
    return torch.stack(errors).mean().sqrt().item()


def test_the_mean_map_averages_each_pixel_over_its_valid_depths():
    depth = torch.tensor([[[1.0, 5.0, 0.0]], [[3.0, 9.0, torch.nan]]])
    valid = torch.tensor([[[True, True, False]], [[True, False, False]]])
    tokens = TapTokens(patch=torch.zeros(2, 1, 4), grid=(1, 1))
    one = TapTokens(patch=torch.zeros(1, 1, 4), grid=(1, 1))
    batches = [(one, {"depth": depth[[i]], "valid": valid[[i]]}) for i in range(2)]
    predicted = fit_mean_map(batches).predict(tokens)
    assert predicted.shape == (2, 1, 1, 3)
    torch.testing.assert_close(predicted[1, 0, 0], torch.tensor([2.0, 5.0, 3.0]))  # 3: mean of all


def test_the_mean_depth_is_one_number_over_all_valid_pixels():
    depth = torch.tensor([[[1.0, 5.0, 0.0]], [[3.0, 9.0, torch.nan]]])
    valid = torch.tensor([[[True, True, False]], [[True, False, False]]])
    tokens = TapTokens(patch=torch.zeros(2, 1, 4), grid=(1, 1))
    predicted = fit_mean_depth([(tokens, {"depth": depth, "valid": valid})]).predict(tokens)
    torch.testing.assert_close(predicted, torch.full((2, 1, 1, 3), 3.0))


def test_ridge_finds_a_linear_depth():
    ridge = ridge_of(make_batches(6, seed=0), make_batches(2, seed=1))
    torch.testing.assert_close(ridge.weight_dn[:, 0], WEIGHT, atol=1e-3, rtol=0)
    assert ridge.bias_n.item() == pytest.approx(4, abs=1e-3)
    assert ridge.strength == 1e-5
    assert centre_error(ridge, make_batches(1, seed=2)) < 0.15


def test_ridge_equals_the_closed_form_over_all_tokens_at_once():
    data = list(make_batches(3, seed=0, noise=0.5))
    for _, targets in data:
        targets["valid"][:] = True
        targets["depth"].nan_to_num_(4.0)
    strength = 0.3
    ridge = ridge_of(data, data[:1], lambdas=(strength,))
    x = torch.cat([tokens.patch.flatten(0, 1) for tokens, _ in data]).double().numpy()
    y = np.concatenate(
        [t["depth"].view(8, 4, 10, 5, 8).double().mean((2, 4)).flatten().numpy() for _, t in data]
    )
    xc, yc = x - x.mean(0), y - y.mean()
    covariance = xc.T @ xc / len(x)
    penalty = strength * np.trace(covariance) / DIM
    expected = np.linalg.solve(covariance + penalty * np.eye(DIM), xc.T @ yc / len(x))
    np.testing.assert_allclose(ridge.weight_dn[:, 0].numpy(), expected, rtol=1e-5, atol=1e-7)
    assert ridge.bias_n.item() == pytest.approx(y.mean() - x.mean(0) @ expected, rel=1e-6)


def test_ridge_takes_more_lambda_where_there_is_more_noise():
    few = list(make_batches(1, seed=0, noise=20.0, batch=1))
    noisy = ridge_of(few, make_batches(4, seed=1))
    assert noisy.strength > ridge_of(make_batches(6, seed=0), make_batches(2, seed=1)).strength


def test_nearest_patches_find_themselves_and_take_the_best_k():
    data = list(make_batches(2, seed=0))
    itself = nearest_of(data, data, neighbours=(1, 5))
    assert itself.k == 1
    assert centre_error(itself, data) < 0.15
    other = nearest_of(make_batches(20, seed=0, noise=1.0), make_batches(2, seed=1))
    assert other.k > 5
    spread = WEIGHT.norm().item()  # what the mean depth would miss by
    assert centre_error(other, make_batches(2, seed=2)) < 0.8 * spread


def test_the_length_of_a_token_does_not_change_its_neighbours():
    data = list(make_batches(2, seed=0))
    baseline = nearest_of(data, data, neighbours=(5,))
    tokens = data[0][0]
    longer = TapTokens(patch=tokens.patch * 7, grid=GRID)
    torch.testing.assert_close(baseline.predict(longer), baseline.predict(tokens))


def test_the_bank_is_bounded_seeded_and_drawn_from_all_batches():
    def bank(seed):
        settings = {"neighbours": (5,), "bank_size": 64, "seed": seed}
        return nearest_of(make_batches(4, seed=0), make_batches(1, seed=1), **settings)

    assert bank(3).bank.unit_md.shape == (64, DIM)
    assert torch.equal(bank(3).bank.unit_md, bank(3).bank.unit_md)
    assert not torch.equal(bank(3).bank.unit_md, bank(4).bank.unit_md)
    everything = torch.cat([t.patch.flatten(0, 1) for t, _ in make_batches(4, seed=0)])
    unit = torch.nn.functional.normalize(everything, dim=1)
    source = (bank(3).bank.unit_md @ unit.mT).argmax(dim=1) // (8 * math.prod(GRID))
    assert set(source.tolist()) == {0, 1, 2, 3}


def test_chunks_give_what_one_piece_gives(monkeypatch):
    data = list(make_batches(1, seed=0))
    baseline = nearest_of(data, data, neighbours=(5,))
    at_once = baseline.predict(data[0][0])
    monkeypatch.setattr("heads.nearest._NUMBERS_AT_ONCE", len(baseline.bank.unit_md) * 7)
    torch.testing.assert_close(baseline.predict(data[0][0]), at_once)


@pytest.mark.parametrize("fit", [ridge_of, nearest_of])
def test_padded_tokens_and_their_targets_are_left_out(fit):
    def padded(fill):
        for tokens, targets in make_batches(3, seed=0):
            valid = torch.ones(8, math.prod(GRID), dtype=torch.bool)
            valid[:, -5:] = False
            tokens.patch[:, -5:] = fill
            yield TapTokens(patch=tokens.patch, grid=GRID, valid=valid), targets

    def without_targets():
        for tokens, targets in make_batches(3, seed=0):
            targets["valid"][:, -10:] = False  # the pixels of the last five tokens
            yield tokens, targets

    probe = next(make_batches(1, seed=5))[0]
    zero, nan = (fit(padded(fill), padded(fill)).predict(probe) for fill in (0.0, torch.nan))
    torch.testing.assert_close(zero, nan)
    torch.testing.assert_close(zero, fit(without_targets(), without_targets()).predict(probe))


@pytest.mark.parametrize("fit", [ridge_of, nearest_of])
def test_parts_without_a_valid_depth_are_refused(fit):
    tokens, targets = next(make_batches(1, seed=0))
    nothing = {"depth": targets["depth"], "valid": torch.zeros_like(targets["valid"])}
    with pytest.raises(InvalidInputError, match=r"`train` must be .* at least one known value"):
        fit([(tokens, nothing)], make_batches(1, seed=1))
    with pytest.raises(InvalidInputError, match=r"`validation` must be .*no known depth"):
        fit(make_batches(1, seed=1), [(tokens, nothing)])
    with pytest.raises(InvalidInputError, match="at least one valid depth"):
        fit_mean_map([(tokens, nothing)])
    with pytest.raises(InvalidInputError, match="at least one valid depth"):
        fit_mean_depth([(tokens, nothing)])


def test_more_neighbours_than_the_bank_holds_are_refused_or_all_of_it_taken():
    def fit(**options):
        return nearest_of(make_batches(1, seed=0), make_batches(1, seed=1), bank_size=3, **options)

    with pytest.raises(InvalidInputError, match="the 3 rows of the bank"):
        fit(neighbours=(2, 5))
    assert fit().k == 3


def class_batches(n, *, seed, batch=4, separation=3.0):
    """Tokens around one of three centres; half of a token's pixels are void, some tokens all."""
    generator = torch.Generator().manual_seed(seed)
    centres = separation * torch.eye(DIM)[:3]
    for _ in range(n):
        classes_bt = torch.randint(3, (batch, math.prod(GRID)), generator=generator)
        noise = torch.randn(batch, math.prod(GRID), DIM, generator=generator)
        classes = classes_bt.view(batch, *GRID).repeat_interleave(10, 1).repeat_interleave(8, 2)
        classes = classes.clone()
        classes[:, :, ::2] = -1
        classes[:, :10, :8] = -1
        yield TapTokens(patch=centres[classes_bt] + noise, grid=GRID), {"classes": classes}


@pytest.mark.parametrize("fit", [ridge_of, nearest_of])
def test_classes_of_tokens_are_found(fit):
    fitted = fit(class_batches(8, seed=0), class_batches(2, seed=1), task=CLASSES)
    tokens, targets = next(class_batches(1, seed=2))
    log_p = fitted.predict(tokens)
    assert log_p.shape == (4, 3, SIDE, SIDE)
    found = log_p.argmax(dim=1)[:, 5::10, 5::8]
    truth = targets["classes"][:, 5::10, 5::8]
    known = truth >= 0
    assert not known.all()
    assert (found == truth)[known].float().mean() > 0.9


def test_a_tokens_value_is_the_share_of_each_class_among_its_known_pixels():
    classes = torch.tensor([[[0, 2, 1, 1], [2, -1, -1, -1]]])
    tokens = TapTokens(patch=torch.zeros(1, 2, 4), grid=(1, 2))
    rows = token_reading(CLASSES).rows(tokens, {"classes": classes})
    expected = torch.tensor([[[1 / 3, 0, 2 / 3], [0, 1, 0]]])
    torch.testing.assert_close(rows.values_btn, expected)
    torch.testing.assert_close(rows.weight_bt, torch.tensor([[0.75, 0.5]]))


def test_ridge_on_shares_is_ridge_on_one_hot_pixels():
    generator = torch.Generator().manual_seed(0)
    patch = torch.randn(6, 2, 3, generator=generator)
    classes = torch.randint(-1, 3, (6, 1, 8), generator=generator)
    batch = (TapTokens(patch=patch, grid=(1, 2)), {"classes": classes})
    ridge = ridge_of([batch], [batch], task=CLASSES, lambdas=(0.1,))
    labels = classes.flatten()
    x = patch.repeat_interleave(4, dim=1).flatten(0, 1)[labels >= 0].double().numpy()
    y = np.eye(3)[labels[labels >= 0]]
    xc = x - x.mean(0)
    covariance = xc.T @ xc / len(x)
    penalty = 0.1 * np.trace(covariance) / 3 * np.eye(3)
    expected = np.linalg.solve(covariance + penalty, xc.T @ (y - y.mean(0)) / len(x))
    np.testing.assert_allclose(ridge.weight_dn.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_distances_are_read_where_they_are_known():
    distance = torch.tensor([[[0.5, -1.0, 0.25, 0.75]]], dtype=torch.float16)
    tokens = TapTokens(patch=torch.zeros(1, 2, 4), grid=(1, 2))
    rows = token_reading(build_task("distance")).rows(tokens, {"distance": distance})
    torch.testing.assert_close(rows.values_btn, torch.tensor([[[0.5], [0.5]]]))
    torch.testing.assert_close(rows.weight_bt, torch.tensor([[0.5, 1.0]]))


def label_batches(n, *, seed, n_prefix):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        labels = torch.randint(3, (4,), generator=generator)
        signal = 3 * torch.eye(DIM)[labels][:, None]
        prefix = signal + torch.randn(4, 1, DIM, generator=generator)
        patch = torch.randn(4, math.prod(GRID), DIM, generator=generator)
        tokens = TapTokens(patch=patch, grid=GRID, prefix=prefix)
        if not n_prefix:
            tokens = TapTokens(patch=patch + signal, grid=GRID)
        yield tokens, {"class": labels}


@pytest.mark.parametrize("n_prefix", [0, 1])
@pytest.mark.parametrize("fit", [fit_ridge, fit_nearest])
def test_an_image_is_classified_by_its_class_token_else_by_the_mean(fit, n_prefix):
    train, val, test = (label_batches(n, seed=n, n_prefix=n_prefix) for n in (12, 3, 8))
    fitted = fit(LABELS, train, val, output_hw=(1, 1))
    hits = []
    for tokens, targets in test:
        log_p = fitted.predict(tokens)
        assert log_p.shape == (4, 3, 1, 1)
        hits.append(log_p[:, :, 0, 0].argmax(dim=1) == targets["class"])
    assert torch.cat(hits).float().mean() > 0.85


def test_padded_tokens_are_not_in_the_mean():
    valid = torch.tensor([[True, True, False, False]])
    patch = torch.tensor([[[1.0], [3.0], [torch.nan], [9.0]]])
    tokens = TapTokens(patch=patch, grid=(2, 2), valid=valid)
    assert token_reading(LABELS).features(tokens).tolist() == [[[2.0]]]


def test_neighbours_vote_by_the_exponential_of_their_cosine():
    angles = torch.tensor([0.0, 0.2, 0.4])
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)[:, None]
    train = [(TapTokens(patch=bank, grid=(1, 1)), {"class": torch.tensor([0, 1, 1])})]
    nearest = fit_nearest(LABELS, train, train, output_hw=(1, 1), neighbours=(3,))
    probe = TapTokens(patch=torch.tensor([[[5.0, 0.0]]]), grid=(1, 1))
    votes = (angles.cos() / 0.07).exp()
    expected = torch.tensor([votes[0], votes[1] + votes[2], 0.0]) / votes.sum()
    found = nearest.predict(probe).flatten()
    torch.testing.assert_close(found, expected.clamp(min=LEAST_SHARE).log())


@pytest.mark.parametrize("name", ["boundaries", "detection", "instances"])
def test_other_tasks_are_refused_by_name(name):
    with pytest.raises(InvalidInputError, match=f"classification, depth, distance.*{name}"):
        fit_ridge(build_task(name), [], [], output_hw=(1, 1))
