"""Removed rows are gone for every reader at once; their space goes later, and never too early."""

from __future__ import annotations

import json
import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import featstore
from cli.featstore_app import featstore as program
from featstore import index
from featstore.cleanup import gc
from featstore.errors import InvalidInputError, NotFoundError
from featstore.plan import RunOptions
from featstore.removal import remove_rows
from featstore.tombstones import Tombstones, read_tombstones
from featstore.usage import measure_usage
from featstore.verify import verify
from tests.fakes import SHAPES, FakeReader, content, fake_extract
from tests.shrinking import (
    KEY,
    READER,
    N,
    check,
    check_old_rows,
    folder_of,
    listed,
    make_whole,
    numbers,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole(tmp_path_factory)


@pytest.fixture(scope="module")
def truth(whole):
    return numbers(whole, listed(whole))


@pytest.fixture
def path(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def shard_of_rows(path, shard):
    """Say which rows lie in one shard, as a condition, and give the paths of their items."""
    rows = folder_of(path).layout.rows_of(shard)
    return f"row between {rows.start} and {rows.stop - 1}", [
        item for item, row in listed(path).items() if row in rows
    ]


def without(truth, items):
    return {item: found for item, found in truth.items() if item not in items}


def test_removed_rows_are_gone_at_once_and_nothing_else_changes(path, truth):
    before = content(path)
    report = remove_rows(path, "split = 'test'")
    gone = [item for item in truth if int(item[:5]) % 5 == 0]
    assert report.rows == report.feature_sets[KEY] == len(gone)
    check(path, without(truth, gone))
    assert report.items_without_rows == len(gone) + 1  # and the image that does not decode
    after = content(path)
    assert {name for name in after if after[name] != before.get(name)} == {
        f"feature_sets/{KEY}/tombstones/00000.parquet"
    }
    assert after.keys() >= before.keys()


def test_a_dry_run_tells_the_same_and_removes_nothing(path, truth):
    where, _ = shard_of_rows(path, 1)
    planned = remove_rows(path, where, dry_run=True)
    check(path, truth)
    done = remove_rows(path, where)
    assert (planned.rows, planned.gc_bytes) == (done.rows, done.gc_bytes)
    assert gc(path, grace_s=0).bytes == done.gc_bytes > 0


def test_what_is_no_condition_or_fits_nothing_is_refused(path):
    for where in ("split = ", "1", "row in (select 1)", "split = 'test') or (true"):
        with pytest.raises(InvalidInputError):
            remove_rows(path, where)
    with pytest.raises(NotFoundError, match="No stored row with split = 'none'"):
        remove_rows(path, "split = 'none'")
    assert not (folder_of(path).path / "tombstones").exists()


def test_rows_that_serve_other_items_too_are_told_and_can_be_kept(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(6), FakeReader(9, name="twin")])  # six images in both
    planned = remove_rows(path, "dataset = 'fake'", dry_run=True)
    assert (planned.rows, planned.shared_rows) == (6, 6)
    with pytest.raises(NotFoundError):
        remove_rows(path, "dataset = 'fake'", keep_shared=True)
    report = remove_rows(path, "dataset = 'twin'", keep_shared=True)
    assert (report.rows, report.shared_rows) == (3, 0)
    assert len(listed(path)) == 6


def test_an_image_extracted_again_gets_a_new_row_and_growth_touches_no_old_file(path, truth):
    old = listed(path)
    remove_rows(path, "split = 'test'")
    stamps = {f: f.stat().st_mtime_ns for f in path.rglob("feature_sets/*/*/**/c/**/*")}
    before = {f: f.read_bytes() for f in stamps if f.is_file()}
    before |= {f: f.read_bytes() for f in path.rglob("assignments/*")}
    before |= {f: f.read_bytes() for f in path.rglob("ledger/*/*")}
    assert len(before) > 20
    report = fake_extract(path, [FakeReader(N + 5, **READER)])
    assert report.new_rows == 4 + 5
    assert {f: f.read_bytes() for f in before} == before
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    new = listed(path)
    assert all(new[item] >= 24 for item in truth if int(item[:5]) % 5 == 0)
    assert all(new[item] == old[item] for item in truth if int(item[:5]) % 5)
    found = numbers(path, new)
    assert {item: found[item] for item in truth} == truth
    assert fake_extract(path, [FakeReader(N + 5, **READER)]).new_rows == 0


def test_a_tap_added_later_passes_over_removed_images(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(N)], shapes=SHAPES[:1])
    remove_rows(path, "split = 'test'")
    reader = FakeReader(N)
    left = [item for item in reader.items() if item.splits == ("train",)]
    reader.items = lambda: left  # their images are gone for good
    report = fake_extract(path, [reader])
    assert (report.new_rows, report.bad) == (len(left), ())
    assert verify(path).problems == []
    folder = folder_of(path)
    ledger = pq.read_table(folder.ledger_path("norm", 0).parent).to_pylist()
    passed_over = {line["row"] for line in ledger if line["reason"] == "removed"}
    assert passed_over == folder.removed_rows()


def test_the_space_goes_after_the_grace_period(path, truth):
    where, items = shard_of_rows(path, 1)
    remove_rows(path, where)
    waiting = gc(path)
    assert waiting.removed == []
    assert 3500 < waiting.waiting_s <= 3600
    assert measure_usage(path).waiting == waiting.waiting_bytes > 0
    folder = folder_of(path)
    assert folder.shard_file("norm", "patch", 1).exists()
    freed = gc(path, grace_s=0)
    assert freed.bytes == waiting.waiting_bytes
    assert not folder.shard_file("norm", "patch", 1).parent.parent.exists()
    assert folder.committed_shards("norm") == [0, 2]
    check(path, without(truth, items))
    assert gc(path, grace_s=0).removed == []
    assert measure_usage(path).removed == 0
    assert fake_extract(path, [FakeReader(N, **READER)]).new_rows == len(items)
    check(path, truth)


