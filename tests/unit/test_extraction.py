"""The extraction engine, with a backbone of NumPy: what is stored, reused, rejected."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import pytest

from featstore.arrays import open_array
from featstore.errors import BadImageError, ConflictError, InvalidInputError
from featstore.files import exclusive
from featstore.ledger import read_ledger
from featstore.plan import RunOptions
from featstore.store import open_folder
from tests.fakes import SHAPES, FakeReader, content, fake_extract, fake_plan


@pytest.fixture
def path(tmp_path):
    return tmp_path / "features.zarr"


def stored(path, tap, array="patch"):
    folder = open_folder(path).feature_set(fake_plan().key())
    return open_array(folder, tap, array)[:]


def test_every_image_is_stored_once_and_reads_back_as_computed(path):
    report = fake_extract(path, [FakeReader(20)])
    assert (report.rows, report.new_rows, report.reused_rows) == (20, 20, 0)
    block, norm = stored(path, "block:0"), stored(path, "norm")
    assert block.shape == (24, 16, 8)  # 20 rows in shards of 8
    assert np.isfinite(block[:20]).all()
    assert np.isnan(block[20:]).all()
    np.testing.assert_array_equal(block[:20] * 2, norm[:20])
    assert stored(path, "norm.mean", "pooled").shape == (24, 8)


def test_a_second_run_reuses_everything_and_changes_no_byte(path):
    fake_extract(path, [FakeReader(20)])
    before = content(path)
    report = fake_extract(path, [FakeReader(20)])
    assert (report.rows, report.new_rows, report.reused_rows) == (20, 0, 20)
    assert content(path) == before


def test_equal_images_of_two_data_sets_share_rows(path):
    report = fake_extract(path, [FakeReader(10), FakeReader(10, name="copy")])
    assert report.rows == 10
    assert open_folder(path).datasets() == ["copy", "fake"]


def test_a_tap_added_later_leaves_the_others_untouched(path):
    fake_extract(path, [FakeReader(20)], shapes=SHAPES[:1])
    before = content(path)
    report = fake_extract(path, [FakeReader(20)], shapes=SHAPES[1:])
    assert report.new_rows == 20
    after = content(path)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"feature_sets/{fake_plan().key()}/zarr.json"}  # it lists the taps
    np.testing.assert_array_equal(stored(path, "block:0")[:20] * 2, stored(path, "norm")[:20])


def test_new_images_go_to_new_shards(path):
    fake_extract(path, [FakeReader(20)])
    before = content(path)
    report = fake_extract(path, [FakeReader(30)])
    assert (report.rows, report.new_rows, report.reused_rows) == (30, 10, 20)
    after = content(path)
    grown = {name for name in before if after[name] != before[name]}
    assert all(name.endswith("zarr.json") for name in grown)
    assert stored(path, "norm").shape[0] == 40


def test_a_flipped_view_is_a_row_of_its_own(path):
    fake_extract(path, [FakeReader(6)])
    report = fake_extract(
        path, [FakeReader(6)], options=RunOptions(views=("plain", "hflip"), n_threads=1)
    )
    assert (report.rows, report.new_rows) == (12, 6)


def test_an_image_that_does_not_decode_is_listed_and_leaves_a_hole(path):
    reader = FakeReader(20, bad=[3, 4])
    report = fake_extract(path, [reader])
    assert report.rows == 18
    assert sorted(bad.path for bad in report.bad) == ["00003.npy", "00004.npy"]
    assert content(path) == content(path)
    again = fake_extract(path, [reader])
    assert (again.rows, len(again.bad)) == (18, 2)


def test_on_bad_image_fail_stops(path):
    with pytest.raises(BadImageError, match="00003"):
        fake_extract(
            path, [FakeReader(9, bad=[3])], options=RunOptions(on_bad_image="fail", n_threads=1)
        )


def test_an_overflow_rejects_the_row_of_that_tap_only_and_names_both(path):
    report = fake_extract(path, [FakeReader(9)], scale={"norm": 1e6})
    assert report.rows == 0
    assert {bad.path for bad in report.bad} == {f"{n:05d}.npy" for n in range(9)}
    assert "norm reached" in report.bad[0].reason
    assert "bfloat16" in report.bad[0].reason
    folder = open_folder(path).feature_set(fake_plan().key())
    assert set(read_ledger(folder, "block:0", 0)["status"].to_pylist()) == {"ok"}
    assert set(read_ledger(folder, "norm", 0)["status"].to_pylist()) == {"rejected"}


def test_a_nan_is_rejected(path):
    report = fake_extract(path, [FakeReader(3)], scale={"block:0": float("nan")})
    assert report.rows == 0
    assert "not finite" in report.bad[0].reason


def test_a_limit_draws_from_every_split(path):
    report = fake_extract(path, [FakeReader(100)], options=RunOptions(limit=30, n_threads=1))
    assert report.rows == 30
    from featstore.items import read_items

    splits = read_items(open_folder(path), "fake")["splits"].to_pylist()
    assert {split for one in splits for split in one} == {"train", "test"}


def test_an_unknown_split_is_refused_before_anything_is_written(path):
    with pytest.raises(InvalidInputError, match="test, train"):
        fake_extract(path, [FakeReader(5)], options=RunOptions(splits=("tset",)))
    assert not path.exists()


def test_a_second_writer_waits_for_one_that_plans_and_says_for_whom(path, monkeypatch):
    fake_extract(path, [FakeReader(5)])
    lock = open_folder(path).locks_path / f"{fake_plan().key()}.lock"
    monkeypatch.setattr("featstore.files._SOON_S", 0.01)
    held, told = contextlib.ExitStack(), []

    def progress(report):
        if report.message:
            told.append(report.message)
            held.close()

    held.enter_context(exclusive(lock, purpose="planning for the test"))
    assert fake_extract(path, [FakeReader(5)], progress=progress).rows == 5
    assert len(told) == 1
    assert re.fullmatch(r"Waiting for: Process \d+ on .*planning for the test\)\.", told[0])


def test_nobody_waits_for_ever(path, monkeypatch):
    fake_extract(path, [FakeReader(5)])
    lock = open_folder(path).locks_path / f"{fake_plan().key()}.lock"
    monkeypatch.setattr("featstore.extraction._PATIENCE_S", 0.05)
    with (
        exclusive(lock, purpose="planning for the test"),
        pytest.raises(ConflictError, match=r"Process \d+ on .*planning for the test"),
    ):
        fake_extract(path, [FakeReader(5)])


def test_a_foreign_data_set_of_the_same_name_is_refused(path):
    fake_extract(path, [FakeReader(5)])
    other = FakeReader(5)
    other.spec = "fake:/elsewhere"
    other.items = lambda: [
        item.__class__(path=f"other/{item.path}", splits=("train",))
        for item in FakeReader.items(other)
    ]
    other.read_image = lambda item: FakeReader(5, seed=1).read_image(
        item.__class__(path=item.path.rpartition("/")[2])
    )
    with pytest.raises(InvalidInputError, match="another data set named 'fake'"):
        fake_extract(path, [other])


def test_an_edited_label_replaces_the_stored_one(path):
    from featstore.labels import read_labels

    reader = FakeReader(5)
    fake_extract(path, [reader])
    store = open_folder(path)
    from featstore.items import read_items

    items = read_items(store, "fake")["item"].to_pylist()
    before = read_labels(store, "fake", items, "depth")
    edited = FakeReader(5)
    edited.depth = lambda path: FakeReader.depth(edited, path) + 1
    edited.read_image = FakeReader(5).read_image
    fake_extract(path, [edited])
    after = read_labels(store, "fake", items, "depth")
    assert all(before[item].data != after[item].data for item in items)


def test_labels_and_thumbnails_travel_in_the_store(path):
    from featstore.items import read_items
    from featstore.labels import read_labels, read_thumbnail

    fake_extract(path, [FakeReader(5)])
    store = open_folder(path)
    items = read_items(store, "fake")["item"].to_pylist()
    found = read_labels(store, "fake", items, "depth")
    assert set(found) == set(items)
    assert read_thumbnail(store, "fake", items[0])[:2] == b"\xff\xd8"  # JPEG


def test_the_order_of_rows_does_not_depend_on_the_order_of_files(tmp_path):
    fake_extract(tmp_path / "a", [FakeReader(20)])
    backwards = FakeReader(20)
    backwards.items = lambda: FakeReader(20).items()[::-1]
    fake_extract(tmp_path / "b", [backwards])
    key = fake_plan().key()
    name = f"feature_sets/{key}/assignments/00000.parquet"
    assert content(tmp_path / "a")[name] == content(tmp_path / "b")[name]
