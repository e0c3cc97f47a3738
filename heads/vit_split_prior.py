"""ViT-Split's prior head: frozen taps of several depths, mixed by one deformable convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featstore.errors import InvalidInputError, invalid
from featstore.layer_choice import ROUNDINGS, last_layers, uniform_layers
from featstore.types import TapShape
from heads.base import HEADS, TapTokens, check_inputs, last_dense_tap
from heads.deformable import DeformableConvNet, check_sampler
from heads.gate import SparseGate
from heads.stages import STAGES, StagedHead, as_map

MIXERS = ("deformable", "plain", "none")
LAYERS = ("auto", "stored", "uniform", "last")
GATES = ("none", "sparse")
_KP = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSplitPriorOptions:
    """Choices of a prior head; the defaults are those of the release.

    `stage` is how it ends: "dense" enlarges the map four times, "depth" does so while it thins to
    64 channels, "pooled" gives one answer an image, and "auto" is what the task needs.

    `width` is the channels after the first convolution (None: those of a tap), to compare at an
    equal budget. `mixer` is what follows it: the deformable convolution, a plain 3x3 one, or with
    "none" neither of the two: the taps go straight to the stage.

    `layers` chooses the taps: "stored" are those that the user names, else all blocks that are
    stored; "uniform" spreads `kp` blocks (None: 4) from block `b` to the last one, "last" takes the
    last `kp`; "auto" is "uniform" where `kp` is given without a gate. `gate` = "sparse" lets the
    head mix the taps to `kp` maps, each of its `k` best taps, in place of them.
    """

    stage: str = "auto"
    width: int | None = None
    mixer: str = "deformable"
    sampler: str = "plain"  # of deformable convolutions: ours, or "torchvision"
    layers: str = "auto"
    kp: int | None = None
    b: int = 2
    rounding: str = "floor"  # of the release; "nearest" is the paper's
    gate: str = "none"
    k: int = 4

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
        self._check_layers()

    def _check_layers(self) -> None:
        if self.layers not in LAYERS:
            raise invalid("layers", self.layers, f"one of {', '.join(LAYERS)}")
        if self.rounding not in ROUNDINGS:
            raise invalid("rounding", self.rounding, f"one of {', '.join(ROUNDINGS)}")
        if self.gate not in GATES:
            raise invalid("gate", self.gate, f"one of {', '.join(GATES)}")
        for name in ("kp", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise invalid(name, value, "at least 1")
        if self.gate != "none" and self.layers not in ("auto", "stored"):
            raise invalid("layers", self.layers, "stored with a gate, which chooses by itself")
        if self.kp is not None and self.gate == "none" and self.layers == "stored":
            raise invalid("kp", self.kp, "left out with layers=stored", hint="Try layers=uniform.")

    @property
    def n_chosen(self) -> int:
        """Count the blocks that are chosen, or the maps that a gate mixes."""
        return self.kp or _KP

    def blocks(self, depth: int | None) -> list[int] | None:
        """Number the blocks that are asked for; None: those that are named or stored.

        Raises:
            InvalidInputError: The backbone has no blocks, or not as many.
        """
        layers = self.layers
        if layers == "auto":
            layers = "stored" if self.kp is None or self.gate != "none" else "uniform"
        if layers == "stored":
            return None
        if depth is None:
            raise InvalidInputError(
                f"layers={layers} counts the blocks of a ViT, and these features come from a net "
                "of stages or were imported. Name taps with --tap instead."
            )
        if layers == "last":
            return last_layers(depth, self.n_chosen)
        return uniform_layers(depth, self.n_chosen, self.b, self.rounding)


class PriorNet(nn.Module):
    """A 1x1 convolution over all taps, GELU, a 3x3 one, GELU; no norm.

    For k taps of width d, ``(k d + 1) w + 162 w + 18 + 9 w^2`` parameters with the deformable one.
    A gate comes first, and its maps take the place of the taps.
    """

    def __init__(self, taps: Sequence[TapShape], options: VitSplitPriorOptions) -> None:
        super().__init__()
        self._taps = tuple(tap.tap for tap in taps)
        self.gate = _gate(taps, options)
        total = sum(tap.dim for tap in taps)
        if self.gate is not None:
            total = options.n_chosen * taps[0].dim
        has_mixer = options.mixer != "none"
        self.width = (options.width or taps[-1].dim) if has_mixer else total
        self.net = mixing_net(total, self.width, options) if has_mixer else nn.Identity()

    def forward(self, inputs: Sequence[TapTokens], like: Tensor) -> Tensor:
        """Give (batch, width, rows, columns), in the dtype of `like`."""
        maps = [as_map(tokens, like) for tokens in inputs]
        if self.gate is not None:
            maps = [self.gate(torch.stack(maps, dim=1)).flatten(1, 2)]
        mixed: Tensor = self.net(torch.cat(maps, dim=1))
        return mixed

    def learned(self) -> dict[str, Any]:
        """Give the weights of the gate by tap, one a map; nothing without a gate."""
        if self.gate is None:
            return {}
        return {"gate": dict(zip(self._taps, self.gate.learned(), strict=True))}


def _gate(taps: Sequence[TapShape], options: VitSplitPriorOptions) -> SparseGate | None:
    if options.gate == "none":
        return None
    widths = {tap.dim for tap in taps}
    if len(widths) > 1:
        raise invalid("widths", sorted(widths), "equal for a gate, which mixes taps")
    return SparseGate(len(taps), options.n_chosen, options.k)


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


def asked_blocks(options: VitSplitPriorOptions, *, depth: int | None) -> tuple[str, ...] | None:
    """Name the taps that the options ask for; None: those that are named or stored."""
    blocks = options.blocks(depth)
    return None if blocks is None else tuple(f"block:{number}" for number in blocks)


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
        self.read_grids(taps)
        self._widths = tuple(tap.dim for tap in taps)
        self.prior = PriorNet(taps, chosen)
        self.build_stage(chosen.stage, self.prior.width, n_outputs)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 4 * rows, 4 * columns) of the tokens' grid; or 1 x 1, pooled."""
        check_inputs(inputs, self._widths)
        like = self.stage[-1].get_parameter("weight")
        return self.answer(self.prior(inputs, like), inputs[0])

    def learned(self) -> dict[str, Any]:
        """Give the weights of the gate."""
        return self.prior.learned()

    @classmethod
    def asked_taps(cls, options: Mapping[str, Any], *, depth: int | None) -> tuple[str, ...] | None:
        """Name the blocks that `layers` chooses."""
        return asked_blocks(VitSplitPriorOptions(**options), depth=depth)

    @classmethod
    def default_taps(
        cls, available: Mapping[str, TapShape], *, input_hw: tuple[int, int] | None
    ) -> tuple[str, ...]:
        """Take all blocks that are stored."""
        return block_taps(available, input_hw=input_hw)
