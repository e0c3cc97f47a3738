"""The deformable convolution in plain PyTorch gives torchvision's numbers and slopes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import InvalidInputError, NotFoundError
from heads import deformable
from heads.deformable import DeformableConvNet, deform_conv

try:
    from torchvision.ops import DeformConv2d, deform_conv2d
except ImportError:
    deform_conv2d = None

needs_torchvision = pytest.mark.skipif(deform_conv2d is None, reason="needs torchvision")


@st.composite
def problems(draw):
    """Draw a map, offsets that leave it on all sides, and weights, in float64."""
    sizes = [draw(st.integers(1, most)) for most in (3, 5, 4, 6, 6)]
    batch, channels, outputs, rows, columns = sizes
    reach = draw(st.sampled_from([0.3, 2.0, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = (
        (batch, channels, rows, columns),
        (batch, 18, rows, columns),
        (outputs, channels, 3, 3),
    )
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[1] *= reach
    return tensors


@needs_torchvision
@given(problems())
def test_outputs_and_gradients_are_torchvisions(tensors):
    found = []
    for convolve in (deform_conv, lambda *given: deform_conv2d(*given, padding=1)):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        output = convolve(*inputs)
        slope = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        found.append((output, *torch.autograd.grad((output * slope).sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(problems())
def test_offsets_of_zero_make_it_a_convolution(tensors):
    map_bcyx, offsets, weight = tensors
    expected = torch.nn.functional.conv2d(map_bcyx, weight, padding=1)
    torch.testing.assert_close(deform_conv(map_bcyx, 0 * offsets, weight), expected)


def test_offsets_are_rows_first_and_the_points_go_row_by_row():
    map_bcyx = torch.arange(12.0).view(1, 1, 3, 4)
    weight, offsets = torch.zeros(1, 1, 3, 3), torch.zeros(1, 18, 3, 4)
    weight[0, 0, 0, 2] = 1  # the point above and to the right: number 2
    offsets[:, 4], offsets[:, 5] = 2, -1.5
    found = deform_conv(map_bcyx, offsets, weight)
    # Cell (0, 1) is read at (0 - 1 + 2, 1 + 1 - 1.5) = (1, 0.5).
    assert found[0, 0, 0, 1].item() == pytest.approx(4.5)


@needs_torchvision
def test_the_net_has_torchvisions_numbers_and_draws_its_offsets():
    torch.manual_seed(0)
    net = DeformableConvNet(6, 4)
    assert net.offsets.weight.abs().sum() > 0
    assert sum(p.numel() for p in net.parameters()) == 162 * 6 + 18 + 9 * 6 * 4
    other = DeformableConvNet(6, 4, sampler="torchvision")
    other.load_state_dict(net.state_dict())
    theirs = DeformConv2d(6, 4, 3, padding=1, bias=False)
    theirs.weight.data = net.weight.data
    map_bcyx = torch.randn(2, 6, 5, 7)
    expected = theirs(map_bcyx, net.offsets(map_bcyx))
    torch.testing.assert_close(net(map_bcyx), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other(map_bcyx), expected)
    with pytest.raises(InvalidInputError, match="sampler=plain"):
        other.to("meta")(map_bcyx.to("meta"))


def test_a_sampler_that_is_not_there_is_refused(monkeypatch):
    with pytest.raises(InvalidInputError, match="one of plain, torchvision"):
        DeformableConvNet(4, 4, sampler="mmcv")
    monkeypatch.setattr(deformable, "find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="Install it, or use sampler=plain"):
        DeformableConvNet(4, 4, sampler="torchvision")
