"""ViT-Split: a prior of frozen taps beside trained copies of the backbone's last blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featstore.errors import invalid
from featstore.tail import TailSpec, TailWeights
from featstore.types import TapShape
from heads.base import HEADS, TapTokens, check_inputs
from heads.copied_blocks import checked_tail, fill, final_tokens, tap_before
from heads.stages import StagedHead
from heads.vit_block import Tail
from heads.vit_split_prior import (
    PriorNet,
    VitSplitPriorOptions,
    asked_blocks,
    block_taps,
    mixing_net,
)

PARTS = ("both", "prior", "task")
FUSIONS = ("net", "add")


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSplitOptions(VitSplitPriorOptions):
    """Choices of a ViT-Split head: those of the prior, and of what stands beside it.

    `kt` is how many of the backbone's last blocks are copied and trained, at `tail_lr` times the
    learning rate. `parts` leaves one of the two out; `fusion` joins them by a net, or adds them.
    """

    kt: int = 3
    parts: str = "both"
    fusion: str = "net"
    tail_lr: float = 0.1

    def __post_init__(self) -> None:
        VitSplitPriorOptions.__post_init__(self)
        if self.kt < 1:
            raise invalid("kt", self.kt, "at least 1 block")
        if self.parts not in PARTS:
            raise invalid("parts", self.parts, f"one of {', '.join(PARTS)}")
        if self.fusion not in FUSIONS:
            raise invalid("fusion", self.fusion, f"one of {', '.join(FUSIONS)}")
        if not 0 < self.tail_lr <= 1:
            raise invalid("tail_lr", self.tail_lr, "above 0 and at most 1")
        if self.width is not None and (self.parts == "task" or self.is_added):
            expected = "auto where nothing follows the copied blocks: their width is the backbone's"
            raise invalid("width", self.width, expected, hint="Use --set fusion=net.")

    @property
    def is_added(self) -> bool:
        """Whether prior and task are added, so that they need one width."""
        return self.parts == "both" and self.fusion == "add"

    @property
    def n_copied(self) -> int:
        """Count the blocks that are copied: none where there is a prior only."""
        return 0 if self.parts == "prior" else self.kt


class Fusion(nn.Module):
    """Concatenate prior and task, mix them as the prior is mixed.

    `bn_norm` is created, counted and never applied, as in the release.
    """

    def __init__(self, channels: int, width: int, options: VitSplitPriorOptions) -> None:
        super().__init__()
        self.net = mixing_net(channels, width, options)
        self.bn_norm = nn.BatchNorm2d(width)

    def forward(self, prior_bdyx: Tensor, task_bdyx: Tensor) -> Tensor:
        """Give (batch, width, rows, columns)."""
        fused: Tensor = self.net(torch.cat([prior_bdyx, task_bdyx], dim=1))
        return fused


@HEADS.register("vit_split.v1")
class VitSplit(StagedHead):
    """A prior head, trained copies of the last blocks, and a net that joins both.

    The copies read the raw output of the block before them, prefix tokens included, begin as the
    backbone's own and end with its frozen norm: untrained they give the backbone's last tokens.
    Padded tokens are read by them as the backbone read them; to prior and fusion they are zeros.

    Source:
        ViT-Split, arXiv:2506.03433, section 3; the release as of HEADS.md 2.1. Padding is ours:
        the release cuts windows that have none.
    """

    OPTIONS = VitSplitOptions
    LR = 3e-4

    def __init__(
        self,
        *,
        taps: Sequence[TapShape],
        n_outputs: int,
        tail: TailSpec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(taps=taps, n_outputs=n_outputs)
        self.options = chosen = VitSplitOptions(**options)
        self.read_grids(taps)
        self._widths = tuple(tap.dim for tap in taps)
        self._n_prior = len(taps) - (1 if chosen.n_copied else 0)
        self._check_taps(taps)
        width = 0
        if self._n_prior:
            self.prior = PriorNet(taps[: self._n_prior], chosen)
            width = self.prior.width
        if chosen.n_copied:
            self.tail = Tail(checked_tail(tail, taps[-1], chosen.kt, option="kt"))
            width = self._join(width, taps[-1].dim)
        self.build_stage(chosen.stage, width, n_outputs)

    def _check_taps(self, taps: Sequence[TapShape]) -> None:
        if (self._n_prior > 0) == (self.options.parts != "task"):
            return
        names = tuple(tap.tap for tap in taps)
        expected = "one tap for parts=task, and at least one for the prior otherwise"
        raise invalid("taps", names, expected, hint="The tap of the copied blocks comes last.")

    def _join(self, prior_width: int, task_width: int) -> int:
        """Make what joins prior and task; give the channels that come out."""
        if not prior_width:
            return task_width
        if self.options.fusion == "net":
            self.UNUSED = ("fusion.bn_norm",)
            width = self.options.width or task_width
            self.fusion = Fusion(prior_width + task_width, width, self.options)
            return width
        if prior_width != task_width:
            given = (prior_width, task_width)
            raise invalid("widths", given, "equal for fusion=add", hint="Use --set fusion=net.")
        return task_width

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give (batch, n_outputs, 4 * rows, 4 * columns) of the tokens' grid; or 1 x 1, pooled.

        Raises:
            InvalidInputError: The last tap lacks its prefix tokens.
        """
        check_inputs(inputs, self._widths)
        like = self.stage[-1].get_parameter("weight")
        prior = self.prior(inputs[: self._n_prior], like) if self._n_prior else None
        task = self._task(inputs[-1]) if self.options.n_copied else None
        if prior is None or task is None:
            joined = task if prior is None else prior
            assert joined is not None
        else:
            joined = prior + task if self.options.is_added else self.fusion(prior, task)
        return self.answer(joined, inputs[0])

    def _task(self, tokens: TapTokens) -> Tensor:
        """Give (batch, dim, rows, columns) of the copied blocks, zeros where padded."""
        final = final_tokens(self.tail, tokens)
        final_btd = final.filled(final.patch.dtype)
        return final_btd.mT.reshape(final_btd.shape[0], -1, *tokens.grid)

    @property
    def raw_inputs(self) -> frozenset[int]:
        """Number the tap of the copied blocks."""
        return frozenset({self._n_prior}) if self.options.n_copied else frozenset()

    def lr_scales(self) -> Mapping[str, float]:
        """Let the copied blocks learn more slowly."""
        return {"tail.": self.options.tail_lr}

    def fill_tail(self, weights: TailWeights) -> None:
        """Begin with the backbone's own blocks."""
        fill(self.tail, weights)

    def learned(self) -> dict[str, Any]:
        """Give the weights of the prior's gate."""
        return self.prior.learned() if self._n_prior else {}

    @classmethod
    def n_tail_blocks(cls, options: Mapping[str, Any]) -> int:
        """Give `kt`, or 0 where there is a prior only."""
        return VitSplitOptions(**options).n_copied

    @classmethod
    def default_taps(
        cls, available: Mapping[str, TapShape], *, input_hw: tuple[int, int] | None
    ) -> tuple[str, ...]:
        """Take all blocks that are stored."""
        return block_taps(available, input_hw=input_hw)

    @classmethod
    def asked_taps(cls, options: Mapping[str, Any], *, depth: int | None) -> tuple[str, ...] | None:
        """Name the blocks that `layers` chooses for the prior; none where there is no prior."""
        chosen = VitSplitOptions(**options)
        return () if chosen.parts == "task" else asked_blocks(chosen, depth=depth)

    @classmethod
    def added_taps(cls, options: Mapping[str, Any], *, depth: int | None) -> tuple[str, ...]:
        """Add the block before those that are copied.

        Raises:
            InvalidInputError: The backbone has no blocks, or not as many.
        """
        n_copied = cls.n_tail_blocks(options)
        if not n_copied:
            return ()
        hint = "Use --head vit_split_prior."
        return (tap_before(n_copied, depth=depth, head="vit_split", option="kt", hint=hint),)
