"""Repair: extract damaged shards again, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from featstore.claims import Claims, sweep_partials
from featstore.codecs import LIMITS
from featstore.errors import InvalidInputError
from featstore.feature_sets import grow_arrays
from featstore.files import exclusive, remove_file
from featstore.lines import Assigned
from featstore.planning import open_readers
from featstore.shard_job import Pace, ShardJob, ShardResult, Source, run_jobs
from featstore.shared_shards import ShardTask
from featstore.sources import BackboneSource, ImportSource, Readers
from featstore.store import FeatureSetFolder, StoreFolder, open_folder
from featstore.types import Progress, ProgressCallback, ignore_progress

Damage = Mapping[str, Mapping[int, set[str]]]
"""Feature set -> shard -> taps."""
_WAIT_S = 60.0


def repair_shards(
    store_path: Path,
    damaged: Damage,
    *,
    data: Sequence[str] = (),
    weights: str | Path | None = None,
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
) -> list[ShardResult]:
    """Extract the damaged shards again from their images.

    Args:
        store_path: Store.
        damaged: Which taps of which shards of which feature sets.
        data: Where data sets lie now, if they moved: ``NAME=FORMAT:PATH``.
        weights: The backbone's weights file, if it moved.
        device: Where to run the backbone.
        progress: Called with reports of progress.

    Raises:
        InvalidInputError: An image or the weights are gone or changed; the message says which.
        ConflictError: Another process works at one of the shards, and goes on with it.
    """
    store = open_folder(store_path)
    readers = Readers(store, open_readers(data) if data else ())
    results: list[ShardResult] = []
    for key, shards in sorted(damaged.items()):
        folder = store.feature_set(key)
        with Claims(store, key, purpose=f"repairing feature set {key}") as claims:
            results += _repair(
                store,
                folder,
                shards,
                readers,
                claims,
                weights=weights,
                device=device,
                progress=progress,
            )
    return results


def _repair(
    store: StoreFolder,
    folder: FeatureSetFolder,
    shards: Mapping[int, set[str]],
    readers: Readers,
    claims: Claims,
    *,
    weights: str | Path | None,
    device: str,
    progress: ProgressCallback,
) -> list[ShardResult]:
    taps = sorted(set().union(*shards.values()))
    lines = dict(Assigned(folder).shards(folder.layout.shard_rows))
    removed = frozenset(folder.removed_rows())
    tasks = [
        ShardTask(shard=shard, lines=lines[shard], taps=tuple(sorted(damaged)), removed=removed)
        for shard, damaged in sorted(shards.items())
    ]
    # Everything that can be missing is looked for before anything is thrown away.
    for task in tasks:
        for line in task.lines:
            if line["row"] not in removed:
                readers.find(line["dataset"], line["path"])
    source = _source(folder, readers, taps, weights, device)
    lock = store.locks_path / f"{folder.key}.lock"
    with exclusive(lock, purpose=f"repairing feature set {folder.key}", timeout_s=_WAIT_S):
        sweep_partials(store, folder)
        grow_arrays(folder, taps)
    total = sum(len(task.lines) for task in tasks)
    done = 0

    def count(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        progress(Progress(stage="extract", done=done, total=total))

    pace = Pace(
        batch_size=int(folder.attributes["provenance"].get("batch_size", 64)),
        n_threads=os.cpu_count() or 1,
        limit=LIMITS[folder.dtype],
    )
    emptied = (_emptied(folder, task, claims) for task in tasks)
    return list(run_jobs(emptied, source, pace=pace, on_batch=count))


def _emptied(folder: FeatureSetFolder, task: ShardTask, claims: Claims) -> ShardJob:
    """Claim a shard and throw away what is damaged; only then anybody sees that it is gone."""
    claim = claims.wait_for(task.shard, timeout_s=_WAIT_S)
    for tap in task.taps:
        remove_file(folder.ledger_path(tap, task.shard))
        for array in folder.taps[tap].arrays:
            remove_file(folder.shard_file(tap, array, task.shard))
    return ShardJob(
        folder=folder,
        shard=task.shard,
        lines=task.lines,
        taps=task.taps,
        claim=claim,
        removed=task.removed,
    )


def _source(
    folder: FeatureSetFolder,
    readers: Readers,
    taps: Sequence[str],
    weights: str | Path | None,
    device: str,
) -> Source:
    plan = folder.plan
    if plan is None:
        return ImportSource(readers, folder.dtype)
    from featstore.backbones import load_from_identity

    recorded = folder.attributes["provenance"].get("weights")
    backbone = load_from_identity(
        folder.attributes["backbone"], weights=weights or recorded, device=device, taps=taps
    )
    if backbone.weights_sha256 != plan.weights_sha256:
        raise InvalidInputError(
            f"The weights at hand hash to {backbone.weights_sha256[:12]}, and feature set "
            f"{folder.key} was made with {plan.weights_sha256[:12]}. Name the right file: "
            "--weights FILE."
        )
    return BackboneSource(readers, backbone, plan)
