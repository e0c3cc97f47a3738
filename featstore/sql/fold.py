"""Folding: bring what changed among the store's files into the index's tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from featstore import items, ledger
from featstore.errors import FormatError, NotFoundError
from featstore.sql.read import read_json, read_parts, read_table
from featstore.sql.runs import fold_runs
from featstore.sql.samples import bring_up_to_date, make
from featstore.sql.scan import Files, Vanished
from featstore.store import ASSIGNMENT_SCHEMA, StoreFolder, read_attributes
from featstore.taps import tap_folder

_BLOCK_FILES = 256  # ledgers in memory at once
_KEPT = [name for name in ledger.SCHEMA.names if name not in ("image_key", "crop", "view")]
LEDGER_SCHEMA = pa.schema([ledger.SCHEMA.field(name) for name in _KEPT])
"""Columns of a ledger that the index takes; the others stand in the assignment too."""
TOMBSTONE_SCHEMA = pa.schema([("row", pa.int64())])

_REMAKE_DIFFERING_ITEMS = """
insert into remade
with new as (from items where dataset = $dataset)
select distinct image_key
from ((from old except from new) union all (from new except from old))
"""
_TOUCH_BURIED = """
insert into touched
select distinct image_key
from rows
where feature_set = $key
    and "row" in (select "row" from tombstones where feature_set = $key and file = $file)
