"""Several heads of one kind that read the same tokens, their outputs one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featstore.tail import TailWeights
from featstore.types import TapShape
from heads.base import Head, TapTokens


class SideBySide(Head):
    """Heads that share nothing: detection learns centres and sizes by one each.

    It is not filed under `HEADS`; `heads.build.build_head` makes it of any head that is.

    Source:
        HEADS.md 1.1: DeAP's detection counts are those of two whole readouts.
    """

    def __init__(self, parts: Sequence[Head]) -> None:
        super().__init__(taps=(), n_outputs=len(parts))
        self.parts = nn.ModuleList(parts)
        self.options = parts[0].options
        self.UNUSED = tuple(
            f"parts.{number}.{name}" for number, part in enumerate(parts) for name in part.UNUSED
        )

    @property
    def heads(self) -> list[Head]:
        """List the heads in the order of their outputs."""
        return [part for part in self.parts if isinstance(part, Head)]

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Give the outputs of all parts, concatenated over channels."""
        return torch.cat([part(inputs) for part in self.heads], dim=1)

    @property
    def output_hw(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return self.heads[0].output_hw

    def ask_on(self, queries: int) -> None:
        """Answer on a grid of another side from now on; see `QueryHead.ask_on`."""
        for part in self.heads:
            part.ask_on(queries)

    def read_grids(self, taps: Sequence[TapShape]) -> None:
        """Read the same taps on other grids from now on."""
        for part in self.heads:
            part.read_grids(taps)

    @property
    def raw_inputs(self) -> frozenset[int]:
        """Numbers of the taps that the parts read as the backbone's blocks gave them."""
        return self.heads[0].raw_inputs

    def lr_scales(self) -> Mapping[str, float]:
        """Give the factors of all parts."""
        return {
            f"parts.{number}.{name}": scale
            for number, part in enumerate(self.heads)
            for name, scale in part.lr_scales().items()
        }

    def fill_tail(self, weights: TailWeights) -> None:
        """Give every part copies of its own."""
        for part in self.heads:
            part.fill_tail(weights)

    def learned(self) -> dict[str, Any]:
        """Give what each part learned, by its number, where there is anything."""
        found = {str(number): part.learned() for number, part in enumerate(self.heads)}
        return {number: learned for number, learned in found.items() if learned}

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the output biases of all parts."""
        return tuple(bias for part in self.heads for bias in part.output_biases())
