"""Reading equals zarr-python, bit for bit, for any rows, taps, order and duplicates."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import featstore
from featstore.rows import RowReader
from tests.fakes import FakeReader, fake_extract

N_IMAGES = 30
NAMES = ("block:0", "block:0/prefix", "norm", "norm/prefix", "norm.mean")


def compressed(features, target):
    """Copy a feature set into a store whose arrays have a compressor and other chunks."""
    store = features.store.path
    shutil.copytree(store, target)
    other = featstore.open(target).feature_set()
    for name in NAMES:
        values = zarr_array(features, name)[:]
        path = array_path(other, name)
        shutil.rmtree(path)
        array = zarr.create_array(
            zarr.storage.LocalStore(path),
            shape=values.shape,
            chunks=(2, *values.shape[1:]),
            dtype=values.dtype,
            fill_value=float("nan"),
            compressors=zarr.codecs.ZstdCodec(),
        )
        array[:] = values
    return other


def array_path(features, name):
    tap, _, part = name.partition("/")
    return features.folder.array_path(tap, part or ("pooled" if tap.endswith(".mean") else "patch"))


def zarr_array(features, name):
    return zarr.open_array(array_path(features, name), mode="r")


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "s.zarr"
    fake_extract(path, [FakeReader(N_IMAGES)])
    return featstore.open(path).feature_set()


@pytest.fixture(scope="module")
def through_zarr(direct, tmp_path_factory):
    return compressed(direct, tmp_path_factory.mktemp("zarr") / "s.zarr")


@pytest.fixture(scope="module")
def truth(direct):
    return {name: zarr_array(direct, name)[:] for name in NAMES}


def test_each_store_takes_its_own_path(direct, through_zarr):
    for name in NAMES:
        assert RowReader(direct.folder, name).is_direct
        assert not RowReader(through_zarr.folder, name).is_direct


rows_strategy = st.lists(st.integers(0, N_IMAGES - 1), max_size=40)


@settings(deadline=None, max_examples=60)
@given(rows=rows_strategy, name=st.sampled_from(NAMES), is_direct=st.booleans())
def test_reading_rows_equals_zarr(direct, through_zarr, truth, rows, name, is_direct):
    found = (direct if is_direct else through_zarr).read(name, rows)
    expected = truth[name][np.array(rows, np.int64)]
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=30)
@given(
    rows=rows_strategy,
    names=st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    batch_size=st.integers(1, 12),
    shuffle=st.sampled_from([False, True, "window"]),
    is_float32=st.booleans(),
    is_direct=st.booleans(),
)
def test_streaming_equals_zarr(
    direct, through_zarr, truth, rows, names, batch_size, shuffle, is_float32, is_direct
):
    stream = (direct if is_direct else through_zarr).stream(
        names,
        rows=rows,
        batch_size=batch_size,
        shuffle=shuffle,
        dtype="float32" if is_float32 else None,
    )
    found = []
    for batch in stream:
        found += batch.rows.tolist()
        for name in names:
            expected = truth[name][batch.rows]
            if is_float32:
                expected = expected.astype(np.float32)
            assert batch[name].tobytes() == expected.tobytes()
    assert sorted(found) == sorted(rows)
    if not shuffle:
        assert found == rows


def test_the_direct_path_reads_what_zarr_says_the_bytes_are(direct):
    """The fast path's idea of the layout holds for what zarr itself wrote."""
    metadata = json.loads((array_path(direct, "norm") / "zarr.json").read_text())
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
