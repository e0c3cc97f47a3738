"""Folding runs: what `run.json`, the metrics and the curves of each run say."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from featstore.sql.scan import Vanished
from featstore.store import StoreFolder

RUN_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("created", pa.string()),
        ("status", pa.string()),
        ("head", pa.string()),
        ("task", pa.string()),
        ("feature_sets", pa.list_(pa.string())),
        ("taps", pa.list_(pa.string())),
        ("store", pa.string()),
        ("parameters", pa.int64()),
        ("dead_parameters", pa.int64()),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("device", pa.string()),
        ("seed", pa.int64()),
        ("best_step", pa.int64()),
    ]
)
PARAM_SCHEMA = pa.schema([("run_id", pa.string()), ("name", pa.string()), ("value", pa.string())])
METRIC_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("name", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
CURVE_SCHEMA = pa.schema(
    [("step", pa.int64()), ("split", pa.string()), ("name", pa.string()), ("value", pa.float64())]
)
DAMAGED = "damaged"


def fold_runs(
    con: duckdb.DuckDBPyConnection,
    store: StoreFolder,
    run_ids: Sequence[str],
    present: Collection[str],
) -> None:
    """Fold runs anew; one that cannot be read is listed as damaged and stops nothing.

    Raises:
        Vanished: A run was removed meanwhile.
    """
    for run_id in run_ids:
        for table in ("runs", "params", "metrics", "curves"):
            con.execute(f"delete from {table} where run_id = $run_id", {"run_id": run_id})
        path = store.runs_path / run_id
        if run_id not in present:
            continue
        try:
            tables = _read(path)
        except FileNotFoundError as error:
            raise Vanished(str(path)) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException):
            about = {"run_id": run_id, "status": DAMAGED}
            tables = {"runs": pa.Table.from_pylist([about], schema=RUN_SCHEMA)}
        for table, given in tables.items():
            con.register("given", given)
            con.execute(f"insert into {table} by name select * from given")
            con.unregister("given")


def _read(path: Path) -> dict[str, pa.Table]:
    record = json.loads((path / "run.json").read_text())
    line = {name: record.get(name) for name in RUN_SCHEMA.names}
    line.update(run_id=path.name, status=str(record["status"]))
    params = [
        {"run_id": path.name, "name": name, "value": value}
        for name, value in _flat(record.get("options") or {})
    ]
    return {
        "runs": pa.Table.from_pylist([line], schema=RUN_SCHEMA),
        "params": pa.Table.from_pylist(params, schema=PARAM_SCHEMA),
        "metrics": _table(path / "metrics.parquet", METRIC_SCHEMA),
        "curves": _table(path / "curves.parquet", CURVE_SCHEMA),
    }


def _table(path: Path, schema: pa.Schema) -> pa.Table:
    if path.exists():
        table = pq.ParquetFile(path).read(columns=schema.names).select(schema.names).cast(schema)
    else:
        table = schema.empty_table()
    run_id = pa.array([path.parent.name] * table.num_rows, pa.string())
    return table.add_column(0, "run_id", run_id)


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Name nested options with dots; text stays as it is, anything else is JSON."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
