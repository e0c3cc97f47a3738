"""Planning for many rows: nothing goes through every row in Python, and the answers stay."""

from __future__ import annotations

import os
import pickle
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from featstore import index, rejected
from featstore.assign import shard_states
from featstore.errors import FormatError
from featstore.files import write_parquet
from featstore.ledger import read_ledger
from featstore.lines import Assigned, n_assigned_rows
from featstore.order import argsort_keys, draw_keys, order_rows
from featstore.plan import RunOptions
from featstore.select import _is_in
from featstore.sql import scan
from featstore.store import ASSIGNMENT_SCHEMA, FeatureSetFolder, StoreFolder
from tests.fakes import FakeReader, fake_extract, fake_plan

TAPS = ["block:0", "norm"]


@pytest.fixture
def folder(tmp_path):
    """Give a feature set of two assignments and two views, one image of which does not decode."""
    path = tmp_path / "s.zarr"
    options = RunOptions(views=("plain", "hflip"))
    fake_extract(path, [FakeReader(11, bad=[3])], options=options)
    fake_extract(path, [FakeReader(7, name="others", seed=1)], options=options)
    found = FeatureSetFolder(path / "feature_sets" / fake_plan().key())
    found.ledger_path("norm", 1).unlink()
    return found


def states_by_hand(folder, taps):
    """Say what `shard_states` should, line by line."""
    by_shard = {}
    for line in folder.assignments().to_pylist():
        by_shard.setdefault(folder.layout.shard_of(line["row"]), []).append(line)
    states = []
    for shard, lines in sorted(by_shard.items()):
        rejected_lines = {}
        for tap in taps:
            if folder.ledger_path(tap, shard).exists():
                for line in read_ledger(folder, tap, shard).to_pylist():
                    if line["status"] != "ok":
                        key = (line["image_key"], line["crop"], line["view"])
                        told = (line["reason"], line["pixel_hash"])
                        rejected_lines.setdefault(tap, {})[key] = told
        committed = {tap for tap in taps if folder.ledger_path(tap, shard).exists()}
        states.append((shard, lines, committed, rejected_lines))
    return states


def states(folder, taps):
    return [
        (
            state.shard,
            list(state.lines),
            set(state.committed),
            {
                tap: {key: (line["reason"], line["pixel_hash"]) for key, line in lines.items()}
                for tap, lines in state.rejected.items()
            },
        )
        for state in shard_states(folder, taps)
    ]


@pytest.mark.parametrize("index_is", ["missing", "behind", "current", "damaged"])
def test_shard_states_say_what_the_files_say(folder, index_is):
    path = folder.path.parents[1]
    assert any(told for *_, told in states_by_hand(folder, TAPS))
    ledger = folder.ledger_path("norm", 0)
    if index_is == "behind":
        data = ledger.read_bytes()
        ledger.unlink()
        index.refresh(path)
        ledger.write_bytes(data)
    if index_is == "current":
        index.refresh(path)
    if index_is == "damaged":
        (path / "index.duckdb").write_bytes(b"no index")
    assert states(folder, TAPS) == states_by_hand(folder, TAPS)


def test_ledgers_that_the_index_holds_are_not_read_again(folder, monkeypatch):
    index.refresh(folder.path.parents[1])
    monkeypatch.setattr(rejected, "read_ledger", None)
    assert states(folder, TAPS)
    index.peek(folder.path.parents[1], [("select 1", {})])
    folder.ledger_path("norm", 0).touch()
    with pytest.raises(TypeError):
        states(folder, TAPS)


def test_lines_are_those_of_the_assignment(folder):
    expected = folder.assignments().to_pylist()
    shards = dict(Assigned(folder).shards(folder.layout.shard_rows))
    assert [line for lines in shards.values() for line in lines] == expected
    first = shards[0]
    assert first[2] == expected[2]
    assert first[-1] == expected[len(first) - 1]
    assert first[1:4] == expected[1:4]
    assert [key for _, key in first.keyed()] == [
        (line["image_key"], line["crop"], line["view"]) for line in expected[: len(first)]
    ]
    assert pickle.loads(pickle.dumps(first)) == tuple(first)
    assert n_assigned_rows(folder) == expected[-1]["row"] + 1
    with pytest.raises(IndexError):
        first[len(first)]


def test_a_damaged_assignment_is_named(folder):
    path = folder.assignment_paths()[1]
    data = bytearray(path.read_bytes())
    data[20] ^= 255
    path.write_bytes(data)
    with pytest.raises(FormatError, match="is damaged"):
        [list(lines) for _, lines in Assigned(folder).shards(8)]


def big_assignment(path, n_rows, row_group_size):
    folder = FeatureSetFolder(path / "feature_sets" / "0" / "set")
    table = pa.table(
        {
            field.name: np.arange(n_rows)
            if field.name == "row"
            else pa.repeat({pa.string(): "x" * 32, pa.bool_(): False}.get(field.type, 1), n_rows)
            for field in ASSIGNMENT_SCHEMA
        }
    ).cast(ASSIGNMENT_SCHEMA)
    target = folder.path / "assignments" / "00000.parquet"
    write_parquet(target, table, row_group_size=row_group_size)
    return folder


