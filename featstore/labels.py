"""Encoded labels and thumbnails that travel in the store: a copied store can be trained from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from featstore.errors import BadImageError, FormatError, NotFoundError
from featstore.files import next_number, read_parquet, write_parquet
from featstore.hashing import image_key
from featstore.images import decode, thumbnail
from featstore.items import BadImage, FoundItem, item_id, read_dataset, read_items
from featstore.store import StoreFolder
from featstore.types import Label, Progress, ProgressCallback, Reader

SCHEMA = pa.schema(
    [
        ("item", pa.string()),
        ("kind", pa.string()),
        ("encoding", pa.string()),
        ("scale", pa.float64()),
        ("invalid", pa.float64()),
        ("source", pa.string()),
        ("digest", pa.string()),  # of the label's bytes; for a thumbnail, the image key
        ("data", pa.binary()),
    ]
)
THUMBNAIL = "thumbnail"
_GROUP = 64  # labels a row group: what one look-up has to decode
_FILE_LABELS = 512


def store_labels(
    store: StoreFolder,
    reader: Reader,
    found: Sequence[FoundItem],
    *,
    thumbnails: bool,
    n_threads: int,
    progress: ProgressCallback,
) -> list[BadImage]:
    """Copy the labels (and thumbnails) of `found` that are new or changed into the store.

    Every label is read and hashed again, so that an edited label is never taken for the old one.

    Returns:
        The labels that could not be read; their items stay without them.
    """
    bad: list[BadImage] = []
    kinds = sorted({kind for entry in found for kind in entry.item.label_kinds})
    for kind in [*kinds, THUMBNAIL] if thumbnails else kinds:
        entries = [e for e in found if kind == THUMBNAIL or kind in e.item.label_kinds]
        known = label_digests(store, reader.name, kind)
        if kind == THUMBNAIL:
            entries = [e for e in entries if known.get(e.item_id) != e.image_key]
        bad += _store_kind(
            store, reader, entries, kind, known=known, n_threads=n_threads, progress=progress
        )
    return bad


def _store_kind(
    store: StoreFolder,
    reader: Reader,
    entries: Sequence[FoundItem],
    kind: str,
    *,
    known: dict[str, str],
    n_threads: int,
    progress: ProgressCallback,
) -> list[BadImage]:
    bad: list[BadImage] = []
    with ThreadPoolExecutor(n_threads) as pool:
        for start in range(0, len(entries), _FILE_LABELS):
            part = entries[start : start + _FILE_LABELS]
            lines = []
            for entry, result in zip(
                part, pool.map(lambda e: _read(reader, e, kind), part), strict=True
            ):
                if isinstance(result, str):
                    # A thumbnail fails with its image, which the extraction reports itself.
                    if kind != THUMBNAIL:
                        bad.append(
                            BadImage(dataset=reader.name, path=entry.item.path, reason=result)
                        )
                elif known.get(result["item"]) != result["digest"]:
                    lines.append(result)
            if lines:
                path = _next_path(store.labels_path(reader.name), kind)
                _write(path, lines)
            progress(Progress(stage="labels", done=start + len(part), total=len(entries)))
    return bad


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    write_parquet(path, pa.Table.from_pylist(lines, schema=SCHEMA), row_group_size=_GROUP)


def _next_path(folder: Path, kind: str) -> Path:
    return folder / f"{kind}-{next_number(folder.glob(f'{kind}-*.parquet')):05d}.parquet"


def _read(reader: Reader, entry: FoundItem, kind: str) -> dict[str, Any] | str:
    """Read one label as a line of the table, or give the reason why not."""
    try:
        if kind == THUMBNAIL:
            data = thumbnail(decode(reader.read_image(entry.item)))
            label = Label(kind=kind, encoding="jpeg", data=data)
            digest = entry.image_key
        else:
            label = reader.read_label(entry.item, kind)
            digest = image_key(label.data)
    except (BadImageError, OSError) as error:
        return str(error)
    return {
        "item": entry.item_id,
        "kind": kind,
        "encoding": label.encoding,
        "scale": label.scale,
        "invalid": label.invalid,
        "source": label.source,
        "digest": digest,
        "data": label.data,
    }


def _paths(store: StoreFolder, dataset: str, kind: str) -> list[Path]:
    return sorted(store.labels_path(dataset).glob(f"{kind}-*.parquet"))


def label_kinds(store: StoreFolder, dataset: str) -> list[str]:
    """List the kinds of labels that are stored of a data set, thumbnails too."""
    stems = (path.stem for path in store.labels_path(dataset).glob("*-*.parquet"))
    return sorted({stem.rpartition("-")[0] for stem in stems})


def label_digests(store: StoreFolder, dataset: str, kind: str) -> dict[str, str]:
    """Give the digest of every stored label of one kind, by item."""
    digests: dict[str, str] = {}
    for path in _paths(store, dataset, kind):
        table = read_parquet(path, columns=["item", "digest"])
        digests.update(zip(table["item"].to_pylist(), table["digest"].to_pylist(), strict=True))
    return digests


def read_labels(
    store: StoreFolder, dataset: str, item_ids: Sequence[str], kind: str
) -> dict[str, Label]:
    """Read the labels of one kind of some items of one data set.

    They come from the store; where they were left at their source (`--no-targets`), from there.

    Returns:
        Item to label; items that have no such label are missing.

    Raises:
        NotFoundError: They lie neither in the store nor at their source.
    """
    found = dict(iterate_labels(store, dataset, item_ids, kind))
    missing = [item for item in item_ids if item not in found]
    if missing and kind != THUMBNAIL:
        found.update(_labels_at_source(store, dataset, missing, kind))
    return found


def iterate_labels(
    store: StoreFolder, dataset: str, item_ids: Sequence[str], kind: str
) -> Iterator[tuple[str, Label]]:
    """Go through the stored labels of one kind, of each item the newest, file by file."""
    waiting = set(item_ids)
    for path in reversed(_paths(store, dataset, kind)):
        if not waiting:
            return
        table = read_parquet(path, filters=[("item", "in", sorted(waiting))])
        # Within one file an item stands once.
        for line in table.to_pylist():
            waiting.discard(line["item"])
            yield line["item"], _label(line)


def _label(line: dict[str, Any]) -> Label:
    names = ("kind", "encoding", "data", "scale", "invalid", "source")
    return Label(**{name: line[name] for name in names})


def _labels_at_source(
    store: StoreFolder, dataset: str, item_ids: Sequence[str], kind: str
) -> dict[str, Label]:
    lines = {line["item"]: line for line in read_items(store, dataset).to_pylist()}
    wanted = [item for item in item_ids if kind in (lines.get(item, {}).get("label_kinds") or ())]
    if not wanted:
        return {}
    from featstore.datasets import open_dataset  # opens the source only where it is needed

    spec = read_dataset(store, dataset)["spec"]
    try:
        reader = open_dataset(f"{dataset}={spec}")
    except (OSError, ValueError, NotFoundError) as error:
        raise NotFoundError(
            f"The {kind} labels of {dataset!r} are not in the store and their source {spec} cannot "
            f"be read ({error}). Bring it back, or extract again without --no-targets."
        ) from error
    at_source = {item_id(dataset, item): item for item in reader.items()}
    return {item: reader.read_label(at_source[item], kind) for item in wanted if item in at_source}


def copy_labels(
    source: StoreFolder, target: StoreFolder, dataset: str, items: Collection[str]
) -> int:
    """Copy the stored labels of some items, each checked; give how many were new.

    Call it under the lock of the target's items.

    Raises:
        FormatError: A label is damaged.
        StorageError: The disk refused.
    """
    n_new = 0
    for kind in label_kinds(source, dataset):
        known = label_digests(target, dataset, kind)
        theirs = label_digests(source, dataset, kind)
        waiting = {item for item in items if theirs.get(item) not in (None, known.get(item))}
        for path in reversed(_paths(source, dataset, kind)):
            for lines in _chosen_lines(path, waiting):
                _write(_next_path(target.labels_path(dataset), kind), lines)
                n_new += len(lines)
    return n_new


def _chosen_lines(path: Path, waiting: set[str]) -> Iterator[list[dict[str, Any]]]:
    """Take lines of one file, some in memory at a time, off those that are waited for."""
    if not waiting:
        return
    table = read_parquet(path, columns=["item"])
    chosen = sorted(waiting.intersection(table["item"].to_pylist()))
    for start in range(0, len(chosen), _FILE_LABELS):
        part = chosen[start : start + _FILE_LABELS]
        lines = read_parquet(path, filters=[("item", "in", part)]).to_pylist()
        for line in lines:
            if line["kind"] != THUMBNAIL and image_key(line["data"]) != line["digest"]:
                raise FormatError(
                    f"The {line['kind']} label of item {line['item']} in {path} is damaged. "
                    "Run `featstore verify` there."
                )
        waiting.difference_update(part)
        yield lines


def read_thumbnail(store: StoreFolder, dataset: str, item: str) -> bytes | None:
    """Read the JPEG thumbnail of one item, or None where none is stored."""
    label = read_labels(store, dataset, [item], THUMBNAIL).get(item)
    return None if label is None else label.data
