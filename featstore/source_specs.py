"""Descriptions of sources that travel to other processes, which open them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from featstore.datasets import open_dataset
from featstore.errors import InvalidInputError
from featstore.plan import ExtractPlan
from featstore.shard_job import Source
from featstore.sources import BackboneSource, ImportSource, Readers
from featstore.store import StoreFolder
from featstore.types import Reader


class SourceSpec(Protocol):
    """What a process needs to open a source; it can be pickled."""

    def open(self, store: StoreFolder, *, n_threads: int) -> Source:
        """Open the source.

        Args:
            store: Store, as this process sees it.
            n_threads: Threads that it may compute with.

        Raises:
            InvalidInputError: A data set or the weights are others here.
            NotFoundError: They are not here.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneSpec:
    """A backbone that runs on images."""

    identity: Mapping[str, Any]  # what `Backbone.identity` gave
    plan: ExtractPlan
    weights: str | None  # a file, or "random:SEED"
    taps: tuple[str, ...]
    device: str
    data: tuple[str, ...]  # ``NAME=FORMAT:PATH``

    def open(self, store: StoreFolder, *, n_threads: int) -> BackboneSource:
        """See `SourceSpec.open`."""
        import torch

        from featstore.backbones import load_from_identity

        torch.set_num_threads(n_threads)
        backbone = load_from_identity(
            self.identity, weights=self.weights, device=self.device, taps=self.taps
        )
        return BackboneSource(_open_readers(store, self.data), backbone, self.plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSpec:
    """Features that somebody else extracted."""

    dtype: str
    data: tuple[str, ...]

    def open(self, store: StoreFolder, *, n_threads: int) -> ImportSource:
        """See `SourceSpec.open`; nothing is computed."""
        del n_threads
        return ImportSource(_open_readers(store, self.data), self.dtype)


def _open_readers(store: StoreFolder, data: Sequence[str]) -> Readers:
    return Readers(store, [open_dataset(text) for text in data])


def specs_of(readers: Sequence[Reader]) -> tuple[str, ...]:
    """Name open data sets so that another process opens the same."""
    return tuple(f"{reader.name}={reader.spec}" for reader in readers)


def check_named(data: Sequence[str | Reader]) -> None:
    """Refuse open readers, which cannot be sent to another process.

    Raises:
        InvalidInputError: The message names the first.
    """
    for one in data:
        if not isinstance(one, str):
            raise InvalidInputError(
                f"The data set {one.name!r} was given as an open reader, which cannot be sent to "
                "workers. Give it as text: NAME=FORMAT:PATH."
            )
