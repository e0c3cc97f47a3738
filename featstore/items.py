"""Items: what the data sets hold, stored beside the features in small Parquet generations."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from featstore.errors import BadImageError, InvalidInputError
from featstore.files import next_number, read_parquet, write_json, write_parquet
from featstore.geometry import clip_box
from featstore.hashing import canonical_json, image_key, short_key
from featstore.images import probe
from featstore.skeleton import Skeleton
from featstore.store import StoreFolder, crop_text
from featstore.types import (
    FeatureReader,
    Item,
    NamesClasses,
    NamesKeypoints,
    Progress,
    ProgressCallback,
    Reader,
)

SCHEMA = pa.schema(
    [
        ("item", pa.string()),
        ("path", pa.string()),
        ("splits", pa.list_(pa.string())),
        ("label", pa.string()),
        ("group_id", pa.string()),
        ("timestamp", pa.string()),
        ("crop", pa.string()),
        ("image_key", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("file_bytes", pa.int64()),
        ("attributes", pa.string()),
        ("label_kinds", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundItem:
    """An item with what its file told: the key of its image and its size in pixels."""

    item: Item
    item_id: str
    image_key: str
    height: int
    width: int
    file_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BadImage:
    """An image that was left out, and why."""

    dataset: str
    path: str
    reason: str


def item_id(dataset: str, item: Item) -> str:
    """Name an item by its data set, path, crop and, if it has one, instance: 16 hex digits."""
    parts = [dataset, item.path, crop_text(item.crop)]
    return short_key(parts if item.instance is None else [*parts, item.instance])


def find_items(
    reader: Reader, items: Sequence[Item], *, n_threads: int, progress: ProgressCallback
) -> tuple[list[FoundItem], list[BadImage]]:
    """Hash every image file and read its size; set aside those that cannot be read.

    Returns:
        The found items in the given order, and the bad ones.
    """
    found: list[FoundItem] = []
    bad: list[BadImage] = []
    with ThreadPoolExecutor(n_threads) as pool:
        results = pool.map(lambda item: _find(reader, item), items)
        for done, (item, result) in enumerate(zip(items, results, strict=True), 1):
            if isinstance(result, FoundItem):
                found.append(result)
            else:
                bad.append(BadImage(dataset=reader.name, path=item.path, reason=result))
            if done % 100 == 0 or done == len(items):
                progress(Progress(stage="items", done=done, total=len(items)))
    return found, bad


def _find(reader: Reader, item: Item) -> FoundItem | str:
    try:
        data = reader.read_image(item)
        if isinstance(reader, FeatureReader):
            height, width = reader.image_hw(item) or (0, 0)
        else:
            height, width = probe(data)
            clip_box(item.crop, (height, width))  # a box beside the image is a bad image
    except (BadImageError, OSError) as error:
        return str(error)
    return FoundItem(
        item=item,
        item_id=item_id(reader.name, item),
        image_key=image_key(data),
        height=height,
        width=width,
        file_bytes=len(data),
    )


def write_items(store: StoreFolder, reader: Reader, found: Sequence[FoundItem]) -> None:
    """Record the data set and those of its items that are new or changed.

    Raises:
        InvalidInputError: Another data set has this name in the store.
    """
    folder = store.items_path(reader.name)
    known = {line["item"]: line for line in read_items(store, reader.name).to_pylist()}
    lines = [_line(entry) for entry in found]
    _check_same_dataset(store, reader, known, lines)
    about: dict[str, Any] = {
        "format": reader.format,
        "spec": reader.spec,
        "licence": reader.licence,
        "homepage": reader.homepage,
    }
    names = class_names(reader)
    if names is not None:
        about["classes"] = list(names)
    skeleton = skeleton_of(reader)
    if skeleton is not None:
        about["skeleton"] = skeleton.to_json()
    path = folder / "dataset.json"
    if not path.exists() or json.loads(path.read_text()) != about:
        write_json(path, about)
    changed = [line for line in lines if known.get(line["item"]) != line]
    if changed:
        generation = next_number(folder.glob("*.parquet"))
        table = pa.Table.from_pylist(changed, schema=SCHEMA)
        write_parquet(folder / f"{generation:05d}.parquet", table)


def copy_items(
    source: StoreFolder, target: StoreFolder, dataset: str, items: Collection[str]
) -> int:
    """Copy some items of a data set, and what it is; give how many were new or other.

    Call it under the lock of the target's items.
    """
    folder = target.items_path(dataset)
    known = {line["item"]: line for line in read_items(target, dataset).to_pylist()}
    lines = [line for line in read_items(source, dataset).to_pylist() if line["item"] in items]
    new = [line for line in lines if known.get(line["item"]) != line]
    if not (folder / "dataset.json").exists():
        write_json(folder / "dataset.json", read_dataset(source, dataset))
    if new:
        path = folder / f"{next_number(folder.glob('*.parquet')):05d}.parquet"
        write_parquet(path, pa.Table.from_pylist(new, schema=SCHEMA))
    return len(new)


def _line(entry: FoundItem) -> dict[str, Any]:
    item = entry.item
    return {
        "item": entry.item_id,
        "path": item.path,
        "splits": list(item.splits) or ["all"],
        "label": item.label,
        "group_id": item.group,
        "timestamp": item.timestamp,
        "crop": crop_text(item.crop),
        "image_key": entry.image_key,
        "height": entry.height,
        "width": entry.width,
        "file_bytes": entry.file_bytes,
        "attributes": canonical_json(dict(item.attributes)),
        "label_kinds": list(item.label_kinds),
    }


def _check_same_dataset(
    store: StoreFolder, reader: Reader, known: dict[str, Any], lines: Sequence[dict[str, Any]]
) -> None:
    """A moved folder keeps its items' paths; a foreign one of the same name shares none."""
    if not known:
        return
    about = read_dataset(store, reader.name)
    is_moved = about["format"] == reader.format and any(line["item"] in known for line in lines)
    if about["spec"] != reader.spec and not is_moved:
        raise InvalidInputError(
            f"The store already has another data set named {reader.name!r} ({about['spec']}). "
            f"Give this one a name of its own: --data NAME={reader.spec}"
        )


def class_names(reader: Reader) -> tuple[str, ...] | None:
    """Name the classes of a reader's labels, where it knows them."""
    return reader.class_names() if isinstance(reader, NamesClasses) else None


def skeleton_of(reader: Reader) -> Skeleton | None:
    """Give the keypoints that a reader's items mark, where they mark any."""
    return reader.skeleton() if isinstance(reader, NamesKeypoints) else None


def read_dataset(store: StoreFolder, dataset: str) -> dict[str, Any]:
    """Read what a data set is: format, spec, licence, homepage, perhaps classes and skeleton."""
    path = store.items_path(dataset) / "dataset.json"
    return dict(json.loads(path.read_text()))


def read_items(store: StoreFolder, dataset: str) -> pa.Table:
    """Read the items of a data set, of each the last generation, ordered by item."""
    newest: dict[str, dict[str, Any]] = {}
    for line in _generations(store, dataset):
        newest[line["item"]] = line
    return pa.Table.from_pylist([newest[key] for key in sorted(newest)], schema=SCHEMA)


def _generations(store: StoreFolder, dataset: str) -> Iterator[dict[str, Any]]:
    for path in sorted(store.items_path(dataset).glob("*.parquet")):
        yield from read_parquet(path).to_pylist()
