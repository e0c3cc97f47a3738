"""Choosing blocks by their number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import InvalidInputError
from featstore.layer_choice import ROUNDINGS, last_layers, uniform_layers

# depth, Kp, b, floor, nearest: HEADS.md 2.1 and 2.2.
PUBLISHED = {
    "ADE S and B": (12, 4, 2, [2, 5, 8, 11], [2, 5, 8, 11]),
    "ADE L": (24, 8, 2, [2, 5, 8, 11, 14, 17, 20, 23], [2, 5, 8, 11, 14, 17, 20, 23]),
    "NYU L": (24, 4, 6, [6, 11, 17, 23], [6, 12, 17, 23]),
    "COCO S and B": (12, 5, 2, [2, 4, 6, 8, 11], [2, 4, 6, 9, 11]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_choices_are_met_in_both_roundings(name):
    depth, kp, b, floor, nearest = PUBLISHED[name]
    assert uniform_layers(depth, kp, b) == floor
    assert uniform_layers(depth, kp, b, rounding="nearest") == nearest


def test_the_repeat_of_the_largest_configuration_is_kept():
    assert uniform_layers(40, 14, 27) == [27, *range(27, 40)]


@given(st.integers(1, 60), st.data(), st.sampled_from(ROUNDINGS))
def test_uniform_layers_rise_from_the_first_to_the_last(depth, data, rounding):
    b = data.draw(st.integers(0, depth - 1))
    kp = data.draw(st.integers(2, max(2, depth)).filter(lambda kp: kp <= depth) | st.just(1))
    layers = uniform_layers(depth, kp, b, rounding=rounding)
    assert len(layers) == kp
    assert layers[-1] == depth - 1
    assert kp == 1 or layers[0] == b
    assert layers == sorted(layers)


@given(st.integers(2, 60), st.data())
def test_blocks_repeat_only_where_there_are_too_few(depth, data):
    b = data.draw(st.integers(0, depth - 1))
    kp = data.draw(st.integers(1, depth))
    layers = uniform_layers(depth, kp, b)
    assert (len(set(layers)) < kp) == (kp > depth - b)


def test_last_layers_are_the_last():
    assert last_layers(12, 4) == [8, 9, 10, 11]
    assert last_layers(3, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: uniform_layers(12, 0), "`kp` must be from 1 to 12"),
        (lambda: uniform_layers(12, 13), "`kp` must be from 1 to 12"),
        (lambda: uniform_layers(12, 4, 12), "0 to 11"),
        (lambda: uniform_layers(12, 4, -1), "0 to 11"),
        (lambda: uniform_layers(12, 4, rounding="up"), "floor, nearest"),
        (lambda: last_layers(12, 13), "`kp` must be from 1 to 12"),
    ],
)
def test_blocks_that_are_not_there_are_refused(call, match):
    with pytest.raises(InvalidInputError, match=match):
        call()
