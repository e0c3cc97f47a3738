"""Damage of every kind to a store's files: an error that tells what to do, or the right numbers."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore.errors import FeatstoreError, FormatError, StorageError
from featstore.rows import RowReader
from featstore.shards import close_kept_shards
from featstore.store import FeatureSetFolder, open_folder
from featstore.stream import open_stream, read_rows
from tests.fakes import FakeReader, fake_extract, fake_plan

ARRAYS = {
    "block:0": "patch",
    "block:0/prefix": "prefix",
    "norm": "patch",
    "norm/prefix": "prefix",
    "norm.mean": "pooled",
}
N_ROWS, SHARD_ROWS = 20, 8
ROWS = np.random.default_rng(0).permutation(N_ROWS)
PATHS = ("read", "stream", "dataset", "residency")
ROUNDS = 14  # of 5 kinds of damage times 4 ways to read: 280 corruptions of a plain store


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A store as it is written: read directly."""
    path = tmp_path_factory.mktemp("plain") / "s.zarr"
    fake_extract(path, [FakeReader(N_ROWS)])
    return open_folder(path).feature_set(fake_plan().key()).path


@pytest.fixture(scope="module")
def compressed(plain, tmp_path_factory):
    """The same numbers in zstd chunks without a checksum: read through zarr."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

    path = tmp_path_factory.mktemp("compressed") / "s.zarr"
    shutil.copytree(plain.parents[1], path)
    folder = FeatureSetFolder(path / "feature_sets" / plain.name)
    for name, array in ARRAYS.items():
        array_path = folder.array_path(name.partition("/")[0], array)
        before = zarr.open_array(array_path, mode="r")
        values, shards, chunks = before[:], before.shards, before.chunks
        shutil.rmtree(array_path)
        codec = ShardingCodec(
            chunk_shape=chunks,
            codecs=[BytesCodec(), ZstdCodec()],
            index_codecs=[BytesCodec(), Crc32cCodec()],
        )
        made = zarr.create_array(
            zarr.storage.LocalStore(array_path),
            shape=values.shape,
            chunks=shards,
            dtype=values.dtype,
            fill_value=float("nan"),
            serializer=codec,
            compressors=None,
            filters=None,
            config={"write_empty_chunks": False},
        )
        made[:] = values
    return folder.path


def read(path: Path, name: str, how: str) -> np.ndarray:
    """Read the rows of one array in one of the public ways, with nothing remembered."""
    folder = FeatureSetFolder(path)
    if how == "read":
        return read_rows(folder, name, ROWS)
    if how == "stream":
        batches = open_stream(folder, [name], rows=ROWS, batch_size=7)
        return np.concatenate([batch[name].copy() for batch in batches])
    from featstore.api import Store
    from featstore.dataset import FeatureDataset

    features = Store(open_folder(path.parents[1])).feature_set(path.name)
    if how == "residency":
        from heads.feed import Feed

        feed = Feed(features, [name], torch.device("cpu"), cache="ram", kept_rows=range(N_ROWS))
        list(feed.shuffled(range(N_ROWS), batch_size=7, seed=0, epoch=0))
        return feed.tensors(ROWS.tolist())[name].numpy()
    items = FeatureDataset(features, [name], rows=ROWS).__getitems__(range(N_ROWS))
    return np.stack([item[name].numpy() for item in items])


@pytest.fixture(scope="module")
def expected(plain):
    return {name: read(plain, name, "read") for name in ARRAYS}


def shard_file(path: Path, name: str, shard: int) -> Path:
    return FeatureSetFolder(path).shard_file(name.partition("/")[0], ARRAYS[name], shard)


def flip(data: bytes, random: np.random.Generator) -> bytes:
    bit = int(random.integers(len(data) * 8))
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def truncate(data: bytes, random: np.random.Generator) -> bytes:
    return data[: int(random.integers(len(data)))]


def scribble(data: bytes, random: np.random.Generator) -> bytes:
    start = int(random.integers(len(data) - 1))
    length = min(int(random.integers(1, 600)), len(data) - start)
    noise = random.bytes(length)
    return data[:start] + noise + data[start + length :]


def lengthen(data: bytes, random: np.random.Generator) -> bytes:
    return data + random.bytes(int(random.integers(1, 200)))


def vanish(data: bytes, random: np.random.Generator) -> None:
    del data, random


DAMAGES = (flip, truncate, scribble, lengthen, vanish)


class Damaged:
    """Puts damage into a file, and the good bytes back afterwards."""

    def __init__(self, file: Path, damage, random: np.random.Generator) -> None:
        self.file = file
        self.good = file.read_bytes()
        self.bad = damage(self.good, random)

    def __enter__(self):
        if self.bad is None:
            self.file.unlink()
        else:
            self.file.write_bytes(self.bad)

    def __exit__(self, *error):
        self.file.write_bytes(self.good)


def check_message(error: FeatstoreError, file: Path, name: str, shard: int) -> None:
    text = str(error)
    assert str(file) in text
    assert "featstore verify --repair" in text
    rows = range(shard * SHARD_ROWS, min(N_ROWS, (shard + 1) * SHARD_ROWS))
    assert any(f"{row}" in text.replace(str(file), "") for row in rows), text
    assert name.partition("/")[0] in text


def test_undamaged_stores_read_alike_in_every_way(plain, compressed, expected):
    assert RowReader(FeatureSetFolder(plain), "norm").is_direct
    assert not RowReader(FeatureSetFolder(compressed), "norm").is_direct
    for path in (plain, compressed):
        for name in ARRAYS:
            for how in PATHS:
                np.testing.assert_array_equal(read(path, name, how), expected[name])


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_a_shard_is_never_silent(plain, expected, damage, how):
    random = np.random.default_rng([DAMAGES.index(damage), PATHS.index(how)])
    for _ in range(ROUNDS):
        name = str(random.choice(list(ARRAYS)))
        shard = int(random.integers(3))
        file = shard_file(plain, name, shard)
        with Damaged(file, damage, random), pytest.raises(FormatError) as caught:
            read(plain, name, how)
        check_message(caught.value, file, name, shard)
    np.testing.assert_array_equal(read(plain, name, how), expected[name])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_a_compressed_shard_gives_an_error_or_the_right_numbers(
    compressed, expected, damage
):
    random = np.random.default_rng(DAMAGES.index(damage))
    n_errors = 0
    for number in range(ROUNDS):
        name = str(random.choice(list(ARRAYS)))
        shard = int(random.integers(3))
        file = shard_file(compressed, name, shard)
        with Damaged(file, damage, random):
            try:
                found = read(compressed, name, PATHS[number % 2])
            except FormatError as error:
                check_message(error, file, name, shard)
                n_errors += 1
            else:
                np.testing.assert_array_equal(found, expected[name])
    assert n_errors >= ROUNDS // 2


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("store", ["plain", "compressed"])
def test_a_shard_of_another_array_is_not_taken(request, store, how):
    path = request.getfixturevalue(store)
    swaps = [
        (("block:0", 0), ("norm", 0)),
        (("block:0/prefix", 2), ("norm/prefix", 2)),
        (("norm", 0), ("norm", 1)),
        (("norm.mean", 1), ("norm.mean", 0)),
    ]
    for (name, shard), other in swaps:
        file = shard_file(path, name, shard)
        foreign = shard_file(path, *other).read_bytes()
        with (
            Damaged(file, lambda *_, foreign=foreign: foreign, np.random.default_rng(0)),
            pytest.raises(FormatError) as caught,
        ):
            read(path, name, how)
        check_message(caught.value, file, name, shard)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_a_ledger_gives_an_error_or_the_right_numbers(plain, expected, damage):
    random = np.random.default_rng(DAMAGES.index(damage))
    n_errors = 0
    for _ in range(ROUNDS):
        name = str(random.choice(list(ARRAYS)))
        file = FeatureSetFolder(plain).ledger_path(name.partition("/")[0], int(random.integers(3)))
        with Damaged(file, damage, random):
            try:
                found = read(plain, name, "read")
            except FeatstoreError:
                n_errors += 1
            else:
                np.testing.assert_array_equal(found, expected[name])
    assert n_errors >= 1


def test_metadata_of_another_shape_or_dtype_is_refused(plain):
    file = FeatureSetFolder(plain).array_path("norm", "patch") / "zarr.json"
    good = json.loads(file.read_text())
    for change in ({"data_type": "float32"}, {"shape": [24, 16, 7]}, {"shape": []}):
        text = json.dumps({**good, **change}).encode()
        with (
            Damaged(file, lambda *_, text=text: text, np.random.default_rng(0)),
            pytest.raises(FormatError, match=r"zarr\.json.*featstore verify --repair"),
        ):
            read(plain, "norm", "read")


def test_every_bit_of_an_array_s_metadata_gives_an_error_or_the_right_numbers(plain, expected):
    file = FeatureSetFolder(plain).array_path("norm", "patch") / "zarr.json"
    random = np.random.default_rng(0)
    for _ in range(100):
        with Damaged(file, flip, random):
            try:
                found = read(plain, "norm", "read")
            except FeatstoreError:
                continue
            np.testing.assert_array_equal(found, expected["norm"])


@pytest.fixture
def many_shards(tmp_path):
    """A store with a shard a row: 100 shard files."""
    fake_extract(tmp_path / "s.zarr", [FakeReader(N_ROWS)], shard_rows=1)
    return FeatureSetFolder(tmp_path / "s.zarr" / "feature_sets" / fake_plan().key())


@pytest.fixture
def leave_files():
    """Let this process open only so many more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []

    def leave(n_files: int) -> None:
        close_kept_shards()
        gc.collect()  # files that another test left would be closed in the midst of this one
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(n_files):
            os.close(held.pop())

    yield leave
    for handle in held:
        os.close(handle)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_stream_stays_within_the_limit_of_open_files(many_shards, leave_files):
    leave_files(120)
    expected = {name: read_rows(many_shards, name, ROWS) for name in ARRAYS}
    for number, batch in enumerate(open_stream(many_shards, list(ARRAYS), rows=ROWS, batch_size=5)):
        for name in ARRAYS:
            np.testing.assert_array_equal(batch[name], expected[name][5 * number : 5 * number + 5])


def test_a_limit_that_is_reached_is_not_told_as_damage(many_shards, leave_files):
    reader = RowReader(many_shards, "norm")
    reader.check(ROWS)
    out = reader.empty(N_ROWS)
    leave_files(0)
    with pytest.raises(StorageError, match=r"Too many open files.*need not be damaged"):
        reader.read_into(ROWS, out)
    with pytest.raises(StorageError, match=r"zarr\.json.*Too many open files"):
        RowReader(many_shards, "block:0")
