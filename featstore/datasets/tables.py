"""Tables that list images, CSV or Parquet: reading them, and items out of their rows."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from featstore.errors import InvalidInputError
from featstore.types import Box, Item

CROP_COLUMNS = ("x0", "y0", "x1", "y1")
DENSE = ("depth", "classes", "instances")
DENSE_PREFIX = "label:"
_ITEM_COLUMNS = ("path", "split", "label", "group", "timestamp", "crop", *CROP_COLUMNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One row: its cells that are not empty, and where it stands, for messages."""

    place: str
    cells: Mapping[str, Any]

    def error(self, column: str, expected: str) -> InvalidInputError:
        """Say what is wrong with one cell."""
        got = self.cells.get(column)
        shown = "nothing" if got is None else repr(got)
        return InvalidInputError(
            f"{self.place}, column {column!r}: must be {expected}. Got {shown}."
        )


def read_table(path: Path) -> list[TableRow]:
    """Read a CSV (or tab-separated) or Parquet file with a ``path`` column.

    Raises:
        InvalidInputError: The file does not parse, lacks the column or has no row; the message
            names the line.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise InvalidInputError(f"{path} must be a .csv, .tsv or .parquet file.")
    rows = _read_parquet(path) if suffix == ".parquet" else _read_csv(path, suffix)
    if not rows:
        raise InvalidInputError(f"{path} lists no image. Give it one row an image.")
    return rows


def _check_header(path: Path, columns: Sequence[str]) -> None:
    if "path" not in columns:
        raise InvalidInputError(
            f"{path} must have a column 'path'. Its columns are {', '.join(columns) or 'none'}."
        )
    twice = {name for name in columns if list(columns).count(name) > 1}
    if twice:
        raise InvalidInputError(f"{path} has the column {min(twice)!r} twice. Rename one.")


def _read_csv(path: Path, suffix: str) -> list[TableRow]:
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
            columns = [name.strip() for name in next(reader, [])]
            _check_header(path, columns)
            for values in reader:
                place = f"Line {reader.line_num} of {path}"
                if not values:
                    continue
                if len(values) != len(columns):
                    raise InvalidInputError(
                        f"{place} must have {len(columns)} fields, as the header has. "
                        f"Got {len(values)}."
                    )
                pairs = zip(columns, (value.strip() for value in values), strict=True)
                rows.append(TableRow(place=place, cells={k: v for k, v in pairs if v}))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{path} cannot be read as CSV ({error}).") from error
    return rows


def _read_parquet(path: Path) -> list[TableRow]:
    import pyarrow as pa  # heavy, and needed for Parquet alone
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InvalidInputError(f"{path} cannot be read as Parquet ({error}).") from error
    _check_header(path, table.column_names)
    return [
        TableRow(
            place=f"Row {number} of {path}",
            cells={k: v for k, v in line.items() if v is not None and v != ""},
        )
        for number, line in enumerate(table.to_pylist())
    ]


def item_of(row: TableRow, root: Path, *, other_columns: Sequence[str] = ()) -> Item:
    """Make an item of a row; columns without a meaning of their own become attributes.

    Args:
        row: One row of a table.
        root: Folder that paths are relative to.
        other_columns: Columns that the caller reads itself.

    Raises:
        InvalidInputError: A cell is not acceptable; the message names line and column.
    """
    known = {*_ITEM_COLUMNS, *other_columns}
    dense = dense_labels(row)
    attributes = {
        column: _attribute(value)
        for column, value in row.cells.items()
        if column not in known and column not in DENSE and not column.startswith(DENSE_PREFIX)
    }
    return Item(
        path=_relative_path(row, root),
        splits=_splits(row),
        label=_text(row, "label"),
        group=_text(row, "group"),
        timestamp=_timestamp(row),
        crop=_crop(row),
        attributes=attributes,
        label_kinds=tuple(dense),
    )


def dense_labels(row: TableRow) -> dict[str, str]:
    """Give the files of a row's dense labels by kind: depth, classes, instances, ``label:KIND``."""
    return {
        column.removeprefix(DENSE_PREFIX): str(value)
        for column, value in row.cells.items()
        if column in DENSE or column.startswith(DENSE_PREFIX)
    }


