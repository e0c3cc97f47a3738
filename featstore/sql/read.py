"""Reading the store's files for the index."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featstore.errors import FormatError, StorageError
from featstore.sql.scan import Vanished

_PART_ROWS = 2**18


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read columns of one of the store's Parquet files.

    Raises:
        Vanished: It has been removed.
        FormatError: It is damaged.
        StorageError: It cannot be read.
    """
    with _reading(path), pq.ParquetFile(path) as file:
        table = file.read(columns=schema.names, use_threads=False)
        return table.select(schema.names).cast(schema)


def read_parts(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Read columns of a file as `read_table` does, a part at a time."""
    with _reading(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_PART_ROWS, columns=schema.names, use_threads=False):
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say what is wrong with a file."""
    try:
        yield
    except FileNotFoundError as error:
        raise Vanished(str(path)) from error
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise StorageError(f"Could not read {path}: {error.strerror}.") from error
        way_out = (
            "Run `featstore verify --repair`."
            if "ledger" in path.parts
            else "Restore it from a copy."
        )
        raise FormatError(f"{path} is damaged. {way_out}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        Vanished: The file has been removed.
        FormatError: It is damaged.
    """
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise Vanished(str(path)) from error
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path} is damaged. Restore it from a copy.") from error
