"""The store's tree: which folder holds what, and the attributes that describe it.

Nothing here reads or writes an array; `arrays` and `shards` do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featstore.errors import FormatError, InvalidInputError, NotFoundError, invalid
from featstore.files import PARTIAL, exclusive, read_parquet, write_json
from featstore.layout import Layout
from featstore.plan import FORMAT_VERSION, ExtractPlan
from featstore.remote.location import REMOTE_FILE, find_mirror, is_url, shown
from featstore.taps import tap_folder
from featstore.types import Box, Placement, TapShape

_DATASET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LOCKS = ".locks"
_LOCK_WAIT_S = 60.0
STORE_DTYPES = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2"}
"""How each dtype of a plan lies on disk; bfloat16 lies as its bits."""

ASSIGNMENT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("image_key", pa.string()),
        ("crop", pa.string()),
        ("view", pa.string()),
        ("source_h", pa.int32()),
        ("source_w", pa.int32()),
        ("input_h", pa.int32()),
        ("input_w", pa.int32()),
        ("box_x0", pa.float64()),
        ("box_y0", pa.float64()),
        ("box_x1", pa.float64()),
        ("box_y1", pa.float64()),
        ("dst_x0", pa.int32()),
        ("dst_y0", pa.int32()),
        ("dst_x1", pa.int32()),
        ("dst_y1", pa.int32()),
        ("is_flipped", pa.bool_()),
        ("dataset", pa.string()),
        ("path", pa.string()),
    ]
)
PLACEMENT_COLUMNS = ASSIGNMENT_SCHEMA.names[4:17]
"""Those that say how the image of a row is drawn into the input."""


def read_attributes(folder: Path) -> dict[str, Any]:
    """Read our attributes of a Zarr group.

    Raises:
        NotFoundError: There is no group.
        FormatError: Its metadata does not parse or is not ours.
    """
    path = folder / "zarr.json"
    try:
        found = json.loads(path.read_text())["attributes"]["featstore"]
    except FileNotFoundError:
        raise NotFoundError(f"No Zarr group at {folder}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path} is damaged or was not written by featstore. Restore it from a copy."
        ) from error
    return dict(found)


def write_attributes(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Write a Zarr v3 group with our attributes, atomically."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"featstore": dict(attributes)}}
    write_json(folder / "zarr.json", group)


def crop_text(crop: Box | None) -> str:
    """Write a crop as it stands in the tables: "x0,y0,x1,y1", empty for the whole image."""
    return "" if crop is None else ",".join(f"{value:.12g}" for value in crop)


def parse_crop(text: str) -> Box | None:
    """Invert `crop_text`."""
    if not text:
        return None
    x0, y0, x1, y1 = (float(part) for part in text.split(","))
    return (x0, y0, x1, y1)


class FeatureSetFolder:
    """The files of one feature set. Attributes are read once; open a new one to see changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = path.name

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Everything recorded about the feature set: plan, backbone, taps, provenance."""
        return read_attributes(self.path)

    @cached_property
    def plan(self) -> ExtractPlan | None:
        """The plan, or None where the features were imported."""
        plan = self.attributes["plan"]
        return None if plan is None else ExtractPlan.from_json(plan)

    @property
    def dtype(self) -> str:
        """Dtype of the stored numbers: "float16", "float32" or "bfloat16"."""
        return str(self.attributes["dtype"])

    @property
    def store_dtype(self) -> np.dtype[Any]:
        """Dtype on disk: uint16 for bfloat16."""
        return np.dtype(STORE_DTYPES[self.dtype])

    @property
    def layout(self) -> Layout:
        """Rows and shards."""
        return Layout(shard_rows=self.attributes["shard_rows"])

    @property
    def taps(self) -> dict[str, TapShape]:
        """Shapes of the stored taps, in order."""
        return {
            tap: TapShape(
                tap=tap,
                dim=shape["dim"],
                grid=None if shape["grid"] is None else (shape["grid"][0], shape["grid"][1]),
                n_prefix=shape["n_prefix"],
            )
            for tap, shape in self.attributes["taps"].items()
        }

    def array_path(self, tap: str, array: str) -> Path:
        """Folder of one array of one tap: `array` is "patch", "prefix" or "pooled"."""
        return self.path / tap_folder(tap) / array

    def shard_file(self, tap: str, array: str, shard: int) -> Path:
        """File of one shard of one array."""
        n_axes = 1 + len(self.taps[tap].arrays[array])
        return self.array_path(tap, array).joinpath("c", str(shard), *["0"] * (n_axes - 1))

    def ledger_path(self, tap: str, shard: int) -> Path:
        """File whose existence commits one shard of one tap."""
        return self.path / "ledger" / tap_folder(tap) / f"{shard:05d}.parquet"

    def committed_shards(self, tap: str) -> list[int]:
        """List the committed shards of one tap, ascending."""
        folder = self.path / "ledger" / tap_folder(tap)
        stems = (path.stem for path in folder.glob("*.parquet"))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def assignment_paths(self) -> list[Path]:
        """List the assignment files, oldest first."""
        return sorted((self.path / "assignments").glob("*.parquet"))

    def assignments(self) -> pa.Table:
        """Read all assigned rows, ascending."""
        paths = self.assignment_paths()
        if not paths:
            return ASSIGNMENT_SCHEMA.empty_table()
        names = ASSIGNMENT_SCHEMA.names  # those of moved rows have one column more
        tables = [read_parquet(path).select(names) for path in paths]
        return pa.concat_tables(tables).sort_by("row")

    def removed_rows(self) -> set[int]:
        """Rows that were removed logically."""
        paths = sorted((self.path / "tombstones").glob("*.parquet"))
        return {row for path in paths for row in read_parquet(path)["row"].to_pylist()}


def placement_from_row(row: Mapping[str, Any]) -> Placement:
    """Rebuild a placement from one line of an assignment."""
    return Placement(
        source_hw=(row["source_h"], row["source_w"]),
        input_hw=(row["input_h"], row["input_w"]),
        box=(row["box_x0"], row["box_y0"], row["box_x1"], row["box_y1"]),
        dst=(row["dst_x0"], row["dst_y0"], row["dst_x1"], row["dst_y1"]),
        is_flipped=row["is_flipped"],
    )


def placement_columns(placement: Placement) -> dict[str, Any]:
    """Give the columns of an assignment that hold a placement."""
    box = dict(zip(("box_x0", "box_y0", "box_x1", "box_y1"), placement.box, strict=True))
    dst = dict(zip(("dst_x0", "dst_y0", "dst_x1", "dst_y1"), placement.dst, strict=True))
    return {
        "source_h": placement.source_hw[0],
        "source_w": placement.source_hw[1],
        "input_h": placement.input_hw[0],
        "input_w": placement.input_hw[1],
        **{name: float(value) for name, value in box.items()},
        **dst,
        "is_flipped": placement.is_flipped,
    }


class StoreFolder:
    """The files of one store. Made by `create_folder` or `open_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def index_path(self) -> Path:
        """The derived DuckDB index."""
        return self.path / "index.duckdb"

    @property
    def runs_path(self) -> Path:
        """Folder of the training runs."""
        return self.path / "runs"

    @property
    def targets_path(self) -> Path:
        """Folder of prepared supervision."""
        return self.path / "targets"

    @property
    def locks_path(self) -> Path:
        """Folder of lock files, not part of the store's content."""
        return self.path / _LOCKS

    @property
    def is_writable(self) -> bool:
        """Whether this process may write to the store."""
        return os.access(self.path, os.W_OK)

    def items_path(self, dataset: str) -> Path:
        """Folder of a data set's items."""
        return self.path / "items" / _checked_dataset(dataset)

    def labels_path(self, dataset: str) -> Path:
        """Folder of a data set's encoded labels and thumbnails."""
        return self.path / "labels" / _checked_dataset(dataset)

    def datasets(self) -> list[str]:
        """List the data sets that have items here."""
        return sorted(path.parent.name for path in (self.path / "items").glob("*/dataset.json"))

    def feature_set_keys(self) -> list[str]:
        """List the keys of the feature sets."""
        found = (self.path / "feature_sets").glob("*/zarr.json")
        return sorted(path.parent.name for path in found)

    def feature_set(self, key: str) -> FeatureSetFolder:
        """Give the folder of one feature set, which must exist."""
        folder = FeatureSetFolder(self.path / "feature_sets" / key)
        if not (folder.path / "zarr.json").exists():
            raise NotFoundError(f"No feature set {key} in {self.path}. See `featstore ls`.")
        return folder


def _checked_dataset(name: str) -> str:
    if not _DATASET.fullmatch(name):
        raise invalid("dataset name", name, "made of letters, digits, dot, dash and underscore")
    return name


def locate(store: str | Path) -> Path:
    """Turn what names a store into a folder: a URL's mirror, brought up to date, else the path.

    Raises:
        InvalidInputError: The URL is none, or no store lies there but something else.
        StorageError: The store behind it refuses, or does not answer within the stated time.
    """
    if not is_url(store):
        return Path(store)
    from featstore.remote.mirror import open_mirror  # obstore only where it is needed

    return open_mirror(store)


def create_folder(path: Path, *, library: str) -> StoreFolder:
    """Make a new, empty store at `path`, which must not exist or must be an empty folder.

    Raises:
        InvalidInputError: Something else is there.
        StorageError: The disk refused.
    """
    check_target(path)
    write_attributes(path, {"format": FORMAT_VERSION, "library": library})
    return complete_folder(path)


def ensure_folder(path: Path, *, library: str) -> StoreFolder:
    """Open the store at `path`, or make it; of several processes that do so, one makes it.

    Raises:
        InvalidInputError: Something else is there.
        StorageError: The disk refused.
    """
    if is_store(path) and (path / "feature_sets" / "zarr.json").exists():
        return open_folder(path)
    lock = path / _LOCKS / "store.lock"
    with exclusive(lock, purpose="making the store", timeout_s=_LOCK_WAIT_S):
        if is_store(path):
            return complete_folder(path)
        return create_folder(path, library=library)


def complete_folder(path: Path) -> StoreFolder:
    """Write what a process that was killed while it made the store left out, sweep what it left.

    Call it where nobody else makes the same store.
    """
    for folder in (path, path / "feature_sets"):
        for leftover in folder.glob(f"zarr.json.*{PARTIAL}"):
            leftover.unlink(missing_ok=True)
    if not (path / "feature_sets" / "zarr.json").exists():
        write_attributes(path / "feature_sets", {})
    return open_folder(path)


def check_target(path: Path) -> None:
    """Refuse, before anything expensive happens, a folder that can become no store.

    Raises:
        InvalidInputError: Something else is there.
        FormatError: A damaged store or one of a newer format is there.
    """
    mirror = find_mirror(path)
    if mirror is not None and mirror.remote.is_read_only:
        raise InvalidInputError(
            f"{mirror.remote.url} can only be read. Write to s3://, gs://, az:// or file://."
        )
    if (path / "zarr.json").exists():
        open_folder(path)
    elif path.exists() and (not path.is_dir() or _holds_files(path)):
        raise InvalidInputError(
            f"{path} exists and is not a featstore store. Choose another --store."
        )


def _holds_files(path: Path) -> bool:
    """Tell whether a folder holds anything but what is no store's, or a killed process left."""
    ours = (_LOCKS, REMOTE_FILE)
    return any(not (e.name.endswith(PARTIAL) or e.name in ours) for e in path.iterdir())


def is_store(path: Path) -> bool:
    """Tell whether a store (of any version) lies at `path`."""
    try:
        return "format" in read_attributes(path)
    except (NotFoundError, FormatError):
        return False


def open_folder(path: Path) -> StoreFolder:
    """Open the store at `path`.

    Raises:
        NotFoundError: There is no store.
        FormatError: It is damaged, or of a newer format than this version reads.
    """
    is_store = (path / "zarr.json").exists()
    if not path.is_dir() or (not is_store and (path / REMOTE_FILE).exists()):
        place = shown(path)
        raise NotFoundError(
            f"No store at {place}. Make one with `featstore extract --store {place} ...`."
        )
    if not is_store:
        raise NotFoundError(f"{path} is a folder, but not a featstore store: it has no zarr.json.")
    version = read_attributes(path).get("format")
    if not isinstance(version, int) or version < 1:
        raise FormatError(f"{path}/zarr.json names no format version; it is not a featstore store.")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format {version}, and this version of featstore reads up to format "
            f"{FORMAT_VERSION}. Update featstore."
        )
    return StoreFolder(path)
