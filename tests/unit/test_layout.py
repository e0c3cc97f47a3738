"""Rows, shards and the choice of a shard's size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import InvalidInputError
from featstore.layout import Layout, choose_shard_rows

rows = st.integers(0, 10**12)
shard_rows = st.integers(1, 4096)


@given(rows, shard_rows)
def test_a_row_lies_in_its_shard_at_its_slot(row, n):
    layout = Layout(shard_rows=n)
    shard = layout.shard_of(row)
    assert row in layout.rows_of(shard)
    assert layout.rows_of(shard)[layout.slot_of(row)] == row


@given(rows, shard_rows)
def test_the_next_free_row_starts_a_shard_that_nothing_used(n_rows, n):
    layout = Layout(shard_rows=n)
    first = layout.next_free_row(n_rows)
    assert first >= n_rows
    assert layout.slot_of(first) == 0
    assert first - n_rows < n


@given(st.lists(st.integers(0, 10_000), max_size=50), shard_rows)
def test_splitting_by_shard_loses_no_row_and_keeps_their_order(numbers, n):
    parts = Layout(shard_rows=n).split_by_shard(numbers)
    assert list(parts) == sorted(parts)
    for shard, part in parts.items():
        expected = [row for row in numbers if row // n == shard]
        np.testing.assert_array_equal(part, expected)
    assert sum(len(part) for part in parts.values()) == len(numbers)


@given(st.integers(1, 10**10), st.floats(1, 1e15))
def test_a_shard_keeps_its_three_limits(n_bytes, flops):
    n = choose_shard_rows(bytes_per_row=n_bytes, flops_per_row=flops, device="cpu")
    assert 1 <= n <= 256
    assert n & (n - 1) == 0
    if n > 1:
        assert n * n_bytes <= 128 * 2**20
        assert n * flops <= 60 * 5e10


def test_known_sizes():
    vit_b = {"bytes_per_row": 257 * 768 * 2, "flops_per_row": 46e9}
    assert choose_shard_rows(**vit_b, device="cpu") == 64
    assert choose_shard_rows(**vit_b, device="cuda:1") == 256


def test_a_shard_without_rows_is_refused():
    with pytest.raises(InvalidInputError, match="shard_rows"):
        Layout(shard_rows=0)
