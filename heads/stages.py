"""What ViT-Split's heads end with: maps enlarged four times, metres, or one answer an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import Head, TapTokens, start_layer_at

AUTO, DENSE, DEPTH, POOLED = "auto", "dense", "depth", "pooled"
STAGES = (AUTO, DENSE, DEPTH, POOLED)
GROWTH = 4
"""Cells of the output a token, along each side."""

_GROUPS = 32
_DEPTH_CHANNELS = 64
_STARTED = 0.01  # of the weights of the last layer, where it begins with one answer


def group_norm(channels: int) -> nn.GroupNorm:
    """Build a norm over 32 groups; over fewer where one would not have two channels."""
    fitting = [n for n in range(1, _GROUPS + 1) if channels % n == 0 and channels >= 2 * n]
    return nn.GroupNorm(max(fitting, default=1), channels)


def dense_stage(width: int, n_outputs: int) -> nn.Sequential:
    """Enlarge a map four times and map its channels: ``8 w^2 + 8 w + (w + 1) n`` parameters."""
    growing = [*_growing(width, width), *_growing(width, width)]
    return nn.Sequential(*growing, nn.BatchNorm2d(width), nn.Conv2d(width, n_outputs, 1))


def depth_stage(width: int, n_outputs: int) -> nn.Sequential:
    """Enlarge a map four times while it thins to 64 channels, and end with a 3x3 convolution."""
    half, last = max(1, width // 2), min(_DEPTH_CHANNELS, width)
    growing = [*_growing(width, half), *_growing(half, last)]
    final = nn.Conv2d(last, n_outputs, 3, padding=1)
    return nn.Sequential(*growing, nn.BatchNorm2d(last), final)


def pooled_stage(width: int, n_outputs: int) -> nn.Sequential:
    """Normalise what was pooled and map it linearly."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_outputs))


def _growing(channels: int, out_channels: int) -> list[nn.Module]:
    larger = nn.ConvTranspose2d(channels, out_channels, 2, stride=2)
    return [larger, group_norm(out_channels), nn.GELU()]


_BUILDERS = {AUTO: dense_stage, DENSE: dense_stage, DEPTH: depth_stage, POOLED: pooled_stage}


class StagedHead(Head):
    """A head that makes one map of the tokens' grid, and ends as its task needs it.

    Its options have a `stage`: "auto" becomes what the task asks for before the head is built.
    All its taps lie on one grid; the output has four cells a token and side, whatever the grid.

    Source:
        HEADS.md 2.1: the segmentation and depth stages of ViT-Split's release. Pooling, for
        classification, is not in it.
    """

    is_pooled = None
    stage: nn.Sequential
    _grid: tuple[int, int]

    @classmethod
    def completed(cls, options: Mapping[str, Any], *, stage: str) -> dict[str, Any]:
        """End as the task asks where the user does not say how.

        Raises:
            InvalidInputError: The user says a map for one answer an image, or the reverse.
        """
        chosen = stage if options["stage"] == AUTO else options["stage"]
        if (chosen == POOLED) != (stage == POOLED):
            raise invalid("stage", chosen, f"{stage} for this task", hint="Use --set stage=auto.")
        return {**options, "stage": chosen}

    def read_grids(self, taps: Sequence[TapShape]) -> None:
        """Take over the one grid of the taps: the output follows it.

        Raises:
            InvalidInputError: A tap is pooled, or they have several grids.
        """
        grids = {shape.grid for shape in taps}
        if None in grids or not grids:
            names = tuple(shape.tap for shape in taps)
            raise invalid("taps", names, "dense, one or more")
        if len(grids) > 1:
            given = ", ".join(f"{t.tap} {t.grid[0]}x{t.grid[1]}" for t in taps if t.grid)
            hint = "Choose taps with --tap."
            raise invalid("taps", given, "of one grid for this head", hint=hint)
        (grid,) = grids
        assert grid is not None
        self._grid = grid

    def build_stage(self, kind: str, width: int, n_outputs: int) -> None:
        """Make the last part, last of all modules."""
        self._is_one_answer = kind == POOLED
        self.stage = _BUILDERS[kind](width, n_outputs)

    def answer(self, map_bdyx: Tensor, like: TapTokens) -> Tensor:
        """Give (batch, n_outputs, *output_hw) of a map; padded tokens of `like` are not pooled."""
        if not self._is_one_answer:
            output: Tensor = self.stage(map_bdyx)
            return output
        tokens_bdt = map_bdyx.flatten(2)
        if like.valid is None:
            pooled_bd = tokens_bdt.mean(dim=2)
        else:
            shares_b1t = like.valid[:, None] / like.valid.sum(dim=1)[:, None, None]
            pooled_bd = (tokens_bdt * shares_b1t).sum(dim=2)
        output = self.stage(pooled_bd)
        return output[:, :, None, None]

    @property
    def output_hw(self) -> tuple[int, int]:
        """Rows and columns of the output, for the grid of the taps."""
        if self._is_one_answer:
            return (1, 1)
        return (GROWTH * self._grid[0], GROWTH * self._grid[1])

    def start_at(self, middle: Tensor) -> None:
        """Begin with one answer: the last layer of a stage adds up far more than it begins with."""
        start_layer_at(self.stage[-1], middle, share=_STARTED)

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the bias of the last layer."""
        return (self.stage[-1].get_parameter("bias"),)


def as_map(tokens: TapTokens, like: Tensor) -> Tensor:
    """Give (batch, dim, rows, columns) in a dtype, zeros where padded."""
    patch_btd = tokens.filled(like.dtype)
    return patch_btd.mT.reshape(patch_btd.shape[0], -1, *tokens.grid)