def test_lines_of_many_rows_are_in_memory_a_part_at_a_time(tmp_path):
    folder = big_assignment(tmp_path, 50_000, row_group_size=2_500)
    before = pa.total_allocated_bytes()
    largest = 0
    tracemalloc.start()
    assigned = Assigned(folder)
    for _, lines in assigned.shards(2_507):  # shards that lie in two parts
        assert lines[0]["row"] == lines.rows[0]
        assert sum(1 for _ in lines.keyed()) == len(lines)
        largest = max(largest, pa.total_allocated_bytes() - before)
    _, python_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert folder.assignments().nbytes > 10e6
    assert largest < 4e6
    assert python_bytes < 4e6


@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("n_groups", [None, 1, 5])
@pytest.mark.parametrize("n_key_bits", [64, 40, 3])
def test_packed_words_sort_as_lexsort_does(n, n_groups, n_key_bits):
    # Keys of a few bits at either end: many begin alike, and many are equal.
    for shift in (0, 64 - n_key_bits):
        keys = (draw_keys(n, 1) >> np.uint64(64 - n_key_bits)) << np.uint64(shift)
        groups = None if n_groups is None else (draw_keys(n, 2) % n_groups).astype(np.int64)
        expected = np.lexsort((keys, np.zeros(n) if groups is None else groups))
        found = argsort_keys(keys, groups)
        assert found.dtype == np.int64
        assert found.tolist() == expected.tolist()


def test_places_that_fill_a_word_are_sorted_all_the_same():
    keys, groups = draw_keys(100, 1), (draw_keys(100, 2) >> np.uint64(3)).astype(np.int64)
    assert argsort_keys(keys, groups).tolist() == np.lexsort((keys, groups)).tolist()


@pytest.mark.parametrize("rows", [np.arange(1000), draw_keys(1000, 3).astype(np.int64) % 5000])
def test_a_window_order_is_that_of_its_definition(rows):
    rows = np.abs(rows)
    shards, member = np.unique(rows // 16, return_inverse=True)
    rank = np.argsort(np.argsort(draw_keys(len(shards), 4, 2, 1), kind="stable"), kind="stable")
    expected = rows[np.lexsort((draw_keys(len(rows), 4, 2), rank[member] // 8))]
    found = order_rows(rows, shuffle="window", shard_rows=16, seed=4, epoch=2)
    assert found.tolist() == expected.tolist()


def test_the_order_of_a_million_rows_takes_a_few_times_their_memory():
    rows = np.arange(1_000_000)
    tracemalloc.start()
    order_rows(rows, shuffle=True, shard_rows=100, seed=0, epoch=0)
    _, n_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_bytes < 5 * rows.nbytes


def make_old(folder):
    """Let a folder look as if nothing came or went for long."""
    os.utime(folder, ns=(10**18, 10**18))


def test_a_digest_is_that_of_the_list_and_knows_of_new_ledgers(folder, monkeypatch):
    store = StoreFolder(folder.path.parents[1])
    ledgers = folder.ledger_path("norm", 0).parent
    make_old(ledgers)
    assert scan.quick_digest(store) == scan.scan(store).digest
    looked = []
    monkeypatch.setattr(scan, "_stamped", spy(scan._stamped, looked))
    assert scan.quick_digest(store) == scan.scan(store).digest
    assert looked.count(ledgers) == 1  # the scan's own
    before = scan.quick_digest(store)
    folder.ledger_path("norm", 0).unlink()
    assert scan.quick_digest(store) == scan.scan(store).digest != before


def test_the_stamp_of_a_folder_is_trusted_neither_fresh_nor_for_ever(folder, monkeypatch):
    store = StoreFolder(folder.path.parents[1])
    looked = []
    monkeypatch.setattr(scan, "_stamped", spy(scan._stamped, looked))
    ledgers = folder.ledger_path("norm", 0).parent
    ledgers.touch()
    for _ in range(2):
        scan.quick_digest(store)
    assert looked.count(ledgers) == 2
    make_old(ledgers)
    for _ in range(2):
        scan.quick_digest(store)
    assert looked.count(ledgers) == 3
    later = time.monotonic() + 31
    monkeypatch.setattr(scan.time, "monotonic", lambda: later)
    scan.quick_digest(store)
    assert looked.count(ledgers) == 4


def spy(function, looked):
    def call(folder, *arguments):
        looked.append(folder)
        return function(folder, *arguments)

    return call


@pytest.mark.parametrize(
    ("rows", "known"),
    [
        (draw_keys(500, 1).astype(np.int64) % 700 + 700, draw_keys(700, 2).astype(np.int64) % 999),
        (np.arange(9), np.array([-1, 4, 10**9])),
        (np.array([3, 2**40]), np.array([2**40])),
        (np.arange(0), np.array([1])),
        (np.array([3]), np.arange(0)),
    ],
)
def test_marks_find_what_isin_finds(rows, known):
    assert _is_in(rows, known).tolist() == np.isin(rows, known).tolist()
