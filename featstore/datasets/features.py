"""``features:PATH,tap=TAP``: features that were extracted elsewhere, to be imported.

PATH is one array for all images (``.npy``, ``.pt``, ``.h5``), or a table with one such file an
image in its column ``features``. With one array, a table stands beside it (same name, or
``manifest.csv``, or ``manifest=FILE``): its rows are the array's, in order, or as its column
``row`` says (from 0). The table has the columns of the format `manifest`; ``images=DIR`` says where
the images lie.

Of one image an array is (tokens, dim), row-major over ``grid=HxW``, any tokens before those being
the prefix (CLS, registers); or (H, W, dim) or (dim, H, W); or (dim,), for a pooled tap (norm.mean).
``array=NAME`` picks one of several arrays of a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.datasets.arrays import FEATURE_SUFFIXES, ArrayFile
from featstore.datasets.common import (
    READERS,
    check_groups,
    check_keys,
    existing_path,
    npy_bytes,
    parse_argument,
    parse_size,
    read_bytes,
)
from featstore.datasets.manifest import parse_scale, read_dense
from featstore.datasets.tables import TableRow, check_unique, dense_labels, item_of, read_table
from featstore.errors import BadImageError, InvalidInputError, invalid, not_found
from featstore.images import probe
from featstore.taps import parse_tap
from featstore.types import Item, Label, TapShape

_OPTIONS = ("tap", "grid", "array", "manifest", "images", "depth_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where the features of one item lie, and the row of the table that says so."""

    file: ArrayFile
    entry: int | None  # None: the whole array
    row: TableRow


class FeaturesReader:
    """Checks the first image's shape when it is opened, and each image's when it is read."""

    format = "features.v1"
    licence = ""
    homepage = ""

    def __init__(
        self,
        *,
        name: str,
        spec: str,
        table_path: Path,
        places: Sequence[_Place],
        tap: str,
        grid: tuple[int, int] | None,
        images: Path | None,
        depth_scale: float | None,
    ) -> None:
        self.name = name
        self.spec = spec
        self._images = images
        self._root = table_path.parent
        self._depth_scale = depth_scale
        rows = [place.row for place in places]
        root = images or table_path.parent
        self._items = [item_of(row, root, other_columns=("features", "row")) for row in rows]
        check_unique(self._items, rows)
        check_groups(self._items, source=str(table_path))
        self._places = dict(zip(map(_key, self._items), places, strict=True))
        self._shape = _first_shape(places)
        self._tap = _tap_shape(tap, self._shape, grid)

    def items(self) -> Sequence[Item]:
        """List the images in the order of the table."""
        return self._items

    def taps(self) -> tuple[TapShape, ...]:
        """Give the one tap that is imported."""
        return (self._tap,)

    def read_features(self, item: Item) -> dict[str, np.ndarray]:
        """Give the features of an image as float32: tokens in rows, prefix apart, or pooled."""
        place = self._place(item)
        values = place.file.read(place.entry)
        if values.shape != self._shape:
            raise BadImageError(
                f"{place.row.place}: the features in {place.file.path} have the shape "
                f"{values.shape}, those of the first image {self._shape}."
            )
        return _arrange(values.astype(np.float32), self._tap)

    def image_hw(self, item: Item) -> tuple[int, int] | None:
        """Give the size of the image, or None where the images are not there."""
        return None if self._images is None else probe(self.read_image(item))

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image, or, without images, its features as .npy bytes."""
        if self._images is not None:
            return read_bytes(self._images / item.path)
        place = self._place(item)
        return npy_bytes(place.file.read(place.entry))

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the label file's bytes, untouched."""
        files = dense_labels(self._place(item).row)
        if kind not in files:
            raise not_found("label kind", kind, files)
        path = self._root / files[kind]
        return read_dense(path, kind, self.image_hw(item), depth_scale=self._depth_scale)

    def _place(self, item: Item) -> _Place:
        if _key(item) not in self._places:
            raise not_found("image", item.path, [known[0] for known in self._places][:3])
        return self._places[_key(item)]


def _first_shape(places: Sequence[_Place]) -> tuple[int, ...]:
    """Give the shape of the first features that can be read; later ones must be alike."""
    errors = []
    for place in places:
        try:
            return place.file.shape(place.entry)
        except InvalidInputError as error:
            errors.append(error)
    raise errors[0]


def _key(item: Item) -> tuple[str, object]:
    return (item.path, item.crop)


def _tap_shape(tap: str, shape: tuple[int, ...], grid: tuple[int, int] | None) -> TapShape:
    """Tell what the axes of one image's array are."""
    parsed = parse_tap(tap)
    if parsed.index is not None and parsed.index < 0:
        raise invalid("tap", tap, "counted from the front, because nobody knows the depth here")
    is_pooled = len(shape) == 1
    if is_pooled != (parsed.pool is not None):
        expected = f"pooled (norm.mean, norm.cls, block:8.mean ...) for features of shape {shape}"
        raise invalid("tap", tap, expected if is_pooled else f"dense for features of shape {shape}")
    if is_pooled:
        return TapShape(tap=str(parsed), dim=shape[0], grid=None)
    if len(shape) == 2:
        n_tokens, dim = shape
        side = math.isqrt(n_tokens)
        if grid is None and side * side != n_tokens:
            hint = "Name it: grid=16x16. Tokens before it are taken as prefix tokens."
            raise invalid("grid", None, f"given for {n_tokens} tokens, no square", hint=hint)
        grid = grid or (side, side)
        n_prefix = n_tokens - grid[0] * grid[1]
        if n_prefix < 0:
            raise invalid("grid", grid, f"of at most {n_tokens} tokens, as many as there are")
        return TapShape(tap=str(parsed), dim=dim, grid=grid, n_prefix=n_prefix)
    return TapShape(tap=str(parsed), dim=_map_dim(shape, grid), grid=grid)


