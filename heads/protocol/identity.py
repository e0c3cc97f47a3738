"""The identity protocol: hold identities out, adapt to them in many ways, say what that gives."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featstore import open as open_store
from featstore.api import Store
from featstore.errors import FeatstoreError, InvalidInputError
from featstore.files import write_json
from featstore.remote.location import shown
from featstore.types import ProgressCallback, ignore_progress
from heads import runs as folders
from heads.base import HEADS
from heads.protocol import reports
from heads.protocol.base_runs import HEAD, TASK
from heads.protocol.findings import statements
from heads.protocol.gathering import Gathered, Gathering
from heads.protocol.plan import Plan
from heads.protocol.statistics import N_RESAMPLES
from heads.record import versions
from heads.runs import Run
from heads.tasks import TASKS

DESIGN = "design.json"
KIND = "identity protocol"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtocolReport:
    """What a protocol did."""

    run_id: str
    path: str
    page: str
    heads: tuple[str, ...]  # ids of the runs that it trained
    cells: int
    statements: tuple[str, ...]
    messages: tuple[str, ...]


def run_identity_protocol(
    store: str | Path | Store,
    plan: Plan,
    *,
    asked: Mapping[str, Any] | None = None,
    runs: str | Path | None = None,
    device: str = "auto",
    cache: str = "auto",
    n_resamples: int = N_RESAMPLES,
    progress: ProgressCallback = ignore_progress,
) -> ProtocolReport:
    """Hold identities out, adapt heads that never saw them, and compare what that gives.

    The protocol is a run of its own, in whose folder every finished cell lies: after an
    interruption, `resume_identity_protocol` does what is missing. The heads that it trains are
    runs beside it.

    Args:
        store: The store.
        plan: What is done.
        asked: How the heads are trained: arguments of `heads.train` by name.
        runs: Folder of the runs, where it is not the store's own.
        device: Where to compute.
        cache: Where activations stay while heads are trained, see `heads.train`.
        n_resamples: Draws of the bootstrap.
        progress: Called with reports of progress.

    Raises:
        InvalidInputError: Something asked for cannot be done; where it shows before the first
            training, nothing was written.
        NotFoundError: A name is not known.
        KeyboardInterrupt: Ctrl-C; the protocol can be resumed.

    Source:
        HEADS.md 3.1, inferred from the abstract of "Token-Only Adaptation of Frozen
        Self-Supervised Vision Foundation Models for Cross-Species Animal Pose".
    """
    opened = store if isinstance(store, Store) else open_store(store)
    wanted = {name: value for name, value in (asked or {}).items() if value is not None}
    features = opened.feature_set(wanted.get("feature_set"), backbone=wanted.get("backbone"))
    folder = folders.writable_runs_folder(opened.folder, runs)
    run_id = folders.new_run_id(KIND.replace(" ", "_"), TASK)
    record = {
        "format": 1,
        "run_id": run_id,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "status": folders.RUNNING,
        "kind": KIND,
        "head": HEADS.full_name(HEAD),
        "task": TASKS.full_name(TASK),
        "store": shown(opened.path.resolve()),
        "feature_sets": [features.key],
        "feature_set_names": [features.name],
        "backbone": features.backbone,
        "taps": list(wanted.get("taps", ())),
        "seed": plan.seed,
        "steps": plan.steps,
        "options": {"protocol": plan.to_json()},
        "plan": plan.to_json(),
        "asked": wanted,
        "n_resamples": n_resamples,
        "measured": None,
        "left_out": {},
        "versions": versions(),
    }
    return _run(
        opened,
        Run(path=folder / run_id, record=record),
        runs=runs,
        device=device,
        cache=cache,
        progress=progress,
    )


def resume_identity_protocol(
    store: str | Path | Store,
    run: str,
    *,
    runs: str | Path | None = None,
    device: str = "auto",
    cache: str = "auto",
    progress: ProgressCallback = ignore_progress,
) -> ProtocolReport:
    """Go on with a protocol as it was begun; one that is finished is reported anew.

    Args:
        store: The store.
        run: Its id, the start of one, or "@last".
        runs: As in `run_identity_protocol`.
        device: As in `run_identity_protocol`.
        cache: As in `run_identity_protocol`.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: There is no such run.
        InvalidInputError: It is no protocol.
        ConflictError: It is running.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    found = folders.find_run(opened.path, run, runs=runs)
    if not found.is_protocol:
        raise InvalidInputError(
            f"{found.run_id} is no identity protocol but a training. Go on with it by "
            f"`heads train --resume {found.run_id}`."
        )
    return _run(opened, found, runs=runs, device=device, cache=cache, progress=progress)


def _run(
    store: Store,
    run: Run,
    *,
    runs: str | Path | None,
    device: str,
    cache: str,
    progress: ProgressCallback,
) -> ProtocolReport:
    gathering = Gathering(store, run, runs=runs, device=device, cache=cache, progress=progress)
    gathering.check()
    run.path.mkdir(parents=True, exist_ok=True)
    with folders.held(run.path), _status(run, store, runs):
        began = time.perf_counter()
        gathered = gathering.do()
        write_json(run.path / DESIGN, _design_json(gathered))
        findings = reports.find(gathered, run.record, n_resamples=run.record["n_resamples"])
        page = reports.write_reports(run.path, findings, gathered, run.record)
        heads = [head.run_id for head in gathered.heads]
        seconds = run.record.get("seconds", 0.0) + time.perf_counter() - began
        run.record.update(heads=heads, seconds=round(seconds, 3), device=device)
    return ProtocolReport(
        run_id=run.run_id,
        path=str(run.path),
        page=str(page),
        heads=tuple(heads),
        cells=len(gathered.cells),
        statements=tuple(statements(findings)),
        messages=gathered.messages,
    )


@contextmanager
def _status(run: Run, store: Store, runs: str | Path | None) -> Iterator[None]:
    """Say in the record how the protocol stands, and in the end how it ended."""
    run.record.pop("error", None)
    folders.write_record(run.path, {**run.record, "status": folders.RUNNING})
    status = folders.FAILED
    try:
        yield
        status = folders.DONE
    except KeyboardInterrupt:
        status = folders.INTERRUPTED
        where = "" if runs is None else f" --runs {run.path.parent}"
        raise KeyboardInterrupt(
            f"Resume with: heads protocol identity --resume {run.run_id} --store "
            f"{store.path}{where}"
        ) from None
    except FeatstoreError as error:
        run.record["error"] = str(error)
        raise
    finally:
        run.record["status"] = status
        folders.write_record(run.path, run.record)
        if store.is_writable and runs is None:
            from featstore.index import refresh

            refresh(store.path)


def _design_json(gathered: Gathered) -> dict[str, Any]:
    """Name the images of every half, and of every support in the order of its draw."""
    found: dict[str, Any] = {}
    for name, design in gathered.designs.items():
        items = [pair.item for pair in gathered.animals.pairs(name)]
        found[name] = {
            "test": [items[number] for number in design.test],
            "drawn": [[[items[n] for n in image] for image in seed] for seed in design.drawn],
        }
    return found
