"""Where a row lies: pure arithmetic between rows, shards and chunks.

A dense array has one chunk a row; a pooled array has one chunk a shard. A shard holds
`shard_rows` consecutive rows; a row never moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featstore.errors import invalid

MAX_SHARD_ROWS = 256
MAX_SHARD_BYTES = 128 * 2**20
SHARD_SECONDS = 60.0
NOMINAL_FLOPS = {"cpu": 5e10, "mps": 2e12, "cuda": 2e13}
"""Assumed speeds for the minute a shard may take: fixed, so that no timing decides the layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Rows and shards of one feature set."""

    shard_rows: int

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise invalid("shard_rows", self.shard_rows, "at least 1")

    def shard_of(self, row: int) -> int:
        """Give the shard that holds `row`."""
        return row // self.shard_rows

    def slot_of(self, row: int) -> int:
        """Give the place of `row` inside its shard."""
        return row % self.shard_rows

    def rows_of(self, shard: int) -> range:
        """Give the rows that shard may hold."""
        return range(shard * self.shard_rows, (shard + 1) * self.shard_rows)

    def n_shards(self, n_rows: int) -> int:
        """Count the shards that `n_rows` rows need."""
        return -(-n_rows // self.shard_rows)

    def next_free_row(self, n_rows: int) -> int:
        """Give the first row of the first shard that `n_rows` rows leave untouched."""
        return self.n_shards(n_rows) * self.shard_rows

    def split_by_shard(self, rows: Sequence[int] | np.ndarray) -> dict[int, np.ndarray]:
        """Group row numbers by shard, shards ascending, rows in the given order."""
        rows_array = np.asarray(rows, dtype=np.int64)
        shards = rows_array // self.shard_rows
        return {int(shard): rows_array[shards == shard] for shard in np.unique(shards)}


def choose_shard_rows(*, bytes_per_row: int, flops_per_row: float, device: str) -> int:
    """Choose rows a shard: at most 256, 128 MiB of the largest tap, about a minute of work.

    The minute is taken at a nominal speed of the kind of device, not a measured one, so that
    two runs of one command always choose alike.

    Args:
        bytes_per_row: Bytes of one row of the largest array.
        flops_per_row: Floating point operations of one forward pass of one image.
        device: "cpu", "cuda" or "mps" (an index after a colon is ignored).

    Returns:
        A power of two from 1 to 256.
    """
    by_bytes = MAX_SHARD_BYTES // max(bytes_per_row, 1)
    speed = NOMINAL_FLOPS.get(device.partition(":")[0], NOMINAL_FLOPS["cpu"])
    by_time = int(SHARD_SECONDS * speed / max(flops_per_row, 1.0))
    rows = max(1, min(MAX_SHARD_ROWS, by_bytes, by_time))
    return 1 << (rows.bit_length() - 1)
