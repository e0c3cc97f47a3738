"""Where labels come from: the store, or a data set that is joined to stored rows by image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError
from featstore.hashing import image_key, short_key
from featstore.items import class_names, item_id, read_dataset, skeleton_of
from featstore.skeleton import Skeleton, skeleton_from_json
from featstore.store import crop_text
from featstore.types import Item, Label, Reader
from heads.box_labels import BOXES, boxes_text
from heads.keypoint_labels import KEYPOINTS, keypoints_text

if TYPE_CHECKING:
    from featstore.api import Store

Line = dict[str, Any]
"""One line of the samples view."""

_LABELLED = """
select dataset, item
from items
where list_contains(label_kinds, $kind)
order by dataset, item
"""

_KINDS = """
select distinct unnest(label_kinds) as kind from items
union
select 'class' as kind from items where label is not null
union
select 'boxes' as kind from items where contains(attributes, '"boxes":')
union
select 'keypoints' as kind from items where contains(attributes, '"keypoints":')
order by kind
"""
_CLASSES = """
select item, label
from items
where dataset = $dataset and label is not null
order by item
"""
_RECORDED = """
select dataset, item, label, attributes
from items
where contains(attributes, $mark)
order by dataset, item
"""
CLASS = "class"
"""The kind of label that names the class of a whole image, and is no map."""
RECORDED = (BOXES, KEYPOINTS)
"""The kinds that stand among the attributes of items, and are no maps."""


class LabelSource(Protocol):
    """Gives the labels of items. `kind` and `spec` are recorded with a run."""

    kind: str
    spec: str | None  # of the data set, or None for the store's own labels

    def iterate(self, dataset: str, items: Sequence[str]) -> Iterator[tuple[str, Label]]:
        """Go through items and labels, in any order; unreadable labels are missing."""
        ...

    def version(self, dataset: str) -> str:
        """Name what the labels of a data set hold now; another name once one has changed."""
        ...

    def format_of(self, dataset: str) -> str:
        """Give the format of a data set, such as "nyu.v1", which may have a protocol."""
        ...

    def class_names(self, dataset: str) -> tuple[str, ...] | None:
        """Name the classes of a data set's "classes" labels; None where nothing names them."""
        ...

    def skeleton(self, dataset: str) -> Skeleton | None:
        """Give the keypoints of a data set's "keypoints" labels; None where it marks none."""
        ...

    def image(self, dataset: str, item: str) -> bytes | None:
        """Give the encoded image of an item, perhaps small, or None where there is none."""
        ...


class StoredLabels:
    """Labels as they lie in the store."""

    spec: str | None = None

    def __init__(self, store: Store, kind: str) -> None:
        self.kind = kind
        self._store = store

    def iterate(self, dataset: str, items: Sequence[str]) -> Iterator[tuple[str, Label]]:
        """Go through items and labels; those left at their source come last."""
        missing = set(items)
        for item, label in self._store.iterate_labels(dataset, items, self.kind):
            missing.discard(item)
            yield item, label
        if missing:
            yield from self._store.read_labels(dataset, sorted(missing), self.kind).items()

    def version(self, dataset: str) -> str:
        """Name the files that hold them: a changed label is written to a new file."""
        folder = self._store.folder.labels_path(dataset)
        files = sorted(folder.glob(f"{self.kind}-*.parquet"))
        return short_key([[path.name, path.stat().st_size] for path in files])

    def format_of(self, dataset: str) -> str:
        """Give the format that is recorded with the items."""
        return str(read_dataset(self._store.folder, dataset)["format"])

    def class_names(self, dataset: str) -> tuple[str, ...] | None:
        """Give the names that were recorded with the items."""
        names = read_dataset(self._store.folder, dataset).get("classes")
        return None if names is None else tuple(names)

    def skeleton(self, dataset: str) -> Skeleton | None:
        """Give what was recorded with the items."""
        about = read_dataset(self._store.folder, dataset).get("skeleton")
        return None if about is None else skeleton_from_json(about)

    def image(self, dataset: str, item: str) -> bytes | None:
        """Give the stored thumbnail."""
        return self._store.thumbnail(dataset, item)


