"""Assigned rows as lines that are read where somebody looks at them, however many there are."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featstore.errors import FormatError, NotFoundError
from featstore.files import next_number, read_parquet, write_parquet
from featstore.store import ASSIGNMENT_SCHEMA, FeatureSetFolder

RowKey = tuple[str, str, str]
"""Image key, crop and view: what a row is."""
Line = Mapping[str, Any]

_KEYS = ("row", "image_key", "crop", "view")
_KEPT_GROUPS = 2  # of rows as they lie in the files: two neighbours, where a shard lies in both


class Lines(Sequence[Line]):
    """Consecutive lines of an assignment, rows ascending; each look makes them anew."""

    def __init__(self, assigned: Assigned, rows: np.ndarray) -> None:
        self._assigned = assigned
        self.rows = rows  # int64

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Line: ...

    @overload
    def __getitem__(self, at: slice) -> list[Line]: ...

    def __getitem__(self, at: int | slice) -> Line | list[Line]:
        if isinstance(at, slice):
            return list(Lines(self._assigned, self.rows[at]))
        return self._assigned.lines(self.rows[at : at + 1 or None])[0]

    def __iter__(self) -> Iterator[Line]:
        return iter(self._assigned.lines(self.rows))

    def __reduce__(self) -> tuple[type[tuple[Line, ...]], tuple[list[Line]]]:
        return tuple, (list(self),)  # another process has no use for the rest

    def keyed(self) -> Iterator[tuple[int, RowKey]]:
        """Give the row and the key of each line; faster than the whole lines."""
        table = self._assigned.keys(self.rows)
        names = [table[name].to_pylist() for name in _KEYS[1:]]
        return zip(self.rows.tolist(), zip(*names, strict=True), strict=True)


class Assigned:
    """The assigned rows of a feature set as they are now, in memory a part at a time.

    Its methods may be called from threads.
    """

    def __init__(self, folder: FeatureSetFolder) -> None:
        self._groups = [group for path in folder.assignment_paths() for group in _groups(path)]
        self._tables: dict[tuple[_Group, bool], tuple[np.ndarray, pa.Table]] = {}
        self._lock = threading.Lock()
        self.rows = np.sort(_rows(folder))

    def shards(self, shard_rows: int) -> Iterator[tuple[int, Lines]]:
        """Give the lines of each shard that has any, ascending."""
        shards = self.rows // shard_rows
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        parts = np.split(self.rows, starts[1:]) if len(starts) else []
        for shard, rows in zip(shards[starts].tolist(), parts, strict=True):
            yield shard, Lines(self, rows)

    def lines(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Read the lines of rows, which are ascending."""
        return self._take(rows, is_whole=True).to_pylist()

    def keys(self, rows: np.ndarray) -> pa.Table:
        """Read what rows are, which are ascending: the columns row, image_key, crop and view."""
        return self._take(rows, is_whole=False)

    def _take(self, rows: np.ndarray, *, is_whole: bool) -> pa.Table:
        schema = ASSIGNMENT_SCHEMA
        if not is_whole:
            schema = pa.schema([schema.field(name) for name in _KEYS])
        found = [schema.empty_table()]
        for group in self._groups if len(rows) else ():
            if group.first <= rows[-1] and rows[0] <= group.last:
                numbers, table = self._read(group, schema, is_whole=is_whole)
                start, stop = np.searchsorted(numbers, [rows[0], rows[-1] + 1]).tolist()
                found.append(table.slice(start, stop - start))
        joined = pa.concat_tables(found)
        if len(found) > 2:
            joined = joined.sort_by("row")
        if joined.num_rows != len(rows):
            joined = joined.filter(pa.array(np.isin(joined["row"].to_numpy(), rows)))
        return joined

    def _read(
        self, group: _Group, schema: pa.Schema, *, is_whole: bool
    ) -> tuple[np.ndarray, pa.Table]:
        with self._lock:
            known = self._tables.get((group, is_whole))
            if known is None:
                with _opened(group.path) as file:
                    table = file.read_row_group(group.number, columns=schema.names)
                    table = table.select(schema.names).cast(schema)
                numbers = table["row"].to_numpy()
                if np.any(numbers[1:] < numbers[:-1]):
                    table = table.sort_by("row")
                    numbers = table["row"].to_numpy()
                known = numbers, table.combine_chunks()
                while sum(kind == is_whole for _, kind in self._tables) >= _KEPT_GROUPS:
                    del self._tables[next(key for key in self._tables if key[1] == is_whole)]
                self._tables[group, is_whole] = known
            return known


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """A part of an assignment file that is read at once, and between which rows it lies."""

    path: Path
    number: int
    first: int
    last: int


def n_assigned_rows(folder: FeatureSetFolder) -> int:
    """Count the rows up to the last that is assigned, holes included."""
    groups = (group for path in folder.assignment_paths() for group in _groups(path))
    return max((group.last + 1 for group in groups), default=0)


def publish_assignment(folder: FeatureSetFolder, table: pa.Table) -> None:
    """Write an assignment under the next free number; hold the feature set's writer lock."""
    number = next_number(folder.assignment_paths())
    write_parquet(folder.path / "assignments" / f"{number:05d}.parquet", table)


def read_columns(folder: FeatureSetFolder, names: Sequence[str]) -> pa.Table:
    """Read some columns of all assigned rows, ascending; `row` is one of them."""
    tables = [ASSIGNMENT_SCHEMA.empty_table().select(names)]
    tables += [read_parquet(path, columns=list(names)) for path in folder.assignment_paths()]
    return pa.concat_tables([table.select(names) for table in tables]).sort_by("row")


def _rows(folder: FeatureSetFolder) -> np.ndarray:
    found = [np.empty(0, np.int64)]
    for path in folder.assignment_paths():
        with _opened(path) as file:
            found.append(file.read(columns=["row"])["row"].to_numpy())
    return np.concatenate(found)


def _groups(path: Path) -> list[_Group]:
    with _opened(path) as file:
        at = file.schema_arrow.names.index("row")
        found = []
        for number in range(file.metadata.num_row_groups):
            about = file.metadata.row_group(number).column(at).statistics
            if about is not None and about.has_min_max:
                first, last = about.min, about.max
            else:
                rows = file.read_row_group(number, columns=["row"])["row"].to_numpy()
                first, last = (int(rows.min()), int(rows.max())) if len(rows) else (0, -1)
            found.append(_Group(path=path, number=number, first=first, last=last))
        return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, every page checked; say what is wrong as `files.read_parquet` does."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise NotFoundError(f"No file at {path}.") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{path} is damaged ({reason}). Run `featstore verify`.") from error
