"""Repair: extract damaged shards again, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from featstore.codecs import LIMITS
from featstore.errors import InvalidInputError
from featstore.feature_sets import grow_arrays
from featstore.files import exclusive, remove_file, remove_partials
from featstore.planning import open_readers
from featstore.shard_job import ShardJob, ShardResult, Source, run_jobs
from featstore.sources import BackboneSource, ImportSource, Readers
from featstore.store import FeatureSetFolder, StoreFolder, open_folder
from featstore.types import Progress, ProgressCallback, ignore_progress

Damage = Mapping[str, Mapping[int, set[str]]]
"""Feature set -> shard -> taps."""


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
        ConflictError: Another process is writing the feature set.
    """
    store = open_folder(store_path)
    readers = Readers(store, open_readers(data) if data else ())
    results: list[ShardResult] = []
    for key, shards in sorted(damaged.items()):
        folder = store.feature_set(key)
        purpose = f"repairing feature set {key}"
        with exclusive(store.locks_path / f"{key}.lock", purpose=purpose):
            remove_partials(folder.path)
            results += _repair(
                store,
                folder,
                shards,
                readers,
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
    *,
    weights: str | Path | None,
    device: str,
    progress: ProgressCallback,
) -> list[ShardResult]:
    taps = sorted(set().union(*shards.values()))
    lines: dict[int, list[Mapping[str, object]]] = {}
    for line in folder.assignments().to_pylist():
        lines.setdefault(folder.layout.shard_of(line["row"]), []).append(line)
    jobs = [
        ShardJob(folder=folder, shard=shard, lines=lines[shard], taps=tuple(sorted(damaged)))
        for shard, damaged in sorted(shards.items())
    ]
    # Everything that can be missing is looked for before anything is thrown away.
    for job in jobs:
        for line in job.lines:
            readers.find(line["dataset"], line["path"])
    source = _source(folder, readers, taps, weights, device)
    for job in jobs:
        for tap in job.taps:
            remove_file(folder.ledger_path(tap, job.shard))
            for array in folder.taps[tap].arrays:
                remove_file(folder.shard_file(tap, array, job.shard))
    grow_arrays(folder, taps)
    total = sum(len(job.lines) for job in jobs)
    done = 0

    def count(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        progress(Progress(stage="extract", done=done, total=total))

    return list(
        run_jobs(
            jobs,
            source,
            batch_size=int(folder.attributes["provenance"].get("batch_size", 64)),
            n_threads=os.cpu_count() or 1,
            limit=LIMITS[folder.dtype],
            on_batch=count,
        )
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
