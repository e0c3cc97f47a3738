from __future__ import annotations

import numpy as np
import pytest

from featstore.errors import InvalidInputError
from heads.bootstrap import bootstrap_groups, bootstrap_weights


def mean_of(totals):
    return totals[:, :1] / totals[:, 1:2]


def mean_interval(values, groups=None, **settings):
    sums = np.stack([values, np.ones(len(values))], axis=1)
    found = bootstrap_groups(sums, groups or [None] * len(values), mean_of, **settings)
    return found.value[0], found.low[0], found.high[0]


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, 400)
    value, low, high = mean_interval(values, n_resamples=8000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        _, low, high = mean_interval(rng.normal(0, 1, 60), n_resamples=1000, seed=trial)
        hits += low <= 0 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_ten_copies_in_one_group_are_worth_one_image():
    values = np.random.default_rng(0).normal(0, 1, 20)
    copies, groups = np.repeat(values, 10), [f"video {i}" for i in range(20) for _ in range(10)]
    assert mean_interval(copies, groups) == pytest.approx(mean_interval(values))
    _, low, high = mean_interval(copies)
    _, group_low, group_high = mean_interval(copies, groups)
    assert high - low < 0.5 * (group_high - group_low)


def test_a_group_of_many_images_weighs_as_many():
    value, _, _ = mean_interval(np.array([0.0, 0.0, 0.0, 4.0]), ["a", "a", "a", "b"])
    assert value == 1.0


def test_the_same_seed_gives_the_same_bounds_and_another_seed_others():
    values = np.random.default_rng(0).normal(0, 1, 30)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    assert mean_interval(values, seed=5) != mean_interval(values, seed=6)


def test_drawing_in_parts_gives_the_bounds_of_drawing_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(0, 1, 30)
    at_once = mean_interval(values)
    monkeypatch.setattr("heads.bootstrap._NUMBERS_AT_ONCE", 30 * 7)
    assert mean_interval(values) == pytest.approx(at_once)


def test_a_group_named_like_a_number_is_not_an_image_of_its_own():
    sums = np.array([[1.0, 1.0], [2.0, 1.0]])
    assert "2 groups" in bootstrap_groups(sums, [None, "0"], mean_of).note


def test_too_few_draws_and_no_images_are_refused():
    with pytest.raises(InvalidInputError, match="at least 1,000"):
        mean_interval(np.ones(3), n_resamples=999)
    with pytest.raises(InvalidInputError, match="one group for each of 2 images"):
        bootstrap_groups(np.ones((2, 2)), ["a"], mean_of)
    with pytest.raises(InvalidInputError, match="not 0"):
        bootstrap_groups(np.ones((0, 2)), [], mean_of)


def test_weights_of_images_give_what_sums_over_groups_give():
    rng = np.random.default_rng(0)
    sums = rng.random((12, 2))
    groups = [f"g{i // 3}" for i in range(12)]
    by_sums = bootstrap_groups(sums, groups, lambda t: t[:, :1] / t[:, 1:], seed=3)
    by_weights = bootstrap_weights(groups, lambda w: (w @ sums)[:, :1] / (w @ sums)[:, 1:], seed=3)
    np.testing.assert_allclose(by_weights.value, by_sums.value)
    np.testing.assert_allclose(by_weights.low, by_sums.low)
    np.testing.assert_allclose(by_weights.high, by_sums.high)
    assert by_weights.note == by_sums.note


def test_a_draw_that_lost_a_class_does_not_spoil_its_interval():
    sums = np.array([[1.0, 2.0, 0.0]] * 3 + [[0.0, 0.0, 0.0]] * 3)

    def statistic(totals):
        with np.errstate(invalid="ignore"):
            return np.stack([totals[:, 0] / totals[:, 1], totals[:, 2] / totals[:, 2]], axis=1)

    found = bootstrap_groups(sums, [None] * 6, statistic)
    assert found.low[0] == found.high[0] == 0.5
    assert np.isnan(found.low[1])
