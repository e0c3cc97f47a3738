"""Streams: which rows, in which order, in whose memory, and what is left behind."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import featstore
from featstore import select
from featstore.codecs import decode
from featstore.errors import FormatError, InvalidInputError, NotFoundError
from featstore.order import Cursor
from featstore.stream import StreamOptions
from featstore.types import TapShape
from tests.fakes import SHAPES, FakeReader, FakeSource, fake_extract, fake_plan

N_IMAGES = 40
BAD = 7


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "s.zarr"
    fake_extract(path, [FakeReader(N_IMAGES, bad=[BAD])])
    return featstore.open(path).feature_set()


@pytest.fixture(scope="module")
def truth(features):
    """Everything, by zarr."""
    return {name: zarr_array(features, name)[:] for name in NAMES}


NAMES = ("block:0", "norm", "norm/prefix", "norm.mean")


def zarr_array(features, name):
    import zarr

    tap, _, part = name.partition("/")
    array = part or ("pooled" if tap.endswith(".mean") else "patch")
    return zarr.open_array(features.folder.array_path(tap, array), mode="r")


def stored_rows(features):
    return sorted(set(features.samples()["row"].to_pylist()))


def given(stream):
    return [row for batch in stream for row in batch.rows.tolist()]


def test_every_stored_row_comes_once_with_its_numbers(features, truth):
    found = []
    stream = features.stream(NAMES, batch_size=7, shuffle=True, seed=3)
    for batch in stream:
        assert len(batch) == len(batch.rows) == len(batch["norm"])
        for name in NAMES:
            np.testing.assert_array_equal(batch[name], truth[name][batch.rows])
        found += batch.rows.tolist()
    assert sorted(found) == stored_rows(features)
    assert len(found) == N_IMAGES - 1
    assert len(stream) == 6


def test_where_selects_rows(features):
    expected = set(features.samples("split = 'test'")["row"].to_pylist())
    assert given(features.stream(["norm"], where="split = 'test'")) == sorted(expected)


def test_given_rows_keep_their_order_and_duplicates(features, truth):
    rows = [12, 3, 3, 30, 12]
    (batch,) = features.stream(["norm"], rows=rows)
    assert batch.rows.tolist() == rows
    np.testing.assert_array_equal(batch["norm"], truth["norm"][rows])
    np.testing.assert_array_equal(features.read("norm.mean", rows), truth["norm.mean"][rows])


def test_no_rows_give_no_batches(features):
    assert list(features.stream(["norm"], rows=[])) == []
    assert features.read("norm", []).shape == (0, 16, 8)


def test_a_rejected_row_is_left_out_of_a_selection_and_refused_by_number(features):
    (rejected,) = set(range(N_IMAGES)) - set(stored_rows(features))
    assert rejected not in given(features.stream(["norm"]))
    with pytest.raises(NotFoundError, match=rf"{rejected} \(row {rejected}: rejected"):
        features.read("norm", [rejected])
    with pytest.raises(NotFoundError, match=rf"2 of the rows .*: {rejected}, 9999 "):
        features.stream(["norm"], rows=[0, rejected, 9999])


def test_of_many_ledgers_the_index_is_asked(features, monkeypatch):
    (rejected,) = set(range(N_IMAGES)) - set(stored_rows(features))
    monkeypatch.setattr(select, "_FEW_LEDGERS", -1)
    assert given(features.stream(["norm"], rows=[3, 0])) == [3, 0]
    with pytest.raises(NotFoundError, match=rf"rejected.*: {rejected}, 9999\."):
        features.stream(["norm"], rows=[0, rejected, 9999])


@pytest.mark.parametrize("rows", [[-1], [0.5], [[1]], ["a"], [2**63]])
def test_what_is_no_row_number_is_refused(features, rows):
    with pytest.raises(InvalidInputError, match="rows"):
        features.read("norm", rows)


def test_a_removed_row_is_gone(tmp_path):
    fake_extract(tmp_path / "s.zarr", [FakeReader(10)])
    features = featstore.open(tmp_path / "s.zarr").feature_set()
    assert features.read("norm", [4]).shape == (1, 16, 8)
    path = features.folder.path / "tombstones" / "00000.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"row": pa.array([4], pa.int64())}), path)
    assert 4 not in given(features.stream(["norm"]))
    with pytest.raises(NotFoundError, match="row 4: removed"):
        features.read("norm", [4])
    with pytest.raises(NotFoundError, match="removed"):
        features.stream(["norm"], rows=[4])


def test_a_tap_that_lacks_a_shard_is_told(tmp_path):
    fake_extract(tmp_path / "s.zarr", [FakeReader(20)])
    features = featstore.open(tmp_path / "s.zarr").feature_set()
    features.folder.ledger_path("norm", 1).unlink()
    assert len(given(features.stream(["block:0"]))) == 20
    with pytest.raises(NotFoundError, match=r"not extracted for 8 .*first is 8.*featstore extract"):
        features.stream(["block:0", "norm"])
    with pytest.raises(NotFoundError, match="not committed"):
        features.read("norm", [9])


@pytest.mark.parametrize(
    ("taps", "error"),
    [
        (["nrm"], NotFoundError),
        (["norm.mean/prefix"], NotFoundError),
        ([], InvalidInputError),
        ("norm", InvalidInputError),
        (["norm", "norm"], InvalidInputError),
    ],
)
def test_unknown_taps_are_refused(features, taps, error):
    with pytest.raises(error):
        features.stream(taps)


def test_a_selection_of_nothing_is_an_error(features):
    with pytest.raises(NotFoundError, match="No stored row with split = 'none'"):
        features.stream(["norm"], where="split = 'none'")


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"seed": -1}, {"epoch": -1}, {"dtype": "float64"}, {"shuffle": "all"},
     {"prefetch_bytes": -1}, {"rank": 1}, {"rank": -1, "world_size": 3}, {"start": 9, "cursor": 1},
     {"where": "true", "rows": [1]}, {"start": 99}],
)  # fmt: skip
def test_wrong_options_are_refused(features, options):
    with pytest.raises(InvalidInputError):
        features.stream(["norm"], **options)


@pytest.mark.parametrize("shuffle", [True, "window"])
def test_a_new_epoch_has_a_new_order(features, shuffle):
    first, again, other = (
        given(features.stream(["norm"], shuffle=shuffle, epoch=epoch)) for epoch in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first) == sorted(other)


def test_ranks_share_the_rows(features):
    parts = [
        given(features.stream(["norm"], shuffle=True, rank=rank, world_size=3)) for rank in range(3)
    ]
    assert sorted(row for part in parts for row in part) == stored_rows(features)


def test_drop_last_leaves_whole_batches(features):
    batches = [len(b) for b in features.stream(["norm"], batch_size=8, drop_last=True)]
    assert batches == [8, 8, 8, 8]


@pytest.mark.parametrize("shuffle", [False, True, "window"])
@pytest.mark.parametrize("n_seen", [0, 1, 3, 5])
def test_a_cursor_goes_on_with_exactly_the_next_batch(features, truth, shuffle, n_seen):
    options = {"batch_size": 8, "shuffle": shuffle, "seed": 5, "epoch": 2, "rank": 0}
    stream = features.stream(["norm"], **options)
    cursors = [stream.start] + [batch.cursor for batch in stream]
    expected = [batch.rows.tolist() for batch in stream]
    text = cursors[n_seen].to_json()
    rest = features.stream(["norm"], cursor=text, **options)
    assert len(rest) == 5 - n_seen
    found = []
    for batch in rest:
        found.append(batch.rows.tolist())
        np.testing.assert_array_equal(batch["norm"], truth["norm"][batch.rows])
    assert found == expected[n_seen:]
    started = features.stream(["norm"], start=n_seen, **options)
    assert [batch.rows.tolist() for batch in started] == expected[n_seen:]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"epoch": 1}, {"batch_size": 4}, {"shuffle": "window"}, {"world_size": 2},
     {"where": "split = 'train'"}],
)  # fmt: skip
def test_a_cursor_of_another_stream_is_refused(features, change):
    options = {"batch_size": 8, "shuffle": True}
    cursor = next(iter(features.stream(["norm"], **options))).cursor
    assert cursor.position == 8
    with pytest.raises(InvalidInputError, match="does not fit"):
        features.stream(["norm"], cursor=cursor, **{**options, **change})


def test_a_cursor_past_the_end_is_refused(features):
    start = features.stream(["norm"]).start
    values = {name: getattr(start, name) for name in Cursor.__slots__}
    with pytest.raises(InvalidInputError, match="position"):
        features.stream(["norm"], cursor=Cursor(**{**values, "position": 1000}))


def test_an_explicitly_false_shuffle_survives_the_cursor(features):
    cursor = next(iter(features.stream(["norm"], batch_size=8))).cursor
    assert Cursor.from_json(cursor.to_json()).shuffle is False


def test_buffers_of_the_caller_are_filled(features, truth):
    ring = [{"norm": np.zeros((8, 16, 8), np.float16)} for _ in range(3)]
    n_batches = 0
    for batch in features.stream(["norm"], batch_size=8, out=ring):
        n_batches += 1
        assert any(np.shares_memory(batch["norm"], buffers["norm"]) for buffers in ring)
        np.testing.assert_array_equal(batch["norm"], truth["norm"][batch.rows])
    assert n_batches == 5


def test_one_buffer_is_enough(features, truth):
    out = {"norm": np.zeros((8, 16, 8), np.float16)}
    for batch in features.stream(["norm"], batch_size=8, out=out):
        np.testing.assert_array_equal(batch["norm"], truth["norm"][batch.rows])


@pytest.mark.parametrize(
    "array",
    [None, np.zeros((7, 16, 8), np.float16), np.zeros((8, 16, 8), np.float32),
     np.zeros((8, 8, 16), np.float16).transpose(0, 2, 1)],
)  # fmt: skip
def test_buffers_that_do_not_fit_are_refused(features, array):
    out = {} if array is None else {"norm": array}
    with pytest.raises(InvalidInputError, match="out"):
        features.stream(["norm"], batch_size=8, out=out)


def test_a_batch_stays_as_it_is_until_the_next_is_taken(features, truth):
    stream = features.stream(["norm"], batch_size=4, prefetch_bytes=0)
    for batch in stream:
        time.sleep(0.01)  # the threads could overwrite it now
        np.testing.assert_array_equal(batch["norm"], truth["norm"][batch.rows])


def test_float32_is_converted_in_the_ring(features, truth):
    for batch in features.stream(NAMES, batch_size=16, dtype="float32"):
        for name in NAMES:
            assert batch[name].dtype == np.float32
            np.testing.assert_array_equal(batch[name], truth[name][batch.rows].astype(np.float32))


def test_bfloat16_gives_bits_or_float32(tmp_path):
    fake_extract(tmp_path / "s.zarr", [FakeReader(10)], plan=fake_plan(dtype="bfloat16"))
    features = featstore.open(tmp_path / "s.zarr").feature_set()
    bits = features.read("norm", range(10))
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal(bits, zarr_array(features, "norm")[:10])
    (batch,) = features.stream(["norm"], rows=range(10), dtype="float32")
    np.testing.assert_array_equal(batch["norm"], decode(bits, "bfloat16"))
    assert 0 < abs(batch["norm"]).max() < 100


def test_mixing_is_reported(features):
    whole, near, none = (
        features.stream(["norm"], shuffle=shuffle, batch_size=8).mixing
        for shuffle in (True, "window", False)
    )
    assert none < near <= 1.2
    assert none < whole


def test_damage_comes_where_the_batch_would_and_leaves_nothing_behind(tmp_path):
    fake_extract(tmp_path / "s.zarr", [FakeReader(40)])
    features = featstore.open(tmp_path / "s.zarr").feature_set()
    path = features.folder.shard_file("norm", "patch", 2)
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    path.write_bytes(bytes(data))
    before = threading.active_count()
    iterator = iter(features.stream(["norm"], batch_size=8))
    assert [next(iterator).rows[0], next(iterator).rows[0]] == [0, 8]
    with pytest.raises(FormatError) as found:
        next(iterator)
    for part in (str(path), "row 17", "tap norm", features.key, "featstore verify --repair"):
        assert part in str(found.value)
    with pytest.raises(StopIteration):
        next(iterator)
    assert threading.active_count() == before


def n_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def n_maps(features):
    return Path("/proc/self/maps").read_text().count(str(features.folder.path))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files by /proc")
def test_a_stream_dropped_midway_leaves_nothing(features):
    rows = np.array(stored_rows(features) * 3)
    stream = features.stream(["norm", "norm.mean"], rows=rows, batch_size=4)

    def drop(n_times):
        for number in range(n_times):
            iterator = iter(stream)
            for _ in range(number % 3):
                next(iterator)

    drop(3)
    gc.collect()
    threads, files, maps = threading.active_count(), n_files(), n_maps(features)
    drop(100)
    gc.collect()
    assert threading.active_count() == threads
    assert n_files() == files
    assert n_maps(features) == maps

    tracemalloc.start()
    drop(20)
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    drop(100)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 20_000  # one slot a drop would be 100 kB


def test_a_closed_iterator_is_at_its_end(features):
    before = threading.active_count()
    with iter(features.stream(["norm"], batch_size=4)) as iterator:
        next(iterator)
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(iterator)


def test_an_iterator_caught_in_a_cycle_is_cleaned_up(features):
    before = threading.active_count()
    iterator = iter(features.stream(["norm"], batch_size=4))
    next(iterator)
    holder = [iterator]
    holder.append(holder)
    del iterator, holder
    gc.collect()
    assert threading.active_count() == before


def test_reading_ahead_is_bounded_in_bytes(features):
    stream = features.stream(["norm"], batch_size=2, prefetch_bytes=4 * 2 * 16 * 8 * 2)
    addresses = {batch["norm"].ctypes.data for batch in stream}
    assert 2 <= len(addresses) <= 4


def test_two_epochs_of_one_stream_are_alike(features):
    stream = features.stream(["norm"], shuffle=True)
    assert given(stream) == given(stream)


def test_to_numpy_and_dask_give_the_stored_rows(features, truth):
    rows = stored_rows(features)
    np.testing.assert_array_equal(features.to_numpy("norm"), truth["norm"][rows])
    lazy = features.dask("norm.mean")
    assert lazy.shape == (len(rows), 8)
    assert lazy.dtype == np.float16
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), truth["norm.mean"][rows])
    chosen = features.to_numpy("norm", where="split = 'test'")
    assert len(chosen) == len(set(features.samples("split = 'test'")["row"].to_pylist()))


def test_defaults_are_those_of_the_documentation():
    options = StreamOptions()
    assert (options.batch_size, options.shuffle, options.seed, options.epoch) == (64, False, 0, 0)


def test_a_row_that_one_tap_rejected_is_streamed_from_the_others(tmp_path):
    fake_extract(tmp_path / "plain.zarr", [FakeReader(10)])
    plain = featstore.open(tmp_path / "plain.zarr").feature_set().to_numpy("block:0")
    scale = 65504 / float(np.median(abs(plain).max(axis=(1, 2))))
    fake_extract(tmp_path / "s.zarr", [FakeReader(10)], scale={"norm": scale})
    features = featstore.open(tmp_path / "s.zarr").feature_set()
    kept = given(features.stream(["norm"]))
    assert 0 < len(kept) < 10
    assert len(given(features.stream(["block:0"]))) == 10
    assert given(features.stream(["block:0", "norm"])) == kept


def test_a_tap_without_prefix_tokens_has_no_prefix(tmp_path, monkeypatch):
    shapes = (SHAPES[1], TapShape(tap="block:0", dim=8, grid=(4, 4)))
    make = FakeSource._block

    def without_prefix(self, tap, tokens):
        block = make(self, tap, tokens)
        if tap == "block:0":
            block.arrays.pop("prefix")
        return block

    monkeypatch.setattr(FakeSource, "_block", without_prefix)
    fake_extract(tmp_path / "s.zarr", [FakeReader(4)], shapes=shapes)
    features = featstore.open(tmp_path / "s.zarr").feature_set()
    assert len(given(features.stream(["block:0", "norm/prefix"]))) == 4
    with pytest.raises(NotFoundError, match=r"Unknown tap .*'block:0/prefix'"):
        features.stream(["block:0/prefix"])
