"""Orders of an epoch, their parts, and cursors."""

from __future__ import annotations

import numpy as np
import pytest

from featstore.errors import InvalidInputError
from featstore.order import (
    WINDOW_SHARDS,
    Cursor,
    digest_rows,
    mixing,
    order_rows,
    part_of,
    permutation,
)

CURSOR = Cursor(
    seed=1,
    epoch=2,
    position=3,
    batch_size=4,
    digest="d",
    shuffle="window",
    rank=0,
    world_size=2,
)

GOLDEN_00 = [11, 3, 2, 1, 8, 6, 0, 7, 4, 10, 5, 9]
GOLDEN_73 = [11, 2, 10, 4, 7, 3, 5, 1, 8, 9, 0, 6]
GOLDEN_WINDOW = [21, 42, 7, 32, 40, 6, 37, 46, 43, 35, 39, 8]


def ordered(rows, shuffle, seed=0, epoch=0, shard_rows=4):
    return order_rows(rows, shuffle=shuffle, shard_rows=shard_rows, seed=seed, epoch=epoch)


def test_the_permutation_is_the_same_everywhere():
    assert permutation(12, seed=0, epoch=0).tolist() == GOLDEN_00
    assert permutation(12, seed=7, epoch=3).tolist() == GOLDEN_73
    rows = np.arange(48)
    assert ordered(rows, "window", 5, 1)[:12].tolist() == GOLDEN_WINDOW


@pytest.mark.parametrize("shuffle", [False, True, "window"])
def test_an_epoch_holds_each_row_once(shuffle):
    rows = np.sort(permutation(500, seed=9, epoch=9)[:333]) * 3
    assert np.sort(ordered(rows, shuffle)).tolist() == rows.tolist()


@pytest.mark.parametrize("shuffle", [True, "window"])
def test_seed_and_epoch_change_the_order(shuffle):
    rows = np.arange(200)
    first = ordered(rows, shuffle, 0, 0)
    assert (first == ordered(rows, shuffle, 0, 0)).all()
    assert (first != ordered(rows, shuffle, 1, 0)).any()
    assert (first != ordered(rows, shuffle, 0, 1)).any()


def test_a_permutation_puts_every_row_everywhere():
    places = np.array([np.argsort(permutation(5, seed=0, epoch=epoch)) for epoch in range(4000)])
    for row in range(5):
        counts = np.bincount(places[:, row], minlength=5)
        assert abs(counts - 800).max() < 120  # 4.7 standard deviations


def test_a_window_touches_few_shards_at_a_time():
    rows = np.arange(4 * 40)
    found = ordered(rows, "window")
    n_window = 4 * WINDOW_SHARDS
    for start in range(0, len(rows), n_window):
        assert len(np.unique(found[start : start + n_window] // 4)) == WINDOW_SHARDS


def test_mixing_tells_the_orders_apart():
    rows = np.arange(64 * 100)
    measured = {
        shuffle: mixing(ordered(rows, shuffle, shard_rows=64), shard_rows=64, batch_size=64)
        for shuffle in (False, True, "window")
    }
    assert measured[False] == pytest.approx(1 / 47.5, rel=0.05)
    assert measured[True] == pytest.approx(1, abs=0.02)
    assert 0.1 < measured["window"] < 0.3


@pytest.mark.parametrize("shuffle", [False, True, "window"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_parts_are_disjoint_and_complete(shuffle, world_size):
    rows = ordered(np.arange(101), shuffle)
    parts = [
        part_of(rows, rank=rank, world_size=world_size, shuffle=shuffle)
        for rank in range(world_size)
    ]
    assert np.sort(np.concatenate(parts)).tolist() == list(range(101))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_unknown_shuffle_or_rank_is_refused():
    with pytest.raises(InvalidInputError, match="shuffle"):
        ordered(np.arange(3), "global")
    with pytest.raises(InvalidInputError, match="rank"):
        part_of(np.arange(3), rank=2, world_size=2, shuffle=True)


def test_a_cursor_survives_json():
    assert Cursor.from_json(CURSOR.to_json()) == CURSOR


NO_POSITION = CURSOR.to_json().replace('"position": 3', '"position": "3"')


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"seed": 1}', "null", NO_POSITION])
def test_text_that_is_no_cursor_is_refused(text):
    with pytest.raises(InvalidInputError, match="cursor"):
        Cursor.from_json(text)


def test_the_digest_depends_on_rows_their_order_and_the_feature_set():
    digests = {
        digest_rows("a", np.array([1, 2])),
        digest_rows("a", np.array([2, 1])),
        digest_rows("b", np.array([1, 2])),
        digest_rows("a", np.array([1])),
    }
    assert len(digests) == 4
