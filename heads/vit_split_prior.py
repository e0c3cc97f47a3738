"""ViT-Split's prior head: frozen taps of several depths, mixed by one deformable convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import HEADS, TapTokens, check_inputs, last_dense_tap
from heads.deformable import DeformableConvNet, check_sampler
from heads.stages import STAGES, StagedHead, as_map

MIXERS = ("deformable", "plain", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSplitPriorOptions:
    """Choices of a prior head; the defaults are those of the release.

    `stage` is how it ends: "dense" enlarges the map four times, "depth" does so while it thins to
    64 channels, "pooled" gives one answer an image, and "auto" is what the task needs.

    `width` is the channels after the first convolution (None: those of a tap), to compare at an
    equal budget. `mixer` is what follows it: the deformable convolution, a plain 3x3 one, or with
    "none" neither of the two: the taps go straight to the stage.
    """

    stage: str = "auto"
    width: int | None = None
    mixer: str = "deformable"
    sampler: str = "plain"  # of deformable convolutions: ours, or "torchvision"

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise invalid("stage", self.stage, f"one of {', '.join(STAGES)}")
        if self.width is not None and self.width < 2:
            raise invalid("width", self.width, "at least 2, or auto")
        if self.mixer not in MIXERS:
            raise invalid("mixer", self.mixer, f"one of {', '.join(MIXERS)}")
        if self.width is not None and self.mixer == "none":
            raise invalid("width", self.width, "auto with mixer=none, which changes no channels")
        check_sampler(self.sampler)


class PriorNet(nn.Module):
    """A 1x1 convolution over all taps, GELU, a 3x3 one, GELU; no norm.

    For k taps of width d, ``(k d + 1) w + 162 w + 18 + 9 w^2`` parameters with the deformable one.
    """

    def __init__(self, taps: Sequence[TapShape], options: VitSplitPriorOptions) -> None:
        super().__init__()
        total = sum(tap.dim for tap in taps)
        has_mixer = options.mixer != "none"
        self.width = (options.width or taps[-1].dim) if has_mixer else total
        self.net = mixing_net(total, self.width, options) if has_mixer else nn.Identity()

    def forward(self, inputs: Sequence[TapTokens], like: Tensor) -> Tensor:
        """Give (batch, width, rows, columns), in the dtype of `like`."""
        mixed: Tensor = self.net(torch.cat([as_map(tokens, like) for tokens in inputs], dim=1))
        return mixed


def mixing_net(channels: int, width: int, options: VitSplitPriorOptions) -> nn.Sequential:
    """Build a 1x1 convolution, GELU, a 3x3 one, GELU."""
    around: nn.Module = nn.Conv2d(width, width, 3, padding=1)
    if options.mixer == "deformable":
        around = DeformableConvNet(width, width, sampler=options.sampler)
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.GELU(), around, nn.GELU())


def block_taps(
    available: Mapping[str, TapShape], *, input_hw: tuple[int, int] | None
) -> tuple[str, ...]:
    """Choose all blocks that are stored, in their order; without any, the last dense tap."""
    blocks = [tap for tap in available if tap.startswith("block:")]
    if not blocks:
        return last_dense_tap(available, input_hw=input_hw)
    return tuple(sorted(blocks, key=lambda tap: int(tap.partition(":")[2])))


@HEADS.register("vit_split_prior.v1")
class VitSplitPrior(StagedHead):
    """Concatenate frozen taps, mix them by a deformable convolution, enlarge the map four times.

    It reads any number of taps of one grid; block outputs go through the backbone's final norm
    before, as with every head. Padded tokens enter as zeros. Its learning rate is 3e-4 where none
    is named, that of the release for ViT-S.

    Source:
        ViT-Split, arXiv:2506.03433, section 3; `frozen_conv` of the release as of HEADS.md 2.1.
    """

    OPTIONS = VitSplitPriorOptions
    LR = 3e-4

    def __init__(self, *, taps: Sequence[TapShape], n_outputs: int, **options: Any) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = VitSplitPriorOptions(**options)
        self.set_grid(taps, head="vit_split_prior")
        self._widths = tuple(tap.dim for tap in taps)
        self.prior = PriorNet(taps, chosen)
        self.build_stage(chosen.stage, self.prior.width, n_outputs)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 4 * rows, 4 * columns) of the tokens' grid; or 1 x 1, pooled."""
        check_inputs(inputs, self._widths)
        like = self.stage[-1].get_parameter("weight")
        return self.answer(self.prior(inputs, like), inputs[0])

    @classmethod
    def default_taps(
        cls, available: Mapping[str, TapShape], *, input_hw: tuple[int, int] | None
    ) -> tuple[str, ...]:
        """Take all blocks that are stored."""
        return block_taps(available, input_hw=input_hw)
