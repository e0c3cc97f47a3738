"""Several taps as one: each on the finest of their grids, their channels one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import TapTokens


def joined_shape(taps: Sequence[TapShape], *, head: str) -> TapShape:
    """Give the shape that `join` makes of some taps.

    Raises:
        InvalidInputError: There are none, or one of them is pooled.
    """
    grids = [shape.grid for shape in taps if shape.grid is not None]
    if not taps or len(grids) < len(taps):
        names = tuple(shape.tap for shape in taps)
        raise invalid("taps", names, f"one dense tap or several for the head {head}")
    return TapShape(tap="+".join(t.tap for t in taps), dim=sum(t.dim for t in taps),
                    grid=max(grids, key=math.prod))  # fmt: skip


def join(inputs: Sequence[TapTokens], dtype: torch.dtype) -> TapTokens:
    """Lay taps over one another on the finest grid among them, bilinearly.

    A padded token gives nothing to the tokens around it. The joined token counts where it does
    in the finest tap. Prefix tokens are dropped.

    Source:
        HEADS.md 1.1: the count of MAXA's ConvNeXt of two layers is that of both widths together
        on the finer grid.
    """
    finest = max(inputs, key=lambda tokens: math.prod(tokens.grid))
    if len(inputs) == 1:
        return finest
    patches = [_resampled(tokens, finest.grid, dtype) for tokens in inputs]
    return TapTokens(patch=torch.cat(patches, dim=2), grid=finest.grid, valid=finest.valid)


def _resampled(tokens: TapTokens, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    patch = tokens.filled(dtype)
    if tokens.grid == grid:
        return patch
    resized = _resize(patch, tokens.grid, grid)
    if tokens.valid is None:
        return resized
    share = _resize(tokens.valid[:, :, None].to(dtype), tokens.grid, grid)
    return resized / share.clamp(min=1e-6)


def _resize(patch_btd: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    map_bdyx = patch_btd.mT.reshape(patch_btd.shape[0], -1, *grid)
    resized = functional.interpolate(map_bdyx, size=to, mode="bilinear", align_corners=False)
    return resized.flatten(2).mT
