"""CPU and CUDA agree: activations, what is cast and copied, and a trained head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featstore.backbones import load_backbone
from featstore.backbones.casting import start_copy

pytestmark = pytest.mark.gpu


def test_activations_agree():
    options = {"image_size": (64, 64), "weights": "random:3", "taps": ["block:3", "norm"]}
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    on_cpu = load_backbone("vit_tiny_patch16_224", device="cpu", **options).forward(images)
    on_cuda = load_backbone("vit_tiny_patch16_224", device="cuda", **options).forward(images)
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_cuda[name].cpu(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_copies_from_the_device_are_those_of_the_cpu(dtype):
    values = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0))
    values[2, 3, 4] = torch.nan
    on_cpu, on_cuda = start_copy(values, dtype)(), start_copy(values.cuda(), dtype)()
    np.testing.assert_array_equal(on_cuda.values, on_cpu.values)
    np.testing.assert_allclose(on_cuda.mean, on_cpu.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(on_cuda.abs_max, on_cpu.abs_max)
    assert np.isnan(on_cuda.abs_max[2])


def test_a_head_learns_alike(tmp_path):
    import heads
    from tests.fakes import FakeReader, fake_extract

    fake_extract(tmp_path / "s.zarr", [FakeReader(40)])
    options = {"task": "depth", "taps": ["norm"], "steps": 20, "batch_size": 8, "seed": 0}
    found = {
        device: heads.train(tmp_path / "s.zarr", device=device, **options).metrics["rmse"]
        for device in ("cpu", "cuda")
    }
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.02)
