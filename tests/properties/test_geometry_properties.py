import math
from dataclasses import replace

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from featstore.geometry import (
    mirrored,
    place,
    resize_masked,
    sample_nearest,
    to_input,
    to_source,
    to_source_map,
    unflip,
)
from featstore.types import Placement

SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700))
SMALL = st.tuples(st.integers(1, 24), st.integers(1, 24))
RULES = st.sampled_from(["squash", "letterbox", "crop", "pad", "via:64", "crop+via:64:nearest"])
VIEWS = st.sampled_from(["plain", "hflip"])


@st.composite
def placements(draw, sizes=SIZES):
    source_h, source_w = draw(sizes)
    crop = None
    if draw(st.booleans()):
        edges_x = sorted(draw(st.lists(st.floats(-0.2, 1.2), min_size=2, max_size=2)))
        edges_y = sorted(draw(st.lists(st.floats(-0.2, 1.2), min_size=2, max_size=2)))
        crop = (
            edges_x[0] * source_w,
            edges_y[0] * source_h,
            edges_x[1] * source_w,
            edges_y[1] * source_h,
        )
        width = min(crop[2], source_w) - max(crop[0], 0)
        height = min(crop[3], source_h) - max(crop[1], 0)
        assume(width > 0.1 and height > 0.1)
    return place(
        source_hw=(source_h, source_w),
        crop=crop,
        input_hw=draw(sizes),
        resize=draw(RULES),
        view=draw(VIEWS),
    )


@given(placements(), st.lists(st.tuples(st.floats(-50, 800), st.floats(-50, 800)), min_size=1))
def test_mapping_to_the_input_and_back_gives_the_point(placement, points):
    points = np.array(points)
    there_and_back = to_source(placement, to_input(placement, points))
    np.testing.assert_allclose(there_and_back, points, rtol=1e-9, atol=1e-6)


@given(placements())
def test_the_box_lies_in_the_image_and_the_destination_in_the_input(placement):
    x0, y0, x1, y1 = placement.box
    assert 0 <= x0 < x1 <= placement.source_hw[1]
    assert 0 <= y0 < y1 <= placement.source_hw[0]
    x0, y0, x1, y1 = placement.dst
    assert 0 <= x0 < x1 <= placement.input_hw[1]
    assert 0 <= y0 < y1 <= placement.input_hw[0]


@given(placements())
def test_the_corners_of_the_box_fall_on_the_corners_of_the_destination(placement):
    corners = to_input(placement, np.array(placement.box).reshape(2, 2))
    x0, y0, x1, y1 = placement.dst
    expected = [[x1, y0], [x0, y1]] if placement.is_flipped else [[x0, y0], [x1, y1]]
    np.testing.assert_allclose(corners, expected, atol=1e-6)


@given(SIZES, SIZES, VIEWS)
def test_letterbox_keeps_the_aspect_to_within_rounding_and_touches_two_sides(source, target, view):
    placement = place(source_hw=source, crop=None, input_hw=target, resize="letterbox", view=view)
    x0, y0, x1, y1 = placement.dst
    scale = min(target[0] / source[0], target[1] / source[1])
    assert abs((x1 - x0) - max(source[1] * scale, 1)) <= 0.5 + 1e-9
    assert abs((y1 - y0) - max(source[0] * scale, 1)) <= 0.5 + 1e-9
    assert (x1 - x0) == target[1] or (y1 - y0) == target[0]
    assert abs(x0 - (target[1] - x1)) <= 1
    assert abs(y0 - (target[0] - y1)) <= 1


@given(SIZES, SIZES)
def test_crop_keeps_the_aspect_and_the_centre(source, target):
    placement = place(source_hw=source, crop=None, input_hw=target, resize="crop", view="plain")
    x0, y0, x1, y1 = placement.box
    assert math.isclose((x1 - x0) / (y1 - y0), target[1] / target[0], rel_tol=1e-6)
    assert math.isclose(x0 + x1, source[1], rel_tol=1e-9)
    assert math.isclose(y0 + y1, source[0], rel_tol=1e-9)
    assert math.isclose(x1 - x0, source[1]) or math.isclose(y1 - y0, source[0])


@given(SIZES, SIZES)
def test_pad_never_changes_the_scale_of_an_image_that_fits(source, target):
    placement = place(source_hw=source, crop=None, input_hw=target, resize="pad", view="plain")
    x0, y0, x1, y1 = placement.dst
    if source[0] <= target[0] and source[1] <= target[1]:
        assert (y1 - y0, x1 - x0) == source
    else:
        assert (x1 - x0) == target[1] or (y1 - y0) == target[0]


@given(placements(SMALL), SMALL, st.integers(0, 99))
def test_a_flip_shows_exactly_the_mirror_image(placement, output_hw, seed):
    values = np.random.default_rng(seed).integers(0, 100, placement.source_hw)
    valid = values > 20
    other = mirrored(placement)
    assert mirrored(other) == placement
    if placement.dst[0] + placement.dst[2] == placement.input_hw[1]:
        assert other == replace(placement, is_flipped=not placement.is_flipped)
    for show in (
        lambda where: sample_nearest(values, where, output_hw),
        lambda where: resize_masked(values, valid, where, output_hw),
    ):
        for one, flipped in zip(show(placement), show(other), strict=True):
            np.testing.assert_array_equal(one, flipped[:, ::-1])


