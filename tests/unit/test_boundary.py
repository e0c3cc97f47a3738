"""The boundary and the taps that a CKA matrix suggests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import InvalidInputError
from heads.boundary import propose


def blocks(numbers):
    return [f"block:{number}" for number in numbers]


def block_matrix(*sizes, within=0.9, between=0.3, noise=0.0):
    """Alike within each part, unlike between them."""
    part = np.repeat(np.arange(len(sizes)), sizes)
    matrix = np.where(part[:, None] == part[None, :], within, between)
    matrix += noise * np.random.default_rng(0).uniform(-1, 1, matrix.shape)
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1.0)
    return matrix


@given(st.integers(1, 8), st.integers(2, 8), st.floats(0, 0.2))
def test_two_blocks_are_found_whatever_their_sizes(first, second, noise):
    taps = blocks(range(first + second))
    found = propose(taps, block_matrix(first, second, noise=noise), depth=first + second)
    assert found.extractor == tuple(taps[:first])
    assert found.adapter == tuple(taps[first:])
    assert found.kt == second
    assert found.within == pytest.approx(0.9, abs=noise + 1e-9)
    assert found.between == pytest.approx(0.3, abs=noise + 1e-9)


def test_taps_stand_for_every_group_of_alike_layers():
    taps = blocks(range(12))
    found = propose(taps, block_matrix(3, 3, 3, 3), kp=4)
    groups = [int(tap.split(":")[1]) // 3 for tap in found.taps]
    assert groups == [0, 1, 2, 3]
    assert found.extractor[-1] in found.taps
    assert found.taps[-1] == "block:11"


def test_the_cut_falls_where_alikeness_falls_off_fastest():
    places = np.array([0, 1, 2, 3, 4, 5, 9, 10, 11]) / 6
    matrix = np.exp(-np.abs(places[:, None] - places[None, :]))
    assert propose(blocks(range(9)), matrix).adapter == ("block:6", "block:7", "block:8")


def test_kt_counts_the_blocks_behind_the_extractor_stored_or_not():
    found = propose(blocks([2, 5, 8, 11]), block_matrix(3, 1), depth=12)
    assert found.adapter == ("block:11",)
    assert found.kt == 3  # block 8 feeds blocks 9, 10 and 11


def test_stages_have_no_kt():
    assert propose([f"stage:{n}" for n in range(4)], block_matrix(2, 2), depth=4).kt is None


@pytest.mark.parametrize(("kp", "count"), [(2, 2), (3, 3), (9, 5)])
def test_as_many_taps_are_proposed_as_asked_for_and_there_are(kp, count):
    found = propose(blocks(range(5)), block_matrix(3, 2), kp=kp)
    assert len(set(found.taps)) == count
    assert set(found.taps) >= {"block:2", "block:4"}


def test_too_few_layers_are_refused():
    with pytest.raises(InvalidInputError, match="at least 3"):
        propose(blocks([0, 1]), block_matrix(1, 1))
    with pytest.raises(InvalidInputError, match="at least 2: one tap of each part"):
        propose(blocks(range(3)), block_matrix(1, 2), kp=1)
