"""Look at every byte of a store that a promise covers, and say what is wrong.

A store may be written to meanwhile, so files are listed before what must exist if they do: shards
before ledgers, ledgers before assignments. What is then missing is really missing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featstore.errors import FeatstoreError, FormatError
from featstore.feature_sets import read_final_norm
from featstore.files import PARTIAL, read_parquet
from featstore.findings import Findings, VerifyReport
from featstore.hashing import image_key
from featstore.labels import THUMBNAIL
from featstore.remote.location import shown
from featstore.shard_check import KEYS, check_shard
from featstore.shards import ShardLayout, find_layout
from featstore.store import FeatureSetFolder, StoreFolder
from featstore.tail_file import TAIL_FILE, check_tail
from featstore.taps import tap_folder
from featstore.tombstones import tombstone_paths
from featstore.types import Progress, ProgressCallback, TapShape

_LEDGER = re.compile(r"\d{5,}\.parquet")
_RESTORE = "Restore it from a copy."
_AGAIN = "Delete it and run the extraction again, which writes it anew."
_LABELS = 64  # in memory at once
_DESCRIPTION = ("format", "spec", "licence", "homepage")
_WRONG = (OSError, ValueError, LookupError, TypeError, AttributeError)


def check_store(store: StoreFolder, progress: ProgressCallback) -> VerifyReport:
    """Check all of a store."""
    findings = Findings(store=store, report=VerifyReport(store=shown(store.path)))
    for kind in ("items", "labels"):
        for path in sorted((store.path / kind).glob("*/*")):
            _check_data_set_file(findings, kind, path)
    _check_group(findings, store.path / "feature_sets")
    for path in sorted((store.path / "feature_sets").glob("*/")):
        folder = FeatureSetFolder(path)
        inside = Findings(store=store, report=findings.report, folder=folder)
        if (path / "zarr.json").exists():
            _FeatureSetCheck(inside, folder).run(progress)
        elif (path / "ledger").exists() or (path / "assignments").exists():
            text = f"{path} holds a feature set without its zarr.json. {_RESTORE}"
            inside.add("feature set", path / "zarr.json", text)
    return findings.report


def _check_data_set_file(findings: Findings, kind: str, path: Path) -> None:
    if path.name.endswith(PARTIAL):
        findings.add_waste(path)
    elif path.name == "dataset.json" and kind == "items":
        if not _is_description(path):
            findings.add(kind, path, f"{path} is damaged. {_AGAIN}")
    elif path.suffix != ".parquet":
        findings.add("foreign", path, f"{path} is no file of a store.")
    else:
        message = _items_problem(path) if kind == "items" else _labels_problem(path)
        if message:
            findings.add(kind, path, message)


def _is_description(path: Path) -> bool:
    try:
        about = json.loads(path.read_text())
        return all(isinstance(about[name], str) for name in _DESCRIPTION)
    except _WRONG:
        return False


def _items_problem(path: Path) -> str:
    about = path.with_name("dataset.json")
    try:
        read_parquet(path)
    except FeatstoreError as error:
        return f"{error} {_AGAIN}"
    return (
        ""
        if about.exists()
        else f"{about}, which says what these items are, is missing. {_RESTORE}"
    )


def _labels_problem(path: Path) -> str:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_LABELS):
                for line in batch.to_pylist():
                    if line["kind"] != THUMBNAIL and image_key(line["data"]) != line["digest"]:
                        label = f"The {line['kind']} label of item {line['item']}"
                        return f"{label} in {path} is damaged. {_AGAIN}"
    except (pa.ArrowException, *_WRONG) as error:
        return f"{path} is damaged ({' '.join(str(error).split())[:120]}). {_AGAIN}"
    return ""


def _check_group(findings: Findings, folder: Path) -> None:
    """Check the metadata that other Zarr readers need to walk down to the arrays."""
    path = folder / "zarr.json"
    try:
        metadata = json.loads(path.read_text())
        is_group = metadata["node_type"] == "group" and metadata["zarr_format"] == 3
    except _WRONG:
        is_group = False
    if not is_group:
        text = f"{path} is missing or damaged. Run `featstore verify --repair`."
        findings.add("group", path, text)


class _FeatureSetCheck:
    """Checks one feature set and adds what is wrong to a report."""

    def __init__(self, findings: Findings, folder: FeatureSetFolder) -> None:
        self.findings = findings
        self.folder = folder
        self.assigned: pa.Table | None = None  # its keys, rows ascending; None: damaged
        self.rows = np.empty(0, np.int64)
        self.removed: set[int] = set()

    def run(self, progress: ProgressCallback) -> None:
        """Check it all."""
        named = {path.name for path in (self.folder.path / "ledger").glob("*/")}
        taps = self._taps()
        if taps is None:
            return
        for name in sorted(named - {tap_folder(tap) for tap in taps}):
            path = self.folder.path / "ledger" / name
            text = f"{path} commits shards of a tap that the feature set's zarr.json does not name."
            self.findings.add("feature set", path, f"{text} {_RESTORE}")
        files = {tap: self._files(tap, shape) for tap, shape in taps.items()}
        committed = {tap: self._ledgers(tap) for tap in taps}
        self._read_assignments()
        self._check_small_files()
        for tap, paths in files.items():
            for array, path in paths:
                self._check_file(tap, array, path, committed[tap])
        self._check_shards(taps, committed, progress)

    def _taps(self) -> dict[str, TapShape] | None:
        """Read the attributes and check that they can be used."""
        path = self.folder.path / "zarr.json"
        try:
            plan, names = self.folder.plan, ("name", "backbone", "provenance")
            is_whole = all(name in self.folder.attributes for name in names)
            is_own = plan is None or plan.key() == self.folder.key
            _ = self.folder.store_dtype, self.folder.layout
            taps = self.folder.taps
        except (FeatstoreError, *_WRONG):
            is_whole = is_own = False
        if is_whole and is_own:
            return taps
        text = f"{path} is damaged, or describes another feature set. {_RESTORE}"
        self.findings.add("feature set", path, text)
        return None

    def _files(self, tap: str, shape: TapShape) -> list[tuple[str, Path]]:
        return [
            (array, path)
            for array in shape.arrays
            for path in sorted(self.folder.array_path(tap, array).rglob("*"))
            if path.is_file() or path.is_symlink()
        ]

    def _ledgers(self, tap: str) -> list[int]:
        """List the committed shards of a tap, ascending."""
        shards = []
        for path in sorted(self.folder.ledger_path(tap, 0).parent.glob("*")):
            if path.name.endswith(PARTIAL):
                self.findings.add_waste(path)
            elif _LEDGER.fullmatch(path.name) and path == self.folder.ledger_path(
                tap, int(path.stem)
            ):
                shards.append(int(path.stem))
            else:
                self.findings.add("foreign", path, f"{path} is no ledger.", tap=tap)
        return sorted(shards)

    def _read_assignments(self) -> None:
        tables = []
        for path in self.folder.assignment_paths():
            try:
                tables.append(read_parquet(path).select(KEYS))
            except (FeatstoreError, KeyError) as error:
                self.findings.add("assignment", path, f"{error} {_RESTORE}")
                return
        schema = pa.schema([("row", pa.int64()), *((name, pa.string()) for name in KEYS[1:])])
        assigned = pa.concat_tables([schema.empty_table(), *tables]).sort_by("row")
        self.rows = assigned["row"].to_numpy()
        if (np.diff(self.rows) < 1).any():
            path = self.folder.path / "assignments"
            self.findings.add("assignment", path, f"{path} name a row twice. {_RESTORE}")
        self.assigned = assigned

    def _check_small_files(self) -> None:
        norm = self.folder.path / "norm.safetensors"
        try:
            read_final_norm(self.folder)
        except FormatError as error:
            self.findings.add("norm", norm, str(error))
        try:
            check_tail(self.folder)
        except FormatError as error:
            self.findings.add("tail", self.folder.path / TAIL_FILE, str(error))
        self._check_tombstones()
        for path in sorted(self.folder.path.glob(f"*{PARTIAL}")):
            self.findings.add_waste(path)
        for name in ("assignments", "tombstones"):
            for path in sorted((self.folder.path / name).glob(f"*{PARTIAL}")):
                self.findings.add_waste(path)

    def _check_tombstones(self) -> None:
        for path in tombstone_paths(self.folder):
            try:
                table = read_parquet(path)
                self.removed.update(table["row"].to_pylist())
                targets = table["moved_to"] if "moved_to" in table.column_names else pa.array([])
            except (FeatstoreError, KeyError) as error:
                self.findings.add("tombstones", path, f"{error} {_RESTORE}")
                continue
            lost = set(targets.drop_null().to_pylist()).difference(self.rows.tolist())
            if lost and self.assigned is not None:
                text = f"{path} moves rows to {min(lost)}, which no assignment names. {_RESTORE}"
                self.findings.add("tombstones", path, text)

    def _check_file(self, tap: str, array: str, path: Path, committed: list[int]) -> None:
        """Find files that belong to no shard, and what interrupted writes left."""
        folder = self.folder.array_path(tap, array)
        if path == folder / "zarr.json":
            return
        parts = path.relative_to(folder).parts
        number = parts[1] if len(parts) > 1 else ""
        is_shard = number.isdecimal() and path == self.folder.shard_file(tap, array, int(number))
        if path.name.endswith(PARTIAL) or (is_shard and int(number) not in committed):
            self.findings.add_waste(path)
        elif not is_shard:
            self.findings.add("foreign", path, f"{path} is no file of this array.", tap=tap)

    def _check_shards(
        self, taps: dict[str, TapShape], committed: dict[str, list[int]], progress: ProgressCallback
    ) -> None:
        stored: set[int] = set()
        done, total = 0, sum(map(len, committed.values()))
        for tap, shards in committed.items():
            expected = {shard: self._expected(shard) for shard in shards}
            known = [shard for shard, keys in expected.items() if keys is None or keys.num_rows]
            layouts = self._layouts(tap, taps[tap], known)
            for shard, keys in expected.items():
                stored |= check_shard(
                    self.findings,
                    self.folder,
                    tap,
                    shard,
                    expected=keys,
                    layouts=layouts,
                    removed=self.removed,
                )
                done += 1
                progress(Progress(stage="verify", done=done, total=total))
        self.findings.report.rows += len(stored)
        self.findings.report.shards += total

    def _expected(self, shard: int) -> pa.Table | None:
        """Give the keys of the rows that are assigned to a shard; None if nobody knows."""
        if self.assigned is None:
            return None
        shard_rows = self.folder.layout.shard_rows
        ends = [shard * shard_rows, (shard + 1) * shard_rows]
        first, last = np.searchsorted(self.rows, ends).tolist()
        return self.assigned.slice(first, last - first)

    def _layouts(
        self, tap: str, shape: TapShape, shards: list[int]
    ) -> dict[str, ShardLayout | None]:
        """Check the metadata of a tap's arrays, which must cover `shards`."""
        layouts: dict[str, ShardLayout | None] = {}
        if not shards:
            return layouts
        n_rows = (shards[-1] + 1) * self.folder.layout.shard_rows
        _check_group(self.findings, self.folder.path / tap_folder(tap))
        for array in shape.arrays:
            path = self.folder.array_path(tap, array) / "zarr.json"
            try:
                layouts[array] = find_layout(self.folder, tap, array)
                covered = json.loads(path.read_text())["shape"][0]
            except FormatError as error:
                self.findings.add("array", path, str(error), tap=tap)
                continue
            if covered < n_rows:
                text = f"{path} covers {covered} rows of the {n_rows} that shards hold."
                self.findings.add(
                    "array", path, f"{text} Run `featstore verify --repair`.", tap=tap
                )
        return layouts
