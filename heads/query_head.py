"""What DeAP, MAXA and the bicubic baseline end with: a CNN and a skip that enlarge a query grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from featstore.errors import invalid
from heads.base import Head
from heads.blocks import Upscale, upscaling_cnn

UPSCALE = 8
"""Pixels of the output a query."""


def check_readout_options(queries: int, dc: int | None) -> None:
    """Refuse a side of the query grid or a number of channels that no readout has.

    Raises:
        InvalidInputError: One of them is out of range.
    """
    if not 2 <= queries <= 256:
        raise invalid("queries", queries, "from 2 to 256 a side", hint="Try 28 or 56.")
    if dc is not None and dc < 1:
        raise invalid("dc", dc, "a positive number of channels, or auto")


class QueryHead(Head):
    """A head that answers on a square grid of `options.queries` a side, enlarged 8 times."""

    cnn: nn.Sequential
    skip: nn.Conv2d
    upscale: Upscale

    def build_readout(
        self, dim: int, inner: int, n_outputs: int, *, factors: Sequence[int] = (2, 2, 2)
    ) -> None:
        """Make the CNN, with `inner` channels inside, and the skip, last of all modules."""
        assert math.prod(factors) == UPSCALE
        self.cnn = upscaling_cnn(dim, inner, n_outputs, factors=factors)
        self.skip = nn.Conv2d(dim, n_outputs, 1)
        self.upscale = Upscale(UPSCALE)

    def readout(self, tokens_bqd: Tensor) -> Tensor:
        """Give (batch, n_outputs, *output_hw) of the answers, (batch, queries, dim)."""
        side = self.options.queries
        map_bdyx = tokens_bqd.mT.reshape(len(tokens_bqd), -1, side, side)  # channels stay last
        output: Tensor = self.upscale(self.skip(map_bdyx)) + self.cnn(map_bdyx)
        return output

    @property
    def output_hw(self) -> tuple[int, int]:
        """Rows and columns of the output: 8 pixels a query."""
        return (UPSCALE * self.options.queries,) * 2

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the biases of the skip and of the CNN's last layer."""
        return (self.skip.get_parameter("bias"), self.cnn[-1].get_parameter("bias"))
