"""Which tap serves which task: one small head a tap, all of them on one pass over the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from featstore import open as open_store
from featstore.api import Store
from featstore.errors import InvalidInputError
from featstore.types import ProgressCallback, ignore_progress
from heads.report import RunReport
from heads.runs import read_run
from heads.setup import Choices
from heads.stages import POOLED
from heads.tap_choice import several_taps
from heads.tasks import TASKS
from heads.train import train_many

_End = tuple[RunReport | None, str | None]  # what a training gave, or why it failed
MAP_HEAD, POOLED_HEAD = "linear", "linear_pool"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What one tap is worth for one task. Numbers are None where its head failed."""

    tap: str
    task: str
    metric: str  # the task's first
    is_lower_better: bool
    value: float | None
    low: float | None  # of the 95 % interval
    high: float | None
    split: str | None  # what was measured: "test", else "val"
    images: int | None
    held_out_loss: float | None  # None where nothing was held out
    is_best: bool  # the lowest loss on the held-out part, which alone chooses
    metrics: Mapping[str, float]
    intervals: Mapping[str, Sequence[float] | None]
    run_id: str | None
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMap:
    """Taps against tasks."""

    feature_set: str
    name: str
    taps: tuple[str, ...]  # from first to last
    tasks: tuple[str, ...]
    heads: tuple[str, ...]  # of each task
    cells: tuple[Cell, ...]  # task by task, in each from the first tap to the last
    n_passes: int  # over the training rows, shared by all taps
    notes: tuple[str, ...]
    left_out: Mapping[str, str]  # path to reason

    def best(self, task: str) -> Cell | None:
        """Give the winner of a task; None where nothing was held out."""
        return next((cell for cell in self.cells if cell.task == task and cell.is_best), None)

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


def map_layers(
    store: str | Path | Store,
    *,
    tasks: Sequence[str],
    taps: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    cache: str = "auto",
    runs: str | Path | None = None,
    progress: ProgressCallback = ignore_progress,
    **chosen: Unpack[Choices],
) -> LayerMap:
    """Train a head a tap for each task, and measure them all.

    Each is a run of its own, with the numbers it would have alone. All taps of a task learn from
    one pass over the store; tasks that want the same rows in the same batches share it.

    Args:
        store: The store.
        tasks: What to learn.
        taps: Dense taps; none: all that the feature set has.
        options: Options of the head, the tasks and the loop. No pictures unless they are asked for.
        device: As in `heads.train`.
        cache: As in `heads.train`.
        runs: As in `heads.train`.
        progress: Called with reports of progress.
        chosen: Head, features, rows and recipe, as in `heads.train`. The head is "linear" where
            none is named, "linear_pool" for a task of whole images; block outputs are read
            through the backbone's final norm unless `tap_norm` is "none".

    Raises:
        InvalidInputError: There are fewer than two dense taps, a task has no labels here, or
            something asked for cannot be done; no run was begun.
        NotFoundError: A name is not known; no run was begun.
        KeyboardInterrupt: Ctrl-C; runs that were begun can be resumed one by one.
    """
    if not tasks:
        raise InvalidInputError("There is nothing to learn: name a task, such as depth.")
    opened = store if isinstance(store, Store) else open_store(store)
    features = opened.feature_set(chosen.get("feature_set"), backbone=chosen.get("backbone"))
    names = tuple(shape.tap for shape in several_taps(features, taps))
    chosen.pop("backbone", None)
    head = chosen.pop("head", None)
    full = tuple(dict.fromkeys(TASKS.full_name(task) for task in tasks))
    heads = tuple(head or _head_for(task) for task in full)
    common = {**chosen, "feature_set": features.key, "options": {"pictures": 0, **(options or {})}}
    configs = [
        {**common, "task": task, "head": each, "taps": [tap]}
        for task, each in zip(full, heads, strict=True)
        for tap in names
    ]
    report = train_many(opened, configs, device=device, cache=cache, runs=runs, progress=progress)
    ends = list(zip(report.runs, report.errors, strict=True))
    columns = {task: ends[at * len(names) :][: len(names)] for at, task in enumerate(full)}
    return LayerMap(
        feature_set=features.key,
        name=features.name,
        taps=names,
        tasks=full,
        heads=heads,
        cells=tuple(cell for task in full for cell in _column(task, names, columns[task])),
        n_passes=report.n_passes,
        notes=tuple(note for task in full for note in _unlike(task, columns[task])),
        left_out={path: reason for run, _ in ends if run for path, reason in run.left_out.items()},
    )


def _head_for(task: str) -> str:
    return POOLED_HEAD if TASKS[task].stage == POOLED else MAP_HEAD


def _column(task: str, names: Sequence[str], ends: Sequence[_End]) -> list[Cell]:
    """Make the cells of one task, the lowest loss on the held-out part marked."""
    losses = {
        tap: run.best_loss
        for tap, (run, _) in zip(names, ends, strict=True)
        if run is not None and run.best_loss is not None
    }
    best = min(losses, key=lambda tap: losses[tap], default=None)
    cells = []
    for tap, (run, error) in zip(names, ends, strict=True):
        metrics = {} if run is None else run.metrics
        metric = next(iter(metrics), TASKS[task].primary_metric)
        bounds = None if run is None else run.intervals.get(metric)
        cells.append(
            Cell(
                tap=tap,
                task=task,
                metric=metric,
                is_lower_better=TASKS[task].is_lower_better,
                value=metrics.get(metric),
                low=None if bounds is None else bounds[0],
                high=None if bounds is None else bounds[1],
                split=run.split if run is not None and metrics else None,
                images=run.images if run is not None and metrics else None,
                held_out_loss=losses.get(tap),
                is_best=tap == best,
                metrics=metrics,
                intervals={} if run is None else run.intervals,
                run_id=None if run is None else run.run_id,
                error=error,
            )
        )
    return cells


def _unlike(task: str, ends: Sequence[_End]) -> list[str]:
    """Tell where the taps of one task did not see as many images."""
    images: dict[str, list[str]] = {}
    for run, _ in ends:
        if run is not None:
            seen = read_run(Path(run.path)).record["images"]
            text = ", ".join(f"{count} {part}" for part, count in seen.items())
            images.setdefault(text, []).append(run.taps[0])
    if len(images) < 2:
        return []
    parts = "; ".join(f"{', '.join(taps)}: {text}" for text, taps in images.items())
    text = (
        f"The taps of {task} are stored for different images ({parts}), so their numbers cannot be "
        "compared. Run `featstore extract` again with all of them."
    )
    return [text]