"""


class Fold:
    """One folding of one store into one open index, which is whole again afterwards."""

    def __init__(
        self, con: duckdb.DuckDBPyConnection, store: StoreFolder, found: Files, folded: Files
    ) -> None:
        self.con = con
        self.store = store
        self.found = found
        self.known = folded.keys()
        self.is_fresh = not folded  # then everything is new, and nothing is noted
        self.stale = {path for path, stamp in folded.items() if found.get(path) != stamp}
        self.new = {path for path, stamp in found.items() if folded.get(path) != stamp}

    def run(self) -> None:
        """Do it all.

        Raises:
            Vanished: A file was removed meanwhile; list the files and fold again.
            FormatError: One of the files is damaged.
            StorageError: One of the files cannot be read.
        """
        for table in ("touched", "remade"):
            self.con.execute(f"create or replace temp table {table} (image_key varchar)")
        for dataset in _second_parts(self._changed("items")):
            self._dataset(dataset)
        sets = self._changed("feature_sets")
        ledgers = {path for path in sets if path.split("/")[2] == "ledger"}
        for key in _second_parts(path for path in sets if path.endswith("/zarr.json")):
            ledgers |= self._feature_set(key)
        self._assignments([path for path in sets if path.split("/")[2] == "assignments"])
        self._ledgers(sorted(ledgers))
        self._tombstones([path for path in sets if path.split("/")[2] == "tombstones"])
        if self.is_fresh:
            make(self.con)
        else:
            bring_up_to_date(self.con)
        present = {path.split("/")[1] for path in self.found if path.startswith("runs/")}
        fold_runs(self.con, self.store, _second_parts(self._changed("runs")), present)
        self._remember()

    def _changed(self, top: str) -> list[str]:
        return sorted(path for path in self.stale | self.new if path.startswith(f"{top}/"))

    def _present(self, paths: Iterable[str]) -> list[str]:
        return [path for path in paths if path in self.found]

    def _remember(self) -> None:
        gone = _columns([(path,) for path in sorted(self.stale)], ("path",))
        self._execute("delete from folded where path in (select path from given)", gone)
        lines = [(path, *self.found[path]) for path in sorted(self.new)]
        self._insert("folded", _columns(lines, ("path", "mtime_ns", "size")))

    def _execute(
        self, sql: str, given: pa.Table, parameters: dict[str, object] | None = None
    ) -> None:
        """Run a statement that names the Arrow table `given`, if that holds anything."""
        if not given.num_rows:
            return
        self.con.register("given", given)
        try:
            self.con.execute(sql, parameters)
        finally:
            self.con.unregister("given")

    def _note(
        self, sql: str, given: pa.Table | None = None, parameters: dict[str, object] | None = None
    ) -> None:
        """Run a statement that writes down images whose lines may change."""
        if self.is_fresh:
            return
        if given is None:
            self.con.execute(sql, parameters)
        else:
            self._execute(sql, given, parameters)

    def _insert(self, table: str, given: pa.Table) -> None:
        self._execute(f"insert into {table} by name from given", given)

    def _parts(self, paths: Iterable[str], schema: pa.Schema) -> Iterator[tuple[str, pa.Table]]:
        for path in paths:
            for table in read_parts(self.store.path / path, schema):
                yield path, table

    def _dataset(self, dataset: str) -> None:
        """Fold the items of a data set; those that differ have their lines made anew."""
        prefix = f"items/{dataset}/"
        self.con.execute("delete from datasets where dataset = $dataset", {"dataset": dataset})
        if f"{prefix}dataset.json" in self.found:
            about = read_json(self.store.path / prefix / "dataset.json")
            names = ("format", "spec", "licence", "homepage")
            line = (dataset, *(str(about.get(name, "")) for name in names))
            self._insert("datasets", _columns([line], ("dataset", *names)))
        own = re.compile(rf"{re.escape(prefix)}.+\.parquet").fullmatch
        tables = sorted(path for path in self.found if own(path))
        known = sorted(path for path in self.known if own(path))
        if self.stale.isdisjoint(known) and tables[: len(known)] == known:
            self._add_items(dataset, tables[len(known) :])
            return
        parameters = {"dataset": dataset}
        self.con.execute(
            "create or replace temp table old as from items where dataset = $dataset", parameters
        )
        self.con.execute("delete from items where dataset = $dataset", parameters)
        self._add_items(dataset, tables)
        self.con.execute(_REMAKE_DIFFERING_ITEMS, parameters)

    def _add_items(self, dataset: str, paths: Sequence[str]) -> None:
        """Add generations of items, which replace those of older ones."""
        parameters = {"dataset": dataset}
        of_one = "from items where dataset = $dataset"
        for path in paths:
            if self.con.execute(f"{of_one} limit 1", parameters).fetchall():
                self.con.execute("create or replace temp table newer (item varchar)")
                for _, table in self._parts([path], pa.schema([("item", pa.string())])):
                    self._execute("insert into newer from given", table)
                replaced = f"{of_one} and item in (from newer)"
                self.con.execute(f"insert into remade select image_key {replaced}", parameters)
                self.con.execute(f"delete {replaced}", parameters)
            for _, table in self._parts([path], items.SCHEMA):
                sql = "insert into items by name select $dataset as dataset, * from given"
                self._execute(sql, table, dict(parameters))
                self._note("insert into remade select image_key from given", table)

    def _feature_set(self, key: str) -> set[str]:
        """Fold what is recorded of a feature set; give the ledgers of taps that came or went."""
        old = self.con.execute("select tap from taps where feature_set = $key", {"key": key})
        differing = {tap for (tap,) in old.fetchall()}
        for table in ("feature_sets", "taps"):
            self.con.execute(f"delete from {table} where feature_set = $key", {"key": key})
        if f"feature_sets/{key}/zarr.json" in self.found:
            about = self._attributes(key)
            try:
                self._insert("feature_sets", _feature_set_line(key, about))
                self._insert("taps", _tap_lines(key, about["taps"]))
            except (KeyError, TypeError, AttributeError, pa.ArrowException) as error:
                path = self.store.path / "feature_sets" / key / "zarr.json"
                raise FormatError(f"{path} is damaged. Restore it from a copy.") from error
            differing ^= about["taps"].keys()
        folders = tuple(f"feature_sets/{key}/ledger/{tap_folder(tap)}/" for tap in differing)
        return {path for path in self.found if path.startswith(folders)}

    def _attributes(self, key: str) -> dict[str, Any]:
        try:
            return read_attributes(self.store.path / "feature_sets" / key)
        except NotFoundError as error:
            raise Vanished(key) from error

    def _assignments(self, paths: Sequence[str]) -> None:
        lines = [(path.split("/")[1], int(Path(path).stem)) for path in paths]
        units = _columns(lines, ("feature_set", "assignment"))
        belonging = "(feature_set, assignment) in (select (feature_set, assignment) from given)"
        self._execute(
            f"insert into remade select distinct image_key from rows where {belonging}", units
        )
        self._execute(f"delete from rows where {belonging}", units)
        for path, table in self._parts(self._present(paths), ASSIGNMENT_SCHEMA):
            key = path.split("/")[1]
            size = self._attributes(key)["shard_rows"]
            self._execute(
                """
                insert into rows by name
                select $key as feature_set, $n as assignment, "row" // $size as shard, *
                from given
                """,
                table,
                {"key": key, "n": int(Path(path).stem), "size": size},
            )
            self._note("insert into remade select distinct image_key from given", table)

    def _ledgers(self, paths: Sequence[str]) -> None:
        names = ("feature_set", "folder", "shard")
        self._execute(
            """
            delete from ledger
            where (feature_set, replace(tap, ':', '_'), shard)
                in (select (feature_set, folder, shard) from given)
            """,
            _columns([_unit(path) for path in paths if path in self.known], names),
        )
        self._note(
            """
            insert into touched
            select distinct image_key
            from rows
            semi join given using (feature_set, shard)
            """,
            _columns([_unit(path) for path in paths], names),
        )
        present = self._present(paths)
        taps = {
            (key, tap_folder(tap)): tap
            for key in _second_parts(present)
            for tap in self._attributes(key)["taps"]
        }
        # A tap that is not recorded (any more) has no ledgers.
        jobs = [(path, *_unit(path)) for path in present if _unit(path)[:2] in taps]
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(jobs), _BLOCK_FILES):
                block = jobs[start : start + _BLOCK_FILES]
                read = [(self.store.path / path, LEDGER_SCHEMA) for path, *_ in block]
                tables = pool.map(read_table, *zip(*read, strict=True))
                labels = [(key, taps[key, folder], shard) for _, key, folder, shard in block]
                self._insert("ledger", _labelled(list(tables), labels))

    def _tombstones(self, paths: Sequence[str]) -> None:
        for path in paths:
            parameters = {"key": path.split("/")[1], "file": Path(path).name}
            self._note(_TOUCH_BURIED, parameters=dict(parameters))
            self.con.execute(
                "delete from tombstones where feature_set = $key and file = $file", parameters
            )
            for _, table in self._parts(self._present([path]), TOMBSTONE_SCHEMA):
                sql = 'insert into tombstones select $key, $file, "row" from given'
                self._execute(sql, table, dict(parameters))
            self._note(_TOUCH_BURIED, parameters=dict(parameters))


def _second_parts(paths: Iterable[str]) -> list[str]:
    """Name the data sets, feature sets or runs that files belong to."""
    return sorted({path.split("/")[1] for path in paths})


def _unit(path: str) -> tuple[str, str, int]:
    """Give feature set, tap folder and shard of a ledger."""
    parts = path.split("/")
    return parts[1], parts[3], int(Path(parts[4]).stem)


def _feature_set_line(key: str, about: dict[str, Any]) -> pa.Table:
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
    return pa.Table.from_pylist([line])


def _tap_lines(key: str, taps: dict[str, dict[str, Any]]) -> pa.Table:
    lines = [
        {
            "feature_set": key,
            "tap": tap,
            "dim": shape["dim"],
            "grid_h": shape["grid"][0] if shape["grid"] else None,
            "grid_w": shape["grid"][1] if shape["grid"] else None,
            "n_prefix": shape["n_prefix"],
        }
        for tap, shape in taps.items()
    ]
    return pa.Table.from_pylist(lines)


def _labelled(tables: Sequence[pa.Table], labels: Sequence[tuple[str, str, int]]) -> pa.Table:
    """Join ledgers, each with its feature set, tap and shard."""
    given = _columns(labels, ("feature_set", "tap", "shard"))
    counts = [table.num_rows for table in tables]
    repeated = given.take(pa.array(np.repeat(np.arange(len(tables)), counts)))
    joined = pa.concat_tables(tables)
    columns = [*repeated.columns, *joined.columns]
    return pa.table(columns, names=[*given.column_names, *joined.column_names])


def _columns(lines: Sequence[tuple[Any, ...]], names: Sequence[str]) -> pa.Table:
    return pa.table({name: [line[at] for line in lines] for at, name in enumerate(names)})
