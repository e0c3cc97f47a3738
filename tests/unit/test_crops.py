"""Square crops around boxes, and keypoints that come back from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.crops import square_crop
from featstore.geometry import clip_box, place, to_input, to_source
from featstore.store import crop_text, parse_crop
from featstore.views import is_jitter, jittered


def test_the_longer_side_of_the_box_decides():
    assert square_crop((40, 30, 60, 40), scale=1.5, image_hw=(100, 100)) == (35, 20, 65, 50)
    assert square_crop((40, 30, 60, 40), scale=1.5, image_hw=None) == (35, 20, 65, 50)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 30, 20, 40), (0, 22.5, 25, 47.5)),  # moved in from the left
        ((88, 190, 108, 199), (85, 185, 100, 200)),  # and from the corner, after it was cut
        ((5, 0, 95, 30), (-6.25, 0, 106.25, 112.5)),  # longer than the image is wide
    ],
)
def test_a_square_that_hangs_over_is_moved_into_the_image(box, expected):
    assert square_crop(box, scale=1.25, image_hw=(200, 100)) == expected


def test_a_box_beside_the_image_gives_a_crop_beside_it():
    x0, _, _, _ = square_crop((120, 10, 140, 20), scale=1.25, image_hw=(100, 100))
    assert x0 > 100


SIZES = st.integers(1, 6000)
RULES = st.sampled_from(["squash", "letterbox", "crop", "pad"])


@st.composite
def boxed_images(draw):
    """An image and a box that overlaps it by a pixel or more, perhaps hanging over."""
    sides = []
    sizes = (draw(SIZES), draw(SIZES))
    for size in reversed(sizes):
        start = draw(st.floats(-size, size - 0.5))
        stop = draw(st.floats(max(start, 0) + 0.5, 2 * size))
        sides.append((start, stop))
    (x0, x1), (y0, y1) = sides
    return sizes, (x0, y0, x1, y1)


@given(boxed_images(), st.floats(1, 3))
def test_a_crop_holds_what_of_its_box_lies_on_the_image(case, scale):
    image_hw, box = case
    crop = clip_box(square_crop(box, scale=scale, image_hw=image_hw), image_hw)
    part = clip_box(box, image_hw)
    assert crop[0] <= part[0] + 0.01
    assert crop[1] <= part[1] + 0.01
    assert crop[2] >= part[2] - 0.01
    assert crop[3] >= part[3] - 0.01


@given(boxed_images(), st.floats(1, 3))
def test_a_crop_is_square_wherever_the_image_has_room(case, scale):
    image_hw, box = case
    crop = square_crop(box, scale=scale, image_hw=image_hw)
    side = crop[2] - crop[0]
    if side <= min(image_hw):
        x0, y0, x1, y1 = clip_box(crop, image_hw)
        assert x1 - x0 == pytest.approx(y1 - y0, abs=0.03)


@given(
    boxed_images(),
    st.floats(1, 3),
    st.sampled_from([(224, 224), (518, 392), (28, 56)]),
    RULES,
    st.sampled_from(["plain", "hflip", "jitter:0:0", "jitter:5:1:0.4"]),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20),
)
def test_every_keypoint_comes_back_from_the_crop(case, scale, input_hw, resize, view, parts):
    """Through the crop as it is written, and numbers in [0, 1] of the input as float32."""
    image_hw, box = case
    crop = parse_crop(crop_text(square_crop(box, scale=scale, image_hw=image_hw)))
    if is_jitter(view):
        assert crop is not None
        crop = jittered(view, "key", crop, image_hw)
    placement = place(source_hw=image_hw, crop=crop, input_hw=input_hw, resize=resize, view=view)
    points = np.array(parts) * [image_hw[1], image_hw[0]]
    normalised = (to_input(placement, points) / [input_hw[1], input_hw[0]]).astype(np.float32)
    back = to_source(placement, normalised.astype(np.float64) * [input_hw[1], input_hw[0]])
    assert np.abs(back - points).max() < 0.01
