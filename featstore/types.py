"""The records that travel between the parts: items, labels, placements, tap shapes.

Pixel coordinates are continuous: pixel column ``i`` covers ``[i, i + 1)`` and its centre is
``i + 0.5`` (the half-pixel convention), x to the right, y down, origin in the top left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from featstore.skeleton import Skeleton

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in continuous pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """One encoded dense label of one item, as it travels in the store.

    ``physical value = decoded value * scale``; a decoded value equal to `invalid` is no value.
    """

    kind: str  # what it is: "depth" (metres), "classes", "instances", ...
    encoding: str  # how `data` decodes: "png" or "npy"
    data: bytes
    scale: float = 1.0
    invalid: float | None = None
    source: str = ""  # which of several sources: "depths", "rawDepths", ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One entry of a data set: an image with its labels, or one box of it.

    `attributes` holds whatever is small and not dense (scalar labels, boxes, keypoints) as JSON
    values. `group` names what may never be cut by a split or a bootstrap (scene, video, camera,
    individual). `instance` tells items apart that show the same region of the same image.
    """

    path: str  # relative to the data set's root, with forward slashes
    splits: tuple[str, ...] = ()
    label: str | None = None  # class name, for classification
    group: str | None = None
    timestamp: str | None = None  # ISO 8601
    crop: Box | None = None  # region of the image, in original pixels
    attributes: Mapping[str, Any] = field(default_factory=dict)
    label_kinds: tuple[str, ...] = ()  # dense labels that the reader can give for this item
    instance: str | None = None  # which thing in the image, where path and crop leave that open


@runtime_checkable
class Reader(Protocol):
    """What a data set format gives: items, encoded images, encoded labels.

    `spec` reopens the same data set (``FORMAT:ARGUMENT`` with an absolute path). Methods other
    than `items` are called from several threads at once.
    """

    name: str
    format: str
    spec: str
    licence: str
    homepage: str

    def items(self) -> Sequence[Item]:
        """List all items, in an order that is the same on every machine."""
        ...

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image file (or the bytes of an .npy array, HWC or HW)."""
        ...

    def read_label(self, item: Item, kind: str) -> Label:
        """Give one of the item's `label_kinds`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How one source image was drawn into the backbone's input.

    The source region `box` fills the input region `dst`; the rest of the input is padding.
    ``x_input = dst.x0 + (x_source - box.x0) * (dst.x1 - dst.x0) / (box.x1 - box.x0)``, mirrored
    inside `dst` when `is_flipped`.
    """

    source_hw: tuple[int, int]  # after EXIF orientation
    input_hw: tuple[int, int]
    box: Box  # in source pixels
    dst: tuple[int, int, int, int]  # x0, y0, x1, y1 in whole input pixels
    is_flipped: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TapShape:
    """Shape of what one tap gives for one image.

    A dense tap has a `grid` and gives ``patch`` (grid_h * grid_w, dim), row-major, and, if
    `n_prefix` is not 0, ``prefix`` (n_prefix, dim): CLS first, then registers. A pooled tap has
    no grid and gives ``pooled`` (dim,).
    """

    tap: str
    dim: int
    grid: tuple[int, int] | None
    n_prefix: int = 0

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Name and shape, without the row axis, of each array stored for this tap."""
        if self.grid is None:
            return {"pooled": (self.dim,)}
        shapes: dict[str, tuple[int, ...]] = {"patch": (self.grid[0] * self.grid[1], self.dim)}
        if self.n_prefix:
            shapes["prefix"] = (self.n_prefix, self.dim)
        return shapes

    def bytes_per_row(self, itemsize: int) -> int:
        """Count the bytes of one row of this tap at `itemsize` bytes a number."""
        return itemsize * sum(int(np.prod(shape)) for shape in self.arrays.values())


@runtime_checkable
class NamesClasses(Protocol):
    """A reader that knows what the numbers of its "classes" labels mean."""

    def class_names(self) -> tuple[str, ...] | None:
        """Name the classes, the first one being 0; None where nothing names them."""
        ...


@runtime_checkable
class NamesKeypoints(Protocol):
    """A reader whose items have keypoints among their attributes, all of one skeleton."""

    def skeleton(self) -> Skeleton:
        """Name the keypoints in the order of the items' attribute ``keypoints``."""
        ...


@runtime_checkable
class LeavesOut(Protocol):
    """A reader that passes over part of what its files hold."""

    def notes(self) -> Sequence[str]:
        """Say in sentences what was left out, and why."""
        ...


@runtime_checkable
class FeatureReader(Reader, Protocol):
    """A reader that gives features that somebody else extracted, instead of images to run."""

    def taps(self) -> tuple[TapShape, ...]:
        """List what it gives for every item."""
        ...

    def read_features(self, item: Item) -> dict[str, np.ndarray]:
        """Give float arrays by "TAP" (patch or pooled) and "TAP/prefix"."""
        ...

    def image_hw(self, item: Item) -> tuple[int, int] | None:
        """Give height and width of the item's image, or None where it has no image."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One report of a long run, handed to the caller's callback; the library never prints.

    `stage` is "items", "labels", "extract", "verify", "index", "copy", "compact", "train",
    "evaluate", "predict", "adapt", "protocol" or "cka"; `done` and `total`
    count what that stage counts (images, shards, steps). A `message` is a sentence for people.
    """

    stage: str
    done: int = 0
    total: int = 0
    message: str = ""


ProgressCallback = Callable[[Progress], None]


def ignore_progress(report: Progress) -> None:
    """Drop a progress report: the default callback."""
