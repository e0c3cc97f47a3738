"""Parsing and resolving taps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import InvalidInputError
from featstore.taps import Tap, default_taps, parse_tap, resolve_taps, uniform_blocks


@given(
    st.sampled_from(["block", "stage"]),
    st.integers(-99, 99),
    st.sampled_from([None, "cls", "mean"]),
)
def test_a_tap_survives_being_written(unit, index, pool):
    tap = Tap(unit=unit, index=index, pool=pool)
    assert parse_tap(str(tap)) == tap
    assert ":" not in tap.folder


@pytest.mark.parametrize("text", ["", "block", "block:x", "norm:1", "blok:1", "norm.max", "stage:"])
def test_what_is_no_tap_is_refused_with_examples(text):
    with pytest.raises(InvalidInputError, match="block:8"):
        parse_tap(text)


def test_negative_numbers_become_positive_and_repeats_vanish():
    taps = resolve_taps(
        ["norm", "block:-1", "block:11", "block:2"], unit="block", depth=12, n_prefix=1
    )
    assert taps == ("block:2", "block:11", "norm")


@pytest.mark.parametrize(
    ("tap", "unit", "match"),
    [
        ("block:12", "block", "block:0 to block:11"),
        ("stage:1", "block", "12 blocks"),
        ("norm", "stage", "no norm"),
        ("block:1.cls", "block", "no CLS"),
    ],
)
def test_a_tap_the_backbone_lacks_is_refused(tap, unit, match):
    with pytest.raises(InvalidInputError, match=match):
        resolve_taps([tap], unit=unit, depth=12, n_prefix=0)


def test_no_tap_at_all_is_refused():
    with pytest.raises(InvalidInputError, match="at least one"):
        resolve_taps([], unit="block", depth=12, n_prefix=1)


def test_uniform_blocks_are_those_of_vit_split():
    assert uniform_blocks(12) == (2, 5, 8, 11)
    assert uniform_blocks(24, first=6) == (6, 11, 17, 23)
    assert uniform_blocks(3) == (0, 1, 2)


@given(st.integers(1, 60))
def test_uniform_blocks_end_with_the_last_and_rise(depth):
    blocks = uniform_blocks(depth)
    assert blocks[-1] == depth - 1
    assert list(blocks) == sorted(set(blocks))


def test_default_taps():
    assert default_taps(unit="block", depth=12) == (
        "block:2",
        "block:5",
        "block:8",
        "block:11",
        "norm",
    )
    assert default_taps(unit="stage", depth=2) == ("stage:0", "stage:1")
