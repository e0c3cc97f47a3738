"""Opening stores, choosing feature sets, atomic files and locks."""

from __future__ import annotations

import json
import os

import pytest

from featstore.errors import (
    ConflictError,
    FormatError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from featstore.feature_sets import find_feature_set, read_final_norm
from featstore.files import PARTIAL, exclusive, next_number, remove_partials, write_bytes
from featstore.store import create_folder, crop_text, open_folder, parse_crop
from tests.fakes import FakeReader, fake_extract, fake_plan


def test_a_missing_store_says_how_to_make_one(tmp_path):
    with pytest.raises(NotFoundError, match="featstore extract --store"):
        open_folder(tmp_path / "none.zarr")


def test_a_folder_that_is_no_store_is_told_apart(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(NotFoundError, match="not a featstore store"):
        open_folder(tmp_path)
    with pytest.raises(InvalidInputError, match="not a featstore store"):
        create_folder(tmp_path, library="0")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_foreign_zarr_group_is_no_store(tmp_path):
    (tmp_path / "zarr.json").write_text(json.dumps({"attributes": {}}))
    with pytest.raises(FormatError, match="not written by featstore"):
        open_folder(tmp_path)


def test_a_newer_format_is_refused_with_both_versions(tmp_path):
    path = create_folder(tmp_path / "s.zarr", library="9").path
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["featstore"]["format"] = 99
    (path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(FormatError, match=r"format 99.*format 1"):
        open_folder(path)
    with pytest.raises(FormatError, match="format 99"):
        fake_extract(path, [FakeReader(2)])


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "s.zarr"
    fake_extract(path, [FakeReader(4)])
    fake_extract(path, [FakeReader(4)], plan=fake_plan(image_size=(32, 32)))
    return open_folder(path)


def test_a_feature_set_is_chosen_by_key_and_by_prefix(two_sets):
    key = fake_plan().key()
    assert find_feature_set(two_sets, key).key == key
    assert find_feature_set(two_sets, key[:5]).key == key


def test_several_that_fit_are_told_apart_field_by_field(two_sets):
    with pytest.raises(InvalidInputError, match=r"image_size: \[.*\] -> \[.*\]"):
        find_feature_set(two_sets)
    with pytest.raises(InvalidInputError, match="--feature-set KEY"):
        find_feature_set(two_sets, backbone="fake")


def test_an_unknown_feature_set_offers_the_nearest(two_sets):
    with pytest.raises(NotFoundError, match="Did you mean 'fake@16'"):
        find_feature_set(two_sets, "fake@15")


def test_the_final_norm_reads_back_and_its_damage_is_seen(two_sets):
    folder = find_feature_set(two_sets, fake_plan().key())
    norm = read_final_norm(folder)
    assert (norm.kind, norm.eps, norm.weight.shape) == ("layer_norm", 1e-6, (8,))
    path = folder.path / "norm.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(FormatError, match=r"norm\.safetensors is damaged"):
        read_final_norm(folder)
    path.write_bytes(whole)


@pytest.mark.parametrize("crop", [None, (0, 0, 10, 20), (0.5, 1.25, 10.0, 20.0)])
def test_a_crop_survives_its_text(crop):
    assert parse_crop(crop_text(crop)) == crop


def test_a_lock_names_its_holder_and_frees_itself(tmp_path):
    lock = tmp_path / "a.lock"
    with (
        exclusive(lock, purpose="testing"),
        pytest.raises(ConflictError, match=f"Process {os.getpid()} .*testing"),
        exclusive(lock, purpose="second"),
    ):
        pass
    with exclusive(lock, purpose="third"):
        pass


def test_a_failed_write_leaves_the_old_file_and_no_waste(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def refuse(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_partials_are_swept(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"x{PARTIAL}").write_bytes(b"")
    (tmp_path / "a" / "x").write_bytes(b"")
    assert remove_partials(tmp_path) == 1
    assert (tmp_path / "a" / "x").exists()


def test_a_read_only_store_says_so(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere; the command-line tests run as another user")
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(4)])
    path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        fake_extract(path, [FakeReader(8)])


def test_the_next_file_is_numbered_after_the_last_even_where_one_was_lost(tmp_path):
    assert next_number([]) == 0
    names = ["00000.parquet", "00002.parquet", "depth-00007.parquet", "notes.txt"]
    assert next_number([tmp_path / name for name in names]) == 8
