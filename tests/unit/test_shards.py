"""Shard files: layouts that are understood, indices, chunks, the LRU of open files."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from featstore.arrays import chunk_crc32c, ensure_array
from featstore.errors import FormatError
from featstore.shard_writer import write_shard
from featstore.shards import (
    ABSENT,
    Recent,
    ShardFile,
    ShardLayout,
    find_layout,
    open_shard,
    read_shard_index,
)
from featstore.store import FeatureSetFolder, write_attributes
from featstore.types import TapShape

SHARD_ROWS = 4
SHAPE = TapShape(tap="norm", dim=6, grid=(2, 2), n_prefix=1)


def make_folder(path, dtype="float16"):
    attributes = {
        "dtype": dtype,
        "shard_rows": SHARD_ROWS,
        "taps": {"norm": {"dim": 6, "grid": [2, 2], "n_prefix": 1}},
    }
    write_attributes(path, attributes)
    folder = FeatureSetFolder(path)
    ensure_array(folder, SHAPE, "patch", n_rows=SHARD_ROWS)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "set")


@pytest.fixture
def block():
    return np.random.default_rng(0).standard_normal((SHARD_ROWS, 4, 6)).astype(np.float16)


def change_metadata(folder, change):
    path = folder.array_path("norm", "patch") / "zarr.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


def test_the_index_names_every_chunk_and_an_absent_one_is_all_ones(folder, block):
    block[2] = np.nan
    write_shard(folder, "norm", "patch", 0, block)
    path = folder.shard_file("norm", "patch", 0)
    index = read_shard_index(path, SHARD_ROWS)
    assert index.shape == (SHARD_ROWS, 2)
    assert index.dtype == np.uint64
    assert (index[2] == ABSENT).all()
    assert (index[[0, 1, 3], 1] == 4 * 6 * 2 + 4).all()
    data = path.read_bytes()
    offset, n_bytes = map(int, index[3])
    assert data[offset : offset + n_bytes - 4] == block[3].tobytes()


def test_a_chunk_is_copied_and_its_checksum_given(folder, block):
    write_shard(folder, "norm", "patch", 0, block)
    layout = find_layout(folder, "norm", "patch")
    assert layout == ShardLayout(n_chunks=SHARD_ROWS, chunk_bytes=4 * 6 * 2)
    file = ShardFile(folder.shard_file("norm", "patch", 0), layout)
    out = np.zeros(layout.chunk_bytes, np.uint8)
    assert file.copy_chunk(1, out) == chunk_crc32c(block[1])
    assert out.tobytes() == block[1].tobytes()


@pytest.mark.parametrize("n_left", [0, 1, 60, 100, 200])
def test_a_truncated_file_is_an_error(folder, block, n_left):
    write_shard(folder, "norm", "patch", 0, block)
    path = folder.shard_file("norm", "patch", 0)
    path.write_bytes(path.read_bytes()[:n_left])
    with pytest.raises(FormatError, match=r"verify --repair"):
        read_shard_index(path, SHARD_ROWS)
    with pytest.raises(FormatError, match=r"verify --repair"):
        ShardFile(path, find_layout(folder, "norm", "patch"))


def test_a_file_truncated_while_it_is_open_does_not_kill_the_process(folder, block):
    write_shard(folder, "norm", "patch", 0, block)
    path = folder.shard_file("norm", "patch", 0)
    layout = find_layout(folder, "norm", "patch")
    file = ShardFile(path, layout)
    with path.open("r+b") as handle:
        handle.truncate(0)
    with pytest.raises(FormatError, match="damaged or cut off"):
        file.copy_chunk(0, np.zeros(layout.chunk_bytes, np.uint8))


@pytest.fixture
def mapped(folder, block):
    """A shard file that a second reader has asked for."""
    write_shard(folder, "norm", "patch", 0, block)
    path, layout = folder.shard_file("norm", "patch", 0), find_layout(folder, "norm", "patch")
    first = open_shard(path, layout)
    assert not first.is_mapped
    second = open_shard(path, layout)
    assert second is first
    assert second.is_mapped
    return second


def test_a_file_that_is_asked_for_twice_is_read_from_a_map(mapped, block, monkeypatch):
    monkeypatch.setattr("os.preadv", None)
    out = np.zeros(mapped.layout.chunk_bytes, np.uint8)
    for chunk in (3, 0):
        crc = mapped.copy_chunk(chunk, out, is_in_memory=True)
        assert crc == chunk_crc32c(block[chunk])
        assert out.tobytes() == block[chunk].tobytes()


def test_what_may_come_from_the_disk_is_not_read_from_a_map(mapped, block, monkeypatch):
    mapped._map = None  # touching it would fail
    out = np.zeros(mapped.layout.chunk_bytes, np.uint8)
    assert mapped.copy_chunk(1, out) == chunk_crc32c(block[1])


def test_a_mapped_file_that_is_cut_off_does_not_kill_the_process(mapped):
    with mapped.path.open("r+b") as file:
        file.truncate(10)
    out = np.zeros(mapped.layout.chunk_bytes, np.uint8)
    with pytest.raises(FormatError, match="damaged or cut off"):
        mapped.copy_chunk(3, out, is_in_memory=True)


def test_a_flipped_bit_under_a_map_is_found(mapped):
    data = bytearray(mapped.path.read_bytes())
    data[50] ^= 8
    with mapped.path.open("r+b") as file:
        file.write(data)
    chunk = 50 // (mapped.layout.chunk_bytes + 4)
    out = np.zeros(mapped.layout.chunk_bytes, np.uint8)
    with pytest.raises(FormatError, match="damaged or cut off"):
        mapped.copy_chunk(chunk, out, is_in_memory=True)


def test_a_file_that_was_replaced_is_opened_anew(folder, mapped, block):
    write_shard(folder, "norm", "patch", 0, block + 1)
    layout = mapped.layout
    out = np.zeros(layout.chunk_bytes, np.uint8)
    again = open_shard(mapped.path, layout)
    assert again is not mapped
    assert again.copy_chunk(1, out, is_in_memory=True) == chunk_crc32c(block[1] + 1)
    mapped.path.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        open_shard(mapped.path, layout)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="No such file"):
        read_shard_index(tmp_path / "none", 4)


def test_an_index_that_points_outside_is_an_error_though_its_checksum_fits(folder, block):
    write_shard(folder, "norm", "patch", 0, block)
    path = folder.shard_file("norm", "patch", 0)
    data = bytearray(path.read_bytes())
    n_index = 16 * SHARD_ROWS
    for bad in (len(data), 2**63, 2**64 - 2):
        index = np.frombuffer(bytes(data[-n_index - 4 : -4]), "<u8").copy()
        index[0] = bad
        crc = chunk_crc32c(index).to_bytes(4, "little")
        path.write_bytes(bytes(data[: -n_index - 4]) + index.tobytes() + crc)
        with pytest.raises(FormatError, match="outside"):
            read_shard_index(path, SHARD_ROWS)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["codecs"][0]["configuration"]["codecs"].append({"name": "zstd"}),
        lambda m: m["codecs"][0]["configuration"]["codecs"].pop(),
        lambda m: m["codecs"][0]["configuration"]["index_codecs"].pop(),
        lambda m: m["codecs"][0]["configuration"].update(index_location="start"),
        lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[2, 4, 6]),
        lambda m: m["codecs"].insert(0, {"name": "transpose", "configuration": {"order": [0]}}),
        lambda m: m.update(codecs=[{"name": "bytes", "configuration": {"endian": "little"}}]),
        lambda m: m["codecs"][0]["configuration"]["codecs"][0]["configuration"].update(
            endian="big"
        ),
        lambda m: m["chunk_key_encoding"].update(configuration={"separator": "."}),
        lambda m: m.update(storage_transformers=[{"name": "other"}]),
        lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[8, 4, 6]),
    ],
)
def test_a_layout_that_is_not_fully_understood_is_left_to_zarr(folder, change):
    assert find_layout(folder, "norm", "patch") is not None
    change_metadata(folder, change)
    assert find_layout(folder, "norm", "patch") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(data_type="float32"),
        lambda m: m.update(shape=[SHARD_ROWS, 4, 7]),
        lambda m: m.pop("shape"),
    ],
)
def test_metadata_of_another_array_is_an_error(folder, change):
    change_metadata(folder, change)
    with pytest.raises(FormatError, match=r"verify --repair"):
        find_layout(folder, "norm", "patch")


def test_metadata_that_does_not_parse_is_an_error(folder):
    (folder.array_path("norm", "patch") / "zarr.json").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        find_layout(folder, "norm", "patch")


def test_only_the_most_recent_values_are_kept():
    made = []
    recent = Recent(2)
    for key in (1, 2, 1, 3, 1, 2):
        assert recent.get(key, lambda key: made.append(key) or key * 10) == key * 10
    assert made == [1, 2, 3, 2]


def test_recent_values_can_be_asked_for_from_threads():
    recent = Recent(3)
    wrong = []

    def ask():
        found = [recent.get(number % 7, lambda key: key + 1) for number in range(500)]
        wrong.extend(n for n, value in enumerate(found) if value != n % 7 + 1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