def _map_dim(shape: tuple[int, ...], grid: tuple[int, int] | None) -> int:
    """Find the channel axis of a (H, W, dim) or (dim, H, W) array by its grid."""
    is_last, is_first = shape[:2] == grid, shape[1:] == grid
    if len(shape) != 3 or is_last == is_first:
        expected = f"two neighbouring sizes of {shape}, and not ambiguous"
        raise invalid("grid", grid, expected, hint="Name it: grid=16x16.")
    return shape[2] if is_last else shape[0]


def _arrange(values: np.ndarray, tap: TapShape) -> dict[str, np.ndarray]:
    if tap.grid is None:
        return {tap.tap: values}
    if values.ndim == 3:
        is_last = values.shape[:2] == tap.grid
        values = values if is_last else np.moveaxis(values, 0, 2)
        return {tap.tap: np.ascontiguousarray(values.reshape(-1, tap.dim))}
    arranged = {tap.tap: values[tap.n_prefix :]}
    if tap.n_prefix:
        arranged[f"{tap.tap}/prefix"] = values[: tap.n_prefix]
    return arranged


def _places_in_one(path: Path, table_path: Path, array: str | None) -> list[_Place]:
    """Pair the rows of a table with the entries of one array."""
    file = ArrayFile(path, array)
    n_entries = file.shape(None)[0]
    rows = read_table(table_path)
    if not any("row" in row.cells for row in rows):
        if len(rows) != n_entries:
            raise InvalidInputError(
                f"{table_path} lists {len(rows)} images and {path} holds {n_entries} entries. They "
                "must be as many, or the column 'row' must say which is which."
            )
        return [_Place(file=file, entry=n, row=row) for n, row in enumerate(rows)]
    return [_Place(file=file, entry=_row_number(row, n_entries), row=row) for row in rows]


def _row_number(row: TableRow, n_entries: int) -> int:
    text = str(row.cells.get("row"))
    if not text.isdecimal() or int(text) >= n_entries:
        raise row.error("row", f"a whole number from 0 to {n_entries - 1}")
    return int(text)


def _places_in_many(table_path: Path, array: str | None) -> list[_Place]:
    """Give the file that each row of a table names."""
    places = []
    for row in read_table(table_path):
        if "features" not in row.cells:
            endings = ", ".join(FEATURE_SUFFIXES)
            raise row.error("features", f"the path of a file of features ({endings})")
        path = table_path.parent / str(row.cells["features"])
        places.append(_Place(file=ArrayFile(path, array), entry=None, row=row))
    return places


def _find_table(path: Path, named: str | None) -> Path:
    if named is not None:
        return existing_path(named, reader="features")
    folder = path if path.is_dir() else path.parent
    stems = ["manifest"] if path.is_dir() else [path.stem, "manifest"]
    options = [folder / f"{stem}{end}" for stem in stems for end in (".csv", ".parquet")]
    for option in options:
        if option.is_file():
            return option
    raise InvalidInputError(
        f"There is no table for {path}. Make {options[0]} with the columns path, split, label ..., "
        "or name one with manifest=FILE."
    )


@READERS.register("features.v1")
def open_features(argument: str, *, name: str) -> FeaturesReader:
    """Open ``PATH,tap=TAP[,grid=HxW][,array=NAME][,manifest=FILE][,images=DIR]``: an import.

    Raises:
        InvalidInputError: Something is missing or of the wrong shape.
        NotFoundError: An option or array is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, _OPTIONS, reader="features")
    path = existing_path(parsed.path, reader="features")
    options = parsed.options
    if "tap" not in options:
        hint = "Example: features:FILE,tap=norm,grid=16x16."
        raise invalid("tap", None, "named, as the features do not tell", hint=hint)
    is_table = path.suffix.lower() in (".csv", ".tsv", ".parquet")
    table_path = path if is_table else _find_table(path, options.get("manifest"))
    in_many = is_table or path.is_dir()
    array = options.get("array")
    places = (
        _places_in_many(table_path, array) if in_many else _places_in_one(path, table_path, array)
    )
    images = existing_path(options["images"], reader="features") if "images" in options else None
    absolute = {"manifest": str(table_path), "images": str(images)}
    named = [f"{key}={absolute.get(key, value)}" for key, value in sorted(options.items())]
    return FeaturesReader(
        name=name,
        spec=",".join([f"features.v1:{path}", *named]),
        table_path=table_path,
        places=places,
        tap=options["tap"],
        grid=parse_size(options["grid"], name="grid") if "grid" in options else None,
        images=images,
        depth_scale=parse_scale(options),
    )
