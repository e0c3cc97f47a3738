"""A trained run stays right when the rows that it names move, or its store is copied."""

from __future__ import annotations

import pytest

import heads
from featstore.cleanup import gc
from featstore.compaction import compact
from featstore.copying import copy_store
from featstore.errors import NotFoundError
from featstore.plan import RunOptions
from featstore.removal import remove_rows
from tests.fakes import FakeReader, fake_extract
from tests.shrinking import listed


def test_a_run_gives_its_numbers_after_its_rows_moved_and_in_a_copy(tmp_path):
    path, copy = tmp_path / "s.zarr", tmp_path / "copy.zarr"
    views = RunOptions(views=("plain", "hflip"), n_threads=1)
    fake_extract(path, [FakeReader(20)], options=views)
    report = heads.train(
        path,
        task="depth",
        steps=2,
        batch_size=8,
        device="cpu",
        options={"queries": 4, "checks": 1, "pictures": 0},
    )
    averaged = heads.evaluate(report.path, tta="hflip", device="cpu").metrics
    remove_rows(path, "split = 'train' and path < '00010.npy'")
    assert compact(path, min_removed=0.1).rows == 2 * len(listed(path))
    gc(path, grace_s=0)
    assert heads.evaluate(report.path, device="cpu").metrics == report.metrics
    assert heads.evaluate(report.path, tta="hflip", device="cpu").metrics == averaged
    with pytest.raises(NotFoundError, match="removed"):
        heads.evaluate(report.path, split="train", device="cpu")
    assert copy_store(path, copy).runs == []
    fake_extract(path, [FakeReader(20)], options=views)
    assert copy_store(path, copy).runs == [report.run_id]
    again = heads.evaluate(report.run_id, store=copy, device="cpu")
    assert again.metrics == report.metrics
    assert heads.evaluate(report.run_id, store=copy, split="train", device="cpu").images > 0
