"""Nothing that counts is deleted, everything that does not is, and a removal is all or nothing."""

from __future__ import annotations

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featstore import index
from featstore.cleanup import gc, remove_feature_set
from featstore.errors import ConflictError, FormatError, NotFoundError, StorageError
from featstore.files import exclusive
from featstore.store import open_folder
from featstore.verify import verify
from tests.fakes import FakeReader, content, fake_extract, fake_plan

KEY = fake_plan().key()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    fake_extract(path, [FakeReader(20, bad=[3])])
    return path


@pytest.fixture
def path(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def files(path):
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def litter(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"12345")
    return sorted(names)


LEFTOVERS = (
    f"feature_sets/{KEY}/zarr.json.1.partial",
    f"feature_sets/{KEY}/norm/patch/c/0/0/0.abc.partial",
    f"feature_sets/{KEY}/ledger/norm/00003.parquet.1.partial",
    "feature_sets/0123456789abcdef/norm.safetensors.1.partial",  # begun and never made
    "items/fake/00001.parquet.1.partial",
    "items/new/dataset.json.1.partial",
    "labels/fake/depth-00001.parquet.1.partial",
    "runs/deap-1/checkpoint.pt.1.partial",
    "targets/0123456789abcdef.1.partial/depth.npy",
    "index.duckdb.1.partial",
    "index.duckdb.1.partial.wal",
)


def test_a_clean_store_loses_nothing(path):
    before = files(path)
    assert gc(path).removed == []
    assert before - files(path) == set()


def test_every_leftover_is_listed_then_swept_and_nothing_else(path, whole):
    (path / "runs" / "deap-1").mkdir(parents=True)
    (path / "runs" / "deap-1" / "run.json").write_text("{}")
    names = litter(path, *LEFTOVERS)
    listed = gc(path, dry_run=True)
    assert sorted(listed.removed) == names
    assert listed.bytes == 5 * len(names)
    assert set(names) <= files(path)
    swept = gc(path)
    assert swept.to_json() == {**listed.to_json(), "removed": swept.removed}
    assert sorted(swept.removed) == names
    assert content(path) == content(whole)
    assert (path / "runs" / "deap-1" / "run.json").exists()
    assert gc(path).removed == []


def test_shards_without_a_ledger_go_tap_by_tap(path):
    folder = open_folder(path).feature_set(KEY)
    folder.ledger_path("norm", 1).unlink()
    shards = [folder.shard_file("norm", array, 1) for array in ("patch", "prefix")]
    assert gc(path).removed == [str(shard.relative_to(path)) for shard in shards]
    assert not any(shard.exists() for shard in shards)
    assert folder.shard_file("block:0", "patch", 1).exists()
    assert verify(path).ok


def test_foreign_files_are_not_for_gc(path):
    names = litter(
        path,
        f"feature_sets/{KEY}/norm/patch/photo.jpg",
        f"feature_sets/{KEY}/norm/patch/c/07/0/0",
        f"feature_sets/{KEY}/ledger/norm/notes.parquet",
        "photo.jpg",
    )
    assert gc(path).removed == []
    assert set(names) <= files(path)


def test_a_damaged_feature_set_stops_it_before_its_data_is_touched(path):
    attributes = path / "feature_sets" / KEY / "zarr.json"
    good = attributes.read_text()
    for text in ("{", good.replace('"taps"', '"tops"')):
        attributes.write_text(text)
        before = content(path)
        with pytest.raises(FormatError, match=r"zarr\.json is damaged"):
            gc(path)
        assert content(path) == before
    attributes.unlink()
    before = content(path)
    assert gc(path).removed == []  # it may come back from a copy
    assert content(path) == before


@pytest.mark.parametrize(
    ("lock", "name", "leftover"),
    [
        (f".locks/{KEY}.lock", KEY, LEFTOVERS[1]),
        (".locks/items-fake.lock", "items-fake", "items/fake/00001.parquet.1.partial"),
        (".locks/items-fake.lock", "items-fake", "labels/fake/depth-00001.parquet.1.partial"),
        (".locks/index.lock", "index", "index.duckdb.1.partial"),
        ("runs/deap-1/.lock", "runs/deap-1", "runs/deap-1/checkpoint.pt.1.partial"),
        ("targets/.locks/0123.lock", "targets/0123", "targets/0123.1.partial/depth.npy"),
        (f".locks/{KEY}.lock", KEY, f".removed/{KEY}.1-ab/zarr.json"),
    ],
)
def test_what_another_process_writes_is_left_alone(path, lock, name, leftover):
    litter(path, leftover)
    with exclusive(path / lock, purpose="working"):
        report = gc(path)
        assert name in report.busy
        assert (path / leftover).exists()
    assert gc(path).removed == [leftover]


def test_a_half_removed_run_goes_and_an_empty_one_stays(path):
    litter(
        path, "runs/deap-1/pictures/a.png", "runs/deap-2/run.json", "runs/deap-2/head.safetensors"
    )
    (path / "runs" / "deap-3").mkdir()  # a training that takes its lock next
    assert gc(path).removed == ["runs/deap-1/pictures/a.png"]
    assert sorted(p.name for p in (path / "runs").iterdir()) == ["deap-2", "deap-3"]


def test_targets_go_only_when_asked_for(path):
    names = litter(
        path, "targets/0123/depth.npy", "targets/0123/targets.json", "targets/4567/a.npy"
    )
    assert gc(path).removed == []
    with exclusive(path / "targets" / ".locks" / "4567.lock", purpose="preparing targets"):
        report = gc(path, targets=True)
    assert report.removed == names[:2]
    assert report.busy == ["targets/4567"]
    assert not (path / "targets" / "0123").exists()


def test_a_read_only_store_can_be_listed(path, monkeypatch):
    (name,) = litter(path, f"feature_sets/{KEY}/norm/patch/c/0/0/0.abc.partial")
    monkeypatch.setattr(type(open_folder(path)), "is_writable", False)
    assert gc(path, dry_run=True).removed == [name]
    assert not (path / ".locks" / "index.lock").exists()


def test_removing_a_feature_set_leaves_the_rest(path):
    before = content(path)
    report = remove_feature_set(path, "fake@16")
    assert report.removed == [f"feature_sets/{KEY}"]
    assert report.bytes > 10_000
    assert content(path) == {
        name: digest
        for name, digest in before.items()
        if not name.startswith(f"feature_sets/{KEY}")
    }
    with pytest.raises(NotFoundError, match="no feature set"):
        remove_feature_set(path, KEY)


def test_a_removed_feature_set_leaves_the_index_too(path):
    count = "select (select count(*) from rows) + (select count(*) from ledger)"
    count += " + (select count(*) from taps) + (select count(*) from samples) as n"
    assert index.query(path, count)["n"].to_pylist() == [20 + 60 + 3 + 19]
    remove_feature_set(path, KEY)
    assert index.query(path, count)["n"].to_pylist() == [0]
    assert index.query(path, "from items")["item"].null_count == 0


def test_a_removal_waits_for_no_writer(path):
    with (
        exclusive(path / ".locks" / f"{KEY}.lock", purpose="extracting"),
        pytest.raises(ConflictError, match="extracting"),
    ):
        remove_feature_set(path, KEY)
    assert verify(path).ok


def test_a_removal_that_dies_in_between_has_removed_it_all_the_same(path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", full_disk)
    with pytest.raises(StorageError, match="No space"):
        remove_feature_set(path, KEY)
    monkeypatch.undo()
    assert open_folder(path).feature_set_keys() == []
    assert verify(path).problems == []
    assert len(gc(path).removed) > 20
    assert list((path / ".removed").iterdir()) == []
    fake_extract(path, [FakeReader(20, bad=[3])])
    assert verify(path).rows == 19


def full_disk(*_args, **_options):
    raise OSError(28, os.strerror(28))


def test_tombstones_take_rows_out_of_what_is_listed_and_gc_keeps_them(path):
    folder = path / "feature_sets" / KEY / "tombstones"
    folder.mkdir()
    rows = index.samples(path)["row"].to_pylist()
    pq.write_table(pa.table({"row": rows[:2]}), folder / "00000.parquet")
    assert gc(path).removed == []
    assert index.samples(path)["row"].to_pylist() == rows[2:]
