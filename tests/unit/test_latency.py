"""The latency of a backbone: measured in bounded time, kept beside the features."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

import featstore.latency
from featstore.backbones.devices import describe_device
from featstore.cleanup import gc, remove_feature_set
from featstore.errors import FormatError
from featstore.extract import extract
from featstore.latency import (
    Latency,
    latency_path,
    measure_latency,
    read_latencies,
    record_latency,
)
from featstore.plan import RunOptions
from featstore.verify import verify
from heads.runs import list_runs
from tests.fakes import FakeReader, content, fake_extract


class Slow:
    """A backbone that takes the times that it is told, then none."""

    device, depth, input_hw = "cpu", 12, (32, 48)

    def __init__(self, *times, taps=("norm",)):
        self.library_versions = {"torch": "1"}
        self.taps = taps
        self.times = list(times)
        self.shapes = []

    def forward(self, images):
        self.shapes.append(images.shape)
        time.sleep(self.times.pop(0) if self.times else 0)
        return {"norm": np.zeros((len(images), 4, 2))}


def test_ten_batches_of_eight_are_timed_after_one_that_does_not_count():
    model = Slow(0.05)
    found = measure_latency(model)
    assert model.shapes == [(8, 32, 48, 3)] * 11
    assert (found.batches, found.batch_size) == (10, 8)
    assert found.seconds < 0.04


def test_a_slow_backbone_is_timed_on_fewer_batches():
    found = measure_latency(Slow(0.0, 0.02, 0.03, 0.04), budget_s=0.04)
    assert found.batches == 2
    assert 0.02 < found.seconds < 0.2
    assert found.ms_per_image == pytest.approx(found.seconds * 125)


def test_one_batch_counts_where_it_takes_the_whole_budget():
    model = Slow(0.02)
    assert measure_latency(model, budget_s=0.01).batches == 1
    assert len(model.shapes) == 1


@pytest.mark.parametrize(
    ("taps", "blocks"), [(("norm",), 12), (("block:2", "block:8.mean"), 9), (("norm.cls",), 12)]
)
def test_it_says_how_many_blocks_were_run(taps, blocks):
    found = measure_latency(Slow(taps=taps))
    assert (found.blocks, found.depth) == (blocks, 12)


def test_what_was_measured_is_kept_until_it_is_renewed(tmp_path):
    record_latency(tmp_path / "l.json", Slow(taps=("block:2",)), is_renewed=False)
    model = Slow()
    first = record_latency(tmp_path / "l.json", model, is_renewed=False)
    assert model.shapes
    again = Slow(0.0, *[0.002] * 10)
    assert record_latency(tmp_path / "l.json", again, is_renewed=False) == first
    assert not again.shapes
    renewed = record_latency(tmp_path / "l.json", again, is_renewed=True)
    assert renewed != first
    assert [one.blocks for one in read_latencies(tmp_path / "l.json")] == [3, 12]
    assert read_latencies(tmp_path / "l.json")[1] == renewed


def test_other_devices_are_kept_beside(tmp_path, monkeypatch):
    found = record_latency(tmp_path / "l.json", Slow(), is_renewed=False)
    monkeypatch.setattr("featstore.backbones.devices.describe_device", lambda device: "Abacus")
    record_latency(tmp_path / "l.json", Slow(), is_renewed=True)
    names = {one.device_name for one in read_latencies(tmp_path / "l.json")}
    assert names == {"Abacus", found.device_name}


@pytest.mark.parametrize("text", ["{", "[]", '{"latency": [{}]}', '{"latency": 3}'])
def test_a_damaged_file_is_an_error_to_read_and_is_made_anew(tmp_path, text):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(FormatError, match=r"is damaged\. Delete it"):
        read_latencies(tmp_path / "l.json")
    found = record_latency(tmp_path / "l.json", Slow(), is_renewed=False)
    assert read_latencies(tmp_path / "l.json") == (found,)


def test_no_file_is_no_latency(tmp_path):
    assert read_latencies(tmp_path / "l.json") == ()


def test_the_processor_is_named_with_its_threads():
    assert "thread" in describe_device("cpu")


def test_an_extraction_measures_once_and_changes_no_byte_that_counts(tmp_path, monkeypatch):
    path = tmp_path / "features.zarr"
    common = {"backbone": "test_vit.r160_in1k", "weights": "random", "image_size": (32, 32)}
    common |= {"data": ["rooms:n=2,seed=0"], "taps": ["norm"]}
    options = RunOptions(device="cpu", n_threads=1)
    assert extract(path, **common, options=options).latency is None
    file = latency_path(path, featstore.open(path).feature_set().key)
    assert not file.exists()
    before = content(path)
    report = extract(path, **common, options=replace(options, latency=True))
    assert (report.new_rows, report.latency.blocks) == (0, report.latency.depth)
    assert content(path) == before
    assert verify(path).problems == []
    assert report.to_json()["latency"]["batches"] == report.latency.batches
    assert isinstance(report.latency, Latency)
    assert json.loads(file.read_text())["latency"][0]["seconds"] > 0
    assert gc(path).removed == []
    assert list_runs(path) == []
    monkeypatch.setattr(featstore.latency, "measure_latency", None)  # nothing left to measure
    assert extract(path, **common, options=replace(options, latency=True)).latency == report.latency


def test_removing_a_feature_set_removes_what_was_measured_of_it(tmp_path):
    path = tmp_path / "features.zarr"
    key = fake_extract(path, [FakeReader(3)]).feature_set
    record_latency(latency_path(path, key), Slow(), is_renewed=False)
    remove_feature_set(path, key)
    assert not latency_path(path, key).exists()
