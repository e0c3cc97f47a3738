"""Adapting, measuring and choosing learning rates, cell by cell; what is finished stays so."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from featstore.errors import InvalidInputError
from featstore.types import Progress, ProgressCallback
from heads.protocol.cells import Cell, CellFolder, Outcome, Unit
from heads.protocol.design import ALL, Design, Shots
from heads.protocol.plan import RANDOM, Plan, Way


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Adaptations of one kind to one identity, one a seed."""

    identity: str
    mode: str
    init: str
    lr: float | None  # None: the token is only made, nothing is trained
    steps: int
    supports: tuple[tuple[int, ...], ...]  # of each seed, by the numbers of the instances
    test: tuple[int, ...]


class Bench(Protocol):
    """A trained head, the instances of some identities, and how to adapt to them."""

    run_id: str

    def own_lr(self, mode: str) -> float:
        """Give the learning rate of a mode that factors are applied to."""
        ...

    def parameters(self, mode: str) -> int:
        """Count what a mode trains for one identity."""
        ...

    def adapt(self, job: Job) -> Sequence[Sequence[Outcome]]:
        """Adapt once a seed, side by side, and measure the test instances.

        Raises:
            InvalidInputError: A loss is not finite.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is done with one trained head."""

    fold: int
    variant: str
    bench: Bench
    designs: Mapping[str, Design]  # of the held-out identities and of the validation identity
    groups: Mapping[str, Sequence[str]]  # of every instance of an identity
    validation: str


def run_task(
    plan: Plan, task: Task, cells: CellFolder, progress: ProgressCallback
) -> dict[str, list[Cell]]:
    """Do everything with one head that is not finished yet, and give all its cells.

    For every way to adapt, the learning rate is the one of the lowest RMSE on the validation
    identity, out of equally many for every mode; the held-out identities choose nothing.

    Args:
        plan: The protocol.
        task: The head, and what it is adapted to.
        cells: Where finished cells lie.
        progress: Called after every cell.

    Returns:
        Cells of the held-out identities as "test", those of the validation identity as "tuning".
    """
    ways = plan.ways(task.variant)
    n_tuned = sum(way.is_trained for way in ways) * len(plan.lr_factors)
    total = n_tuned + len(ways) * (len(task.designs) - 1)
    counter = _Counter(progress, total, f"fold {task.fold + 1}, {task.variant}")
    found: dict[str, list[Cell]] = {"test": [], "tuning": []}
    for way in ways:
        tried = [_measure(u, task, cells, counter) for u in _tuning_units(plan, task, way)]
        found["tuning"] += tried
        lr = best_lr(tried)
        for identity in plan.folds[task.fold]:
            if task.designs[identity].has(way.shots):
                unit = Unit(
                    fold=task.fold,
                    way=way,
                    identity=identity,
                    is_tuning=False,
                    lr=lr,
                    n_seeds=plan.n_seeds if _is_random(way) else 1,
                    steps=plan.steps if way.is_trained else 0,
                )
                found["test"].append(_measure(unit, task, cells, counter))
    return found


def best_lr(tried: Sequence[Cell]) -> float | None:
    """Give the learning rate of the lowest RMSE, the smaller one of two alike.

    Returns:
        None where nothing was tried.

    Raises:
        InvalidInputError: Every one of them failed.
    """
    rmses = [(math.inf if each.error else each.errors().rmse(), each) for each in tried]
    if not rmses:
        return None
    rmse, best = min(rmses, key=lambda pair: (pair[0], pair[1].unit.lr))
    if math.isinf(rmse):
        way = best.unit.way
        raise InvalidInputError(
            f"No learning rate serves {way.mode} with {way.shots} images of {best.unit.identity}: "
            f"{best.error} Give smaller --lr-factors."
        )
    return best.unit.lr


def _tuning_units(plan: Plan, task: Task, way: Way) -> list[Unit]:
    """List what is tried on the validation identity, which may have fewer images than shots."""
    if not way.is_trained:
        return []
    design = task.designs[task.validation]
    shots: Shots = way.shots if design.has(way.shots) else ALL
    own = task.bench.own_lr(way.mode)
    return [
        Unit(
            fold=task.fold,
            way=Way(variant=way.variant, mode=way.mode, init=way.init, shots=shots),
            identity=task.validation,
            is_tuning=True,
            lr=float(f"{own * factor:.6g}"),
            n_seeds=min(plan.n_tuning_seeds, plan.n_seeds),
            steps=plan.steps,
        )
        for factor in plan.lr_factors
    ]


def _is_random(way: Way) -> bool:
    """Whether seeds differ: not where nothing is drawn."""
    return way.is_trained or way.init == RANDOM


class _Counter:
    """Tells how many cells of a task are done."""

    def __init__(self, progress: ProgressCallback, total: int, what: str) -> None:
        self._progress, self._total, self._what, self._done = progress, total, what, 0

    def step(self) -> None:
        self._done += 1
        report = Progress(stage=self._what, done=self._done, total=max(self._total, self._done))
        self._progress(report)


def _measure(unit: Unit, task: Task, cells: CellFolder, counter: _Counter) -> Cell:
    """Do a unit, or read it where it is finished."""
    key = unit.key(run_id=task.bench.run_id, design=task.designs[unit.identity].key)
    if not cells.has(key):
        cells.write(key, _done(unit, task))
    counter.step()
    return cells.read(key)


def _done(unit: Unit, task: Task) -> Cell:
    design = task.designs[unit.identity]
    job = Job(
        identity=unit.identity,
        mode=unit.way.mode,
        init=unit.way.init,
        lr=unit.lr,
        steps=unit.steps,
        supports=tuple(design.support(unit.way.shots, seed) for seed in range(unit.n_seeds)),
        test=design.test,
    )
    began = time.perf_counter()
    error, outcomes = None, ()
    try:
        outcomes = tuple(tuple(seed) for seed in task.bench.adapt(job))
    except InvalidInputError as failed:
        error = str(failed)
    groups = task.groups[unit.identity]
    return Cell(
        unit=unit,
        parameters=task.bench.parameters(unit.way.mode) if unit.way.is_trained else 0,
        seconds=round(time.perf_counter() - began, 3),
        error=error,
        outcomes=outcomes,
        groups=tuple(groups[number] for number in design.test),
    )
