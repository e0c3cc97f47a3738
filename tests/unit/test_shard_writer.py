"""Writing shard files: zarr's own bytes, whole or absent."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from featstore.arrays import ensure_array, open_array
from featstore.errors import StorageError
from featstore.shard_writer import open_writer, write_shard
from featstore.store import FeatureSetFolder, write_attributes
from featstore.types import TapShape

SHARD_ROWS = 5
DENSE = TapShape(tap="norm", dim=6, grid=(2, 2), n_prefix=1)
POOLED = TapShape(tap="norm.cls", dim=6, grid=None)
CASES = [(DENSE, "patch"), (DENSE, "prefix"), (POOLED, "pooled")]


def make_folder(path, dtype):
    taps = {
        "norm": {"dim": 6, "grid": [2, 2], "n_prefix": 1},
        "norm.cls": {"dim": 6, "grid": None, "n_prefix": 0},
    }
    write_attributes(path, {"dtype": dtype, "shard_rows": SHARD_ROWS, "taps": taps})
    folder = FeatureSetFolder(path)
    for shape, array in CASES:
        ensure_array(folder, shape, array, n_rows=2 * SHARD_ROWS)
    return folder


def random_block(folder, shape, array):
    bits = np.random.default_rng(1).integers(0, 2**14, (SHARD_ROWS, *shape.arrays[array]))
    if folder.dtype == "bfloat16":
        return bits.astype(np.uint16)
    return bits.astype(folder.store_dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "array"), CASES)
@pytest.mark.parametrize("holes", [(), (0, 3), tuple(range(SHARD_ROWS))])
def test_the_bytes_are_those_of_zarr(tmp_path, dtype, shape, array, holes):
    import zarr

    ours, theirs = make_folder(tmp_path / "ours", dtype), make_folder(tmp_path / "theirs", dtype)
    block = random_block(ours, shape, array)
    block[list(holes)] = 0x7FC0 if dtype == "bfloat16" else np.nan
    write_shard(ours, shape.tap, array, 1, block)
    target = zarr.open_array(theirs.array_path(shape.tap, array), mode="r+")
    target.with_config({"write_empty_chunks": False})[SHARD_ROWS:] = block
    files = [folder.shard_file(shape.tap, array, 1) for folder in (ours, theirs)]
    if len(holes) == SHARD_ROWS:
        assert not any(file.exists() for file in files)
    else:
        assert files[0].read_bytes() == files[1].read_bytes()
    np.testing.assert_array_equal(open_array(ours, shape.tap, array)[SHARD_ROWS:], block)


def test_a_shard_has_no_name_before_it_is_committed(tmp_path):
    folder = make_folder(tmp_path / "set", "float16")
    block = random_block(folder, DENSE, "patch")
    file = folder.shard_file("norm", "patch", 0)
    writer = open_writer(folder, "norm", "patch", 0)
    writer.append(3, block[3])
    assert [path.suffix for path in file.parent.iterdir()] == [".partial"]
    writer.discard()
    assert list(file.parent.iterdir()) == []


def test_a_shard_that_lost_its_rows_loses_its_file(tmp_path):
    folder = make_folder(tmp_path / "set", "float16")
    write_shard(folder, "norm", "patch", 0, random_block(folder, DENSE, "patch"))
    write_shard(folder, "norm", "patch", 0, np.full((SHARD_ROWS, 4, 6), np.nan, np.float16))
    assert not folder.shard_file("norm", "patch", 0).exists()


class FullDisk:
    """A file that takes nothing, not even what it has buffered."""

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        self.write(b"")


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    folder = make_folder(tmp_path / "set", "float16")
    block = random_block(folder, DENSE, "patch")
    writer = open_writer(folder, "norm", "patch", 0)
    writer.append(0, block[0])
    writer._file.close()
    writer._file = FullDisk()
    with pytest.raises(StorageError, match="No space left"):
        writer.append(1, block[1])
    writer.discard()
    assert list(folder.shard_file("norm", "patch", 0).parent.iterdir()) == []
