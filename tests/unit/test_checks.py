"""Damage beside the shards is found, and what cannot be repaired is never made worse."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featstore import checks
from featstore.errors import ConflictError
from featstore.files import exclusive
from featstore.store import write_attributes
from featstore.types import TapShape
from featstore.verify import verify
from tests.fakes import SHAPES, FakeReader, content, fake_extract, fake_plan

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


@pytest.fixture
def feature_set(path):
    return path / "feature_sets" / KEY


def no_repairer(*_args, **_options):
    raise AssertionError("nothing here can be extracted again")


def found(path):
    return [(problem.kind, problem.file) for problem in verify(path).problems]


def inside(name):
    return f"feature_sets/{KEY}/{name}"


def test_a_lost_assignment_is_found_and_a_repair_deletes_nothing(path, feature_set):
    (feature_set / "assignments" / "00000.parquet").unlink()
    before = content(path)
    report = verify(path, repair=True, repairer=no_repairer)
    assert not report.ok
    assert {problem.kind for problem in report.problems} == {"assignment"}
    assert content(path) == before


def test_a_damaged_assignment_is_named_and_the_numbers_are_checked_all_the_same(path, feature_set):
    (feature_set / "assignments" / "00000.parquet").write_bytes(b"not parquet")
    shard = feature_set / "norm" / "patch" / "c" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert found(path) == [
        ("assignment", inside("assignments/00000.parquet")),
        ("shard", inside("norm/patch/c/0/0/0")),
    ]


def test_a_row_that_is_assigned_twice_is_found(path, feature_set):
    first = feature_set / "assignments" / "00000.parquet"
    shutil.copy(first, first.with_name("00001.parquet"))
    assert ("assignment", inside("assignments")) in found(path)


def test_a_feature_set_without_its_attributes_is_found(path, feature_set):
    (feature_set / "zarr.json").unlink()
    assert found(path) == [("feature set", inside("zarr.json"))]


def change_attributes(feature_set, **changes):
    file = feature_set / "zarr.json"
    attributes = json.loads(file.read_text())["attributes"]["featstore"]
    write_attributes(feature_set, {**attributes, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"taps": None},
        {"plan": {"architecture": "other"}},
        {"plan": fake_plan(resize="letterbox").to_json()},
        {"shard_rows": 0},
        {"dtype": "int8"},
    ],
    ids=str,
)
def test_attributes_that_cannot_be_right_are_found(path, feature_set, changes):
    change_attributes(feature_set, **changes)
    assert found(path) == [("feature set", inside("zarr.json"))]


def test_ledgers_of_a_tap_that_the_attributes_do_not_name_are_found(path, feature_set):
    file = feature_set / "zarr.json"
    taps = json.loads(file.read_text())["attributes"]["featstore"]["taps"]
    change_attributes(feature_set, taps={tap: taps[tap] for tap in ("block:0", "norm")})
    assert found(path) == [("feature set", inside("ledger/norm.mean"))]


def test_foreign_files_are_found_and_removed(path, feature_set):
    names = [
        "ledger/norm/notes.txt",
        "ledger/norm/notes.parquet",
        "ledger/norm/0.parquet",
        "norm/patch/c/00/0/0",
        "norm/patch/c/0/0/photo.jpg",
        "norm/patch/x",
    ]
    for name in names:
        (feature_set / name).parent.mkdir(parents=True, exist_ok=True)
        (feature_set / name).write_bytes(b"hello")
    (path / "items" / "fake" / "notes.txt").write_text("hello")
    expected = {("foreign", inside(name)) for name in names}
    assert set(found(path)) == {*expected, ("foreign", "items/fake/notes.txt")}
    report = verify(path, repair=True, repairer=no_repairer)
    assert report.ok
    assert not any((feature_set / name).exists() for name in names)
    assert found(path) == []


def test_a_repair_waits_for_no_writer_for_ever(path, feature_set, monkeypatch):
    monkeypatch.setattr("featstore.verify._LOCK_WAIT_S", 0.05)
    (feature_set / "norm" / "patch" / "x").write_bytes(b"hello")
    with (
        exclusive(path / ".locks" / f"{KEY}.lock", purpose="extracting"),
        pytest.raises(ConflictError, match="extracting"),
    ):
        verify(path, repair=True)
    assert (feature_set / "norm" / "patch" / "x").exists()


@pytest.mark.parametrize("text", [None, "{", '{"node_type": "array"}'], ids=str)
@pytest.mark.parametrize("folder", ["feature_sets", f"feature_sets/{KEY}/norm"])
def test_group_metadata_is_checked_and_written_anew(path, folder, text):
    file = path / folder / "zarr.json"
    good = file.read_text()
    file.unlink() if text is None else file.write_text(text)
    assert found(path) == [("group", f"{folder}/zarr.json")]
    assert verify(path, repair=True, repairer=no_repairer).ok
    assert file.read_text() == good


def test_an_array_that_does_not_cover_its_shards_is_found_and_grown(path, feature_set):
    file = feature_set / "norm" / "prefix" / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["shape"][0] = 16  # of 24
    file.write_text(json.dumps(metadata))
    assert found(path) == [("array", inside("norm/prefix/zarr.json"))]
    assert verify(path, repair=True, repairer=no_repairer).ok
    assert json.loads(file.read_text())["shape"][0] == 24


@pytest.mark.parametrize("text", [None, "{", '{"format": "x"}'], ids=str)
def test_the_description_of_a_data_set_is_checked(path, text):
    file = path / "items" / "fake" / "dataset.json"
    file.unlink() if text is None else file.write_text(text)
    ((kind, name),) = found(path)
    assert kind == "items"
    assert name.startswith("items/fake/")


def test_tombstones_and_the_final_norm_are_checked(path, feature_set):
    (feature_set / "tombstones").mkdir()
    pq.write_table(pa.table({"row": [1]}), feature_set / "tombstones" / "00000.parquet")
    assert found(path) == []
    (feature_set / "tombstones" / "00001.parquet").write_bytes(b"x")
    (feature_set / "norm.safetensors").write_bytes(b"x")
    assert found(path) == [
        ("norm", inside("norm.safetensors")),
        ("tombstones", inside("tombstones/00001.parquet")),
    ]


def test_an_edited_label_is_found_by_its_digest(path):
    (file,) = (path / "labels" / "fake").glob("depth-*.parquet")
    table = pq.read_table(file)
    column = table.schema.get_field_index("data")
    edited = pa.array([b"x" * 10, *table["data"].to_pylist()[1:]], pa.binary())
    pq.write_table(table.set_column(column, "data", edited), file)
    assert found(path) == [("labels", f"labels/fake/{file.name}")]


def test_leftovers_are_waste_wherever_they_lie(path, feature_set):
    names = [
        "zarr.json.1.partial",
        "ledger/norm/00009.parquet.1.partial",
        "norm/patch/c/0/0/0.x.partial",
        "assignments/00001.parquet.1.partial",
    ]
    for name in names:
        (feature_set / name).write_bytes(b"x")
    (path / "labels" / "fake" / "depth-00007.parquet.1.partial").write_bytes(b"x")
    report = verify(path)
    assert report.problems == []
    expected = {*map(inside, names), "labels/fake/depth-00007.parquet.1.partial"}
    assert set(report.waste) == expected


def test_a_pooled_chunk_is_read_once_a_shard(path, monkeypatch):
    chunks = []
    from featstore.shards import ShardFile

    original = ShardFile.copy_chunk

    def copy_chunk(self, chunk, out):
        chunks.append((self.path, chunk))
        return original(self, chunk, out)

    monkeypatch.setattr(ShardFile, "copy_chunk", copy_chunk)
    assert verify(path).ok
    assert len(chunks) == len(set(chunks)) == 19 * 4 + 3  # rows x dense arrays, pooled shards


STEPS = ["_taps", "_files", "_ledgers", "_read_assignments", "_check_file", "_check_shards"]


@pytest.mark.parametrize("step", STEPS)
def test_what_is_written_between_two_looks_is_no_problem(path, monkeypatch, step):
    original = getattr(checks._FeatureSetCheck, step)
    shapes = [*SHAPES, TapShape(tap="block:1", dim=8, grid=(4, 4), n_prefix=1)]

    def write_first(self, *arguments):
        monkeypatch.setattr(checks._FeatureSetCheck, step, original)
        fake_extract(path, [FakeReader(50, bad=[3])], shapes=shapes)
        return original(self, *arguments)

    monkeypatch.setattr(checks._FeatureSetCheck, step, write_first)
    assert verify(path).problems == []
    monkeypatch.undo()
    report = verify(path)
    assert (report.problems, report.rows) == ([], 49)
