"""docs/SCALE.md says what the arithmetic gives, which is that of `featstore estimate`."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from featstore.estimate import estimate
from featstore.plan import RunOptions
from tests.fakes import FakeReader

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def costs():
    spec = importlib.util.spec_from_file_location("costs", ROOT / "benchmarks" / "costs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["costs"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["costs"]


@pytest.mark.parametrize("name", ["storage", "compute", "files"])
def test_the_tables_are_those_of_the_script(costs, name):
    text = (ROOT / "docs" / "SCALE.md").read_text()
    (found,) = re.findall(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- end -->", text, re.DOTALL)
    assert found == costs.TABLES[name]()


def test_bytes_and_work_are_those_of_an_estimate(costs, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "featstore.estimate.images_per_second", lambda model, size: seen.append(model) or 1.0
    )
    taps = ["block:2", "norm", "norm.cls"]
    told = estimate(
        backbone="dinov2_s",
        data=[FakeReader(2)],
        taps=taps,
        weights="random",
        options=RunOptions(n_threads=1, device="cpu"),
    )
    cost = costs.cost_of("dinov2_s", taps)
    assert {shape.tap: shape.bytes_per_row(2) for shape in cost.shapes} == told.taps
    assert told.bytes == 2 * cost.n_bytes + told.tail_bytes
    assert cost.flops == pytest.approx(seen[0].flops_per_image, rel=0.05)
