"""From stored rows to tensors on the device of the heads.

Features stay in their stored dtype until they are on the device, and are cast there: half the
bytes cross the bus. On CUDA a ring of pinned memory is filled from the store and copied on a
stream of its own, one batch ahead of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from featstore.rows import find_array
from featstore.types import Placement
from heads.residency import ArraySpec, Residency, choose_place

if TYPE_CHECKING:
    from featstore.api import FeatureSet
    from featstore.stream import Batch as StoredBatch
    from featstore.stream import Stream

_PINNED_SLOTS = 4
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Some rows on the device: array name to (rows, tokens, dim), in the stored dtype.

    On the CPU they may lie in the memory of a stream, so they hold until the next ones are taken.
    """

    rows: list[int]
    tensors: Mapping[str, Tensor]


class Feed:
    """Gives rows of some arrays of one feature set on one device, to one head or to several."""

    def __init__(
        self,
        features: FeatureSet,
        names: Sequence[str],
        device: torch.device,
        *,
        cache: str = "none",
        kept_rows: Sequence[int] = (),
    ) -> None:
        """Open a feed.

        Args:
            features: Feature set.
            names: Arrays, "TAP" or "TAP/prefix".
            device: Where the tensors shall be.
            cache: Where `kept_rows` stay once they were read; see `residency.choose_place`.
            kept_rows: Rows that are read again and again.

        Raises:
            InvalidInputError: They cannot be kept where `cache` says.
        """
        self.device = device
        self.names = tuple(names)
        self._features = features
        dtype = _DTYPES[features.dtype]
        specs = {
            name: ArraySpec(item_shape=find_array(features.folder, name).item_shape, dtype=dtype)
            for name in names
        }
        n_bytes = len(kept_rows) * sum(spec.row_bytes for spec in specs.values())
        place = choose_place(cache, device, n_bytes)
        self._kept = None if place is None or not kept_rows else Residency(kept_rows, specs, place)
        self._rings: dict[int, list[dict[str, Tensor]]] = {}

    @property
    def cache_place(self) -> torch.device | None:
        """Where rows are kept; None: nowhere."""
        return None if self._kept is None else self._kept.place

    def placements(self, rows: Sequence[int]) -> dict[int, Placement]:
        """Tell how the image of each row was drawn into the backbone's input."""
        return self._features.placements(rows)

    def tensors(self, rows: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Give rows in their order: array name to (rows, tokens, dim), all arrays by default."""
        wanted = list(rows)
        chosen = self.names if names is None else tuple(names)
        kept = self._kept
        if kept is None or not kept.is_for(wanted):
            return self._to_device(self._read(wanted, chosen))
        missing = kept.missing(wanted)
        if missing:
            kept.put(missing, self._read(missing, self.names))
        return self._to_device(kept.get(wanted, chosen))

    def shuffled(
        self, rows: Sequence[int], *, batch_size: int, seed: int, epoch: int, start: int = 0
    ) -> Iterator[Rows]:
        """Give one epoch of whole batches in an order that `seed` and `epoch` decide.

        Args:
            rows: Rows to go through, ascending.
            batch_size: Rows a batch.
            seed: Of the order.
            epoch: Number of the epoch.
            start: Batches to pass over, for a resumed epoch.
        """
        pinned = self._ring(batch_size) if self.device.type == "cuda" else None
        stream = self._features.stream(
            list(self.names),
            rows=list(rows),
            batch_size=batch_size,
            shuffle=True,
            seed=seed,
            epoch=epoch,
            start=start,
            drop_last=True,
            out=None if pinned is None else [_as_numpy(slot) for slot in pinned],
        )
        pieces = [stream.piece(number).tolist() for number in range(len(stream))]
        if self._kept is not None:
            missing = self._kept.missing([row for piece in pieces for row in piece])
            # What one epoch leaves over, as its last batch is not whole, is not worth a stream.
            if len(missing) <= batch_size:
                for piece in pieces:
                    yield Rows(rows=piece, tensors=self.tensors(piece))
                return
        for given in self._streamed(stream, pinned):
            if self._kept is not None:
                self._kept.put(given.rows, given.tensors)
            yield given

    def _streamed(
        self, stream: Stream, pinned: Sequence[Mapping[str, Tensor]] | None
    ) -> Iterator[Rows]:
        with iter(stream) as batches:
            if pinned is None:
                for stored in batches:
                    tensors = {name: self._typed(stored[name]) for name in self.names}
                    yield Rows(rows=stored.rows.tolist(), tensors=self._to_device(tensors))
                return
            ahead = _CopyAhead(self.device)
            for stored in batches:
                ready = ahead.swap(self._copied(stored, ahead))
                if ready is not None:
                    yield ready
                ahead.wait()  # taking the next batch gives this one's memory back to the ring
            last = ahead.swap(None)
            if last is not None:
                yield last

    def _copied(self, stored: StoredBatch, ahead: _CopyAhead) -> Rows:
        """Begin the copy of a batch that lies in pinned memory."""
        with torch.cuda.stream(ahead.side):
            tensors = {
                name: self._typed(stored[name]).to(self.device, non_blocking=True)
                for name in self.names
            }
        return Rows(rows=stored.rows.tolist(), tensors=tensors)

    def _read(self, rows: list[int], names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._typed(self._features.read(name, rows=rows)) for name in names}

    def _ring(self, batch_size: int) -> list[dict[str, Tensor]]:
        """Give pinned buffers, made once: pinning takes longer than filling them."""
        if batch_size not in self._rings:
            folder = self._features.folder
            dtype = torch.from_numpy(np.empty(0, folder.store_dtype)).dtype
            self._rings[batch_size] = [
                {
                    name: torch.empty(
                        (batch_size, *find_array(folder, name).item_shape),
                        dtype=dtype,
                        pin_memory=True,
                    )
                    for name in self.names
                }
                for _ in range(_PINNED_SLOTS)
            ]
        return self._rings[batch_size]

    def _typed(self, array: np.ndarray) -> Tensor:
        """Take the bits of bfloat16, which NumPy lacks, for what they are."""
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self._features.dtype == "bfloat16" else tensor

    def _to_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}


class _CopyAhead:
    """Holds the batch whose copy to a GPU runs beside the step on the batch before it."""

    def __init__(self, device: torch.device) -> None:
        self.side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device
        self._held: tuple[Rows, Any] | None = None

    def swap(self, following: Rows | None) -> Rows | None:
        """Take the next batch, give the one before it; the step's stream waits for its copy."""
        before, self._held = self._held, None
        if following is not None:
            self._held = (following, self.side.record_event())
        if before is None:
            return None
        rows, is_copied = before
        current = torch.cuda.current_stream(self._device)
        current.wait_event(is_copied)
        for tensor in rows.tensors.values():
            tensor.record_stream(current)
        return rows

    def wait(self) -> None:
        """Wait until the batch that is held has been copied."""
        if self._held is not None:
            self._held[1].synchronize()


def _as_numpy(slot: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in slot.items()}
