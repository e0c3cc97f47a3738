"""Comparing two ways to adapt: over seeds and images, resampled both at once.

Axis letters at the end of names: ``s`` seeds, ``i`` test instances, ``g`` groups of instances (one
image may show several), ``r`` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featstore.errors import invalid

N_RESAMPLES = 10_000
LEVEL = 0.95
TIE_RATIO = 1.15  # of two RMSEs, up to which they count as equal
LEAST_REDUCTION = 0.15  # share of the base's RMSE that is called a reduction


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """What each test instance adds to a mean over its marked keypoints, under each seed.

    Squared distances with the number of keypoints make an RMSE, hits with it a share.
    """

    sums_si: np.ndarray  # (seeds, instances) float64
    counts_i: np.ndarray  # (instances,) float64, above 0

    def __post_init__(self) -> None:
        n_instances = len(self.counts_i)
        if self.sums_si.ndim != 2 or self.sums_si.shape[1] != n_instances or not n_instances:
            expected = f"(seeds, {n_instances}), one column for each of at least one instance"
            raise invalid("sums", self.sums_si.shape, expected)
        if not np.isfinite(self.sums_si).all() or not (self.counts_i > 0).all():
            raise invalid("sums, counts", "others", "finite, and above 0 keypoints an instance")

    def mean(self) -> float:
        """Give the mean over instances and then over seeds."""
        return float(self.means_s().mean())

    def means_s(self) -> np.ndarray:
        """Give the mean over instances of each seed."""
        return self.sums_si.sum(axis=1) / self.counts_i.sum()

    def rmses_s(self) -> np.ndarray:
        """Give the square root of the mean of each seed."""
        return np.sqrt(self.means_s())

    def rmse(self) -> float:
        """Give the RMSE of each seed, averaged over the seeds."""
        return float(self.rmses_s().mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number with its interval; the bounds are None where nothing can be said."""

    value: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """Give 1 or -1 where the interval excludes 0, above or below it; else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How much better than a base something is, on the same instances with the same seeds."""

    base_rmse: float
    rmse: float
    reduction: Estimate  # of the RMSE: the base's less this one's, averaged over seeds
    relative: Estimate  # the same as a share of the base's
    mean_reduction: Estimate  # of an instance's own RMSE, averaged over instances and seeds
    ratio: Estimate  # this one's RMSE over the base's

    @property
    def is_tie(self) -> bool:
        """Whether its RMSE is at most 15 % above the base's."""
        return self.ratio.value <= TIE_RATIO

    @property
    def is_reduction(self) -> bool:
        """Whether its RMSE is at least 15 % below the base's."""
        return self.relative.value >= LEAST_REDUCTION


