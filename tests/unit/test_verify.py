"""Promise 2: damage of every kind is found, named and repaired."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import featstore.repair
from featstore.cleanup import gc, remove_feature_set
from featstore.errors import ConflictError, NotFoundError
from featstore.files import exclusive
from featstore.sources import Readers
from featstore.store import open_folder
from featstore.verify import verify
from tests.fakes import FakeReader, FakeSource, content, fake_extract, fake_plan

KEY = fake_plan().key()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    fake_extract(path, [FakeReader(20, bad=[3])])
    return path


@pytest.fixture
def path(whole, tmp_path, monkeypatch):
    """Give a fresh copy, and a backbone for repairs."""
    copy = tmp_path / "s.zarr"
    shutil.copytree(whole, copy)

    def source(folder, readers, taps, weights, device):
        return FakeSource(Readers(open_folder(copy), [FakeReader(20, bad=[3])]))

    monkeypatch.setattr(featstore.repair, "_source", source)
    monkeypatch.setattr(
        featstore.repair,
        "Readers",
        lambda store, given=(): Readers(store, [FakeReader(20, bad=[3])]),
    )
    return copy


def shard(path, tap="norm", array="patch", number=0):
    return open_folder(path).feature_set(KEY).shard_file(tap, array, number)


def flip(file, offset):
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)


def test_a_whole_store_is_ok(path):
    report = verify(path)
    assert report.ok
    assert (report.rows, report.shards) == (19, 9)  # 3 shards of 3 taps
    assert report.problems == []


def damage_flipped_bit(path):
    flip(shard(path), 100)


def damage_flipped_index(path):
    flip(shard(path), -20)


def damage_truncated(path):
    file = shard(path, number=1)
    file.write_bytes(file.read_bytes()[:-50])


def damage_emptied(path):
    shard(path, array="prefix").write_bytes(b"")


def damage_missing(path):
    shard(path, "block:0", number=2).unlink()


def damage_swapped(path):
    one, other = shard(path, "block:0"), shard(path, "norm")
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def damage_pooled(path):
    flip(shard(path, "norm.mean", "pooled"), 3)


def damage_ledger(path):
    file = open_folder(path).feature_set(KEY).ledger_path("norm", 1)
    file.write_bytes(file.read_bytes()[:-30])


def damage_ledger_swapped(path):
    folder = open_folder(path).feature_set(KEY)
    folder.ledger_path("norm", 1).write_bytes(folder.ledger_path("norm", 0).read_bytes())


def damage_metadata(path):
    (open_folder(path).feature_set(KEY).array_path("norm", "patch") / "zarr.json").write_text("{")


def damage_foreign(path):
    shard(path).with_name("photo.jpg").write_bytes(b"hello")


DAMAGES = {name: value for name, value in globals().items() if name.startswith("damage_")}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_named_and_repaired(damage, path, whole):
    damage(path)
    found = verify(path)
    assert not found.ok
    assert found.problems
    for problem in found.problems:
        assert problem.feature_set == KEY
        assert problem.file.startswith(f"feature_sets/{KEY}/")
    report = verify(path, repair=True)
    assert report.ok, report.problems
    assert all(problem.repaired for problem in report.problems)
    assert verify(path).problems == []
    after, before = content(path), content(whole)
    metadata = f"feature_sets/{KEY}/norm/patch/zarr.json"
    if damage is damage_metadata:  # rewritten as zarr writes it, not as it grew
        after.pop(metadata), before.pop(metadata)
    assert after == before, "a repair ends with the bytes of an undisturbed run"


def test_a_repair_touches_only_what_is_damaged(path):
    damage_flipped_bit(path)
    times = {file: file.stat().st_mtime_ns for file in (path / "feature_sets").rglob("*/c/**/*")}
    verify(path, repair=True)
    changed = {file for file, time in times.items() if file.stat().st_mtime_ns != time}
    assert {file for file in changed if file.is_file()} == {
        shard(path),
        shard(path, array="prefix"),
    }


def test_the_rows_of_a_flipped_bit_are_named(path):
    damage_flipped_bit(path)
    (problem,) = verify(path).problems
    assert (problem.kind, problem.tap, problem.shard, problem.rows) == ("shard", "norm", 0, (0,))


def test_random_flips_anywhere_in_any_shard_are_found(path):
    random = np.random.default_rng(0)
    files = [f for f in (path / "feature_sets").rglob("c/**/*") if f.is_file()]
    for _ in range(60):
        file = files[random.integers(len(files))]
        original = file.read_bytes()
        flip(file, int(random.integers(len(original))))
        assert not verify(path).ok, file
        file.write_bytes(original)
    assert verify(path).ok


def test_damaged_labels_and_items_are_found(path):
    label = next((path / "labels" / "fake").glob("depth-*.parquet"))
    whole_label = label.read_bytes()
    flip(label, len(whole_label) // 2)
    assert [problem.kind for problem in verify(path).problems] == ["labels"]
    label.write_bytes(whole_label)
    item = next((path / "items" / "fake").glob("*.parquet"))
    item.write_bytes(item.read_bytes()[:-10])
    assert [problem.kind for problem in verify(path).problems] == ["items"]


def test_waste_is_no_problem_and_gc_sweeps_it(path, whole):
    partial = shard(path).with_name("0.123.partial")
    partial.write_bytes(b"x" * 1000)
    uncommitted = open_folder(path).feature_set(KEY).ledger_path("norm", 2)
    uncommitted.unlink()
    report = verify(path)
    assert report.ok
    assert len(report.waste) == 3  # the partial, and the patch and prefix of the shard
    listed = gc(path, dry_run=True)
    assert partial.exists()
    swept = gc(path)
    assert listed.removed == swept.removed
    assert len(swept.removed) == 3
    assert not partial.exists()
    fake_extract(path, [FakeReader(20, bad=[3])])
    assert content(path) == content(whole)


def test_gc_leaves_a_feature_set_that_is_being_written(path):
    partial = shard(path).with_name("0.123.partial")
    partial.write_bytes(b"x")
    with exclusive(path / ".locks" / f"{KEY}.lock", purpose="extracting"):
        report = gc(path)
    assert report.busy == [KEY]
    assert partial.exists()


def test_removing_a_feature_set(path):
    with (
        exclusive(path / ".locks" / f"{KEY}.lock", purpose="extracting"),
        pytest.raises(ConflictError, match="extracting"),
    ):
        remove_feature_set(path, KEY)
    report = remove_feature_set(path, KEY[:6])
    assert report.bytes > 0
    assert open_folder(path).feature_set_keys() == []
    with pytest.raises(NotFoundError, match="no feature set"):
        remove_feature_set(path, KEY)
