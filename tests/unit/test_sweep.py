"""Several heads on one pass: each as it would be alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import heads
from featstore.errors import InvalidInputError
from featstore.rows import RowReader
from heads.runs import list_runs
from heads.sweep import expand_sweep
from tests.fakes import FakeReader, fake_extract

SMALL = {"queries": 4, "checks": 4, "pictures": 0}
COMMON = {"task": "depth", "steps": 12, "batch_size": 8}
CONFIGS = [
    {**COMMON, "options": SMALL},
    {**COMMON, "lr": 3e-2, "options": SMALL},
    {**COMMON, "taps": ["block:0"], "options": SMALL},
    {**COMMON, "options": {**SMALL, "mask_form": "paper"}},
    {**COMMON, "steps": 7, "options": {**SMALL, "patience": 1}},
    {**COMMON, "seed": 5, "options": SMALL},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "s.zarr"
    fake_extract(path, [FakeReader(40)])
    return path


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "s.zarr")


CACHES = ("none", "ram")


def weights(report):
    return safetensors.numpy.load_file(Path(report.path) / "head.safetensors")


def test_each_head_ends_as_it_would_alone(store):
    several = [heads.train_many(store, CONFIGS, device="cpu", cache=cache) for cache in CACHES]
    for together in several:
        assert together.n_passes == 2  # the other seed goes its own way
        assert together.errors == (None,) * len(CONFIGS)
    for config, *reports in zip(CONFIGS, *(one.runs for one in several), strict=True):
        alone = heads.train(store, device="cpu", cache="none", **config)
        for report in reports:
            assert_same_run(alone, report)


def assert_same_run(alone, report):
    assert alone.metrics == report.metrics
    assert alone.best_step == report.best_step
    mine, theirs = weights(report), weights(alone)
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_the_best_has_the_lowest_loss_on_the_held_out_part(store):
    report = heads.train_many(store, CONFIGS[:3], device="cpu")
    losses = [run.best_loss for run in report.runs]
    assert report.best == int(np.argmin(losses))
    assert len(list_runs(store)) == 3


def test_a_pass_reads_each_row_once_for_all_heads(store, monkeypatch):
    read = []
    original = RowReader.read_into

    def count(self, rows, out, is_stopped=None):
        read.append(len(rows))
        return original(self, rows, out, is_stopped)

    def rows_read(n_heads):
        read.clear()
        options = {**SMALL, "metric_images": 0}
        configs = [{**COMMON, "lr": 1e-3 * (1 + n), "options": options} for n in range(n_heads)]
        heads.train_many(store, configs, device="cpu", cache="none")
        return sum(read)

    monkeypatch.setattr(RowReader, "read_into", count)
    # Only the test split, of 8 images with patch and prefix tokens, is read by each head.
    assert rows_read(4) == rows_read(1) + 3 * 8 * 2


def test_a_head_that_fails_fails_alone(store):
    bad = {**COMMON, "lr": 1e30, "options": SMALL}
    report = heads.train_many(store, [CONFIGS[0], bad, CONFIGS[1]], device="cpu")
    assert [run is None for run in report.runs] == [False, True, False]
    assert "Try a smaller --lr" in report.errors[1]
    assert sorted(run.status for run in list_runs(store)) == ["done", "done", "failed"]
    alone = heads.train(store, device="cpu", **CONFIGS[1])
    assert alone.metrics == report.runs[2].metrics


def test_nothing_is_begun_where_one_configuration_is_wrong(store):
    with pytest.raises(InvalidInputError, match="lr"):
        heads.train_many(store, [CONFIGS[0], {**COMMON, "lr": -1.0}], device="cpu")
    with pytest.raises(InvalidInputError, match="A configuration has depth"):
        heads.train_many(store, [{"depth": 1, **COMMON}], device="cpu")
    with pytest.raises(InvalidInputError, match="empty"):
        heads.train_many(store, [], device="cpu")
    assert list_runs(store) == []


def test_interrupted_heads_are_resumed_one_by_one(store):
    def stop(report):
        if report.stage == "train" and report.total and report.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"heads train --resume deap-depth-.* or deap-"):
        heads.train_many(store, CONFIGS[:2], device="cpu", progress=stop)
    runs = list_runs(store)
    assert [run.status for run in runs] == ["interrupted"] * 2
    undisturbed = {c.get("lr"): heads.train(store, device="cpu", **c) for c in CONFIGS[:2]}
    for run in runs:
        resumed = heads.train(store, resume=run.run_id, device="cpu")
        expected = undisturbed[run.record["command"]["lr"]]
        assert resumed.metrics == expected.metrics


def test_a_sweep_is_every_combination():
    base = {"task": "depth", "steps": 5, "epochs": None, "options": {"queries": "4"}}
    configs = expand_sweep(base, [("lr", ("1e-3", "3e-4")), ("mask_form", ("code", "paper"))])
    assert [values for values, _ in configs] == [
        {"lr": lr, "mask_form": form} for lr in ("1e-3", "3e-4") for form in ("code", "paper")
    ]
    assert configs[3][1]["lr"] == 3e-4
    assert configs[3][1]["options"] == {"queries": "4", "mask_form": "paper"}
    assert base["options"] == {"queries": "4"}
    _, config = expand_sweep(base, [("tap", ("block:1", "block:1+norm"))])[1]
    assert config["taps"] == ["block:1", "norm"]
    _, config = expand_sweep(base, [("epochs", ("2",))])[0]
    assert config["epochs"] == 2
    assert "steps" not in config


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ([("lr", ("1",)), ("lr", ("2",))], "lr=VALUE,VALUE"),
        ([("lr", ("fast",))], "a number"),
        ([("steps", ("1.5",))], "a whole number"),
        ([("a", tuple("abcdefghijklmnopq")), ("b", tuple("abcdefghijklmnopq"))], "289 combin"),
    ],
)
def test_a_wrong_sweep_is_told(sweep, told):
    with pytest.raises(InvalidInputError, match=told):
        expand_sweep({"task": "depth"}, sweep)
