from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from featstore.errors import InvalidInputError
from heads.base import TapTokens
from heads.baselines import fit_mean_depth, fit_mean_map, fit_nearest_patches, fit_ridge

GRID, DIM, SIDE = (4, 5), 6, 40
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
    ridge = fit_ridge(make_batches(6, seed=0), make_batches(2, seed=1))
    torch.testing.assert_close(ridge.weight_d, WEIGHT, atol=1e-3, rtol=0)
    assert ridge.bias == pytest.approx(4, abs=1e-3)
    assert ridge.strength == 1e-5
    assert centre_error(ridge, make_batches(1, seed=2)) < 0.15


def test_ridge_equals_the_closed_form_over_all_tokens_at_once():
    data = list(make_batches(3, seed=0, noise=0.5))
    for _, targets in data:
        targets["valid"][:] = True
        targets["depth"].nan_to_num_(4.0)
    strength = 0.3
    ridge = fit_ridge(data, data[:1], lambdas=(strength,))
    x = torch.cat([tokens.patch.flatten(0, 1) for tokens, _ in data]).double().numpy()
    y = np.concatenate(
        [t["depth"].view(8, 4, 10, 5, 8).double().mean((2, 4)).flatten().numpy() for _, t in data]
    )
    xc, yc = x - x.mean(0), y - y.mean()
    covariance = xc.T @ xc / len(x)
    penalty = strength * np.trace(covariance) / DIM
    expected = np.linalg.solve(covariance + penalty * np.eye(DIM), xc.T @ yc / len(x))
    np.testing.assert_allclose(ridge.weight_d.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert ridge.bias == pytest.approx(y.mean() - x.mean(0) @ expected, rel=1e-6)


def test_ridge_takes_more_lambda_where_there_is_more_noise():
    few = list(make_batches(1, seed=0, noise=20.0, batch=1))
    noisy = fit_ridge(few, make_batches(4, seed=1))
    assert noisy.strength > fit_ridge(make_batches(6, seed=0), make_batches(2, seed=1)).strength


def test_nearest_patches_find_themselves_and_take_the_best_k():
    data = list(make_batches(2, seed=0))
    itself = fit_nearest_patches(data, data, neighbours=(1, 5))
    assert itself.k == 1
    assert centre_error(itself, data) < 0.15
    other = fit_nearest_patches(make_batches(20, seed=0, noise=1.0), make_batches(2, seed=1))
    assert other.k > 5
    spread = WEIGHT.norm().item()  # what the mean depth would miss by
    assert centre_error(other, make_batches(2, seed=2)) < 0.8 * spread


def test_the_length_of_a_token_does_not_change_its_neighbours():
    data = list(make_batches(2, seed=0))
    baseline = fit_nearest_patches(data, data, neighbours=(5,))
    tokens = data[0][0]
    longer = TapTokens(patch=tokens.patch * 7, grid=GRID)
    torch.testing.assert_close(baseline.predict(longer), baseline.predict(tokens))


def test_the_bank_is_bounded_seeded_and_drawn_from_all_batches():
    def bank(seed):
        settings = {"neighbours": (5,), "bank_size": 64, "seed": seed}
        return fit_nearest_patches(make_batches(4, seed=0), make_batches(1, seed=1), **settings)

    assert bank(3).bank_md.shape == (64, DIM)
    assert torch.equal(bank(3).bank_md, bank(3).bank_md)
    assert not torch.equal(bank(3).bank_md, bank(4).bank_md)
    everything = torch.cat([t.patch.flatten(0, 1) for t, _ in make_batches(4, seed=0)])
    unit = torch.nn.functional.normalize(everything, dim=1)
    source = (bank(3).bank_md @ unit.mT).argmax(dim=1) // (8 * math.prod(GRID))
    assert set(source.tolist()) == {0, 1, 2, 3}


def test_chunks_give_what_one_piece_gives(monkeypatch):
    data = list(make_batches(1, seed=0))
    baseline = fit_nearest_patches(data, data, neighbours=(5,))
    at_once = baseline.predict(data[0][0])
    monkeypatch.setattr("heads.baselines._SCORES_AT_ONCE", len(baseline.bank_md) * 7)
    torch.testing.assert_close(baseline.predict(data[0][0]), at_once)


@pytest.mark.parametrize("fit", [fit_ridge, fit_nearest_patches])
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


@pytest.mark.parametrize("fit", [fit_ridge, fit_nearest_patches])
def test_parts_without_a_valid_depth_are_refused(fit):
    tokens, targets = next(make_batches(1, seed=0))
    nothing = {"depth": targets["depth"], "valid": torch.zeros_like(targets["valid"])}
    with pytest.raises(InvalidInputError, match="at least one valid depth"):
        fit([(tokens, nothing)], make_batches(1, seed=1))
    with pytest.raises(InvalidInputError, match="at least one valid depth"):
        fit_mean_map([(tokens, nothing)])
    with pytest.raises(InvalidInputError, match="at least one valid depth"):
        fit_mean_depth([(tokens, nothing)])


def test_more_neighbours_than_the_bank_holds_are_refused():
    with pytest.raises(InvalidInputError, match="the bank's 3 tokens"):
        fit_nearest_patches(make_batches(1, seed=0), make_batches(1, seed=1), bank_size=3)
