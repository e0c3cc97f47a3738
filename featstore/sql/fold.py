"""Folding: bring what changed among the store's files into the index's tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from featstore import items, ledger
from featstore.errors import FormatError
from featstore.sql.runs import fold_runs
from featstore.sql.scan import Files
from featstore.store import ASSIGNMENT_SCHEMA, StoreFolder, read_attributes
from featstore.taps import tap_folder

_BLOCK_FILES = 256  # read at once
_TOMBSTONE_SCHEMA = pa.schema([("row", pa.int64())])

_SAMPLES = """
insert into sample_lines
with live as (
    select feature_set, "row", image_key, crop, "view"
    from rows
    where image_key in (select image_key from touched)
        and exists (
            from ledger
            where ledger.feature_set = rows.feature_set
                and ledger."row" = rows."row"
                and ledger.status = 'ok'
        )
        and not exists (
            from tombstones
            where tombstones.feature_set = rows.feature_set and tombstones."row" = rows."row"
        )
    qualify row_number() over (
        partition by feature_set, image_key, crop, "view" order by "row"
    ) = 1
)
select
    live."row",
    items.item,
    items.dataset,
    unnest(items.splits) as split,
    items.path,
    items.label,
    live.image_key,
    items.height,
    items.width,
    live.crop,
    live."view",
    live.feature_set,
    items.group_id,
    items."timestamp",
    items.attributes,
    items.label_kinds