class Resamples:
    """Draws of seeds and of groups, both with replacement and apart, shared by all comparisons.

    All seeds are measured on the same instances, so that the two levels are crossed: a draw takes
    some seeds, some groups, and all instances of these groups under these seeds. Averaging over
    the seeds first would hide how much the drawn support matters; drawing instances would take
    those of one image for independent ones.

    Source:
        HEADS.md 3.1 (statistics); Efron & Tibshirani 1993, chapter 13 (percentile intervals).
    """

    def __init__(
        self,
        groups: Sequence[str],
        *,
        n_seeds: int,
        n_resamples: int = N_RESAMPLES,
        level: float = LEVEL,
        seed: int = 0,
    ) -> None:
        """Draw.

        Args:
            groups: Group of each instance, such as its image.
            n_seeds: How many seeds there are.
            n_resamples: How many draws, at least 1,000.
            level: Share of the draws between the bounds.
            seed: Of the draws; the same seed gives the same bounds on every machine.

        Raises:
            InvalidInputError: There is no instance or no seed, or too few draws.
        """
        if not groups or n_seeds < 1:
            given = f"{len(groups)} instances, {n_seeds} seeds"
            raise invalid("groups, seeds", given, "at least one of each")
        if n_resamples < 1000 or not 0 < level < 1:
            given = f"{n_resamples}, {level}"
            raise invalid("n_resamples, level", given, "at least 1,000, and between 0 and 1")
        names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        self._group_of = np.array([names[name] for name in groups])
        self.n_groups, self.n_seeds, self._level = len(names), n_seeds, level
        rng = np.random.default_rng(seed)
        self._seeds_rs = _drawn(rng, n_seeds, n_resamples) / n_seeds
        self._groups_rg = _drawn(rng, self.n_groups, n_resamples)
        self.note = (
            f"{100 * level:g} % percentile bootstrap, {n_resamples:,} resamples of {n_seeds} seeds "
            f"and of {self.n_groups} images ({len(groups)} instances), seed {seed}"
        )

    def compare(self, base: Errors, own: Errors) -> Comparison:
        """Compare squared distances with those of a base.

        Args:
            base: Of one seed, where nothing in it is random, or of as many as `own`.
            own: What may be better, of as many seeds as were drawn.

        Raises:
            InvalidInputError: They are not of the same instances and seeds.
        """
        base = self._checked(base, own)
        base_r, own_r = (self._rmse_r(each) for each in (base, own))
        before, after = base.rmse(), own.rmse()
        return Comparison(
            base_rmse=before,
            rmse=after,
            reduction=self._estimate(before - after, base_r - own_r),
            relative=self._estimate(_over(before - after, before), _over(base_r - own_r, base_r)),
            mean_reduction=self._mean_reduction(base, own),
            ratio=self._estimate(_over(after, before), _over(own_r, base_r)),
        )

    def difference(self, base: Errors, own: Errors) -> Estimate:
        """Give how far the mean lies above a base's, such as the share of hits."""
        base = self._checked(base, own)
        drawn_r = self._mean_r(own) - self._mean_r(base)
        return self._estimate(own.mean() - base.mean(), drawn_r)

    def recovery(self, base: Errors, own: Errors, best: Errors) -> Estimate:
        """Give which part of the RMSE that `best` takes off the base `own` takes off.

        Where `best` is no better than the base there is no such part: NaN without bounds. Where
        draws say that it may be no better, a part without bounds.
        """
        base, best = self._checked(base, own), self._checked(best, own)
        gained = base.rmse() - best.rmse()
        if gained <= 0:
            return Estimate(value=math.nan, low=None, high=None)
        base_r = self._rmse_r(base)
        gained_r = base_r - self._rmse_r(best)
        value = (base.rmse() - own.rmse()) / gained
        is_gain_r = gained_r > 0
        if is_gain_r.mean() < (1 + self._level) / 2:
            return Estimate(value=value, low=None, high=None)
        drawn_r = (base_r - self._rmse_r(own))[is_gain_r] / gained_r[is_gain_r]
        return self._estimate(value, drawn_r)

    def _checked(self, base: Errors, own: Errors) -> Errors:
        """Give the base as often as there are seeds."""
        n_instances = len(self._group_of)
        if own.sums_si.shape != (self.n_seeds, n_instances):
            expected = f"of {self.n_seeds} seeds and {n_instances} instances, as was drawn"
            raise invalid("errors", own.sums_si.shape, expected)
        if not np.array_equal(base.counts_i, own.counts_i):
            raise invalid("errors", "other instances", "of the same instances in the same order")
        if len(base.sums_si) not in (1, self.n_seeds):
            raise invalid("base", len(base.sums_si), f"of one seed or of {self.n_seeds}")
        return Errors(
            sums_si=np.broadcast_to(base.sums_si, own.sums_si.shape), counts_i=base.counts_i
        )

    def _means_rs(self, sums_si: np.ndarray, counts_i: np.ndarray) -> np.ndarray:
        """Give the mean of the drawn instances, for every draw and every seed."""
        sums_gs = np.zeros((self.n_groups, len(sums_si)))
        np.add.at(sums_gs, self._group_of.tolist(), sums_si.T)
        counts_g = np.bincount(self._group_of, weights=counts_i, minlength=self.n_groups)
        return self._groups_rg @ sums_gs / (self._groups_rg @ counts_g)[:, None]

    def _mean_r(self, errors: Errors) -> np.ndarray:
        means_rs = self._means_rs(errors.sums_si, errors.counts_i)
        return (means_rs * self._seeds_rs).sum(axis=1)

    def _rmse_r(self, errors: Errors) -> np.ndarray:
        means_rs = self._means_rs(errors.sums_si, errors.counts_i)
        return (np.sqrt(means_rs) * self._seeds_rs).sum(axis=1)

    def _mean_reduction(self, base: Errors, own: Errors) -> Estimate:
        base_si, own_si = (np.sqrt(e.sums_si / e.counts_i) for e in (base, own))
        gained = Errors(sums_si=base_si - own_si, counts_i=np.ones_like(own.counts_i))
        return self._estimate(gained.mean(), self._mean_r(gained))

    def _estimate(self, value: float | np.ndarray, drawn_r: np.ndarray) -> Estimate:
        if self.n_groups < 2 or not np.isfinite(drawn_r).all():
            return Estimate(value=float(value), low=None, high=None)
        tail = (1 - self._level) / 2
        low, high = np.quantile(drawn_r, [tail, 1 - tail])
        return Estimate(value=float(value), low=float(low), high=float(high))


def share_of(own: float, best: float) -> float:
    """Give `own` as a share of `best`, such as one PCK of another; NaN where that is 0."""
    return own / best if best > 0 else math.nan


def _drawn(rng: np.random.Generator, count: int, n_resamples: int) -> np.ndarray:
    """Count how often each of `count` things is drawn, in each resample."""
    shares = np.full(count, 1 / count)
    return rng.multinomial(count, shares, size=n_resamples).astype(np.float64)


def _over(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """Divide; what is divided by 0 has no value."""
    below = np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, below, out=np.full(below.shape, np.nan), where=below != 0)
