"""Compaction moves what is left: once for every reader, and right for whoever knew the old rows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import featstore
from cli.featstore_app import featstore as program
from featstore.claims import Claims
from featstore.cleanup import gc
from featstore.compaction import compact
from featstore.errors import FormatError, InvalidInputError
from featstore.removal import remove_rows
from featstore.store import open_folder
from featstore.tombstones import read_tombstones, rows_out_of_force, write_tombstones
from featstore.verify import verify
from tests.fakes import SHAPES, FakeReader, fake_extract
from tests.shrinking import (
    KEY,
    TAPS,
    Killed,
    N,
    check,
    check_old_rows,
    dying_disk,
    folder_of,
    listed,
    make_whole,
    numbers,
)

WHERE = "split = 'test' or path < '00008.npy'"


def is_left(item):
    return int(item[:5]) % 5 != 0 and item >= "00008.npy"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole(tmp_path_factory)


@pytest.fixture(scope="module")
def old_rows(whole):
    return listed(whole)


@pytest.fixture(scope="module")
def truth(whole, old_rows):
    return numbers(whole, old_rows)


@pytest.fixture(scope="module")
def holey(whole, tmp_path_factory):
    path = tmp_path_factory.mktemp("holey") / "s.zarr"
    shutil.copytree(whole, path)
    remove_rows(path, WHERE)
    return path


@pytest.fixture
def path(holey, tmp_path):
    shutil.copytree(holey, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@pytest.fixture(scope="module")
def left(truth):
    return {item: found for item, found in truth.items() if is_left(item)}


def test_what_is_left_moves_and_the_old_shards_go(path, left, old_rows):
    report = compact(path)
    assert (report.rows, report.shards, report.new_shards) == (len(left), 3, 2)
    check(path, left)
    assert min(listed(path).values()) == 24
    freed = gc(path, grace_s=0)
    assert freed.bytes == report.gc_bytes
    assert folder_of(path).committed_shards("norm") == [3, 4]
    check(path, left)
    check_old_rows(path, old_rows, left)
    again = compact(path)
    assert (again.rows, again.shards) == (0, 0)


def test_streams_and_placements_by_old_rows_give_the_same(path, left, old_rows):
    features = featstore.open(path).feature_set()
    rows = sorted(old_rows[item] for item in left)
    before = [batch["norm"].copy() for batch in features.stream(["norm"], rows=rows, shuffle=True)]
    running = features.stream(["norm"], rows=rows, shuffle=True)
    placements = features.placements(rows)
    compact(path)
    gc(path, grace_s=0)
    fresh = featstore.open(path).feature_set()
    for stream in (running, fresh.stream(["norm"], rows=rows, shuffle=True)):
        found = [batch["norm"].copy() for batch in stream]
        assert [block.tobytes() for block in found] == [block.tobytes() for block in before]
    assert fresh.placements(rows) == placements


def test_a_stream_that_reads_while_rows_move_under_it_reads_on(path, left):
    item_of = {row: item for item, row in listed(path).items()}
    seen = []
    stream = featstore.open(path).feature_set().stream(["norm"], batch_size=1, prefetch_bytes=0)
    for number, batch in enumerate(stream):
        if number == 1:
            compact(path)
            gc(path, grace_s=0)
        item = item_of[int(batch.rows[0])]
        assert batch["norm"][0].tobytes() == left[item]["norm"]
        seen.append(item)
    assert sorted(seen) == sorted(left)


def test_shards_of_which_little_is_gone_stay(whole, tmp_path, truth):
    path = tmp_path / "s.zarr"
    shutil.copytree(whole, path)
    remove_rows(path, "path = '00004.npy'")
    assert compact(path).rows == 0
    assert compact(path, min_removed=0.1).rows in (6, 7)  # one of the shard's may be the bad one
    check(path, {item: found for item, found in truth.items() if item != "00004.npy"})
    with pytest.raises(InvalidInputError, match="min_removed"):
        compact(path, min_removed=0)


def test_taps_that_only_part_of_the_rows_have_stay_apart(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(8)], shapes=SHAPES)
    fake_extract(path, [FakeReader(16)], shapes=SHAPES[:1])
    truth = numbers(path, listed(path), TAPS[:1])
    remove_rows(path, "split = 'test'")
    report = compact(path, min_removed=0.1)
    assert report.rows == 12
    check(path, {i: v for i, v in truth.items() if int(i[:5]) % 5}, TAPS[:1])
    folder = folder_of(path)
    assert len(folder.committed_shards("block:0")) == 4
    assert len(folder.committed_shards("norm")) == 2
    fake_extract(path, [FakeReader(16)], shapes=SHAPES)
    assert numbers(path, listed(path)).keys() == {f"{n:05d}.npy" for n in range(16)}


def test_what_was_removed_while_it_moved_stays_removed(path, left, monkeypatch):
    with dying_disk(monkeypatch, path, 12) as disk, pytest.raises(Killed):
        compact(path)
    assert disk["is_dead"]
    assert len(rows_out_of_force(folder_of(path))) > 8 + len(left) - 3
    remove_rows(path, "path = '00009.npy'")
    compact(path)
    check(path, {item: found for item, found in left.items() if item != "00009.npy"})


def test_a_tap_that_came_while_rows_moved_moves_too(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(N)], shapes=SHAPES[:1])
    remove_rows(path, "split = 'test'")
    with dying_disk(monkeypatch, path, 5), pytest.raises(Killed):
        compact(path, min_removed=0.1)
    train = FakeReader(N)
    items = [item for item in train.items() if item.splits == ("train",)]
    train.items = lambda: items
    fake_extract(path, [train])
    truth = numbers(path, listed(path))
    compact(path, min_removed=0.1)
    check(path, truth)
    gc(path, grace_s=0)
    check(path, truth)
    assert fake_extract(path, [train]).new_rows == 0


def test_rows_of_which_some_gained_a_tap_stay_and_move_apart(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(16)], shapes=SHAPES[:1])
    remove_rows(path, "split = 'test'")
    truth = numbers(path, listed(path), TAPS[:1])
    with dying_disk(monkeypatch, path, 5), pytest.raises(Killed):
        compact(path, min_removed=0.1)
    first = {item for item, row in listed(path).items() if row < 8}
    reader = FakeReader(16)
    items = [item for item in reader.items() if item.path in first]
    reader.items = lambda: items
    fake_extract(path, [reader], shapes=SHAPES)
    told = []
    report = compact(path, min_removed=0.1, progress=lambda p: told.append(p.message))
    assert any("left where they are" in message for message in told)
    assert report.rows == len(truth)
    gc(path, grace_s=0)
    check(path, truth, TAPS[:1])
    rows = {item: row for item, row in listed(path).items() if item in first}
    assert len(numbers(path, rows)) == len(first)


def test_rows_at_which_another_process_works_stay_where_they_are(path, left, monkeypatch):
    monkeypatch.setattr("featstore.compaction.LOCK_WAIT_S", 0.0)
    with Claims(open_folder(path), KEY, purpose="extracting") as claims:
        assert claims.take(1)
        assert compact(path).rows == 0
        check(path, left)
        remove_rows(path, "row between 8 and 15")
        assert not [name for name in gc(path, grace_s=0).removed if "/c/1" in name]
    report = compact(path)
    assert report.rows == len(listed(path)) < len(left)


def test_arrays_with_a_codec_of_others_are_refused_before_anything_is_written(path):
    file = folder_of(path).array_path("norm", "patch") / "zarr.json"
    metadata = json.loads(file.read_text())
    inner = metadata["codecs"][0]["configuration"]["codecs"]
    inner.append({"name": "zstd", "configuration": {"level": 1, "checksum": True}})
    file.write_text(json.dumps(metadata))
    with pytest.raises(InvalidInputError, match="featstore copy"):
        compact(path)
    assert len(folder_of(path).assignment_paths()) == 1


def test_a_move_to_nowhere_is_damage(path, left):
    folder = folder_of(path)
    rows = np.array([min(listed(path).values())])
    write_tombstones(folder, rows, np.array([999]))
    [problem] = verify(path).problems
    assert (problem.kind, "999" in problem.message) == ("tombstones", True)
    write_tombstones(folder, np.array([9]), np.array([8]))
    with pytest.raises(FormatError, match="moves a row to one before it"):
        read_tombstones(folder)


def test_damaged_bytes_are_not_moved(path, left):
    folder = folder_of(path)
    file = folder.shard_file("norm", "patch", 1)
    data = bytearray(file.read_bytes())
    data[:2000] = bytes(byte ^ 1 for byte in data[:2000])
    file.write_bytes(data)
    with pytest.raises(FormatError, match="verify --repair"):
        compact(path)
    assert listed(path).keys() == left.keys()
    assert {problem.shard for problem in verify(path).problems} == {1}


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_change_nothing_is_lost_or_doubled(holey, tmp_path, left, monkeypatch, step):
    n_changes, n_kills = 0, 0
    while True:
        path = tmp_path / f"{n_changes}.zarr"
        shutil.copytree(holey, path)
        with dying_disk(monkeypatch, path, n_changes) as disk:
            try:
                compact(path)
                gc(path, grace_s=0)
            except Killed:
                n_kills += 1
        check(path, left)
        if not disk["is_dead"]:
            break
        compact(path)
        gc(path, grace_s=0)
        check(path, left)
        assert len(folder_of(path).committed_shards("norm")) == 2
        assert verify(path).waste == []
        shutil.rmtree(path)
        n_changes += step
    assert n_kills >= 40 // step


def test_the_command_says_what_moved(path):
    run = CliRunner().invoke
    done = run(program, ["compact", "--store", str(path)])
    assert "Moved 10 rows out of 3 shards" in done.stdout
    again = run(program, ["compact", "--json", "--store", str(path)])
    assert json.loads(again.stdout)["rows"] == 0


def test_what_a_compaction_leaves_is_told_with_the_option_that_takes_it(whole, tmp_path):
    path = tmp_path / "s.zarr"
    shutil.copytree(whole, path)
    remove_rows(path, "path = '00008.npy'")
    done = CliRunner().invoke(program, ["compact", "--store", str(path)])
    assert "Moved 0 rows" in done.stdout
    assert "less than 30% is gone; a smaller --min-removed" in done.stderr
    done = CliRunner().invoke(program, ["compact", "--min-removed", "0.01", "--store", str(path)])
    assert "Moved 0 rows" not in done.stdout
    assert "--min-removed" not in done.stderr
