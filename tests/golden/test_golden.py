"""Promise 8: a store that an older version wrote reads as it did then."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

import featstore
from featstore.plan import FORMAT_VERSION
from featstore.verify import verify

HERE = Path(__file__).parent
ROWS = [1, *range(3, 18)]  # 0 and 2 were rejected
HASHES = {
    "block:0": "547fe4aa617a2ce2",
    "block:0/prefix": "6eca3ba45f307ec1",
    "norm": "d331bfab364f51fd",
    "norm.mean": "2e3a3b5f3a64ab24",
}


@pytest.fixture
def store(tmp_path):
    shutil.copytree(HERE / "format1.zarr", tmp_path / "s.zarr")
    return featstore.open(tmp_path / "s.zarr")


def test_every_format_up_to_now_has_a_golden_store():
    written = {path.name for path in HERE.glob("*.zarr")}
    assert written == {f"format{number}.zarr" for number in range(1, FORMAT_VERSION + 1)}


def test_its_rows_are_found(store):
    samples = store.feature_set(name="fake@16").samples()
    assert sorted(samples["row"].to_pylist()) == ROWS
    assert sorted(set(samples["view"].to_pylist())) == ["hflip", "plain"]


@pytest.mark.parametrize("name", HASHES)
def test_its_numbers_are_the_same(store, name):
    values = store.feature_set().read(name, ROWS)
    assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == HASHES[name]


def test_its_labels_and_norm_read(store):
    item = store.samples("path = '00004.npy'")["item"][0].as_py()
    assert store.read_label("fake", item, "depth").source == "exact"
    assert store.feature_set().final_norm().kind == "layer_norm"


def test_it_verifies(store):
    report = verify(store.path)
    assert report.ok
    assert report.rows == 16