@given(placements(SMALL), SMALL, st.integers(0, 99))
def test_an_unflipped_prediction_lies_where_the_plain_one_does(placement, output_hw, seed):
    flipped, plain = (replace(placement, is_flipped=flag) for flag in (True, False))
    output = np.random.default_rng(seed).random((2, *output_hw))
    found, covered = to_source_map(unflip(output, flipped), plain)
    expected, also_covered = to_source_map(output, flipped)
    np.testing.assert_array_equal(covered, also_covered)
    if mirrored(flipped).dst == plain.dst:
        np.testing.assert_array_equal(unflip(output, flipped), output[..., ::-1])
        np.testing.assert_array_equal(found, expected)


@given(st.integers(8, 40), st.integers(0, 1))
def test_a_prediction_is_unflipped_over_odd_padding_too(width, side):
    """A ramp shows a shift of one pixel, which mirroring the frame alone would leave."""
    n_shown = width - 3
    start = 1 + side
    flipped = Placement(
        source_hw=(4, n_shown),
        input_hw=(4, width),
        box=(0.0, 0.0, float(n_shown), 4.0),
        dst=(start, 0, start + n_shown, 4),
        is_flipped=True,
    )
    ramp = np.arange(n_shown, dtype=np.float64)
    output = np.zeros((1, 4, width))
    output[..., start : start + n_shown] = ramp[::-1]  # what the flipped input would give
    found, _ = to_source_map(unflip(output, flipped), replace(flipped, is_flipped=False))
    np.testing.assert_allclose(found[0], np.broadcast_to(ramp, (4, n_shown)), atol=1e-9)


@given(placements(SMALL), SMALL, st.integers(0, 99), st.sampled_from([np.nan, np.inf, 1e6]))
def test_an_invalid_pixel_never_bleeds(placement, output_hw, seed, junk):
    generator = np.random.default_rng(seed)
    valid = generator.random(placement.source_hw) < 0.6
    values = np.where(valid, generator.uniform(2, 3, placement.source_hw), junk)
    means, has_mean = resize_masked(values, valid, placement, output_hw)
    assert np.isfinite(means).all()
    assert ((means[has_mean] > 2 - 1e-5) & (means[has_mean] < 3 + 1e-5)).all()
    assert (means[~has_mean] == 0).all()


@given(placements(SMALL), SMALL)
def test_the_mean_agrees_with_a_direct_integral(placement, output_hw):
    values = np.random.default_rng(1).uniform(1, 9, placement.source_hw)
    means, has_mean = resize_masked(values, np.ones(values.shape, bool), placement, output_hw)
    row, column = output_hw[0] // 2, output_hw[1] // 2
    cell_h = placement.input_hw[0] / output_hw[0]
    cell_w = placement.input_hw[1] / output_hw[1]
    low = [max(column * cell_w, placement.dst[0]), max(row * cell_h, placement.dst[1])]
    high = [
        min((column + 1) * cell_w, placement.dst[2]),
        min((row + 1) * cell_h, placement.dst[3]),
    ]
    if low[0] >= high[0] or low[1] >= high[1]:
        assert not has_mean[row, column]
        return
    corners = to_source(placement, np.array([low, high]))
    (x0, x1), (y0, y1) = np.sort(corners[:, 0]), np.sort(corners[:, 1])
    size_h, size_w = placement.source_hw
    overlap_x = np.clip(np.minimum(np.arange(size_w) + 1, x1) - np.maximum(range(size_w), x0), 0, 9)
    overlap_y = np.clip(np.minimum(np.arange(size_h) + 1, y1) - np.maximum(range(size_h), y0), 0, 9)
    weights = np.outer(overlap_y, overlap_x)
    if has_mean[row, column]:
        expected = (weights * values).sum() / weights.sum()
        np.testing.assert_allclose(means[row, column], expected, rtol=1e-5)


@given(placements(SMALL), SMALL, st.sampled_from(["bilinear", "nearest"]))
def test_a_constant_prediction_comes_back_constant_and_padding_stays_out(
    placement, output_hw, mode
):
    output = np.full((1, *output_hw), 7.0, dtype=np.float32)
    centres_y = (np.arange(output_hw[0]) + 0.5) * placement.input_hw[0] / output_hw[0]
    centres_x = (np.arange(output_hw[1]) + 0.5) * placement.input_hw[1] / output_hw[1]
    on_y = (centres_y >= placement.dst[1]) & (centres_y < placement.dst[3])
    on_x = (centres_x >= placement.dst[0]) & (centres_x < placement.dst[2])
    assume(on_y.any() and on_x.any())
    output[0][~(on_y[:, None] & on_x[None, :])] = np.nan
    values, covered = to_source_map(output, placement, mode=mode)
    assert values.shape == (1, *placement.source_hw)
    np.testing.assert_allclose(values[0][covered], 7.0, rtol=1e-6)
    assert np.isnan(values[0][~covered]).all()


@given(placements(SMALL))
def test_nearest_samples_agree_with_the_mapping_of_points(placement):
    values = np.arange(np.prod(placement.source_hw)).reshape(placement.source_hw)
    shown, covered = sample_nearest(values, placement, placement.input_hw)
    x0, y0, x1, y1 = placement.dst
    assert covered.sum() == (x1 - x0) * (y1 - y0)
    assert covered[y0:y1, x0:x1].all()
    point = to_source(placement, np.array([[x0 + 0.5, y0 + 0.5]]))[0]
    column = min(int(point[0]), placement.source_hw[1] - 1)
    row = min(int(point[1]), placement.source_hw[0] - 1)
    assert shown[y0, x0] == values[row, column]
