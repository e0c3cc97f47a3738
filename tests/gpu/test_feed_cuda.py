"""What arrives on the GPU is, bit for bit, what is stored, wherever rows are kept in between."""

from __future__ import annotations

import pytest
import torch

import featstore
from heads.feed import Feed
from tests.fakes import FakeReader, fake_extract, fake_plan

pytestmark = pytest.mark.gpu
NAMES = ["norm", "norm/prefix"]
ROWS = range(0, 60, 2)


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def features(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("feed") / "s.zarr"
    fake_extract(path, [FakeReader(60)], plan=fake_plan(dtype=request.param))
    return featstore.open(path).feature_set()


def epochs(features, device, cache):
    feed = Feed(features, NAMES, torch.device(device), cache=cache, kept_rows=ROWS)
    found = []
    for epoch in range(3):
        for batch in feed.shuffled(ROWS, batch_size=4, seed=1, epoch=epoch):
            busy = torch.randn(500, 500, device=device) @ torch.randn(500, 500, device=device)
            found.append((batch.rows, {name: t.clone() for name, t in batch.tensors.items()}))
            del busy  # a step that the copy of the next batch runs beside
    return feed, found


@pytest.mark.parametrize("cache", ["none", "ram", "gpu"])
def test_batches_are_those_of_the_cpu(features, cache):
    _, plain = epochs(features, "cpu", "none")
    feed, found = epochs(features, "cuda", cache)
    place = {"none": None, "ram": "cpu", "gpu": "cuda"}[cache]
    assert (feed.cache_place and feed.cache_place.type) == place
    assert [rows for rows, _ in found] == [rows for rows, _ in plain]
    for (_, mine), (_, theirs) in zip(found, plain, strict=True):
        for name in NAMES:
            assert mine[name].device.type == "cuda"
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name].cpu(), theirs[name])
