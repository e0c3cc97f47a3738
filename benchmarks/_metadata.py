"""A store of metadata alone: items, assignment and ledgers of any number of rows, no array."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _common import make_empty

from featstore.feature_sets import grow_arrays
from featstore.items import SCHEMA as ITEM_SCHEMA
from featstore.ledger import SCHEMA as LEDGER_SCHEMA
from featstore.order import permutation
from featstore.store import (
    ASSIGNMENT_SCHEMA,
    FeatureSetFolder,
    StoreFolder,
    placement_columns,
)
from featstore.types import Placement, TapShape

SHAPE = TapShape(tap="block:8", dim=768, grid=(16, 16))
DATASET = "noise"
REJECTED_EVERY = 997  # one row in so many did not decode
_BLOCK_ROWS = 1_000_000
_HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint8)


def make_metadata(path: Path, n_rows: int, shard_rows: int, *, n_held_back: int) -> None:
    """Make a store that looks full but for the ledgers of its last `n_held_back` shards."""
    store, folder = make_empty(path, [SHAPE], shard_rows)
    _write_items(store, n_rows)
    order = permutation(n_rows, seed=0, epoch=0)  # as `assign` mixes them
    _write_assignment(folder, order)
    grow_arrays(folder, [SHAPE.tap])
    write_ledgers(folder, order, range(folder.layout.n_shards(n_rows) - n_held_back))


def write_ledgers(folder: FeatureSetFolder, order: np.ndarray, shards: range) -> None:
    """Commit shards; nothing waits for the disk."""
    shard_rows = folder.layout.shard_rows
    folder.ledger_path(SHAPE.tap, 0).parent.mkdir(parents=True, exist_ok=True)
    for start in range(shards.start, shards.stop, max(1, _BLOCK_ROWS // shard_rows)):
        block = range(start, min(shards.stop, start + max(1, _BLOCK_ROWS // shard_rows)))
        first = block.start * shard_rows
        rows = np.arange(first, min(block.stop * shard_rows, len(order)))
        table = _ledger_table(rows, order)
        for shard in block:
            part = table.slice(shard * shard_rows - first, shard_rows)
            path = folder.ledger_path(SHAPE.tap, shard)
            pq.write_table(part, path, compression="zstd", store_schema=False)


def _ledger_table(rows: np.ndarray, order: np.ndarray) -> pa.Table:
    n_rows = len(rows)
    keys = image_keys(order[rows])
    is_bad = pa.array(rows % REJECTED_EVERY == REJECTED_EVERY - 1)
    crcs = pa.array(_mixed(rows).astype(np.uint32))
    nothing = pa.nulls(n_rows)
    values = {
        "row": rows,
        "image_key": keys,
        "crop": pa.repeat("", n_rows),
        "view": pa.repeat("plain", n_rows),
        "status": pa.compute.if_else(is_bad, "rejected", "ok"),
        "reason": pa.compute.if_else(is_bad, "The image does not decode.", None),
        "pixel_hash": pa.compute.if_else(is_bad, None, image_keys(order[rows] + 2**40)),
        "patch_crc32c": pa.compute.if_else(is_bad, None, crcs),
        "prefix_crc32c": nothing,
        "pooled_crc32c": nothing,
        **{
            name: pa.array(_mixed(rows + at).astype(np.float32))
            for at, name in enumerate(("abs_max", "mean", "std"))
        },
    }
    return pa.table(values).cast(LEDGER_SCHEMA)


def _blocks(n_rows: int) -> Iterator[np.ndarray]:
    for start in range(0, n_rows, _BLOCK_ROWS):
        yield np.arange(start, min(n_rows, start + _BLOCK_ROWS))


def _write_items(store: StoreFolder, n_rows: int) -> None:
    folder = store.items_path(DATASET)
    folder.mkdir(parents=True)
    about = {"format": "noise.v1", "spec": "noise:", "licence": "", "homepage": ""}
    (folder / "dataset.json").write_text(json.dumps(about))
    with pq.ParquetWriter(folder / "00000.parquet", ITEM_SCHEMA, compression="zstd") as writer:
        for numbers in _blocks(n_rows):
            writer.write_table(_items(numbers))


def _items(numbers: np.ndarray) -> pa.Table:
    n_rows = len(numbers)
    scenes = pa.array([f"scene{number}" for number in (numbers // 1000).tolist()])
    splits = pa.array([["test"], ["train"]]).take(pa.array(np.minimum(numbers % 5, 1)))
    labels = pa.array([f"class{number}" for number in range(100)])
    values = {
        "item": _hex(numbers, 16),
        "path": _paths(numbers),
        "splits": splits,
        "label": labels.take(pa.array(numbers % 100)),
        "group_id": scenes,
        "timestamp": pa.nulls(n_rows),
        "crop": pa.repeat("", n_rows),
        "image_key": image_keys(numbers),
        "height": pa.repeat(480, n_rows),
        "width": pa.repeat(640, n_rows),
        "file_bytes": pa.array(100_000 + numbers % 65_536),
        "attributes": pa.repeat("{}", n_rows),
        "label_kinds": pa.array([["depth"]]).take(pa.array(np.zeros(n_rows, np.int64))),
    }
    return pa.table(values).cast(ITEM_SCHEMA)


def _write_assignment(folder: FeatureSetFolder, order: np.ndarray) -> None:
    placement = Placement(
        source_hw=(480, 640), input_hw=(224, 224), box=(0, 0, 640, 480), dst=(0, 0, 224, 224)
    )
    same = {"crop": "", "view": "plain", "dataset": DATASET, **placement_columns(placement)}
    path = folder.path / "assignments" / "00000.parquet"
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, ASSIGNMENT_SCHEMA, compression="zstd") as writer:
        for rows in _blocks(len(order)):
            values = {name: pa.repeat(value, len(rows)) for name, value in same.items()}
            values["row"] = pa.array(rows)
            values["image_key"] = image_keys(order[rows])
            values["path"] = _paths(order[rows])
            table = pa.table(values).select(ASSIGNMENT_SCHEMA.names)
            writer.write_table(table.cast(ASSIGNMENT_SCHEMA))


def _paths(numbers: np.ndarray) -> pa.Array:
    return pa.array([f"scene{number // 1000}/{number:08d}.jpg" for number in numbers.tolist()])


def image_keys(numbers: np.ndarray) -> pa.Array:
    """Name made-up images as hashes do: 32 hex digits that look random."""
    return _hex(numbers, 32)


def _hex(numbers: np.ndarray, n_digits: int) -> pa.Array:
    words = [_mixed(numbers * 2 + at) for at in range(n_digits // 16)]
    data = np.stack(words, axis=1).view(np.uint8).reshape(-1)
    text = np.ascontiguousarray(_HEX.reshape(256, 2)[data])
    offsets = np.arange(len(numbers) + 1, dtype=np.int32) * n_digits
    buffers = [pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.StringArray.from_buffers(len(numbers), *buffers)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Spread whole numbers over 64 bits, one to one."""
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