class ItemLabels:
    """Labels that are no maps, and stand with the items: class, boxes or keypoints, as text."""

    def __init__(
        self, inner: LabelSource, kind: str, texts_of: Callable[[str], Mapping[str, str]]
    ) -> None:
        """Take all but the labels from `inner`.

        Args:
            inner: Where images, formats and specs come from.
            kind: "class", "boxes" or "keypoints".
            texts_of: Gives item to label for a data set.
        """
        self.kind = kind
        self.spec = inner.spec
        self._inner = inner
        self._texts_of = lru_cache(maxsize=None)(texts_of)

    def iterate(self, dataset: str, items: Sequence[str]) -> Iterator[tuple[str, Label]]:
        """Go through items and labels."""
        known = self._texts_of(dataset)
        source = "label" if self.kind == CLASS else self.kind
        for item in items:
            if item in known:
                data = known[item].encode()
                yield item, Label(kind=self.kind, encoding="text", data=data, source=source)

    def version(self, dataset: str) -> str:
        """Name all labels of all items."""
        return short_key(sorted(self._texts_of(dataset).items()))

    def format_of(self, dataset: str) -> str:
        """Give the format of the data set."""
        return self._inner.format_of(dataset)

    def class_names(self, dataset: str) -> tuple[str, ...] | None:
        """List the classes that its images have, in the order of their names."""
        is_class = self.kind == CLASS
        return tuple(sorted(set(self._texts_of(dataset).values()))) if is_class else None

    def skeleton(self, dataset: str) -> Skeleton | None:
        """Give the keypoints of the data set."""
        return self._inner.skeleton(dataset)

    def image(self, dataset: str, item: str) -> bytes | None:
        """Give the encoded image of an item."""
        return self._inner.image(dataset, item)


def open_stored_labels(store: Store, kind: str) -> LabelSource:
    """Open the labels of one kind that the store itself has."""
    stored = StoredLabels(store, kind)
    if kind in RECORDED:
        return ItemLabels(stored, kind, lambda dataset: _stored(store, kind).get(dataset, {}))
    if kind != CLASS:
        return stored

    def classes_of(dataset: str) -> dict[str, str]:
        table = store.sql(_CLASSES, {"dataset": dataset})
        return dict(zip(table["item"].to_pylist(), table["label"].to_pylist(), strict=True))

    return ItemLabels(stored, CLASS, classes_of)


def _text_of(kind: str, attributes: str, label: str | None) -> str | None:
    """Take boxes or keypoints out of an item's attributes, JSON both; None where it has none."""
    return boxes_text(attributes) if kind == BOXES else keypoints_text(attributes, label)


def _stored(store: Store, kind: str) -> dict[str, dict[str, str]]:
    """Give the boxes or keypoints of all items that have some, by data set.

    Boxes may also be said to be none.
    """
    found: dict[str, dict[str, str]] = {}
    for line in store.sql(_RECORDED, {"mark": f'"{kind}":'}).to_pylist():
        text = _text_of(kind, line["attributes"], line["label"])
        if text is not None:
            found.setdefault(line["dataset"], {})[line["item"]] = text
    return found


class ReaderLabels:
    """Labels of a data set outside the store."""

    def __init__(self, reader: Reader, kind: str, items: Mapping[str, Item]) -> None:
        self.kind = kind
        self.spec: str | None = reader.spec
        self._reader = reader
        self._items = dict(items)

    def iterate(self, dataset: str, items: Sequence[str]) -> Iterator[tuple[str, Label]]:
        """Go through items and labels."""
        for item in items:
            label = self._read(item)
            if label is not None:
                yield item, label

    def version(self, dataset: str) -> str:
        """Name the bytes of all labels: files outside the store may change at any time."""
        digests = []
        for item in sorted(self._items):
            label = self._read(item)
            digests.append([item, "" if label is None else image_key(label.data)])
        return short_key(digests)

    def format_of(self, dataset: str) -> str:
        """Give the reader's format."""
        return self._reader.format

    def class_names(self, dataset: str) -> tuple[str, ...] | None:
        """Give the reader's names."""
        return class_names(self._reader)

    def skeleton(self, dataset: str) -> Skeleton | None:
        """Give the reader's keypoints."""
        return skeleton_of(self._reader)

    def image(self, dataset: str, item: str) -> bytes | None:
        """Give the image itself."""
        return self._reader.read_image(self._items[item])

    def _read(self, item: str) -> Label | None:
        try:
            return self._reader.read_label(self._items[item], self.kind)
        except (BadImageError, OSError):
            return None


