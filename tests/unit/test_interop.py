"""Other Zarr readers open the arrays and give the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from featstore.store import open_folder
from tests.fakes import FakeReader, fake_extract, fake_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("interop") / "s.zarr"
    fake_extract(path, [FakeReader(20)])
    return open_folder(path).feature_set(fake_plan().key())


@pytest.fixture(scope="module")
def expected(folder):
    from featstore.arrays import open_array

    return open_array(folder, "norm", "patch")[:]


def test_zarr_walks_from_the_store_to_the_array(folder, expected):
    root = zarr.open_group(folder.path.parents[1], mode="r")
    assert root.attrs["featstore"]["format"] == 1
    array = root[f"feature_sets/{folder.key}/norm/patch"]
    np.testing.assert_array_equal(array[:], expected)
    assert array.metadata.dimension_names == ("row", "norm_token", "norm_dim")


def test_xarray_opens_a_tap(folder, expected):
    xarray = pytest.importorskip("xarray")
    with xarray.open_zarr(folder.path / "norm", consolidated=False) as opened:
        np.testing.assert_array_equal(opened["patch"].values, expected)
        assert opened["patch"].dims == ("row", "norm_token", "norm_dim")


def test_tensorstore_reads_the_array(folder, expected):
    tensorstore = pytest.importorskip("tensorstore")
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder.array_path("norm", "patch"))},
    }
    array = tensorstore.open(spec, open=True, read=True).result()
    np.testing.assert_array_equal(array.read().result(), expected)


def test_dimension_names_are_unique_over_the_feature_set(folder):
    sizes: dict[str, int] = {}
    for tap, shape in folder.taps.items():
        for array in shape.arrays:
            opened = zarr.open_array(folder.array_path(tap, array), mode="r")
            for name, size in zip(opened.metadata.dimension_names, opened.shape, strict=True):
                assert sizes.setdefault(name, size) == size
