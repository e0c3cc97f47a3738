"""The simulation of benchmarks/scale.py, small: what it measures is what the store answers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from featstore import index
from featstore.sql import fold
from featstore.sql.read import read_parts
from tests.fakes import FakeReader, fake_extract

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
N_ROWS, SHARD_ROWS, N_NEW = 3000, 20, 10


@pytest.fixture(scope="module")
def scale(tmp_path_factory):
    """Give the module and a made store, the index folded but for the last ledgers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("scale", "_metadata", "_common")
        module = importlib.import_module("scale")
        patch.setattr(module, "N_NEW", N_NEW)
        path = tmp_path_factory.mktemp("scale") / "s.zarr"
        module.make_metadata(path, N_ROWS, SHARD_ROWS, n_held_back=N_NEW)
        (path / "made.json").write_text(f'{{"rows": {N_ROWS}}}')
        module.fold_all(path)
        yield module, path
        for name in names:
            sys.modules.pop(name, None)


def n_ok(n_rows):
    return n_rows - n_rows // 997


def test_the_questions_have_the_answers_of_the_rows_that_were_made(scale):
    module, path = scale
    n_folded = N_ROWS - SHARD_ROWS * N_NEW
    assert module.plan(path)["plan.missing_shards"] == N_NEW
    for shuffle in (True, "window"):
        rows = module.featstore.open(path).feature_set().stream(["block:8"], shuffle=shuffle).rows
        good = np.arange(n_folded)[np.arange(n_folded) % 997 != 996]
        assert np.sort(rows).tolist() == good.tolist()
    module.fold_new(path)
    store = module.featstore.open(path)
    n_samples = store.sql("select count(*) as n from samples")["n"][0].as_py()
    assert n_samples == n_ok(N_ROWS)
    assert module.plan(path)["plan.missing_shards"] == 0
    module.remove(path)
    buried = store.sql("select count(*) as n from samples where row % 100 = 0").to_pylist()
    assert buried == [{"n": 0}]
    marked = store.sql("from samples order by all")
    index.rebuild(path)
    assert store.sql("from samples order by all") == marked


def test_a_new_generation_is_folded_without_the_older_ones(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(8)])
    index.refresh(path)
    fake_extract(path, [FakeReader(12)])
    read = []
    monkeypatch.setattr(
        fold, "read_parts", lambda path, schema: read.append(path.name) or read_parts(path, schema)
    )
    index.refresh(path)
    assert set(read) == {"00001.parquet"}
    folded = index.samples(path)
    index.rebuild(path)
    assert "00000.parquet" in read
    assert index.samples(path) == folded
    assert folded.num_rows == 12
