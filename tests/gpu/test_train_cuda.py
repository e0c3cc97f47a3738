"""Training on a GPU gives a head as good as on the CPU, and a run that either can read."""

from __future__ import annotations

import pytest

import heads
from tests.fakes import FakeReader, fake_extract

pytestmark = pytest.mark.gpu


def test_a_head_learns_alike_on_both_devices(tmp_path):
    store = tmp_path / "features.zarr"
    fake_extract(store, [FakeReader(40)])
    reports = {
        device: heads.train(
            store, task="depth", steps=100, batch_size=8, device=device, options={"queries": 4}
        )
        for device in ("cpu", "cuda")
    }
    cpu, cuda = (reports[device].metrics["rmse"] for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=0.5)
    for device in ("cpu", "cuda"):
        again = heads.evaluate(reports["cuda"].path, device=device)
        assert again.metrics["rmse"] == pytest.approx(cuda, rel=1e-3)


def test_a_run_begun_on_one_device_goes_on_on_the_other(tmp_path):
    store = tmp_path / "features.zarr"
    fake_extract(store, [FakeReader(40)])

    def stop(report):
        if report.stage == "train" and report.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heads.train(store, task="depth", steps=10, batch_size=8, device="cuda", progress=stop)
    report = heads.train(store, resume="@last", device="cpu")
    assert report.steps == 10
