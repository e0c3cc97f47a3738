"""Statistics of the identity protocol, against numbers that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from featstore.errors import InvalidInputError, NotFoundError
from heads.protocol.distances import identity_distances
from heads.protocol.pareto import Point, frontier
from heads.protocol.statistics import Errors, Estimate, Resamples, share_of

N_SEEDS, N_INSTANCES = 10, 60


def errors(sums, counts=None):
    sums = np.asarray(sums, dtype=np.float64)
    counts = np.ones(sums.shape[1]) if counts is None else np.asarray(counts, dtype=np.float64)
    return Errors(sums_si=sums, counts_i=counts)


def drawn(rng, *, gain=0.0, seed_spread=0.0, group_spread=0.0, n_groups=30):
    """Squared errors about 1 of a base and of what takes `gain` off its RMSE, on average."""
    groups = [f"image {i % n_groups}" for i in range(N_INSTANCES)]
    base = rng.uniform(0.5, 1.5, N_INSTANCES)
    of_seed = rng.normal(0, seed_spread, (N_SEEDS, 1))
    of_group = rng.normal(0, group_spread, n_groups)[[i % n_groups for i in range(N_INSTANCES)]]
    own = (np.sqrt(base) - gain + of_seed + of_group) ** 2
    return errors(base[None]), errors(own), groups


def test_rmse_is_the_mean_over_seeds_of_the_root_over_all_keypoints():
    found = errors([[1.0, 8.0], [4.0, 0.0]], counts=[1, 3])
    assert found.rmse() == pytest.approx((math.sqrt(9 / 4) + 1.0) / 2)
    assert found.mean() == pytest.approx((9 / 4 + 1) / 2)


def test_a_comparison_gives_reduction_share_and_ratio_of_the_rmse():
    draws = Resamples(["a", "b"], n_seeds=2)
    found = draws.compare(errors([[4.0, 4.0]]), errors([[1.0, 1.0], [1.0, 1.0]]))
    assert (found.base_rmse, found.rmse) == (2.0, 1.0)
    values = (found.reduction, found.mean_reduction, found.relative, found.ratio)
    assert [each.value for each in values] == [1.0, 1.0, 0.5, 0.5]
    # Nothing varies, so that every draw says the same.
    assert (found.reduction.low, found.reduction.high) == (1.0, 1.0)
    assert found.is_reduction
    assert found.is_tie


@pytest.mark.parametrize(
    ("own", "is_tie", "is_reduction"), [(1.151, 0, 0), (1.149, 1, 0), (0.84, 1, 1)]
)
def test_ties_end_at_15_percent_more_and_reductions_begin_at_15_percent_less(
    own, is_tie, is_reduction
):
    draws = Resamples(["a", "b"], n_seeds=1)
    found = draws.compare(errors([[1.0, 1.0]]), errors([[own**2, own**2]]))
    assert (found.is_tie, found.is_reduction) == (is_tie, is_reduction)


def test_the_mean_reduction_weighs_instances_and_not_keypoints():
    draws = Resamples(["a", "b"], n_seeds=1)
    base, own = errors([[1.0, 40.0]], counts=[1, 10]), errors([[0.0, 40.0]], counts=[1, 10])
    assert draws.compare(base, own).mean_reduction.value == pytest.approx(0.5)


def test_an_interval_has_the_width_that_the_variance_of_seeds_and_images_gives():
    rng = np.random.default_rng(0)
    base, own, groups = drawn(rng, gain=0.1, seed_spread=0.05, group_spread=0.2)
    found = Resamples(groups, n_seeds=N_SEEDS).compare(base, own).mean_reduction
    gains = np.sqrt(base.sums_si) - np.sqrt(own.sums_si)
    of_seeds = gains.mean(axis=1).std() / math.sqrt(N_SEEDS)
    of_groups = gains.mean(axis=0).reshape(2, 30).mean(axis=0).std() / math.sqrt(30)
    width = 2 * 1.96 * math.hypot(of_seeds, of_groups)
    assert found.high - found.low == pytest.approx(width, rel=0.08)


def test_averaging_the_seeds_first_would_hide_their_variance():
    rng = np.random.default_rng(1)
    base, own, groups = drawn(rng, seed_spread=0.2)
    both = Resamples(groups, n_seeds=N_SEEDS).compare(base, own).mean_reduction
    averaged = errors(np.sqrt(own.sums_si).mean(axis=0, keepdims=True) ** 2)
    one = Resamples(groups, n_seeds=1).compare(base, averaged).mean_reduction
    assert both.high - both.low > 3 * (one.high - one.low)


def test_instances_of_one_image_are_not_taken_for_independent():
    rng = np.random.default_rng(2)
    base, own, groups = drawn(rng, group_spread=0.3, n_groups=12)
    clustered = Resamples(groups, n_seeds=N_SEEDS).compare(base, own).mean_reduction
    apart = Resamples([str(i) for i in range(N_INSTANCES)], n_seeds=N_SEEDS)
    naive = apart.compare(base, own).mean_reduction
    assert clustered.high - clustered.low > 1.5 * (naive.high - naive.low)


def test_about_95_of_100_intervals_of_no_gain_contain_zero():
    rng = np.random.default_rng(3)
    n_covered = 0
    for _ in range(100):
        base, own, groups = drawn(rng, seed_spread=0.05, group_spread=0.2)
        draws = Resamples(groups, n_seeds=N_SEEDS, n_resamples=1000)
        n_covered += draws.compare(base, own).mean_reduction.sign == 0
    assert 86 <= n_covered <= 99


def test_a_sign_is_given_where_the_interval_excludes_zero():
    rng = np.random.default_rng(4)
    base, own, groups = drawn(rng, gain=0.3, group_spread=0.1)
    draws = Resamples(groups, n_seeds=N_SEEDS)
    assert draws.compare(base, own).reduction.sign == 1
    worse = draws.compare(own, errors(np.repeat(base.sums_si, N_SEEDS, axis=0)))
    assert worse.reduction.sign == -1
    assert Estimate(value=1.0, low=None, high=None).sign == 0


def test_equal_seeds_give_equal_bounds_and_others_do_not():
    base, own, groups = drawn(np.random.default_rng(5), gain=0.1, group_spread=0.1)
    bounds = [
        Resamples(groups, n_seeds=N_SEEDS, seed=seed).compare(base, own).reduction
        for seed in (0, 0, 1)
    ]
    assert bounds[0] == bounds[1] != bounds[2]


def test_one_image_gives_no_interval():
    draws = Resamples(["a", "a"], n_seeds=2)
    found = draws.compare(errors([[4.0, 4.0]]), errors([[1.0, 1.0], [2.0, 2.0]]))
    assert found.reduction.low is None
    assert found.reduction.value > 0


def test_a_difference_of_shares_has_an_interval_too():
    draws = Resamples(["a", "b", "c"], n_seeds=2)
    base, own = errors([[0, 0, 0]], counts=[2, 2, 2]), errors([[1, 2, 1]] * 2, counts=[2, 2, 2])
    found = draws.difference(base, own)
    assert found.value == pytest.approx(4 / 6)
    assert (found.low, found.high) == (0.5, 1.0)  # image b never, or always


def test_recovery_is_the_part_of_the_best_gain():
    draws = Resamples(["a", "b"], n_seeds=1)
    base, own, best = errors([[9.0, 9.0]]), errors([[4.0, 4.0]]), errors([[1.0, 1.0]])
    assert draws.recovery(base, own, best) == Estimate(value=0.5, low=0.5, high=0.5)
    assert math.isnan(draws.recovery(base, own, base).value)


def test_recovery_has_no_bounds_where_the_best_may_be_no_better():
    rng = np.random.default_rng(6)
    base, best, groups = drawn(rng, gain=0.001, group_spread=0.2)
    _, own, _ = drawn(rng)
    found = Resamples(groups, n_seeds=N_SEEDS).recovery(base, own, best)
    assert (found.low, found.high) == (None, None)


def test_a_share_of_nothing_is_no_number():
    assert share_of(1.0, 4.0) == 0.25
    assert math.isnan(share_of(1.0, 0.0))


@pytest.mark.parametrize(
    ("sums", "counts"), [([[1.0, math.nan]], [1, 1]), ([[1.0, 1.0]], [1, 0]), ([[1.0]], [1, 1])]
)
def test_errors_without_a_number_are_refused(sums, counts):
    with pytest.raises(InvalidInputError):
        errors(sums, counts)


def test_errors_of_other_instances_are_not_compared():
    draws = Resamples(["a", "b"], n_seeds=1)
    with pytest.raises(InvalidInputError, match="same instances"):
        draws.compare(errors([[1.0, 1.0]], [1, 2]), errors([[1.0, 1.0]], [1, 1]))
    with pytest.raises(InvalidInputError, match="of 1 seeds and 2 instances"):
        draws.compare(errors([[1.0, 1.0]]), errors([[1.0, 1.0], [1.0, 1.0]]))
    with pytest.raises(InvalidInputError, match="at least one of each"):
        Resamples([], n_seeds=1)
    with pytest.raises(InvalidInputError, match=r"at least 1,000"):
        Resamples(["a"], n_seeds=1, n_resamples=10)


def test_the_nearest_identity_is_the_one_of_the_largest_cosine():
    means = {"fox": np.array([1.0, 0.0]), "cow": np.array([0.0, 0.3]), "dog": np.array([0.3, 0.4])}
    (found,) = identity_distances(means, ["fox"], ["cow", "dog"])
    assert (found.nearest, found.cosine) == ("dog", pytest.approx(0.6))
    assert found.distance == pytest.approx(0.4)


def test_an_identity_without_features_is_named_with_the_nearest():
    with pytest.raises(NotFoundError, match="Did you mean 'fox'"):
        identity_distances({"fox": np.ones(2), "cow": np.ones(2)}, ["foxx"], ["cow"])


def test_the_frontier_holds_what_nothing_beats():
    points = [
        Point(name="mean", parameters=0, rmse=0.3),
        Point(name="token", parameters=768, rmse=0.2),
        Point(name="wasteful", parameters=900, rmse=0.2),
        Point(name="bad", parameters=768, rmse=0.25),
        Point(name="decoder", parameters=7_000_000, rmse=0.1),
        Point(name="broken", parameters=1, rmse=math.nan),
    ]
    assert [point.name for point in frontier(points)] == ["mean", "token", "decoder"]
    twice = [points[1], Point(name="other", parameters=768, rmse=0.2)]
    assert len(frontier(twice)) == 2
