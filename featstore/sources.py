"""Where the rows of a shard come from: a backbone that runs on images, or imported features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.codecs import encode
from featstore.datasets import open_dataset
from featstore.errors import BadImageError, FeatstoreError, InvalidInputError
from featstore.hashing import image_key, pixel_hash
from featstore.images import decode, draw
from featstore.items import read_dataset
from featstore.plan import ExtractPlan, parse_resize
from featstore.shard_job import Loaded, TapBlock
from featstore.store import StoreFolder, placement_from_row
from featstore.types import Item, Reader

if TYPE_CHECKING:
    from featstore.backbones import Backbone


class Readers:
    """The data sets of a store, opened when they are first needed."""

    def __init__(self, store: StoreFolder, given: Sequence[Reader] = ()) -> None:
        self._store = store
        self._readers = {reader.name: reader for reader in given}
        self._items: dict[str, dict[str, Item]] = {}
        self._lock = Lock()

    def find(self, dataset: str, path: str) -> tuple[Reader, Item]:
        """Give the reader and one item of an image.

        Raises:
            BadImageError: The data set lacks that path now.
            InvalidInputError: It cannot be opened.
        """
        with self._lock:
            if dataset not in self._items:
                reader = self._readers.get(dataset) or self._open(dataset)
                self._readers[dataset] = reader
                self._items[dataset] = {item.path: item for item in reader.items()}
        item = self._items[dataset].get(path)
        if item is None:
            raise BadImageError(
                f"{path} is no longer in the data set {dataset!r}, and the store needs it again. "
                f"Bring it back, or name the folder that has it: --data {dataset}=FORMAT:PATH."
            )
        return self._readers[dataset], item

    def _open(self, dataset: str) -> Reader:
        spec = read_dataset(self._store, dataset)["spec"]
        try:
            return open_dataset(f"{dataset}={spec}")
        except FeatstoreError as error:
            raise InvalidInputError(
                f"The source of the data set {dataset!r}, {spec}, cannot be opened ({error}) "
                f"Name the place where it lies now: --data {dataset}=FORMAT:PATH."
            ) from error


class BackboneSource:
    """Decodes, draws and runs images; see `shard_job.Source`."""

    def __init__(self, readers: Readers, backbone: Backbone, plan: ExtractPlan) -> None:
        self._readers = readers
        self._backbone = backbone
        self._plan = plan
        self._rule = parse_resize(plan.resize)
        # Padding has the mean colour, so that it is near zero after normalisation.
        red, green, blue = (round(255 * channel) for channel in plan.mean)
        self._fill = (red, green, blue)

    def load(self, line: Mapping[str, Any]) -> Loaded:
        """Read, check, decode and draw one image."""
        reader, item = self._readers.find(line["dataset"], line["path"])
        data = reader.read_image(item)
        check_unchanged(line, data)
        pixels = decode(data)
        drawn = draw(
            pixels,
            placement_from_row(line),
            interpolation=self._plan.interpolation,
            fill_rgb=self._fill,
            via=self._rule.via,
            upscale=self._rule.upscale,
        )
        return Loaded(value=drawn, pixel_hash=pixel_hash(pixels))

    def submit(
        self, values: Sequence[Any], taps: Sequence[str]
    ) -> Callable[[], dict[str, TapBlock]]:
        """Run the backbone on one batch of drawn images."""
        from featstore.backbones.casting import start_copy

        outputs = self._backbone.forward(np.stack(values))
        shapes = self._backbone.tap_shapes
        waits = {
            (tap, array): start_copy(
                outputs[f"{tap}/prefix" if array == "prefix" else tap], self._plan.dtype
            )
            for tap in taps
            for array in shapes[tap].arrays
        }

        def fetch() -> dict[str, TapBlock]:
            hosts = {key: wait() for key, wait in waits.items()}
            return {tap: _tap_block({a: hosts[tap, a] for a in shapes[tap].arrays}) for tap in taps}

        return fetch


def _tap_block(hosts: Mapping[str, Any]) -> TapBlock:
    """Join a tap's arrays: the magnitude over all of them, mean and std of the main one."""
    main = hosts.get("patch") or hosts["pooled"]
    return TapBlock(
        arrays={array: host.values for array, host in hosts.items()},
        abs_max=np.maximum.reduce([host.abs_max for host in hosts.values()]),
        mean=main.mean,
        std=main.std,
    )


def check_unchanged(line: Mapping[str, Any], data: bytes) -> None:
    """Make sure that a file still is the one that was assigned.

    Raises:
        BadImageError: It changed since.
    """
    if image_key(data) != line["image_key"]:
        raise BadImageError(
            f"{line['path']} changed since it was assigned. Run the extraction again to add the "
            "new image."
        )


class ImportSource:
    """Takes features that somebody else extracted; see `shard_job.Source`."""

    def __init__(self, readers: Readers, dtype: str) -> None:
        self._readers = readers
        self._dtype = dtype

    def load(self, line: Mapping[str, Any]) -> Loaded:
        """Read the features of one item."""
        reader, item = self._readers.find(line["dataset"], line["path"])
        check_unchanged(line, reader.read_image(item))
        return Loaded(value=reader.read_features(item), pixel_hash=None)  # type: ignore[attr-defined]

    def submit(
        self, values: Sequence[Any], taps: Sequence[str]
    ) -> Callable[[], dict[str, TapBlock]]:
        """Stack and encode one batch."""
        blocks = {tap: self._block(values, tap) for tap in taps}
        return lambda: blocks

    def _block(self, values: Sequence[Mapping[str, np.ndarray]], tap: str) -> TapBlock:
        main = np.stack([np.asarray(value[tap], np.float32) for value in values])
        arrays = {"patch" if main.ndim == 3 else "pooled": main}
        if f"{tap}/prefix" in values[0]:
            arrays["prefix"] = np.stack(
                [np.asarray(v[f"{tap}/prefix"], np.float32) for v in values]
            )
        axes = tuple(range(1, main.ndim))
        abs_max = np.maximum.reduce(
            [np.abs(a).reshape(len(a), -1).max(axis=1) for a in arrays.values()]
        )
        safe = {name: np.where(np.isfinite(a), a, 0) for name, a in arrays.items()}
        stored = {name: self._encode(a) for name, a in safe.items()}
        return TapBlock(
            arrays=stored, abs_max=abs_max, mean=main.mean(axis=axes), std=main.std(axis=axes)
        )

    def _encode(self, values: np.ndarray) -> np.ndarray:
        from featstore.codecs import LIMITS

        limit = LIMITS[self._dtype]
        return encode(np.clip(values, -limit, limit), self._dtype)


def weights_argument(weights: str | Path | None) -> str | None:
    """Give `--weights` as it is recorded: "random:SEED", or an absolute path."""
    if weights is None or str(weights).partition(":")[0] == "random":
        return None if weights is None else str(weights)
    return str(Path(weights).absolute())