def test_a_time_of_removal_decides_and_not_a_files_own(path):
    where, _ = shard_of_rows(path, 1)
    remove_rows(path, where)
    file = folder_of(path).path / "tombstones" / "00000.parquet"
    table = pq.read_table(file)
    old = pa.array([int(time.time()) - 3601] * table.num_rows)
    pq.write_table(table.set_column(2, "removed_at", old), file)
    assert len(gc(path).removed) == 8  # three ledgers and five shards


def test_where_an_image_was_rejected_the_ledger_that_says_so_stays(path, truth):
    folder = folder_of(path)
    rejected = [
        line["row"]
        for line in pq.read_table(folder.path / "assignments" / "00000.parquet").to_pylist()
        if line["path"] == "00003.npy"
    ]
    shard = folder.layout.shard_of(rejected[0])
    where, items = shard_of_rows(path, shard)
    remove_rows(path, where)
    gc(path, grace_s=0)
    assert not folder.shard_file("norm", "patch", shard).exists()
    assert shard in folder.committed_shards("norm")
    check(path, without(truth, items))
    assert gc(path, grace_s=0).removed == []
    assert [bad.path for bad in fake_extract(path, [FakeReader(N, **READER)]).bad] == ["00003.npy"]
    check(path, truth)


@pytest.mark.parametrize("grace_s", [0.0, 3600.0])
def test_a_running_stream_ends_its_epoch_or_says_why_not(path, truth, grace_s):
    rows = listed(path)
    item_of = {row: item for item, row in rows.items()}
    features = featstore.open(path).feature_set()
    stream = features.stream(["norm"], batch_size=2, prefetch_bytes=0)
    where, _ = shard_of_rows(path, 1)
    seen, problems = [], []
    may_go_on, is_begun = threading.Event(), threading.Event()

    def read():
        try:
            for batch in stream:
                for place, row in enumerate(batch.rows.tolist()):
                    assert batch["norm"][place].tobytes() == truth[item_of[row]]["norm"]
                    seen.append(row)
                is_begun.set()
                may_go_on.wait(10)
        except NotFoundError as error:
            problems.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    assert is_begun.wait(10)
    remove_rows(path, where)
    gc(path, grace_s=grace_s)
    may_go_on.set()
    thread.join()
    if grace_s:
        assert problems == []
        assert sorted(seen) == sorted(rows.values())
    else:
        assert len(problems) == 1
        assert "was removed while it was about to be read" in problems[0]
    left = features.stream(["norm"], batch_size=4)
    assert sum(len(batch) for batch in left) == len(listed(path))


def test_removed_rows_named_by_number_say_so(path):
    rows = listed(path)
    remove_rows(path, "path = '00004.npy'")
    with pytest.raises(NotFoundError, match=r"\(row \d+: removed\).*get new rows"):
        featstore.open(path).feature_set().read("norm", [rows["00004.npy"]])


def test_damage_of_a_removed_row_is_nobodys_problem(path):
    where, _ = shard_of_rows(path, 1)
    remove_rows(path, where)
    folder_of(path).shard_file("norm", "patch", 1).write_bytes(b"x")
    assert verify(path).problems == []


def test_views_of_an_image_can_go_one_by_one(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(5)], options=RunOptions(views=("plain", "hflip"), n_threads=1))
    assert remove_rows(path, "\"view\" = 'hflip'").rows == 5
    assert set(index.samples(path)["view"].to_pylist()) == {"plain"}


def test_rows_follow_where_they_moved_as_often_as_they_did():
    moved = Tombstones(
        np.array([1, 2, 11, 5, 2]), np.array([11, 12, 21, -1, -1]), np.array([0, 0, 0, 0, 9])
    )
    assert moved.current(np.array([1, 2, 3, 5, 11])).tolist() == [21, 12, 3, 5, 21]
    assert moved.are_removed(np.array([1, 3, 5])).tolist() == [True, False, True]


def test_the_command_says_what_it_did_and_what_comes_next(path):
    run = CliRunner().invoke
    store = ["--store", str(path)]
    where = ["--where", "split = 'test'"]
    planned = run(program, ["rm", *where, "--dry-run", *store])
    assert "Would remove 4 rows" in planned.stdout
    done = run(program, ["rm", *where, "--json", *store])
    assert json.loads(done.stdout)["rows"] == 4
    assert run(program, ["rm", *store]).exit_code == 2
    assert run(program, ["rm", KEY, *where, *store]).exit_code == 2
    assert run(program, ["gc", "--grace", "soon", *store]).exit_code == 2
    assert (
        "Would remove 0 files" in run(program, ["gc", "--grace", "2h", "--dry-run", *store]).stdout
    )
    lines = run(program, ["du", *store]).stdout
    assert "featstore compact" in lines
    assert "norm/patch" in lines
    usage = json.loads(run(program, ["du", "--json", *store]).stdout)
    assert usage["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert run(program, ["ls", *store]).stdout.split().count("15") == 1


def test_old_numbers_of_rows_stay_readable_or_say_that_they_are_gone(path, truth):
    rows = listed(path)
    remove_rows(path, "split = 'test'")
    check_old_rows(path, rows, without(truth, [i for i in truth if int(i[:5]) % 5 == 0]))
    assert len(read_tombstones(folder_of(path)).rows) == 4
