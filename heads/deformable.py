"""Deformable 3x3 convolution in operations that every device has, forward and backward."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional

from featstore.errors import NotFoundError, invalid

SAMPLERS = ("plain", "torchvision")
N_OFFSETS = 18
"""Channels of the offsets: rows and columns of nine points."""

_POINTS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]


def deform_conv(map_bcyx: Tensor, offsets_bkyx: Tensor, weight: Tensor) -> Tensor:
    """Convolve 3x3 with padding 1, each of the nine points read at a place of its own.

    The map is read bilinearly, as zeros outside. One point is sampled and mixed after the other.

    Args:
        map_bcyx: (batch, channels, rows, columns).
        offsets_bkyx: (batch, 18, rows, columns): for each point, row by row, how many cells
            further down and then how many further right it is read.
        weight: (outputs, channels, 3, 3).

    Returns:
        (batch, outputs, rows, columns).

    Source:
        Dai et al. 2017, arXiv:1703.06211, section 2.1.
    """
    rows, columns = map_bcyx.shape[2:]
    y, x = (
        torch.arange(n, device=map_bcyx.device, dtype=offsets_bkyx.dtype) for n in (rows, columns)
    )
    mixed = map_bcyx.new_zeros(())
    for number, (down, right) in enumerate(_POINTS):
        y_byx = offsets_bkyx[:, 2 * number] + (y + down)[:, None]
        x_byx = offsets_bkyx[:, 2 * number + 1] + (x + right)
        # From cells to the frame of grid_sample, whose edges are -1 and 1.
        places = torch.stack([(2 * x_byx + 1) / columns - 1, (2 * y_byx + 1) / rows - 1], dim=-1)
        sampled = functional.grid_sample(
            map_bcyx, places, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        mixed = mixed + functional.conv2d(sampled, weight[:, :, down + 1, right + 1, None, None])
    return mixed


def check_sampler(name: str) -> None:
    """Refuse a name that is no way to sample, or torchvision where it is not installed.

    Raises:
        InvalidInputError: There is no such way.
        NotFoundError: torchvision is missing.
    """
    if name not in SAMPLERS:
        raise invalid("sampler", name, f"one of {', '.join(SAMPLERS)}")
    if name == "torchvision" and find_spec("torchvision") is None:
        raise NotFoundError(
            "sampler=torchvision needs torchvision, which is not installed here. "
            "Install it, or use sampler=plain."
        )


class DeformableConvNet(nn.Module):
    """A 3x3 convolution that says where a second one without bias reads.

    The offsets begin at random, as any convolution, not at zero. ``162 * width + 18 + 9 * width *
    outputs`` parameters.

    Source:
        HEADS.md 2.1: `DeformableConvNet` of ViT-Split's release, with the DCNv1 of mmcv, whose
        first weights are He's uniform ones.
    """

    def __init__(self, width: int, outputs: int, *, sampler: str = "plain") -> None:
        super().__init__()
        check_sampler(sampler)
        self._sampler = sampler
        self.offsets = nn.Conv2d(width, N_OFFSETS, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(outputs, width, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, map_bcyx: Tensor) -> Tensor:
        """Give (batch, outputs, rows, columns).

        Raises:
            InvalidInputError: torchvision was asked for where it has no backward pass.
        """
        offsets_bkyx = self.offsets(map_bcyx)
        if self._sampler == "plain":
            return deform_conv(map_bcyx, offsets_bkyx, self.weight)
        if map_bcyx.device.type not in ("cpu", "cuda"):
            expected = "plain on this device"
            raise invalid("sampler", self._sampler, expected, hint="Use --set sampler=plain.")
        from torchvision.ops import deform_conv2d

        mixed: Tensor = deform_conv2d(map_bcyx, offsets_bkyx, self.weight, padding=1)
        return mixed