def check_unique(items: Sequence[Item], rows: Sequence[TableRow]) -> None:
    """Check that no two rows name the same path and crop.

    Raises:
        InvalidInputError: Two do; the message names both.
    """
    seen: dict[tuple[str, Box | None], str] = {}
    for item, row in zip(items, rows, strict=True):
        first = seen.setdefault((item.path, item.crop), row.place)
        if first != row.place:
            raise InvalidInputError(
                f"{row.place}, column 'path': {item.path!r} is there before ({first}) with the "
                "same crop. Join the two; several splits are written as train|val."
            )


def _text(row: TableRow, column: str) -> str | None:
    value = row.cells.get(column)
    return None if value is None else str(value)


def _attribute(value: Any) -> Any:
    """Give a cell as a JSON value: a number where it is one."""
    if isinstance(value, (bool, int, list, dict)):
        return value
    if isinstance(value, (date, datetime)):
        return value.isoformat()
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if not math.isfinite(number):
        return str(value)
    text = str(value).removeprefix("-")
    return int(value) if isinstance(value, str) and text.isdecimal() else number


def _relative_path(row: TableRow, root: Path) -> str:
    text = row.cells.get("path")
    if not isinstance(text, str):
        raise row.error("path", "the path of an image")
    path = PurePosixPath(text)
    if path.is_absolute() and path.is_relative_to(root.as_posix()):
        path = path.relative_to(root.as_posix())
    if path.is_absolute() or ".." in path.parts:
        raise row.error("path", f"a path inside of {root} (another folder is named with root=DIR)")
    return str(path)


def _splits(row: TableRow) -> tuple[str, ...]:
    value = row.cells.get("split")
    if value is None:
        return ()
    names = [str(name) for name in value] if isinstance(value, list) else str(value).split("|")
    names = [name.strip() for name in names]
    if not all(names):
        raise row.error("split", "a name, or several as train|val")
    return tuple(dict.fromkeys(names))


def _timestamp(row: TableRow) -> str | None:
    value = row.cells.get("timestamp")
    if value is None or isinstance(value, (date, datetime)):
        return None if value is None else value.isoformat()
    try:
        datetime.fromisoformat(str(value))
    except ValueError:
        raise row.error("timestamp", "an ISO 8601 time like 2024-05-01T12:30:00") from None
    return str(value)


def _crop(row: TableRow) -> Box | None:
    corners = [column for column in CROP_COLUMNS if column in row.cells]
    if "crop" in row.cells and corners:
        raise row.error("crop", "empty where x0, y0, x1, y1 are given")
    if "crop" in row.cells:
        text = row.cells["crop"]
        values = text if isinstance(text, list) else str(text).replace(",", " ").split()
        columns = ("crop",) * 4
        if len(values) != 4:
            raise row.error("crop", 'four numbers "x0,y0,x1,y1"')
    elif corners:
        missing = [column for column in CROP_COLUMNS if column not in row.cells]
        if missing:
            raise row.error(missing[0], "a number, as the other corners are given")
        columns, values = CROP_COLUMNS, [row.cells[column] for column in CROP_COLUMNS]
    else:
        return None
    x0, y0, x1, y1 = (_number(row, c, v) for c, v in zip(columns, values, strict=True))
    if not (x1 > x0 and y1 > y0):
        raise row.error(columns[2], f"a box with x1 > x0 and y1 > y0, not {(x0, y0, x1, y1)}")
    return (x0, y0, x1, y1)


def _number(row: TableRow, column: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise row.error(column, "a finite number of pixels")
    return number
