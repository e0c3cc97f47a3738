"""From stored rows to tokens and targets on the device of a head.

Features stay in their stored dtype until they are on the device, and are cast there: half the
bytes cross the bus. On CUDA they cross from pinned memory without blocking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from featstore.types import Placement
from heads.base import TapTokens
from heads.model import Model
from heads.selection import Pair
from heads.targets import Targets

if TYPE_CHECKING:
    from featstore.api import FeatureSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Tokens and targets of some pairs, on the device."""

    pairs: Sequence[Pair]
    inputs: list[TapTokens]
    targets: dict[str, Tensor]


class Feed:
    """Gives batches for one model from one feature set."""

    def __init__(self, features: FeatureSet, model: Model) -> None:
        self._features = features
        self._model = model

    def placements(self, rows: Sequence[int]) -> dict[int, Placement]:
        """Tell how the image of each row was drawn into the backbone's input."""
        return self._features.placements(rows)

    def tokens(self, rows: Sequence[int]) -> list[TapTokens]:
        """Give the head's input for some rows, in their order."""
        arrays = {
            name: self._features.read(name, rows=list(rows)) for name in self._model.array_names
        }
        return self._inputs(arrays, rows)

    def fixed(self, pairs: Sequence[Pair], targets: Targets, batch_size: int) -> Iterator[Batch]:
        """Give all pairs once, in their order."""
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            yield self._batch(part, self.tokens([pair.row for pair in part]), targets)

    def shuffled(
        self,
        pairs_by_row: Mapping[int, Sequence[Pair]],
        targets: Targets,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        start: int,
    ) -> Iterator[Batch]:
        """Give one epoch of whole batches in an order that `seed` and `epoch` decide.

        A row with several items (equal images) shows them in turn, one an epoch.

        Args:
            pairs_by_row: Rows to go through and the pairs of each.
            targets: Supervision.
            batch_size: Rows a batch.
            seed: Of the order.
            epoch: Number of the epoch.
            start: Batches to pass over, for a resumed epoch.
        """
        stream = self._features.stream(
            list(self._model.array_names),
            rows=sorted(pairs_by_row),
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            epoch=epoch,
            start=start,
            drop_last=True,
        )
        with iter(stream) as batches:
            for stored in batches:
                rows = [int(row) for row in stored.rows]
                pairs = [pairs_by_row[row][epoch % len(pairs_by_row[row])] for row in rows]
                # The arrays hold until the next batch is taken, when this one is learned.
                arrays = {name: stored[name] for name in self._model.array_names}
                yield self._batch(pairs, self._inputs(arrays, rows), targets)

    def _batch(self, pairs: Sequence[Pair], inputs: list[TapTokens], targets: Targets) -> Batch:
        found = targets.batch([pair.key for pair in pairs])
        return Batch(
            pairs=pairs,
            inputs=inputs,
            targets={name: self._to_device(array) for name, array in found.items()},
        )

    def _inputs(self, arrays: Mapping[str, np.ndarray], rows: Sequence[int]) -> list[TapTokens]:
        placements = self._features.placements(rows)
        tensors = {name: self._to_device(self._typed(array)) for name, array in arrays.items()}
        return self._model.tokens(tensors, [placements[row] for row in rows])

    def _typed(self, array: np.ndarray) -> Any:
        """Take the bits of bfloat16, which NumPy lacks, for what they are."""
        if self._features.dtype == "bfloat16" and array.dtype == np.uint16:
            return torch.from_numpy(array).view(torch.bfloat16)
        return array

    def _to_device(self, array: Any) -> Tensor:
        tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
        device = self._model.device
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)
