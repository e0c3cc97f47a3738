"""The heads that a protocol adapts: one a fold and variant, trained once and found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.api import Store
from featstore.errors import InvalidInputError
from featstore.types import ProgressCallback
from heads.protocol.findings import HeadRun
from heads.protocol.plan import Plan
from heads.runs import FAILED, Run, list_runs, read_run
from heads.train import make_request, train, train_many

HEAD, TASK = "identity_token", "pose"
BALANCE = {"balance": "identity", "pictures": 0}
"""What loops do unless they are told otherwise: show every identity equally often."""


def configs_of(
    plan: Plan, fold: int, validation: str, asked: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Give the arguments of `heads.train` for every variant of a fold.

    Args:
        plan: The protocol.
        fold: Number of the fold.
        validation: Identity on which learning rates are chosen, which is held out too.
        asked: Arguments that all have in common.
    """
    holdout = tuple(sorted({*plan.folds[fold], validation}))
    common = {"head": HEAD, "task": TASK, **asked, "holdout": holdout}
    options = {**BALANCE, **asked.get("options", {})}
    return {
        variant: {**common, "options": {**options, **changed}}
        for variant, changed in plan.all_variants.items()
    }


def train_heads(
    store: Store,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    since: str,
    device: str,
    cache: str,
    runs: str | Path | None,
    progress: ProgressCallback,
) -> dict[str, Run]:
    """Train what is not trained yet, side by side, and finish what was interrupted.

    Args:
        store: The store.
        configs: Arguments of `heads.train`, by variant.
        since: When the protocol was begun: only runs that are no older are its own.
        device: As in `heads.train`.
        cache: As in `heads.train`.
        runs: As in `heads.train`.
        progress: Called with reports of progress.

    Returns:
        A finished run for each variant.

    Raises:
        InvalidInputError: A training failed.
    """
    own = [
        run
        for run in list_runs(store.path, runs=runs)
        if str(run.record.get("created", "")) >= since and run.status != FAILED
    ]
    found: dict[str, Run] = {}
    for variant, config in configs.items():
        wanted = make_request(store, config).to_json()
        run = next((run for run in own if run.record.get("command") == wanted), None)
        if run is not None and not run.is_finished:
            resumed = train(
                store, resume=run, device=device, cache=cache, runs=runs, progress=progress
            )
            run = read_run(Path(resumed.path))
        if run is not None:
            found[variant] = run
    missing = [variant for variant in configs if variant not in found]
    if missing:
        reports = train_many(
            store,
            [configs[variant] for variant in missing],
            device=device,
            cache=cache,
            runs=runs,
            progress=progress,
        )
        for variant, report, error in zip(missing, reports.runs, reports.errors, strict=True):
            if report is None:
                raise InvalidInputError(f"The head {variant} could not be trained: {error}")
            found[variant] = read_run(Path(report.path))
    return {variant: found[variant] for variant in configs}


def describe(
    run: Run, *, fold: int, variant: str, validation: str, training: Sequence[str]
) -> HeadRun:
    """Tell of a finished run what a protocol's page shows."""
    measured = run.record["measured"]
    return HeadRun(
        fold=fold,
        variant=variant,
        run_id=run.run_id,
        training=tuple(training),
        validation=validation,
        parameters=run.record["parameters"],
        split="" if measured is None else measured["split"],
        metrics={} if measured is None else measured["metrics"],
        # Of the weights that were kept.
        token_std=run.record["learned"].get("token_std"),
        views=run.record["options"]["loop"]["views"],
    )