from live
inner join items on items.image_key = live.image_key and items.crop = live.crop
order by live.feature_set, live."row", items.item, split
"""


class Vanished(Exception):  # noqa: N818
    """A file was removed after it had been listed: list and fold again."""


class Fold:
    """One folding of one store into one open index."""

    def __init__(
        self, con: duckdb.DuckDBPyConnection, store: StoreFolder, found: Files, folded: Files
    ) -> None:
        self.con = con
        self.store = store
        self.found = found
        self.stale = {path for path, stamp in folded.items() if found.get(path) != stamp}
        self.new = {path for path, stamp in found.items() if folded.get(path) != stamp}

    def run(self) -> None:
        """Do it all; the index is whole again afterwards."""
        self.con.execute("create or replace temp table touched (image_key varchar)")
        for dataset in sorted({path.split("/")[1] for path in self._changed("items")}):
            self._dataset(dataset)
        sets = self._changed("feature_sets")
        for key in sorted({path.split("/")[1] for path in sets if path.endswith("/zarr.json")}):
            self._feature_set(key)
        self._assignments([path for path in sets if path.split("/")[2] == "assignments"])
        self._ledgers([path for path in sets if path.split("/")[2] == "ledger"])
        self._tombstones([path for path in sets if path.split("/")[2] == "tombstones"])
        self.con.execute(
            "delete from sample_lines where image_key in (select image_key from touched)"
        )
        self.con.execute(_SAMPLES)
        runs = sorted({path.split("/")[1] for path in self._changed("runs")})
        fold_runs(self.con, self.store, runs)
        self._remember()

    def _changed(self, top: str) -> list[str]:
        return sorted(path for path in self.stale | self.new if path.startswith(f"{top}/"))

    def _remember(self) -> None:
        gone = pa.table({"path": pa.array(sorted(self.stale), pa.string())})
        self._execute("delete from folded where path in (select path from given)", gone)
        lines = [(path, *self.found[path]) for path in sorted(self.new)]
        self._insert("folded", _columns(lines, ("path", "mtime_ns", "size")))

    def _execute(self, sql: str, given: pa.Table) -> None:
        """Run a statement that names the Arrow table `given`."""
        self.con.register("given", given)
        try:
            self.con.execute(sql)
        finally:
            self.con.unregister("given")

    def _insert(self, table: str, given: pa.Table) -> None:
        if given.num_rows:
            self._execute(f"insert into {table} by name select * from given", given)

    def _dataset(self, dataset: str) -> None:
        """Fold the items of a data set anew; those that differ touch their images."""
        parameters = {"dataset": dataset}
        self.con.execute(
            "create or replace temp table old as from items where dataset = $dataset", parameters
        )
        self.con.execute("delete from items where dataset = $dataset", parameters)
        self.con.execute("delete from datasets where dataset = $dataset", parameters)
        prefix = f"items/{dataset}/"
        if f"{prefix}dataset.json" in self.found:
            about = _read_json(self.store.path / prefix / "dataset.json")
            names = ("format", "spec", "licence", "homepage")
            line = [(dataset, *(str(about.get(name, "")) for name in names))]
            self._insert("datasets", _columns(line, ("dataset", *names)))
        paths = [path for path in self.found if path.startswith(prefix) and _is_table(path)]
        for path, table in self._tables(sorted(paths, reverse=True), items.SCHEMA):
            assert path
            name = pa.array([dataset]).take(pa.array([0] * table.num_rows))
            # The last generation comes first; what it names is not taken from an older one.
            self._execute(
                "insert into items by name select * from given where item not in "
                f"(select item from items where dataset = '{dataset}')",
                table.append_column("dataset", name),
            )
        self.con.execute(
            """
            insert into touched
            with new as (from items where dataset = $dataset)
            select distinct image_key
            from ((from old except from new) union all (from new except from old))
            """,
            parameters,
        )

    def _feature_set(self, key: str) -> None:
        for table in ("feature_sets", "taps"):
            self.con.execute(f"delete from {table} where feature_set = $key", {"key": key})
        if f"feature_sets/{key}/zarr.json" not in self.found:
            return
        about = self._attributes(key)
        plan = about["plan"]
        line = {
            "feature_set": key,
            "name": about["name"],
            "backbone": str(about["backbone"].get("name", "")),
            "dtype": about["dtype"],
            "shard_rows": about["shard_rows"],
            "is_foreign": plan is None,
            "plan": None if plan is None else json.dumps(plan, sort_keys=True),
            "identity": json.dumps(about["backbone"], sort_keys=True),
            "provenance": json.dumps(about["provenance"], sort_keys=True),
        }
        self._insert("feature_sets", pa.Table.from_pylist([line]))
        taps = [
            {
                "feature_set": key,
                "tap": tap,
                "dim": shape["dim"],
                "grid_h": shape["grid"][0] if shape["grid"] else None,
                "grid_w": shape["grid"][1] if shape["grid"] else None,
                "n_prefix": shape["n_prefix"],
            }
            for tap, shape in about["taps"].items()
        ]
        self._insert("taps", pa.Table.from_pylist(taps))

    def _attributes(self, key: str) -> dict[str, Any]:
        return read_attributes(self.store.path / "feature_sets" / key)

    def _assignments(self, paths: Sequence[str]) -> None:
        units = _columns(
            [(path, path.split("/")[1], int(Path(path).stem)) for path in paths],
            ("file", "feature_set", "assignment"),
        )
        if not paths:
            return
        belonging = "(feature_set, assignment) in (select (feature_set, assignment) from given)"
        self._execute(
            f"insert into touched select distinct image_key from rows where {belonging}", units
        )
        self._execute(f"delete from rows where {belonging}", units)
        sizes = {key: self._attributes(key)["shard_rows"] for key in self._keys(paths)}
        for path, table in self._tables(self._present(paths), ASSIGNMENT_SCHEMA):
            key = path.split("/")[1]
            self.con.register("given", table)
            self.con.execute(
                """
                insert into rows by name
                select $key as feature_set, $n as assignment, "row" // $size as shard, *
                from given
                """,
                {"key": key, "n": int(Path(path).stem), "size": sizes[key]},
            )
            self.con.unregister("given")
            self._execute("insert into touched select distinct image_key from given", table)

    def _keys(self, paths: Iterable[str]) -> set[str]:
        return {path.split("/")[1] for path in self._present(paths)}

    def _present(self, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if path in self.found]

    def _ledgers(self, paths: Sequence[str]) -> None:
        if not paths:
            return
        names = {
            (key, tap_folder(tap)): tap
            for key in self._keys(paths)
            for tap in self._attributes(key)["taps"]
        }
        units = [_ledger_unit(path) for path in paths]
        old = _columns(units, ("feature_set", "folder", "shard"))
        self._execute(
            """
            delete from ledger
            where (feature_set, replace(tap, ':', '_'), shard)
                in (select (feature_set, folder, shard) from given)
            """,
            old,
        )
        self._execute(
            """
            insert into touched
            select distinct image_key
            from rows
            where (feature_set, shard) in (select (feature_set, shard) from given)
            """,
            old,
        )
        present = [path for path in self._present(paths) if _ledger_unit(path)[:2] in names]
        for start in range(0, len(present), _BLOCK_FILES):
            block = present[start : start + _BLOCK_FILES]
            parts = []
            for path, table in self._tables(block, ledger.SCHEMA):
                key, folder, shard = _ledger_unit(path)
                parts.append(_labelled(table, key, names[key, folder], shard))
            self._insert("ledger", pa.concat_tables(parts))

    def _tombstones(self, paths: Sequence[str]) -> None:
        for path in paths:
            key, name = path.split("/")[1], Path(path).name
            parameters = {"key": key, "file": name}
            touch = """
                insert into touched
                select distinct image_key
                from rows
                where feature_set = $key and "row" in (
                    select "row" from tombstones where feature_set = $key and file = $file
                )
            """
            self.con.execute(touch, parameters)
            self.con.execute(
                "delete from tombstones where feature_set = $key and file = $file", parameters
            )
            for _, table in self._tables(self._present([path]), _TOMBSTONE_SCHEMA):
                self.con.register("given", table)
                self.con.execute(
                    'insert into tombstones select $key, $file, "row" from given', parameters
                )
                self.con.unregister("given")
            self.con.execute(touch, parameters)

    def _tables(self, paths: Iterable[str], schema: pa.Schema) -> Iterator[tuple[str, pa.Table]]:
        for path in paths:
            yield path, read_table(self.store.path / path, schema)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read one of the store's Parquet files.

    Raises:
        Vanished: It has been removed.
        FormatError: It is damaged.
    """
    try:
        table = pq.ParquetFile(path).read(columns=schema.names)
        return table.select(schema.names).cast(schema)
    except FileNotFoundError as error:
        raise Vanished(str(path)) from error
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise FormatError(
            f"{path} is damaged: {str(error).splitlines()[0]} Run `featstore verify --repair`."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise Vanished(str(path)) from error
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path} is damaged. Restore it from a copy.") from error


def _is_table(path: str) -> bool:
    return path.endswith(".parquet")


def _ledger_unit(path: str) -> tuple[str, str, int]:
    parts = path.split("/")
    return parts[1], parts[3], int(Path(parts[4]).stem)


def _labelled(table: pa.Table, key: str, tap: str, shard: int) -> pa.Table:
    count = table.num_rows
    given = {
        "feature_set": pa.array([key] * count, pa.string()),
        "tap": pa.array([tap] * count, pa.string()),
        "shard": pa.array([shard] * count, pa.int32()),
    }
    kept = table.drop_columns(["image_key", "crop", "view"])
    return pa.table({**given, **dict(zip(kept.column_names, kept.columns, strict=True))})


def _columns(lines: Sequence[tuple[Any, ...]], names: Sequence[str]) -> pa.Table:
    return pa.table({name: [line[at] for line in lines] for at, name in enumerate(names)})
