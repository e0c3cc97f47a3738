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
    """A head that answers on a square grid of `options.queries` a side, enlarged 8 times.

    Trained on one grid, it can be asked on another (`ask_on`): queries are places of the frame,
    and CNN and skip are convolutions.
    """

    cnn: nn.Sequential
    skip: nn.Conv2d
    upscale: Upscale
    _asked_side: int | None = None

    @property
    def side(self) -> int:
        """Queries along each side of the grid in use."""
        return self._asked_side or int(self.options.queries)

    @property
    def position_step(self) -> float:
        """Steps of the grid of training from one query to the next.

        Source:
            HEADS.md 1.4: the corners of both grids lie in the corners of the frame.
        """
        return (self.options.queries - 1) / (self.side - 1)

    def ask_on(self, queries: int) -> None:
        """Answer on a grid of another side from now on; the weights stay.

        Raises:
            InvalidInputError: The side is out of range.
        """
        check_readout_options(queries, None)
        self._asked_side = queries

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
        side = self.side
        map_bdyx = tokens_bqd.mT.reshape(tokens_bqd.shape[0], -1, side, side)  # channels stay last
        output: Tensor = self.upscale(self.skip(map_bdyx)) + self.cnn(map_bdyx)
        return output

    @property
    def output_hw(self) -> tuple[int, int]:
        """Rows and columns of the output: 8 pixels a query."""
        return (UPSCALE * self.side,) * 2

    def output_biases(self) -> tuple[nn.Parameter, ...]:
        """List the biases of the skip and of the CNN's last layer."""
        return (self.skip.get_parameter("bias"), self.cnn[-1].get_parameter("bias"))
