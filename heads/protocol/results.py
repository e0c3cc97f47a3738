"""What a protocol found: a line for each way to adapt to each identity, and over all identities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heads.identity_images import MEAN
from heads.metrics.keypoints import similarity_precision
from heads.protocol.cells import READINGS, Cell
from heads.protocol.design import Shots
from heads.protocol.pareto import Point
from heads.protocol.plan import MAIN, NEAREST, TOKEN, Way
from heads.protocol.statistics import Comparison, Estimate, Resamples, share_of

DECODER = "decoder"
"""The mode that everything is compared with: all of the decoder learns."""

PCK = "pck@0.05"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One way to adapt to one identity."""

    identity: str
    way: Way
    parameters: int
    lr: float | None
    n_seeds: int
    seconds: float  # of all seeds together
    error: str | None = None
    rmse: float = math.nan
    rmse_seeds: tuple[float, ...] = ()
    pck: Mapping[str, float] | None = None  # of each reading
    oks_ap: float | None = None  # None: not known
    jittered: Mapping[str, float] | None = None  # rmse and `PCK` under worse boxes
    against_base: Comparison | None = None  # the mean token as it is
    against_nearest: Comparison | None = None  # the token of the trained identity most alike
    pck_gain: Estimate | None = None  # of `PCK`, over the base's
    against_decoder: Comparison | None = None  # fine-tuned on the same images
    pck_recovery: float = math.nan  # PCK as a share of the decoder's
    recovery: Estimate | None = None  # of what the decoder's fine-tuning takes off the RMSE


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One way to adapt, over all identities that have it."""

    way: Way
    parameters: int
    identities: tuple[str, ...]
    rmse: float
    pck: Mapping[str, float]
    oks_ap: float | None
    jittered: Mapping[str, float] | None  # rmse and `PCK` under worse boxes; None: not measured
    relative: float  # reduction of the RMSE as a share of the base's, averaged
    n_better: int  # intervals of the reduction above 0
    n_worse: int  # below 0
    n_better_nearest: int  # intervals of the reduction of the nearest token's RMSE above 0
    n_worse_nearest: int  # below 0
    n_reductions: int  # at least 15 % off the base's RMSE
    n_ties: int  # at most 15 % above the decoder's RMSE
    ratio: float  # of the RMSE to the decoder's, averaged; NaN without it
    pck_recovery: float
    recovery: float  # of the decoder's gain, averaged where it gains


def analyse(
    cells: Sequence[Cell], *, n_resamples: int, seed: int = 0
) -> tuple[list[Line], list[str]]:
    """Compare all cells of the held-out identities with their base and with fine-tuning.

    Args:
        cells: Of all folds and variants; an identity is held out in one fold.
        n_resamples: Draws of the bootstrap.
        seed: Of the draws.

    Returns:
        Lines in the order of the cells, and how their intervals were made, identity by identity.
    """
    by_identity: dict[str, list[Cell]] = {}
    for cell in cells:
        if not cell.unit.is_tuning:
            by_identity.setdefault(cell.unit.identity, []).append(cell)
    lines: list[Line] = []
    notes: list[str] = []
    for identity, own in by_identity.items():
        one = _Identity(own, n_resamples=n_resamples, seed=seed)
        lines += [one.line(cell) for cell in own]
        notes.append(f"{identity}: {one.note}")
    return lines, notes


class _Identity:
    """The cells of one identity, which share test instances and draws."""

    def __init__(self, cells: Sequence[Cell], *, n_resamples: int, seed: int) -> None:
        self._cells = {cell.unit.way: cell for cell in cells if cell.error is None}
        self._draws: dict[int, Resamples] = {}  # by how many seeds
        self._n_resamples, self._seed = n_resamples, seed
        n_seeds = max((len(cell.outcomes) for cell in self._cells.values()), default=0)
        some = next(iter(self._cells.values()), None)
        self.note = "" if some is None else self._resamples(some.groups, n_seeds).note

    def _resamples(self, groups: Sequence[str], n_seeds: int) -> Resamples:
        if n_seeds not in self._draws:
            self._draws[n_seeds] = Resamples(
                groups, n_seeds=n_seeds, n_resamples=self._n_resamples, seed=self._seed
            )
        return self._draws[n_seeds]

    def line(self, cell: Cell) -> Line:
        about: dict[str, Any] = {
            "identity": cell.unit.identity,
            "way": cell.unit.way,
            "parameters": cell.parameters,
            "lr": cell.unit.lr,
            "n_seeds": cell.unit.n_seeds,
            "seconds": cell.seconds,
        }
        if cell.error is not None:
            return Line(**about, error=cell.error)
        return Line(**about, **self._found(cell))

    def _found(self, cell: Cell) -> dict[str, Any]:
        errors, way = cell.errors(), cell.unit.way
        found: dict[str, object] = {
            "rmse": errors.rmse(),
            "rmse_seeds": tuple(map(float, errors.rmses_s())),
            "pck": {reading: _mean_hits(cell, reading) for reading in READINGS},
            "oks_ap": _precision(cell),
            "jittered": _jittered(cell),
        }
        draws = self._resamples(cell.groups, len(cell.outcomes))
        base = self._cells.get(Way(variant=way.variant, mode=TOKEN, init=MEAN, shots=0))
        if base is not None and base is not cell:
            found["against_base"] = draws.compare(base.errors(), errors)
            found["pck_gain"] = draws.difference(base.hits(PCK), cell.hits(PCK))
        alike = self._cells.get(Way(variant=MAIN, mode=TOKEN, init=NEAREST, shots=0))
        if alike is not None and way.variant == MAIN and alike is not cell:
            found["against_nearest"] = draws.compare(alike.errors(), errors)
        best = self._cells.get(Way(variant=MAIN, mode=DECODER, init=MEAN, shots=way.shots))
        if best is not None and best is not cell and len(best.outcomes) == len(cell.outcomes):
            found["against_decoder"] = draws.compare(best.errors(), errors)
            found["pck_recovery"] = share_of(cell.hits(PCK).mean(), best.hits(PCK).mean())
            if base is not None and way.variant == MAIN:
                found["recovery"] = draws.recovery(base.errors(), errors, best.errors())
        return found


def _mean_hits(cell: Cell, reading: str) -> float:
    is_known = any(one.counted[reading] for one in cell.outcomes[0])
    return cell.hits(reading).mean() if is_known else math.nan


def _jittered(cell: Cell) -> dict[str, float] | None:
    found = cell.jittered()
    return None if found is None else {"rmse": found[0].rmse(), PCK: found[1].mean()}


def _precision(cell: Cell) -> float | None:
    """Give OKS-AP, averaged over the seeds; None where no similarity is known."""
    values = [
        similarity_precision([one.oks for one in seed], [one.score for one in seed])
        for seed in cell.outcomes
    ]
    mean = float(np.mean(values))
    return mean if math.isfinite(mean) else None


def summarise(lines: Sequence[Line]) -> list[Summary]:
    """Average over identities, way by way, in the order of the lines; failures stay out."""
    by_way: dict[Way, list[Line]] = {}
    for line in lines:
        if line.error is None:
            by_way.setdefault(line.way, []).append(line)
    return [_summary(way, own) for way, own in by_way.items()]


def _summary(way: Way, lines: Sequence[Line]) -> Summary:
    bases = [line.against_base for line in lines if line.against_base is not None]
    bests = [line.against_decoder for line in lines if line.against_decoder is not None]
    alike = [line.against_nearest for line in lines if line.against_nearest is not None]
    recoveries = [line.recovery.value for line in lines if line.recovery is not None]
    known = [line.oks_ap for line in lines if line.oks_ap is not None]
    worse = [line.jittered for line in lines if line.jittered is not None]
    return Summary(
        way=way,
        parameters=lines[0].parameters,
        identities=tuple(line.identity for line in lines),
        rmse=_mean(line.rmse for line in lines),
        pck={name: _mean((line.pck or {})[name] for line in lines) for name in READINGS},
        oks_ap=_mean(known) if known else None,
        jittered={name: _mean(one[name] for one in worse) for name in worse[0]} if worse else None,
        relative=_mean(each.relative.value for each in bases),
        n_better=sum(each.reduction.sign > 0 for each in bases),
        n_worse=sum(each.reduction.sign < 0 for each in bases),
        n_better_nearest=sum(each.reduction.sign > 0 for each in alike),
        n_worse_nearest=sum(each.reduction.sign < 0 for each in alike),
        n_reductions=sum(each.is_reduction for each in bases),
        n_ties=sum(each.is_tie for each in bests),
        ratio=_mean(each.ratio.value for each in bests),
        pck_recovery=_mean(line.pck_recovery for line in lines),
        recovery=_mean(recoveries),
    )


def pareto_points(summaries: Sequence[Summary], shots: Shots) -> list[Point]:
    """Give what every mode of the main variant trains and reaches with so many images.

    Only what was done for every identity is comparable: a mean over fewer is left out.
    """
    chosen = [s for s in summaries if s.way.variant == MAIN and s.way.init == MEAN]
    most = max((len(each.identities) for each in chosen), default=0)
    return [
        Point(name=_name(each.way), parameters=each.parameters, rmse=each.rmse)
        for each in chosen
        if each.way.shots in (0, shots) and len(each.identities) == most
    ]


def _name(way: Way) -> str:
    return "mean token" if way.shots == 0 else way.mode


def _mean(values: Iterable[float]) -> float:
    """Average what is a number; NaN where nothing is."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan
