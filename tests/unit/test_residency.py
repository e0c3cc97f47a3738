"""Rows kept in memory: the numbers of the store, read once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import featstore
from featstore.errors import FormatError, InvalidInputError
from heads import residency
from heads.feed import Feed
from heads.residency import ArraySpec, Residency, choose_place
from tests.fakes import FakeReader, fake_extract, fake_plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def features(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("residency") / "s.zarr"
    fake_extract(path, [FakeReader(40)], plan=fake_plan(dtype=request.param))
    return featstore.open(path).feature_set()


def epochs(features, cache, n_epochs=3, batch_size=6, start=0):
    names = ["norm", "norm/prefix"]
    rows = list(range(0, 40, 2))
    feed = Feed(features, names, CPU, cache=cache, kept_rows=rows)
    found = []
    for epoch in range(n_epochs):
        given = feed.shuffled(rows, batch_size=batch_size, seed=3, epoch=epoch, start=start)
        found += [
            (batch.rows, {name: tensor.clone() for name, tensor in batch.tensors.items()})
            for batch in given
        ]
    return feed, found


@pytest.mark.parametrize("start", [0, 2])
def test_kept_rows_come_in_the_same_order_with_the_same_numbers(features, start):
    _, plain = epochs(features, "none", start=start)
    feed, kept = epochs(features, "ram", start=start)
    assert feed.cache_place == CPU
    assert [rows for rows, _ in kept] == [rows for rows, _ in plain]
    for (_, mine), (_, theirs) in zip(kept, plain, strict=True):
        for name in theirs:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name])


def test_each_row_is_read_once(features, monkeypatch):
    read = []
    original = featstore.rows.RowReader.read_into

    def count(self, rows, out, is_stopped=None):
        read.extend((self.source.name, row) for row in rows.tolist())
        return original(self, rows, out, is_stopped)

    monkeypatch.setattr(featstore.rows.RowReader, "read_into", count)
    epochs(features, "ram", n_epochs=6)
    assert len(set(read)) == len(read) == 2 * 20
    read.clear()
    epochs(features, "none", n_epochs=6)
    assert len(read) == 6 * 36


def features_of(features, rows):
    return Feed(features, ["norm"], CPU).tensors(rows)["norm"]


def test_rows_that_are_not_announced_are_given_and_not_kept(features):
    feed = Feed(features, ["norm"], CPU, cache="ram", kept_rows=[1, 2])
    tensors = feed.tensors([5, 1])
    assert torch.equal(tensors["norm"], features_of(features, [5, 1]))
    assert feed._kept.missing([1, 2]) == [1, 2]
    assert torch.equal(feed.tensors([2, 2])["norm"], features_of(features, [2, 2]))
    assert feed._kept.missing([1, 2]) == [1]


def test_a_damaged_chunk_is_an_error_and_is_not_kept(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(40)])
    features = featstore.open(path).feature_set()
    file = next((features.folder.path / "norm" / "patch").rglob("c/0/0/0"))
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    feed = Feed(features, ["norm"], CPU, cache="ram", kept_rows=range(40))
    for _ in range(2):
        with pytest.raises(FormatError, match="verify --repair"):
            list(feed.shuffled(range(40), batch_size=8, seed=0, epoch=0))


def test_half_of_the_free_memory_is_what_auto_takes(monkeypatch):
    monkeypatch.setattr(residency, "free_bytes", lambda place: 100)
    assert choose_place("auto", CPU, 50) == CPU
    assert choose_place("auto", CPU, 51) is None
    assert choose_place("ram", CPU, 100) == CPU
    assert choose_place("none", CPU, 1) is None
    with pytest.raises(InvalidInputError, match="--cache auto or none"):
        choose_place("ram", CPU, 101)
    with pytest.raises(InvalidInputError, match="ram or none where the head computes on the CPU"):
        choose_place("gpu", CPU, 1)
    with pytest.raises(InvalidInputError, match="auto, ram, gpu, none"):
        choose_place("disk", CPU, 1)


def test_auto_goes_from_the_gpu_to_the_main_memory(monkeypatch):
    free = {"cuda": 10, "cpu": 100}
    monkeypatch.setattr(residency, "free_bytes", lambda place: free[place.type])
    gpu = torch.device("cuda")
    assert choose_place("auto", gpu, 5) == gpu
    assert choose_place("auto", gpu, 6) == CPU
    assert choose_place("auto", gpu, 51) is None


def test_a_container_counts_its_page_cache_as_free(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 100\nfile 700\n")
    assert residency._free_in_group(tmp_path) == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert residency._free_in_group(tmp_path) > 2**60
    assert residency.free_bytes(CPU) > 2**20


def test_kept_rows_are_given_in_any_order_and_twice():
    kept = Residency([4, 2, 9], {"a": ArraySpec(item_shape=(3,), dtype=torch.float32)}, CPU)
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    kept.put([9, 4], {"a": values})
    assert kept.missing([2, 4, 9, 2]) == [2]
    assert not kept.is_for([2, 7])
    found = kept.get([4, 9, 4], ["a"])["a"]
    np.testing.assert_array_equal(found, values[[1, 0, 1]])
