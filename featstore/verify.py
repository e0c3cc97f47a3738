"""Check every byte of a store that a promise covers, and repair what can be extracted again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import FeatstoreError, FormatError
from featstore.feature_sets import grow_arrays, read_final_norm
from featstore.files import PARTIAL, exclusive, read_parquet
from featstore.hashing import image_key
from featstore.labels import THUMBNAIL
from featstore.ledger import read_ledger
from featstore.repair import Damage, repair_shards
from featstore.shards import MappedShard, crc32c, find_layout
from featstore.store import FeatureSetFolder, StoreFolder, open_folder
from featstore.types import Progress, ProgressCallback, ignore_progress

Repairer = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong."""

    kind: str  # "shard", "ledger", "array", "foreign", "items", "labels", "norm", "feature set"
    file: str  # relative to the store
    message: str
    feature_set: str = ""
    tap: str = ""
    shard: int | None = None
    rows: tuple[int, ...] = ()
    repaired: bool = False


@dataclass(kw_only=True, slots=True)
class VerifyReport:
    """What was checked and what was found."""

    store: str
    rows: int = 0  # stored rows, over all feature sets
    shards: int = 0  # shards times taps
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    waste: list[str] = field(default_factory=list)  # left by interrupted writes; `gc` sweeps them

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, or all of it was repaired."""
        return all(problem.repaired for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    store_path: str | Path,
    *,
    repair: bool = False,
    data: Sequence[str] = (),
    weights: str | Path | None = None,
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
    repairer: Repairer = repair_shards,
) -> VerifyReport:
    """Read everything that is committed and compare it with its checksums.

    Args:
        store_path: Store.
        repair: Extract damaged shards again, and nothing else; remove foreign files.
        data: Where data sets lie now, if they moved: ``NAME=FORMAT:PATH``.
        weights: The backbone's weights file, if it moved.
        device: Where a repair runs the backbone.
        progress: Called with reports of progress.
        repairer: What extracts shards again.

    Returns:
        The report. With `repair`, problems that are gone after a second look are `repaired`.

    Raises:
        NotFoundError: There is no store.
        InvalidInputError: A repair needs an image or weights that are gone.
    """
    store = open_folder(Path(store_path))
    report = VerifyReport(store=str(store.path))
    _check_data_sets(store, report)
    for key in store.feature_set_keys():
        _check_feature_set(store, store.feature_set(key), report, progress)
    if repair and report.problems:
        _repair(store, report, repairer, data, weights, device, progress)
    return report


def _check_data_sets(store: StoreFolder, report: VerifyReport) -> None:
    for kind in ("items", "labels"):
        for path in sorted((store.path / kind).rglob("*")):
            if path.is_dir() or path.name == "dataset.json":
                continue
            if path.name.endswith(PARTIAL):
                report.waste.append(_relative(store, path))
                continue
            message = _table_problem(path, kind)
            if message:
                problem = Problem(kind=kind, file=_relative(store, path), message=message)
                report.problems.append(problem)


def _table_problem(path: Path, kind: str) -> str:
    hint = "Delete it and run the extraction again, which writes it anew."
    try:
        table = read_parquet(path)
        if kind == "labels":
            for line in table.to_pylist():
                if line["kind"] != THUMBNAIL and image_key(line["data"]) != line["digest"]:
                    return f"The {line['kind']} label of item {line['item']} is damaged. {hint}"
    except (FeatstoreError, KeyError) as error:
        return f"{error} {hint}"
    return ""


def _check_feature_set(
    store: StoreFolder,
    folder: FeatureSetFolder,
    report: VerifyReport,
    progress: ProgressCallback,
) -> None:
    try:
        taps = folder.taps
        lines = folder.assignments().to_pylist()
        read_final_norm(folder)
    except FeatstoreError as error:
        report.problems.append(
            Problem(
                kind="feature set",
                file=_relative(store, folder.path),
                message=str(error),
                feature_set=folder.key,
            )
        )
        return
    assigned: dict[int, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        assigned.setdefault(folder.layout.shard_of(line["row"]), {})[line["row"]] = line
    stored: set[int] = set()
    work = [(tap, shard) for tap in taps for shard in folder.committed_shards(tap)]
    for done, (tap, shard) in enumerate(work, 1):
        check = _ShardCheck(store, folder, tap, shard, assigned.get(shard, {}))
        check.run(report, stored)
        progress(Progress(stage="verify", done=done, total=len(work)))
    report.rows += len(stored)
    report.shards += len(work)
    _check_files(store, folder, report)


class _ShardCheck:
    """Checks one committed shard of one tap."""

    def __init__(
        self,
        store: StoreFolder,
        folder: FeatureSetFolder,
        tap: str,
        shard: int,
        assigned: Mapping[int, Mapping[str, Any]],
    ) -> None:
        self.store = store
        self.folder = folder
        self.tap = tap
        self.shard = shard
        self.assigned = assigned

    def run(self, report: VerifyReport, stored: set[int]) -> None:
        """Add what is wrong to the report, and the good rows to `stored`."""
        ledger_path = self.folder.ledger_path(self.tap, self.shard)
        try:
            ledger = read_ledger(self.folder, self.tap, self.shard).to_pylist()
        except FeatstoreError as error:
            report.problems.append(self._problem("ledger", ledger_path, str(error), ()))
            return
        names = ("image_key", "crop", "view")
        expected = {row: [line[n] for n in names] for row, line in self.assigned.items()}
        if {line["row"]: [line[n] for n in names] for line in ledger} != expected:
            text = f"{ledger_path} lists other rows than were assigned to shard {self.shard}."
            report.problems.append(self._problem("ledger", ledger_path, text, ()))
            return
        good = [line for line in ledger if line["status"] == "ok"]
        bad_rows: set[int] = set()
        for array in self.folder.taps[self.tap].arrays:
            for problem in self._array_problems(array, good, report):
                report.problems.append(problem)
                bad_rows.update(problem.rows)
        stored.update(line["row"] for line in good if line["row"] not in bad_rows)

    def _array_problems(
        self, array: str, good: Sequence[Mapping[str, Any]], report: VerifyReport
    ) -> Iterator[Problem]:
        path = self.folder.shard_file(self.tap, array, self.shard)
        rows = tuple(line["row"] for line in good)
        if not good:
            return
        try:
            layout = find_layout(self.folder, self.tap, array)
        except FormatError as error:
            metadata = self.folder.array_path(self.tap, array) / "zarr.json"
            yield self._problem("array", metadata, str(error), rows)
            return
        if layout is None:
            yield from self._compressed_problems(array, good, path)
            return
        try:
            shard = MappedShard(path, layout)
        except FormatError as error:
            yield self._problem("shard", path, str(error), rows)
            return
        report.bytes += path.stat().st_size
        out = np.empty(layout.chunk_bytes, np.uint8)
        damaged: list[int] = []
        first = ""
        for line in good:
            chunk = 0 if array == "pooled" else self.folder.layout.slot_of(line["row"])
            try:
                found = shard.copy_chunk(chunk, out)
            except FormatError as error:
                damaged.append(line["row"])
                first = first or str(error)
                continue
            if found != line[f"{array}_crc32c"]:
                damaged.append(line["row"])
                first = first or f"{path} holds other data than its ledger says."
        if damaged:
            yield self._problem("shard", path, first, tuple(damaged))

    def _compressed_problems(
        self, array: str, good: Sequence[Mapping[str, Any]], path: Path
    ) -> Iterator[Problem]:
        """Check a shard that only zarr can read: by the checksum of its decoded numbers."""
        from featstore.arrays import open_array

        start = self.shard * self.folder.layout.shard_rows
        stop = start + self.folder.layout.shard_rows
        try:
            block = open_array(self.folder, self.tap, array)[start:stop]
        except (OSError, ValueError, RuntimeError) as error:
            rows = tuple(line["row"] for line in good)
            yield self._problem("shard", path, f"{path} cannot be read: {error}", rows)
            return
        damaged = []
        for line in good:
            values = block if array == "pooled" else block[line["row"] - start]
            flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            if crc32c(flat) != line[f"{array}_crc32c"]:
                damaged.append(line["row"])
        if damaged:
            text = f"{path} holds other data than its ledger says."
            yield self._problem("shard", path, text, tuple(damaged))

    def _problem(self, kind: str, path: Path, message: str, rows: tuple[int, ...]) -> Problem:
        return Problem(
            kind=kind,
            file=_relative(self.store, path),
            message=message,
            feature_set=self.folder.key,
            tap=self.tap,
            shard=self.shard,
            rows=rows,
        )


def _check_files(store: StoreFolder, folder: FeatureSetFolder, report: VerifyReport) -> None:
    """Find files that belong to no shard, and what interrupted writes left."""
    last = folder.assignments()["row"]
    n_shards = 0 if len(last) == 0 else folder.layout.shard_of(last[-1].as_py()) + 1
    for tap, shape in folder.taps.items():
        committed = set(folder.committed_shards(tap))
        for array in shape.arrays:
            known = {folder.shard_file(tap, array, shard): shard for shard in range(n_shards)}
            for path in sorted(folder.array_path(tap, array).rglob("*")):
                if path.is_dir() or path.name == "zarr.json":
                    continue
                if path.name.endswith(PARTIAL) or known.get(path, -1) not in {-1, *committed}:
                    report.waste.append(_relative(store, path))
                elif path not in known:
                    report.problems.append(
                        Problem(
                            kind="foreign",
                            file=_relative(store, path),
                            message=f"{path} is no file of this array.",
                            feature_set=folder.key,
                            tap=tap,
                        )
                    )


def _relative(store: StoreFolder, path: Path) -> str:
    return path.relative_to(store.path).as_posix()


def _repair(
    store: StoreFolder,
    report: VerifyReport,
    repairer: Repairer,
    data: Sequence[str],
    weights: str | Path | None,
    device: str,
    progress: ProgressCallback,
) -> None:
    """Repair what can be repaired, look again, and mark what is gone."""
    damaged: dict[str, dict[int, set[str]]] = {}
    for problem in report.problems:
        path = store.path / problem.file
        if problem.kind == "foreign":
            path.unlink(missing_ok=True)
        elif problem.kind == "array":
            _remake_array(store, problem)
        elif problem.kind in ("shard", "ledger") and problem.shard is not None:
            shards = damaged.setdefault(problem.feature_set, {})
            shards.setdefault(problem.shard, set()).add(problem.tap)
    if damaged:
        found: Damage = damaged
        repairer(store.path, found, data=data, weights=weights, device=device, progress=progress)
    again = verify(store.path, progress=progress)
    left = {(problem.kind, problem.file) for problem in again.problems}
    report.problems = [
        replace(problem, repaired=(problem.kind, problem.file) not in left)
        for problem in report.problems
    ]
    known = {(problem.kind, problem.file) for problem in report.problems}
    report.problems += [p for p in again.problems if (p.kind, p.file) not in known]
    report.rows, report.shards, report.waste = again.rows, again.shards, again.waste


def _remake_array(store: StoreFolder, problem: Problem) -> None:
    """Write an array's metadata anew; its shards stay as they are."""
    folder = store.feature_set(problem.feature_set)
    lock = store.locks_path / f"{folder.key}.lock"
    with exclusive(lock, purpose=f"repairing feature set {folder.key}"):
        (store.path / problem.file).unlink(missing_ok=True)
        grow_arrays(folder, [problem.tap])
