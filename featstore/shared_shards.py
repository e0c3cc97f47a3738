"""Doing the shards of one plan beside other processes that do the same: each shard once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from featstore.claims import Claims, waiting_message
from featstore.files import PARTIAL
from featstore.ledger import read_ledger
from featstore.shard_job import Pace, ShardJob, ShardResult, Source, run_jobs
from featstore.store import FeatureSetFolder, StoreFolder

_FIRST_POLL_S, _LAST_POLL_S = 0.05, 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """A shard that lacks taps, as an extraction found it; anybody may claim and do it."""

    shard: int
    lines: Sequence[Mapping[str, Any]]  # of the assignment, rows ascending
    taps: tuple[str, ...]
    removed: frozenset[int] = frozenset()  # rows whose image is not looked at any more


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a task."""

    task: ShardTask
    is_ours: bool = True  # else another process did it meanwhile
    rejected: Mapping[int, str] = field(default_factory=dict)  # row -> reason
    set_aside: str = ""  # why nobody does the shard now; it is not committed


class Crew(Protocol):
    """Who does the shards of an extraction: this process, or those of a cluster."""

    def do(
        self,
        folder: FeatureSetFolder,
        tasks: Sequence[ShardTask],
        *,
        pace: Pace,
        on_rows: Callable[[int], None],
        tell: Callable[[str], None],
    ) -> Generator[Outcome, None, None]:
        """Yield the outcome of every task once it is committed, whoever did it.

        Args:
            folder: Feature set.
            tasks: What to do.
            pace: Batches, threads and the largest magnitude.
            on_rows: Called with the number of rows that are done, or not done after all.
            tell: Called with sentences for people.
        """
        ...


def lacking_taps(folder: FeatureSetFolder, task: ShardTask) -> tuple[str, ...]:
    """List the taps of a task that still have no ledger."""
    lacking = []
    for tap in task.taps:
        path = folder.ledger_path(tap, task.shard)
        if path.parent.exists():
            # Makes a network file system ask its server what is in there now.
            os.close(os.open(path.parent, os.O_RDONLY))
        if not path.exists():
            lacking.append(tap)
    return tuple(lacking)


def rejections(folder: FeatureSetFolder, shard: int, taps: Sequence[str]) -> dict[int, str]:
    """Read which rows of a committed shard were rejected for one of the taps, and why."""
    found: dict[int, str] = {}
    for tap in taps:
        for line in read_ledger(folder, tap, shard).to_pylist():
            if line["status"] != "ok":
                found[line["row"]] = line["reason"]
    return found


def claim_task(
    folder: FeatureSetFolder, task: ShardTask, claims: Claims
) -> ShardJob | Outcome | None:
    """Claim what a task lacks.

    Returns:
        The job, or the outcome where others have done it all, or None where another process has
        the shard now.
    """
    lacking = lacking_taps(folder, task)
    if lacking:
        claim = claims.take(task.shard)
        if claim is None:
            return None
        lacking = lacking_taps(folder, task)  # nobody else commits it from here on
        if claim.is_taken_over:
            _sweep_shard(folder, task.shard)
        if lacking:
            return ShardJob(
                folder=folder,
                shard=task.shard,
                lines=task.lines,
                taps=lacking,
                claim=claim,
                removed=task.removed,
            )
        claim.release()
    return Outcome(task=task, is_ours=False, rejected=rejections(folder, task.shard, task.taps))


def _sweep_shard(folder: FeatureSetFolder, shard: int) -> None:
    """Delete what a dead process left of a shard that is claimed, and not yet begun, here."""
    for tap, shape in folder.taps.items():
        files = [folder.shard_file(tap, array, shard) for array in shape.arrays]
        for file in [*files, folder.ledger_path(tap, shard)]:
            for leftover in file.parent.glob(f"{file.name}.*{PARTIAL}"):
                leftover.unlink(missing_ok=True)


def outcome_of(folder: FeatureSetFolder, task: ShardTask, result: ShardResult) -> Outcome:
    """Give the outcome of a task that is committed; others may have done some of its taps."""
    others = [tap for tap in task.taps if tap not in result.job.taps]
    return Outcome(
        task=task, rejected={**rejections(folder, task.shard, others), **result.rejected}
    )


class SerialCrew:
    """This process alone, beside whoever else works at the same feature set.

    What others hold is passed over, and waited for at the end with nothing in hand: so nobody
    waits for somebody who waits.
    """

    def __init__(self, source: Source, *, purpose: str) -> None:
        self._source = source
        self._purpose = purpose

    def do(
        self,
        folder: FeatureSetFolder,
        tasks: Sequence[ShardTask],
        *,
        pace: Pace,
        on_rows: Callable[[int], None],
        tell: Callable[[str], None],
    ) -> Generator[Outcome, None, None]:
        """See `Crew.do`."""
        waiting = {task.shard: task for task in tasks}
        pause_s, is_told = _FIRST_POLL_S, False
        store = StoreFolder(folder.path.parents[1])
        with Claims(store, folder.key, purpose=self._purpose) as claims:
            while waiting:
                n_before = len(waiting)
                for outcome in self._pass(folder, list(waiting.values()), claims, pace, on_rows):
                    del waiting[outcome.task.shard]
                    yield outcome
                if not waiting:
                    return
                is_stuck = len(waiting) == n_before
                if is_stuck and pause_s >= _LAST_POLL_S and not is_told:
                    is_told = True
                    tell(waiting_message(store, folder.key, min(waiting), len(waiting)))
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_POLL_S) if is_stuck else _FIRST_POLL_S

    def _pass(
        self,
        folder: FeatureSetFolder,
        tasks: Sequence[ShardTask],
        claims: Claims,
        pace: Pace,
        on_rows: Callable[[int], None],
    ) -> Generator[Outcome, None, None]:
        """Do what can be claimed now, in order."""
        by_shard = {task.shard: task for task in tasks}
        done_by_others: list[Outcome] = []

        def claimed() -> Iterator[ShardJob]:
            for task in tasks:
                found = claim_task(folder, task, claims)
                if isinstance(found, ShardJob):
                    yield found
                elif found is not None:
                    done_by_others.append(found)

        results = run_jobs(claimed(), self._source, pace=pace, on_batch=on_rows)
        with contextlib.closing(results):
            for result in results:
                task = by_shard[result.job.shard]
                if result.is_lost:
                    on_rows(-len(task.lines))
                else:
                    yield outcome_of(folder, task, result)
        for outcome in done_by_others:
            on_rows(len(outcome.task.lines))
            yield outcome
