"""The door to zarr: create and grow arrays, and read what the fast path does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from featstore.files import write_bytes
from featstore.remote.location import find_mirror
from featstore.store import FeatureSetFolder, write_attributes
from featstore.types import TapShape

BFLOAT16_NAN = 0x7FC0
_AXES = {"patch": ("token", "dim"), "prefix": ("prefix_token", "dim"), "pooled": ("dim",)}


def ensure_array(folder: FeatureSetFolder, shape: TapShape, array: str, *, n_rows: int) -> None:
    """Make the array, or grow its first axis to `n_rows`; its metadata is replaced atomically.

    Call it under the feature set's writer lock.

    Args:
        folder: Feature set.
        shape: Shape of the tap.
        array: "patch", "prefix" or "pooled".
        n_rows: Rows the array must cover, a multiple of the shard's rows.
    """
    path = folder.array_path(shape.tap, array)
    if not (path.parent / "zarr.json").exists():
        write_attributes(path.parent, {})  # so that Zarr readers can walk down to the array
    metadata_path = path / "zarr.json"
    if not metadata_path.exists():
        _create(folder, path, shape, array, n_rows)
        return
    metadata = json.loads(metadata_path.read_text())
    if metadata["shape"][0] < n_rows:
        metadata["shape"][0] = n_rows
        write_bytes(metadata_path, json.dumps(metadata, indent=2).encode())


def _create(folder: FeatureSetFolder, path: Path, shape: TapShape, array: str, n_rows: int) -> None:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    item = shape.arrays[array]
    shard_rows = folder.layout.shard_rows
    inner = (shard_rows if array == "pooled" else 1, *item)
    is_bfloat16 = folder.dtype == "bfloat16"
    scope = shape.tap.replace(":", "_").replace(".", "_")
    codec = ShardingCodec(
        chunk_shape=inner,
        codecs=[BytesCodec(), Crc32cCodec()],
        index_codecs=[BytesCodec(), Crc32cCodec()],
    )
    made: dict[str, Any] = {}
    zarr.create_array(
        store=zarr.storage.MemoryStore(made),
        shape=(n_rows, *item),
        chunks=(shard_rows, *item),
        dtype=folder.store_dtype,
        fill_value=BFLOAT16_NAN if is_bfloat16 else float("nan"),
        serializer=codec,
        compressors=None,
        filters=None,
        # Unique names, so that xarray opens a whole feature set without a clash of sizes.
        dimension_names=["row", *(f"{scope}_{axis}" for axis in _AXES[array])],
        attributes={"featstore_dtype": "bfloat16"} if is_bfloat16 else {},
    )
    write_bytes(path / "zarr.json", made["zarr.json"].to_bytes())


def open_array(folder: FeatureSetFolder, tap: str, array: str) -> Any:
    """Open one array for reading with zarr."""
    import zarr

    path = folder.array_path(tap, array)
    mirror = find_mirror(path)
    if mirror is None:
        return zarr.open_array(zarr.storage.LocalStore(path), mode="r")
    from featstore.remote.client import client_of

    store = client_of(mirror.remote).store_below(mirror.key(path))
    return zarr.open_array(zarr.storage.ObjectStore(store, read_only=True), mode="r")


def chunk_crc32c(block: np.ndarray) -> int:
    """Checksum one chunk as the crc32c codec stores it."""
    # A plain uint8 array: the C function takes no memoryview.
    return int(google_crc32c.value(np.ascontiguousarray(block).reshape(-1).view(np.uint8)))
