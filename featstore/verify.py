"""Check every byte of a store that a promise covers, and repair what can be extracted again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featstore.checks import check_store
from featstore.feature_sets import grow_arrays
from featstore.files import exclusive, remove_file, storage_errors
from featstore.findings import Problem, VerifyReport
from featstore.repair import repair_shards
from featstore.store import StoreFolder, locate, open_folder, write_attributes
from featstore.types import ProgressCallback, ignore_progress

__all__ = ["Problem", "Repairer", "VerifyReport", "verify"]

Repairer = Callable[..., Any]
_LOCK_WAIT_S = 60.0


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
        repair: Extract damaged shards again, and nothing else; write damaged metadata of arrays
            anew; remove foreign files.
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
        ConflictError: A repair needs a feature set that another process is writing.
        StorageError: The disk refused a repair.
    """
    store = open_folder(locate(store_path))
    report = check_store(store, progress)
    if not repair or not report.problems:
        return report
    lost = {p.feature_set for p in report.problems if p.kind in ("assignment", "feature set")}
    for problem in report.problems:
        if problem.kind != "array" or problem.feature_set not in lost:
            _repair_file(store, problem)
    damaged = _damaged_shards(report)
    if damaged:
        repairer(store.path, damaged, data=data, weights=weights, device=device, progress=progress)
    return _compared(report, check_store(store, progress))


def _damaged_shards(report: VerifyReport) -> dict[str, dict[int, set[str]]]:
    """List what has to be extracted again, as feature set -> shard -> taps."""
    damaged: dict[str, dict[int, set[str]]] = {}
    for problem in report.problems:
        if problem.kind in ("shard", "ledger") and problem.shard is not None:
            shards = damaged.setdefault(problem.feature_set, {})
            shards.setdefault(problem.shard, set()).add(problem.tap)
    return damaged


def _repair_file(store: StoreFolder, problem: Problem) -> None:
    """Put right what needs no extraction; shards stay as they are."""
    if problem.kind not in ("foreign", "group", "array"):
        return
    path = store.path / problem.file
    name = problem.feature_set or "store"
    lock = store.locks_path / f"{name}.lock"
    with exclusive(lock, purpose=f"repairing {name}", timeout_s=_LOCK_WAIT_S), storage_errors(path):
        if problem.kind == "group":
            write_attributes(path.parent, {})
            return
        remove_file(path)
        if problem.kind == "array":
            grow_arrays(store.feature_set(problem.feature_set), [problem.tap])


def _compared(before: VerifyReport, after: VerifyReport) -> VerifyReport:
    """Mark the problems that are gone, and add those that are new."""
    left = {(problem.kind, problem.file) for problem in after.problems}
    known = {(problem.kind, problem.file) for problem in before.problems}
    problems = [
        replace(problem, repaired=(problem.kind, problem.file) not in left)
        for problem in before.problems
    ]
    problems += [p for p in after.problems if (p.kind, p.file) not in known]
    return replace(after, problems=problems)