def stored_labels(
    store: Store, lines: Sequence[Line], *, kind: str
) -> tuple[LabelSource, list[Line]]:
    """Keep those lines of the samples view whose item has a label of `kind` in the store.

    Raises:
        InvalidInputError: No line has.
    """
    if kind == CLASS:
        kept = [line for line in lines if line["label"] is not None]
    elif kind in RECORDED:
        texts = _stored(store, kind)
        kept = [line for line in lines if line["item"] in texts.get(line["dataset"], {})]
    else:
        table = store.sql(_LABELLED, {"kind": kind})
        labelled = set(zip(table["dataset"].to_pylist(), table["item"].to_pylist(), strict=True))
        kept = [line for line in lines if (line["dataset"], line["item"]) in labelled]
    if not kept:
        names = ", ".join(sorted({line["dataset"] for line in lines}))
        others = ", ".join(store.sql(_KINDS, {})["kind"].to_pylist()) or "none"
        raise InvalidInputError(
            f"No stored row has {kind} labels (data sets: {names}; kinds of labels they have: "
            f"{others}). Extract a data set that has such labels, or join them with --data "
            "FORMAT:PATH."
        )
    return open_stored_labels(store, kind), kept


def reader_labels(data: str, lines: Sequence[Line], *, kind: str) -> tuple[LabelSource, list[Line]]:
    """Join the items of a data set to stored rows by the image's bytes and the crop.

    An item that names no split takes those of the stored row.

    Returns:
        The labels, and lines of the samples view that name the new items in place of the old.

    Raises:
        InvalidInputError: The data set has no labels of `kind`, or none of its images is stored.
    """
    reader = open_dataset(data)
    items = [item for item in reader.items() if _has_label(item, kind)]
    if not items:
        raise InvalidInputError(f"{data} has no {kind} labels. Name a data set that has some.")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        keys = list(pool.map(lambda item: _key_of(reader, item), items))
    by_image: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        by_image.setdefault((line["image_key"], line["crop"]), []).append(line)
    joined: list[Line] = []
    for item, key in zip(items, keys, strict=True):
        joined += _joined(reader, item, by_image.get((key or "", crop_text(item.crop)), ()))
    if not joined:
        raise InvalidInputError(
            f"None of the {len(items)} labelled images of {data} is stored in this feature set. "
            f"Extract them first: `featstore extract --data {data}`."
        )
    known = {item_id(reader.name, item): item for item in items}
    labels: LabelSource = ReaderLabels(reader, kind, known)
    if kind == CLASS:
        named = {name: item.label for name, item in known.items() if item.label is not None}
        labels = ItemLabels(labels, CLASS, lambda dataset: named)
    if kind in RECORDED:
        texts = {name: _text_of(kind, *_recorded(item)) or "" for name, item in known.items()}
        labels = ItemLabels(labels, kind, lambda dataset: texts)
    return labels, joined


def _has_label(item: Item, kind: str) -> bool:
    if kind in RECORDED:
        return item.attributes.get(kind) is not None
    return item.label is not None if kind == CLASS else kind in item.label_kinds


def _recorded(item: Item) -> tuple[str, str | None]:
    return json.dumps(dict(item.attributes)), item.label


def _joined(reader: Reader, item: Item, stored: Sequence[Line]) -> list[Line]:
    own = {
        "item": item_id(reader.name, item),
        "dataset": reader.name,
        "path": item.path,
        "label": item.label,
        "group_id": item.group,
        "timestamp": item.timestamp,
    }
    rows = {line["row"]: line for line in stored}
    if item.splits:
        return [{**line, **own, "split": split} for line in rows.values() for split in item.splits]
    seen = {(line["row"], line["split"]): line for line in stored}
    return [{**line, **own} for line in seen.values()]


def _key_of(reader: Reader, item: Item) -> str | None:
    try:
        return image_key(reader.read_image(item))
    except (BadImageError, OSError):
        return None
