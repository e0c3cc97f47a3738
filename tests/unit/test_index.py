"""The index: folded from the files, always up to date, never in the way, safe to delete."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featstore import index
from featstore.errors import FormatError, InvalidInputError, NotFoundError
from featstore.files import PARTIAL, exclusive, write_json, write_parquet
from featstore.items import SCHEMA as ITEM_SCHEMA
from featstore.store import create_folder
from tests.fakes import FakeReader, content, fake_extract, fake_plan

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.fakes"])
TABLES = (
    "datasets feature_sets taps items rows shards ledger tombstones runs params metrics curves"
).split()
ROW = pa.schema([("row", pa.int64())])


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    path = tmp_path_factory.mktemp("extracted") / "s.zarr"
    fake_extract(path, [FakeReader(20, bad=[3])])
    return path


@pytest.fixture
def store(extracted, tmp_path):
    """Give a store of its own, without an index."""
    return shutil.copytree(extracted, tmp_path / "s.zarr")


def ask(store, sql):
    return index.query(store, sql).to_pylist()


def count(store, table="samples"):
    return ask(store, f"select count(*) as n from {table}")[0]["n"]


def everything(store):
    """Give all lines of all tables."""
    with contextlib.closing(index.connect(store)) as con:
        tables = {name: con.sql(f"from {name} order by all").to_arrow_table() for name in TABLES}
        return {**tables, "samples": con.sql("from samples order by all").to_arrow_table()}


def assert_same_as_rebuilt(store):
    """Compare the index with one that is made anew."""
    folded = everything(store)
    index.rebuild(store)
    rebuilt = everything(store)
    for name in folded:
        assert folded[name].equals(rebuilt[name]), name


def feature_set(store):
    return store / "feature_sets" / fake_plan().key()


def write_run(store, run_id="deap-depth-1", **changes):
    path = store / "runs" / run_id
    record = {
        "format": 1,
        "run_id": run_id,
        "created": "2026-01-01T00:00:00+00:00",
        "status": "running",
        "head": "deap.v1",
        "task": "depth.v1",
        "feature_sets": ["0" * 16],
        "taps": ["block:0", "norm"],
        "store": "s.zarr",
        "parameters": 10,
        "dead_parameters": 0,
        "steps": 5,
        "seconds": 1.5,
        "device": "cpu",
        "seed": 0,
        "best_step": 4,
        "options": {"head": {"width": 8, "is_big": True}, "task": {"name": "x"}},
    }
    write_json(path / "run.json", {**record, **changes})
    return path


def write_metrics(path, value):
    lines = [{"split": "test", "name": "rmse", "value": value, "low": 0.1, "high": 0.9}]
    write_parquet(path / "metrics.parquet", pa.Table.from_pylist(lines))


@pytest.mark.parametrize("where", [None, "split = 'train'", "path < '00007'", "false"])
def test_sample_rows_are_the_rows_of_samples_each_once(store, where):
    key = fake_plan().key()
    found = index.sample_rows(store, where, key)
    assert found.tolist() == sorted(set(index.samples(store, where, key)["row"].to_pylist()))
    assert len(index.sample_rows(store, where, "0" * 16)) == 0


def test_sample_rows_take_one_plain_expression_only(store):
    with pytest.raises(InvalidInputError, match="subquery"):
        index.sample_rows(store, "row in (select 1)", fake_plan().key())


def test_samples_are_the_committed_rows_with_their_items(store):
    lines = index.samples(store).to_pylist()
    assert len(lines) == 19  # the bad image is rejected
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)
    assert {line["path"] for line in lines} == {f"{n:05d}.npy" for n in range(20) if n != 3}
    for line in lines:
        number = int(line["path"][:5])
        assert line["split"] == ("train" if number % 5 else "test")
        assert line["group_id"] == f"scene{number % 10}"
        assert (line["height"], line["width"], line["crop"]) == (32, 48, "")
        assert (line["dataset"], line["view"]) == ("fake", "plain")
        assert (line["attributes"], line["label_kinds"]) == ("{}", ["depth"])
        assert line["feature_set"] == fake_plan().key()
    assert lines == index.samples(store, feature_set=fake_plan().key()).to_pylist()
    assert index.samples(store, feature_set="f" * 16).num_rows == 0


def test_a_row_that_one_tap_rejects_and_another_has_is_a_sample(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(8)], scale={"norm": 1e6})  # beyond float16
    statuses = "select tap, status, count(*) as n from ledger group by all order by all"
    assert ask(path, statuses) == [
        {"tap": "block:0", "status": "ok", "n": 8},
        {"tap": "norm", "status": "rejected", "n": 8},
        {"tap": "norm.mean", "status": "ok", "n": 8},
    ]
    assert count(path) == 8


def test_an_up_to_date_index_is_left_alone(store):
    path = index.refresh(store)
    before = path.stat()
    assert index.refresh(store) == path
    assert index.samples(store).num_rows == 19
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_added_is_folded(store):
    assert count(store) == 19
    fake_extract(store, [FakeReader(20, bad=[3]), FakeReader(6, name="more", seed=1)])
    assert count(store) == 25
    assert {line["dataset"] for line in ask(store, "from datasets")} == {"fake", "more"}
    fake_extract(store, [FakeReader(10)], plan=fake_plan(image_size=(32, 32)))
    assert count(store) == 35
    assert count(store, "feature_sets") == 2
    assert_same_as_rebuilt(store)


def test_folding_bit_by_bit_gives_what_a_rebuild_gives(store, tmp_path):
    """Files come and go in every order; each state is compared with an index made anew."""
    fake_extract(store, [FakeReader(20, bad=[3]), FakeReader(4, name="more", seed=1)])
    tombstones = feature_set(store) / "tombstones"
    write_parquet(tombstones / "a.parquet", pa.table({"row": [2]}, schema=ROW))
    write_metrics(write_run(store), 0.5)
    folded = {line["path"] for line in ask(store, "from folded")}
    files = sorted(name for name in folded if "/ledger/" not in name or "norm/00001" in name)
    assert {name.split("/")[0] for name in files} == {"feature_sets", "items", "runs"}
    assert len(files) == 11
    all_lines = everything(store)
    for name in files:
        aside = tmp_path / "aside"
        shutil.move(store / name, aside)
        without = everything(store)
        assert any(not without[table].equals(all_lines[table]) for table in without), name
        assert_same_as_rebuilt(store)
        shutil.move(aside, store / name)
        back = everything(store)
        assert all(back[table].equals(all_lines[table]) for table in back), name


def test_a_deleted_index_comes_back_the_same(store):
    write_metrics(write_run(store), 0.5)
    before = everything(store)
    (store / "index.duckdb").unlink()
    after = everything(store)
    assert all(after[name].equals(before[name]) for name in before)


def test_the_last_generation_of_an_item_wins(store):
    folder = store / "items" / "fake"
    item = pq.read_table(folder / "00000.parquet").to_pylist()[0]
    assert count(store) == 19
    changed = {**item, "splits": ["val", "train"], "label": "new"}
    write_parquet(folder / "00001.parquet", pa.Table.from_pylist([changed], schema=ITEM_SCHEMA))
    lines = index.samples(store, f"item = '{item['item']}'").to_pylist()
    assert [(line["split"], line["label"]) for line in lines] == [("train", "new"), ("val", "new")]
    assert count(store) == 20
    assert count(store, "items") == 20
    assert_same_as_rebuilt(store)
    (folder / "00001.parquet").unlink()
    assert index.samples(store, f"item = '{item['item']}'")["label"].to_pylist() == [None]


def test_an_item_whose_image_changed_leaves_its_old_row(store):
    folder = store / "items" / "fake"
    lines = pq.read_table(folder / "00000.parquet").to_pylist()
    assert count(store) == 19
    changed = {**lines[0], "image_key": lines[1]["image_key"]}
    write_parquet(folder / "00001.parquet", pa.Table.from_pylist([changed], schema=ITEM_SCHEMA))
    rows = index.samples(store, f"item in ('{lines[0]['item']}', '{lines[1]['item']}')")
    assert len(set(rows["row"].to_pylist())) == 1
    assert rows.num_rows == 2
    assert_same_as_rebuilt(store)


def test_equal_images_of_two_data_sets_share_rows(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(6, name="one"), FakeReader(6, name="two")])
    lines = index.samples(path).to_pylist()
    assert len(lines) == 12
    assert len({line["row"] for line in lines}) == 6
    assert [line["row"] for line in lines] == sorted(line["row"] for line in lines)


def test_a_row_stored_twice_counts_once_with_its_lowest_number(store):
    folder = feature_set(store)
    assert count(store) == 19
    assigned = pq.read_table(folder / "assignments" / "00000.parquet").to_pylist()[:8]
    again = [{**line, "row": line["row"] + 24} for line in assigned]
    schema = pq.read_schema(folder / "assignments" / "00000.parquet")
    write_parquet(
        folder / "assignments" / "00001.parquet", pa.Table.from_pylist(again, schema=schema)
    )
    ledger = pq.read_table(folder / "ledger/norm/00000.parquet")
    moved = [{**line, "row": line["row"] + 24} for line in ledger.to_pylist()]
    write_parquet(
        folder / "ledger/norm/00003.parquet", pa.Table.from_pylist(moved, schema=ledger.schema)
    )
    assert count(store, "rows") == 28
    lines = index.samples(store).to_pylist()
    assert len(lines) == 19
    assert max(line["row"] for line in lines) < 24
    # Once the first is buried, the second takes its place.
    tombstones = folder / "tombstones" / "a.parquet"
    write_parquet(tombstones, pa.table({"row": [assigned[0]["row"]]}, schema=ROW))
    rows = index.samples(store)["row"].to_pylist()
    assert assigned[0]["row"] not in rows
    assert assigned[0]["row"] + 24 in rows
    assert_same_as_rebuilt(store)


def test_a_buried_row_is_gone_and_comes_back(store):
    path = feature_set(store) / "tombstones" / "a.parquet"
    row = index.samples(store)["row"][0].as_py()
    write_parquet(path, pa.table({"row": [row]}, schema=ROW))
    assert row not in index.samples(store)["row"].to_pylist()
    assert count(store) == 18
    path.unlink()
    assert row in index.samples(store)["row"].to_pylist()


def test_a_removed_feature_set_is_gone(store):
    fake_extract(store, [FakeReader(4)], plan=fake_plan(image_size=(32, 32)))
    assert count(store, "feature_sets") == 2
    shutil.rmtree(feature_set(store))
    assert count(store) == 4
    for table in ("feature_sets", "taps", "rows", "ledger", "shards"):
        keys = {line["feature_set"] for line in ask(store, f"from {table}")}
        assert len(keys) == 1, table
    assert_same_as_rebuilt(store)


def test_a_tap_that_is_not_recorded_any_more_takes_its_ledger_along(store):
    path = feature_set(store) / "zarr.json"
    text = path.read_text()
    assert count(store, "ledger") == 60
    group = json.loads(text)
    del group["attributes"]["featstore"]["taps"]["norm"]
    path.write_text(json.dumps(group))
    assert count(store, "ledger") == 40
    assert count(store, "shards") == 6
    path.write_text(text)
    assert count(store, "ledger") == 60
    assert_same_as_rebuilt(store)


def test_shards_tell_what_is_missing(store):
    index.refresh(store)
    (feature_set(store) / "ledger/norm/00001.parquet").unlink()
    lines = ask(store, "from shards where tap = 'norm' order by shard")
    assert [line["is_committed"] for line in lines] == [True, False, True]
    assert [line["n_rows"] for line in lines] == [8, 8, 4]
    assert [line["n_ok"] for line in lines] == [8, 0, 3]
    assert [line["n_rejected"] for line in lines] == [0, 0, 1]
    assert count(store) == 19  # the other taps have the rows


def test_a_store_without_rows_has_an_empty_index(tmp_path):
    path = create_folder(tmp_path / "s.zarr", library="0").path
    assert index.samples(path).num_rows == 0
    assert index.samples(path, "split = 'train'").column_names[:2] == ["row", "item"]
    assert count(path, "feature_sets") == 0


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="No store"):
        index.query(tmp_path / "none.zarr", "select 1")


def test_a_store_whose_path_is_full_of_signs(tmp_path):
    path = tmp_path / "it's a [store] *%20{x}; -- ü.zarr"
    fake_extract(path, [FakeReader(3)])
    assert count(path) == 3
    assert index.refresh(path).parent == path


def test_a_store_whose_path_duckdb_misreads_can_be_asked(tmp_path):
    path = tmp_path / "what?.zarr"
    fake_extract(path, [FakeReader(3)])
    assert count(path) == 3


def test_files_that_are_not_ours_are_left_alone(store):
    (feature_set(store) / "ledger/norm/notes.parquet").write_bytes(b"x")
    (feature_set(store) / "assignments" / f"00001.parquet.7{PARTIAL}").write_bytes(b"x")
    (store / "items" / "photos").mkdir()
    (store / "items" / "photos" / "x.parquet").write_bytes(b"x")
    (store / "feature_sets" / "notes.txt").write_text("x")
    (store / "runs" / "half-deleted").mkdir(parents=True)
    write_metrics(store / "runs" / "half-deleted", 1.0)
    assert count(store) == 19
    assert count(store, "runs") == 0
    assert count(store, "metrics") == 0


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("feature_sets/{key}/ledger/norm/00001.parquet", "verify --repair"),
        ("feature_sets/{key}/assignments/00000.parquet", "Restore"),
        ("items/fake/00000.parquet", "Restore"),
        ("items/fake/dataset.json", "Restore"),
        ("feature_sets/{key}/zarr.json", "Restore"),
    ],
)
@pytest.mark.parametrize("how", ["truncated", "flipped", "foreign"])
def test_a_damaged_file_is_named(store, name, way_out, how):
    path = store / name.format(key=fake_plan().key())
    data = path.read_bytes()
    at = len(data) - 8 if name.endswith("parquet") else 0
    damaged = {
        "truncated": data[: len(data) // 2],
        "flipped": data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :],
        "foreign": b"PAR1 or not",
    }
    path.write_bytes(damaged[how])
    with pytest.raises(FormatError, match=path.name) as caught:
        index.samples(store)
    assert way_out in str(caught.value)
    path.write_bytes(data)
    assert count(store) == 19


def test_runs_are_folded_and_folded_again(store):
    path = write_run(store)
    assert [line["status"] for line in ask(store, "from runs")] == ["running"]
    write_run(store, status="done", steps=6)
    write_metrics(path, 0.5)
    curves = [{"step": 1, "split": "train", "name": "loss", "value": 2.0}]
    write_parquet(path / "curves.parquet", pa.Table.from_pylist(curves))
    (run,) = ask(store, "from runs")
    assert (run["status"], run["steps"], run["seconds"]) == ("done", 6, 1.5)
    assert run["taps"] == ["block:0", "norm"]
    assert ask(store, "select name, value from params order by name") == [
        {"name": "head.is_big", "value": "true"},
        {"name": "head.width", "value": "8"},
        {"name": "task.name", "value": "x"},
    ]
    assert ask(store, "from curves") == [{"run_id": "deap-depth-1", **curves[0]}]
    write_metrics(path, 0.25)  # evaluated again
    assert ask(store, "select run_id, split, name, value, low, high from metrics") == [
        {
            "run_id": "deap-depth-1",
            "split": "test",
            "name": "rmse",
            "value": 0.25,
            "low": 0.1,
            "high": 0.9,
        }
    ]
    assert_same_as_rebuilt(store)
    shutil.rmtree(path)
    assert [count(store, name) for name in ("runs", "params", "metrics", "curves")] == [0] * 4


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("run.json", b"{"),
        ("run.json", b"[]"),
        ("run.json", b"{}"),
        ("run.json", b"\xff\xfe"),
        ("run.json", b'{"status": "done", "steps": "many"}'),
        ("run.json", b'{"status": "done", "options": [1]}'),
        ("metrics.parquet", b"PAR1"),
        ("metrics.parquet", b""),
        ("curves.parquet", b"no table"),
    ],
)
def test_a_run_that_cannot_be_read_is_listed_as_damaged(store, name, data):
    write_metrics(write_run(store, "good-run"), 0.5)
    path = write_run(store, "bad-run")
    write_metrics(path, 0.5)
    (path / name).write_bytes(data)
    found = {line["run_id"]: line["status"] for line in ask(store, "from runs")}
    assert found == {"good-run": "running", "bad-run": "damaged"}
    assert [line["run_id"] for line in ask(store, "from metrics")] == ["good-run"]


def test_a_record_replaced_within_one_tick_of_the_clock_is_seen(store):
    for number in range(3):
        write_run(store, status="running", seed=number)
        index.refresh(store)
        write_run(store, status="stopped", seed=number)  # of the same size
        assert [line["status"] for line in ask(store, "from runs")] == ["stopped"]


@pytest.mark.parametrize("damage", ["garbage", "empty", "older", "folder of another", "log"])
def test_an_index_that_cannot_be_used_is_made_anew(store, damage, tmp_path):
    path = index.refresh(store)
    if damage == "garbage":
        path.write_bytes(os.urandom(5000))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "older":
        _change(path, "update about set schema = 'older'", "drop table sample_lines cascade")
    elif damage == "folder of another":
        other = tmp_path / "other.zarr"
        fake_extract(other, [FakeReader(4, seed=5)])
        shutil.copy(index.refresh(other), path)
    else:
        (store / "index.duckdb.wal").write_bytes(os.urandom(500))
    assert count(store) == 19
    assert index.refresh(store) == path
    assert_same_as_rebuilt(store)
    assert not (store / "index.duckdb.wal").exists()


def _change(path, *statements):
    import duckdb

    with duckdb.connect(path) as con:
        for sql in statements:
            con.execute(sql)


def test_an_index_damaged_inside_is_made_anew(tmp_path):
    """Flip one byte a block: whatever it hits, no question gets a wrong answer."""
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(64)], shard_rows=8)
    expected = everything(path)
    good = index.refresh(path).read_bytes()
    block = 256 * 1024
    names = ("samples", "items", "ledger")
    n_damaged = 0
    for at in range(12 * 1024 + 100, len(good), block):
        data = bytearray(good)
        data[at] ^= 0xFF
        (path / "index.duckdb").write_bytes(data)
        found = {name: index.query(path, f"from {name} order by all") for name in names}
        assert all(found[name].equals(expected[name]) for name in found), at
        n_damaged += (path / "index.duckdb").read_bytes() != bytes(data)
    assert n_damaged > 0, "no byte that was flipped lay in a block that is used"


def test_a_damaged_index_does_not_stop_a_fold(store):
    path = index.refresh(store)
    data = bytearray(path.read_bytes())
    for at in range(12 * 1024 + 100, len(data), 256 * 1024):
        data[at] ^= 0xFF
    path.write_bytes(data)
    fake_extract(store, [FakeReader(24, bad=[3])])
    assert count(store) == 23
    assert_same_as_rebuilt(store)


def test_waste_of_a_killed_fold_is_swept(store):
    waste = store / f"index.duckdb.99999{PARTIAL}"
    waste.write_bytes(b"x")
    (store / f"index.duckdb.99999{PARTIAL}.wal").write_bytes(b"x")
    index.refresh(store)
    assert sorted(path.name for path in store.glob("index*")) == ["index.duckdb"]


def test_a_reader_keeps_its_snapshot_and_a_new_one_sees_the_new(store):
    sql = "select count(*) from samples"
    old = index.connect(store)
    assert old.sql(sql).fetchall() == [(19,)]
    fake_extract(store, [FakeReader(30, bad=[3])])
    new = index.connect(store)
    assert new.sql(sql).fetchall() == [(29,)]
    assert old.sql(sql).fetchall() == [(19,)]
    old.close()
    new.close()


def test_threads_may_ask_at_once(store):
    found = []
    threads = [threading.Thread(target=lambda: found.append(count(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [19] * 8


def _refresh(path, ready, results):
    ready.wait()
    results.put(index.samples(path).num_rows)


def test_processes_may_refresh_at_once(store):
    ready, results = CONTEXT.Event(), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_refresh, args=(store, ready, results)) for _ in range(4)]
    for process in processes:
        process.start()
    ready.set()
    assert [results.get(timeout=120) for _ in processes] == [19] * 4
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert_same_as_rebuilt(store)


def _extract_slowly(path):
    fake_extract(path, [FakeReader(60, bad=[7])], delay_s=0.1)


def test_questions_are_answered_while_another_process_extracts(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(1)])
    process = CONTEXT.Process(target=_extract_slowly, args=(path,))
    process.start()
    found = []
    while process.is_alive():
        (line,) = ask(
            path,
            """
            select
                (select count(distinct "row") from samples) as n_samples,
                (select count(distinct "row") from ledger where status = 'ok') as n_ok
            """,
        )
        assert line["n_samples"] == line["n_ok"]  # one moment, whole shards
        found.append(line["n_samples"])
    process.join()
    assert process.exitcode == 0
    assert found == sorted(found)
    assert len(set(found)) >= 3, "the questions came too late to see the store grow"
    assert count(path) == 59
    assert_same_as_rebuilt(path)


def test_the_command_answers_while_another_process_holds_the_feature_set(store):
    from cli.common import exit_code
    from cli.featstore_app import featstore

    with exclusive(store / ".locks" / f"{fake_plan().key()}.lock", purpose="extracting"):
        assert exit_code(featstore, ["sql", "from samples", "--store", str(store)]) == 0


def test_a_store_that_cannot_be_written_gets_an_index_elsewhere(store, tmp_path):
    (store / ".locks").rename(tmp_path / "locks")
    (store / ".locks").write_text("a file, so that no lock can be taken, not even by root")
    before = content(store)
    path = index.refresh(store)
    assert store not in path.parents
    assert index.samples(store).num_rows == 19
    made = path.stat()
    assert index.refresh(store) == path
    assert path.stat().st_ino == made.st_ino, "made twice for one state"
    write_run(store)
    assert count(store, "runs") == 1  # what came meanwhile is seen
    shutil.rmtree(path.parent.parent)  # by whatever sweeps temporary folders
    assert count(store, "runs") == 1
    assert index.refresh(store) == path
    assert not (store / "index.duckdb").exists()
    assert content(store) == before
    (store / ".locks").unlink()
    assert index.refresh(store) == store / "index.duckdb"


def test_a_full_index_beside_a_store_that_cannot_be_written_is_used(store, tmp_path):
    path = index.refresh(store)
    shutil.rmtree(store / ".locks")
    (store / ".locks").write_text("a file")
    assert index.refresh(store) == path
    assert index.samples(store).num_rows == 19
    assert (store / ".locks").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_store_without_write_permission_can_be_asked(store):
    store.chmod(0o500)
    try:
        assert store not in index.refresh(store).parents
        assert count(store) == 19
    finally:
        store.chmod(0o700)


def test_an_index_elsewhere_is_deleted_with_its_process(store):
    shutil.rmtree(store / ".locks")
    (store / ".locks").write_text("a file")
    code = f"from featstore import index; print(index.refresh({str(store)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    path = done.stdout.strip()
    assert path.endswith("index.duckdb")
    assert str(store) not in path
    assert not os.path.exists(os.path.dirname(path))  # noqa: PTH110, PTH120
