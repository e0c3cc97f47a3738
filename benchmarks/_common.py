"""What the reading benchmarks share: a store made of noise, fair timing, one JSON line a result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from featstore.arrays import chunk_crc32c
from featstore.feature_sets import NewFeatureSet, ensure_feature_set, grow_arrays
from featstore.items import SCHEMA as ITEM_SCHEMA
from featstore.ledger import SCHEMA as LEDGER_SCHEMA
from featstore.ledger import write_ledger
from featstore.shard_writer import write_shard
from featstore.shards import close_kept_shards
from featstore.store import ASSIGNMENT_SCHEMA, FeatureSetFolder, StoreFolder, create_folder
from featstore.types import TapShape

SHARD_ROWS = 256
KEY = "0123456789abcdef"


def make_empty(
    path: Path, shapes: Sequence[TapShape], shard_rows: int
) -> tuple[StoreFolder, FeatureSetFolder]:
    """Make a store with a feature set that has no rows."""
    store = create_folder(path, library="benchmark")
    new = NewFeatureSet(
        key=KEY,
        name="noise@224",
        dtype="float16",
        shard_rows=shard_rows,
        plan=None,
        backbone={"name": "noise"},
        provenance={},
        final_norm=None,
    )
    return store, ensure_feature_set(store, new, shapes)


def make_feature_set(
    path: Path, shapes: Sequence[TapShape], n_rows: int
) -> tuple[StoreFolder, FeatureSetFolder]:
    """Make a store with a feature set of `n_rows` assigned rows, and no array yet."""
    store, folder = make_empty(path, shapes, SHARD_ROWS)
    write_items(store, n_rows)
    write_assignment(folder, n_rows)
    return store, folder


def image_keys(n_rows: int) -> list[str]:
    """Name the images of a made-up data set."""
    return [f"{number:032x}" for number in range(n_rows)]


def write_items(store: StoreFolder, n_rows: int) -> None:
    """Write one item a row: four of five in the train split."""
    folder = store.items_path("noise")
    folder.mkdir(parents=True)
    about = {"format": "noise.v1", "spec": "noise:", "licence": "", "homepage": ""}
    (folder / "dataset.json").write_text(json.dumps(about))
    columns = {
        "item": [f"{number:016x}" for number in range(n_rows)],
        "path": [f"scene{number // 1000}/{number:07d}.jpg" for number in range(n_rows)],
        "splits": [["test"] if number % 5 == 0 else ["train"] for number in range(n_rows)],
        "label": [f"class{number % 100}" for number in range(n_rows)],
        "group_id": [f"scene{number // 1000}" for number in range(n_rows)],
        "timestamp": [None] * n_rows,
        "crop": [""] * n_rows,
        "image_key": image_keys(n_rows),
        "height": [480] * n_rows,
        "width": [640] * n_rows,
        "file_bytes": [100_000] * n_rows,
        "attributes": ["{}"] * n_rows,
        "label_kinds": [["depth"]] * n_rows,
    }
    write_table(folder / "00000.parquet", pa.table(columns, schema=ITEM_SCHEMA))


def write_assignment(folder: FeatureSetFolder, n_rows: int) -> None:
    """Assign the rows in the order of the items."""
    whole = {"source_h": 480, "source_w": 640, "input_h": 224, "input_w": 224}
    box = {"box_x0": 0.0, "box_y0": 0.0, "box_x1": 640.0, "box_y1": 480.0}
    dst = {"dst_x0": 0, "dst_y0": 0, "dst_x1": 224, "dst_y1": 224}
    same = {"crop": "", "view": "plain", "is_flipped": False, "dataset": "noise"}
    columns = {
        "row": np.arange(n_rows),
        "image_key": image_keys(n_rows),
        "path": [f"scene{number // 1000}/{number:07d}.jpg" for number in range(n_rows)],
        **{name: [value] * n_rows for name, value in {**whole, **box, **dst, **same}.items()},
    }
    path = folder.path / "assignments" / "00000.parquet"
    write_table(path, pa.table(columns, schema=ASSIGNMENT_SCHEMA))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file without waiting for the disk."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", store_schema=False)


def ledger_table(
    rows: range, keys: Sequence[str], crcs: Mapping[str, Sequence[int | None]]
) -> pa.Table:
    """Make the ledger of one shard; `crcs` gives the checksums by array."""
    n_rows = len(rows)
    columns = {
        "row": list(rows),
        "image_key": list(keys),
        "crop": [""] * n_rows,
        "view": ["plain"] * n_rows,
        "status": ["ok"] * n_rows,
        "reason": [None] * n_rows,
        "pixel_hash": list(keys),
        **{
            f"{array}_crc32c": list(crcs.get(array, [None] * n_rows))
            for array in ("patch", "prefix", "pooled")
        },
        "abs_max": [1.0] * n_rows,
        "mean": [0.0] * n_rows,
        "std": [1.0] * n_rows,
    }
    return pa.table(columns, schema=LEDGER_SCHEMA)


def make_store(path: Path, shapes: Sequence[TapShape], n_rows: int) -> FeatureSetFolder:
    """Make a store of dense taps without prefix tokens, filled with noise."""
    _, folder = make_feature_set(path, shapes, n_rows)
    grow_arrays(folder, [shape.tap for shape in shapes])
    keys = image_keys(n_rows)
    for number, shape in enumerate(shapes):
        for shard in range(folder.layout.n_shards(n_rows)):
            rows = range(shard * SHARD_ROWS, min(n_rows, (shard + 1) * SHARD_ROWS))
            block = np.full((SHARD_ROWS, *shape.arrays["patch"]), np.nan, np.float16)
            block[: len(rows)] = noise((len(rows), *shape.arrays["patch"]), (number, shard))
            write_shard(folder, shape.tap, "patch", shard, block)
            crcs = {"patch": [chunk_crc32c(row) for row in block[: len(rows)]]}
            ledger = ledger_table(rows, keys[rows.start : rows.stop], crcs)
            write_ledger(folder, shape.tap, shard, ledger)
    return folder


def noise(shape: Sequence[int], seed: Sequence[int]) -> np.ndarray:
    """Make finite float16 noise fast: random bits with the largest exponents left out."""
    random = np.random.default_rng(list(seed))
    bits = random.integers(0, 2**16, shape, dtype=np.uint16)
    return (bits & np.uint16(0xBFFF)).view(np.float16)


def time_in_turn(runs: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Time several things in turn, `repeats` rounds after an untimed one.

    Whatever else the machine does meets all of them alike, so ratios within a round hold.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def throughput_lines(
    seconds: Mapping[str, Sequence[float]],
    n_bytes: Mapping[str, int],
    *,
    prefix: str,
    floor: str,
    **about: object,
) -> None:
    """Print a line a contender: its best MB/s, and its median ratio to the floor's speed."""
    for name, own in seconds.items():
        speeds = [n_bytes[name] / value / 1e6 for value in own]
        floors = [n_bytes[floor] / value / 1e6 for value in seconds[floor]]
        ratios = [mine / its for mine, its in zip(speeds, floors, strict=True)]
        print_line(
            f"{prefix}.{name}",
            max(speeds),
            "MB/s",
            ratio=statistics.median(ratios),
            floor=f"{floor}: {max(floors):.0f} MB/s",
            **about,
        )


def print_line(
    name: str, value: float, unit: str, *, ratio: float, floor: str, **about: object
) -> None:
    """Print one result."""
    line = {"name": name, "value": float(f"{value:.4g}"), "unit": unit, "ratio": round(ratio, 3)}
    machine = {"cpus": os.cpu_count(), "machine": platform.machine()}
    print(json.dumps({**line, "floor": floor, **about, **machine}), flush=True)


def evict(paths: Sequence[Path]) -> None:
    """Drop files from the page cache (Linux), as `posix_fadvise` can without being root."""
    close_kept_shards()  # pages that are mapped stay
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
