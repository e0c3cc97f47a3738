"""Copying finished runs to another store, whose rows have other numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featstore.assign import row_key
from featstore.feature_copy import lines_by_key
from featstore.files import PARTIAL, exclusive, read_parquet, write_bytes, write_parquet
from featstore.latency import latency_path
from featstore.store import StoreFolder

_RECORD = "run.json"
_DONE = "done"


def copy_runs(
    source: StoreFolder, target: StoreFolder, keys: Iterable[str]
) -> tuple[list[str], dict[str, str]]:
    """Copy the finished runs whose feature sets and rows the target has.

    Tables that name rows get the target's numbers; everything else is copied as it is. A run that
    is there already is left alone.

    Args:
        source: Store.
        target: Store.
        keys: Feature sets that were copied.

    Returns:
        The runs that the target has now, and for each other one the reason why not.

    Raises:
        StorageError: The disk refused; the same call goes on where it stopped.
    """
    chosen = set(keys)
    numbers: dict[str, dict[int, int]] = {}
    copied: list[str] = []
    left_out: dict[str, str] = {}
    for path in sorted(source.runs_path.glob(f"*/{_RECORD}")):
        run_id, problem = path.parent.name, ""
        record = _read_record(path)
        if record.get("status") != _DONE:
            problem = f"it is {record.get('status', 'damaged')}"
        elif not set(record.get("feature_sets") or ()) <= chosen:
            problem = "its features were not copied"
        elif not (target.runs_path / run_id / _RECORD).exists():
            translation: Mapping[int, int] = {}
            for key in (record.get("feature_sets") or ())[:1]:
                if key not in numbers:
                    numbers[key] = _translation(source, target, key)
                translation = numbers[key]
            problem = _copy_run(path.parent, target.runs_path / run_id, translation)
        if problem:
            left_out[run_id] = problem
        else:
            copied.append(run_id)
    for key in chosen:
        old, new = latency_path(source.path, key), latency_path(target.path, key)
        if old.exists() and not new.exists():
            write_bytes(new, old.read_bytes())
    return copied, left_out


def _read_record(path: Path) -> dict[str, Any]:
    """Read what a run says of itself; a damaged record says nothing."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return {}


def _translation(source: StoreFolder, target: StoreFolder, key: str) -> dict[int, int]:
    """Give the target's number of every row of the source that the target has.

    Rows that were moved or removed have one too, if their image is there.
    """
    theirs = {k: line["row"] for k, line in lines_by_key(target.feature_set(key)).items()}
    lines = source.feature_set(key).assignments().to_pylist()
    return {line["row"]: theirs[row_key(line)] for line in lines if row_key(line) in theirs}


def _copy_run(source: Path, target: Path, numbers: Mapping[int, int]) -> str:
    """Copy one run, its record last; give the reason why it was left out."""
    tables = {path: table for path in _files(source) if (table := _table_of_rows(path))}
    named = {row for table in tables.values() for row in table["row"].to_pylist()}
    missing = named - numbers.keys()
    if missing:
        return f"{len(missing)} of the rows that it names were not copied"
    with exclusive(target / ".lock", purpose="copying a run"):
        for path in _files(source):
            new = target / path.relative_to(source)
            if path in tables:
                write_parquet(new, _renumbered(tables[path], numbers))
            elif path.name != _RECORD:
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, new)
        write_bytes(target / _RECORD, (source / _RECORD).read_bytes())
    return ""


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".lock") and path.suffix != PARTIAL:
            yield path


def _table_of_rows(path: Path) -> pa.Table | None:
    if path.suffix != ".parquet" or "row" not in pq.read_schema(path).names:
        return None
    return read_parquet(path)


def _renumbered(table: pa.Table, numbers: Mapping[int, int]) -> pa.Table:
    place = table.column_names.index("row")
    rows: list[Any] = [numbers[row] for row in table["row"].to_pylist()]
    return table.set_column(place, "row", pa.array(rows, table.schema.field("row").type))
