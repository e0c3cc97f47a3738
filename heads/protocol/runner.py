"""Adapting, measuring and choosing learning rates, cell by cell; what is finished stays so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from featstore.errors import InvalidInputError
from heads.identity_images import RANDOM
from heads.protocol.cells import Cell, CellFolder, Outcome, Unit
from heads.protocol.design import ALL, Design, Shots
from heads.protocol.plan import Plan, Way


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
    jitters: tuple[str, ...] = ()  # views of worse boxes that the bench measures held-out ones in


def run_task(
    plan: Plan, task: Task, cells: CellFolder, told: Callable[[], None]
) -> dict[str, list[Cell]]:
    """Do everything with one head that is not finished yet, and give all its cells.

    For every way to adapt, the learning rate is the one of the lowest RMSE on the validation
    identity, out of equally many for every mode; the held-out identities choose nothing.

    Args:
        plan: The protocol.
        task: The head, and what it is adapted to.
        cells: Where finished cells lie.
        told: Called after every cell.

    Returns:
        Cells of the held-out identities as "test", those of the validation identity as "tuning".
    """

    def measured(unit: Unit) -> Cell:
        key = unit.key(
            run_id=task.bench.run_id,
            design=task.designs[unit.identity].key,
            jitters=() if unit.is_tuning else task.jitters,
        )
        if not cells.has(key):
            cells.write(key, _done(unit, task))
        told()
        return cells.read(key)

    found: dict[str, list[Cell]] = {"test": [], "tuning": []}
    for way in plan.ways(task.variant):
        tried = [measured(unit) for unit in _tuning_units(plan, task, way)]
        found["tuning"] += tried
        lr = best_lr(tried)
        for identity in plan.folds[task.fold]:
            if task.designs[identity].has(way.shots):
                found["test"].append(measured(_unit(plan, task, way, identity, lr)))
    return found


def count_cells(plan: Plan, fold: int, variant: str, designs: Mapping[str, Design]) -> int:
    """Count the cells of one head, see `run_task`."""
    count = 0
    for way in plan.ways(variant):
        count += len(plan.lr_factors) * way.is_trained
        count += sum(designs[identity].has(way.shots) for identity in plan.folds[fold])
    return count


def _unit(plan: Plan, task: Task, way: Way, identity: str, lr: float | None) -> Unit:
    return Unit(
        fold=task.fold,
        way=way,
        identity=identity,
        is_tuning=False,
        lr=lr,
        n_seeds=plan.n_seeds if _is_random(way) else 1,
        steps=plan.steps if way.is_trained else 0,
    )


def best_lr(tried: Sequence[Cell]) -> float | None:
    """Give the learning rate of the lowest RMSE, the smaller one of two alike.

    Where all of them failed it is the smallest: what is then measured may fail too, and stays in
    as a failure.

    Returns:
        None where nothing was tried.
    """
    rmses = [
        (math.inf if one.error else one.errors().rmse(), one.unit.lr)
        for one in tried
        if one.unit.lr is not None
    ]
    return min(rmses)[1] if rmses else None


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
    error: str | None = None
    outcomes: tuple[tuple[Outcome, ...], ...] = ()
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
