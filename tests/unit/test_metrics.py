from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from featstore.errors import InvalidInputError
from heads.metrics.depth import (
    DEPTH_METRICS,
    DEPTH_SUMS,
    depth_metrics,
    depth_sums,
    summarise_depth,
)


def metrics_of(prediction, truth):
    sums = depth_sums(np.array(prediction), np.array(truth))
    values = depth_metrics(np.array([[sums[name] for name in DEPTH_SUMS]]))[0]
    return dict(zip(DEPTH_METRICS, values, strict=True))


def test_depth_metrics_of_four_pixels_are_those_by_hand():
    found = metrics_of([1.0, 2.0, 3.0, 6.0], [1.0, 1.0, 4.0, 4.0])
    assert found["rmse"] == pytest.approx(np.sqrt((0 + 1 + 1 + 4) / 4))
    assert found["absrel"] == pytest.approx((0 + 1 + 0.25 + 0.5) / 4)
    assert found["log10"] == pytest.approx(np.log10([1, 2, 4 / 3, 1.5]).mean())
    assert found["delta1"] == 0.25  # ratios 1, 2, 1.333, 1.5 against 1.25, 1.5625, 1.953125
    assert found["delta2"] == 0.75
    assert found["delta3"] == 0.75
    logs = np.log([1, 2, 0.75, 1.5])
    assert found["silog"] == pytest.approx(100 * logs.std())


def test_a_scaled_prediction_has_no_silog():
    truth = np.linspace(0.5, 9, 100)
    assert metrics_of(truth * 1.1, truth)["silog"] == pytest.approx(0, abs=1e-5)
    assert metrics_of(truth * 1.1, truth)["absrel"] == pytest.approx(0.1)


@given(npst.arrays(np.float64, (7, 2), elements=st.floats(1e-3, 10)))
def test_deltas_grow_and_every_metric_is_finite(pairs):
    found = metrics_of(pairs[:, 0], pairs[:, 1])
    assert found["delta1"] <= found["delta2"] <= found["delta3"] <= 1
    assert all(np.isfinite(value) for value in found.values())


def make_stats(n, *, seed=0, n_pixels=50):
    rng = np.random.default_rng(seed)
    return [depth_sums(rng.uniform(1, 5, n_pixels), rng.uniform(1, 5, n_pixels)) for _ in range(n)]


def test_pooled_values_are_those_of_all_pixels_together():
    rng = np.random.default_rng(0)
    pixels = [(rng.uniform(1, 5, n), rng.uniform(1, 5, n)) for n in (3, 50, 200)]
    found = {m.name: m.value for m in summarise_depth([depth_sums(*p) for p in pixels], [None] * 3)}
    everything = metrics_of(*(np.concatenate(side) for side in zip(*pixels, strict=True)))
    alone = [metrics_of(*p) for p in pixels]
    for name in DEPTH_METRICS:
        assert found[f"{name}_pooled"] == pytest.approx(everything[name])
        assert found[name] == pytest.approx(np.mean([image[name] for image in alone]))


def test_an_image_without_a_pixel_is_left_out():
    stats = make_stats(4)
    empty = dict.fromkeys(DEPTH_SUMS, 0.0)
    with_empty = summarise_depth([*stats, empty], [None] * 5)
    assert with_empty == summarise_depth(stats, [None] * 4)


def test_no_image_with_a_pixel_is_refused():
    with pytest.raises(InvalidInputError, match="at least one with a valid pixel"):
        summarise_depth([dict.fromkeys(DEPTH_SUMS, 0.0)], [None])
    with pytest.raises(InvalidInputError, match="0 images"):
        summarise_depth([], [])


def test_the_interval_holds_the_value_and_says_how_it_was_made():
    for metric in summarise_depth(make_stats(30), [None] * 30):
        assert metric.low < metric.value < metric.high
        assert metric.note == (
            "95 % percentile bootstrap over 30 groups (30 images), 2000 resamples, seed 0"
        )


def test_one_group_gives_no_interval_and_says_why():
    for metric in summarise_depth(make_stats(30), ["kitchen"] * 30):
        assert (metric.low, metric.high) == (None, None)
        assert metric.note == "no interval: all 30 images are of one group"
