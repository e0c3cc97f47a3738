"""What a protocol says in words: what held, what did not, and what nothing can be said about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from featstore.views import PLAIN
from heads.figures import rank_correlation
from heads.identity_images import MEAN
from heads.protocol.design import ALL, Shots
from heads.protocol.distances import Distance
from heads.protocol.pareto import frontier
from heads.protocol.plan import BASELINES, MAIN, TOKEN, Plan, Way
from heads.protocol.results import DECODER, PCK, Line, Summary, pareto_points

_LEAST_RANKED = 4  # identities below which a rank correlation says nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRun:
    """A head that was trained for the protocol."""

    fold: int
    variant: str
    run_id: str
    training: tuple[str, ...]  # identities it learned from
    validation: str
    parameters: int
    split: str  # of the training identities, that `metrics` are of; "" where none was measured
    metrics: Mapping[str, float]
    token_std: float | None  # of its answers over random tokens; None: not measured
    views: str = PLAIN  # that it learned from, see `heads.view_choice`


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything that a protocol found."""

    plan: Plan
    lines: tuple[Line, ...]
    summaries: tuple[Summary, ...]
    distances: tuple[Distance, ...]
    heads: tuple[HeadRun, ...]
    notes: tuple[str, ...]  # how intervals were made
    messages: tuple[str, ...]  # what was left out
    about: Mapping[str, Any]  # features and labels, see `heads.record`
    jitters: tuple[str, ...] = ()  # views of worse boxes that everything is measured in too
    add_jitters: str = ""  # the command that stores some

    @property
    def identities(self) -> tuple[str, ...]:
        """List the held-out identities."""
        return tuple(dict.fromkeys(line.identity for line in self.lines))

    @property
    def headline(self) -> Shots:
        """Give the number of images that is told of first: the largest that every identity has."""
        trained = [shots for shots in self.plan.shots if shots != 0]
        numbers = sorted((s for s in trained if s != ALL), key=int, reverse=True)
        for shots in (*numbers, *(s for s in trained if s == ALL)):
            found = self.summary(MAIN, TOKEN, MEAN, shots)
            if found is not None and len(found.identities) == len(self.identities):
                return shots
        return trained[0] if trained else 0

    def summary(self, variant: str, mode: str, init: str, shots: Shots) -> Summary | None:
        """Give one way over all identities; None where it was not done."""
        way = Way(variant=variant, mode=mode, init=init, shots=shots)
        return next((each for each in self.summaries if each.way == way), None)

    def line(self, identity: str, mode: str, shots: Shots, *, init: str = MEAN) -> Line | None:
        """Give one way of the main variant for one identity; None where it was not done."""
        way = Way(variant=MAIN, mode=mode, init=init, shots=shots)
        found = (line for line in self.lines if (line.identity, line.way) == (identity, way))
        return next(found, None)


def statements(findings: Findings) -> list[str]:
    """Say in sentences what was found, for and against."""
    parts = (
        _token,
        _decoder,
        _baselines,
        _pareto,
        _jitters,
        _distance,
        _inits,
        _variants,
        _failures,
    )
    return [text for part in parts for text in part(findings)]


def gains_by_distance(findings: Findings) -> list[tuple[Distance, Line]]:
    """Pair the distance of each identity with what the token gained with the headline's images."""
    pairs = []
    for distance in findings.distances:
        line = findings.line(distance.identity, TOKEN, findings.headline)
        if line is not None and line.against_base is not None:
            pairs.append((distance, line))
    return pairs


def distance_correlation(findings: Findings) -> float:
    """Give Spearman's correlation of distance and relative gain; NaN for too few identities."""
    pairs = gains_by_distance(findings)
    if len(pairs) < _LEAST_RANKED:
        return math.nan
    gains = [line.against_base.relative.value for _, line in pairs if line.against_base]
    return rank_correlation([distance.distance for distance, _ in pairs], gains)


def _token(findings: Findings) -> Iterator[str]:
    shots = findings.headline
    found = findings.summary(MAIN, TOKEN, MEAN, shots)
    if found is None:
        yield "The token alone was adapted to nothing, so nothing is said of it."
        return
    count = len(found.identities)
    unsure = count - found.n_better - found.n_worse
    yield (
        f"Token only, {_images(shots)}: the 95 % interval of the RMSE reduction over the mean "
        f"token lies above zero for {found.n_better} of {count} identities, below it for "
        f"{found.n_worse}, and contains it for {unsure}. Where nothing changes, about one interval "
        f"in twenty misses zero by chance."
    )
    yield (
        f"The RMSE {'rises' if found.relative < 0 else 'falls'} by {_percent(abs(found.relative))} "
        f"of the mean token's, averaged over identities; it falls by at least 15 % for "
        f"{found.n_reductions} of {count}."
    )


def _decoder(findings: Findings) -> Iterator[str]:
    found = findings.summary(MAIN, TOKEN, MEAN, findings.headline)
    best = findings.summary(MAIN, DECODER, MEAN, findings.headline)
    if found is None or best is None:
        yield "The decoder was not fine-tuned, so nothing is compared with it."
        return
    fewer = best.parameters / found.parameters if found.parameters else math.nan
    yield (
        f"Fine-tuning the decoder on the same images trains {best.parameters:,} numbers, "
        f"{fewer:,.0f} times as many. The token's RMSE is {_number(found.ratio, 2)} times that of "
        f"fine-tuning, and within 15 % of it for {found.n_ties} of {len(found.identities)} "
        f"identities; its PCK@0.05 is {_percent(found.pck_recovery)} of fine-tuning's."
    )
    if best.relative <= 0:
        yield (
            f"Fine-tuning itself does not lower the RMSE of the mean token "
            f"({_percent(-best.relative)} more), so there is no gain to recover."
        )
    else:
        yield (
            f"Fine-tuning lowers the RMSE by {_percent(best.relative)}; of what it takes off, the "
            f"token takes off {_percent(found.recovery)}, averaged over the identities where "
            "fine-tuning gains."
        )


def _baselines(findings: Findings) -> Iterator[str]:
    """Say how good the mean token is, for everything is compared with it."""
    found = [findings.summary(MAIN, TOKEN, init, 0) for init in (MEAN, *BASELINES)]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return
    mean, shared, near, best = known
    text = (
        f"Without any label of the identity, the RMSE is {_number(mean.rmse)} with the mean token, "
        f"{_number(shared.rmse)} with one token fitted to images of all trained identities, "
        f"{_number(near.rmse)} with that of the trained identity whose images are most alike, and "
        f"{_number(best.rmse)} with the trained token that does best on the validation identity."
    )
    if min(shared.rmse, near.rmse, best.rmse) < mean.rmse:
        text += " So the mean token is a weak baseline here: reductions over it, and shares of a "
        text += "gain over it, flatter."
    yield text
    adapted = findings.summary(MAIN, TOKEN, MEAN, findings.headline)
    if adapted is not None:
        count = len(adapted.identities)
        unsure = count - adapted.n_better_nearest - adapted.n_worse_nearest
        yield (
            "What labels of the identity add to its looks: the adapted token's RMSE "
            f"({_number(adapted.rmse)}) is below that of the trained identity most alike for "
            f"{adapted.n_better_nearest} of {count} identities, above it for "
            f"{adapted.n_worse_nearest}, and within its 95 % interval for {unsure}."
        )


def _pareto(findings: Findings) -> Iterator[str]:
    points = pareto_points(findings.summaries, findings.headline)
    best = frontier(points)
    beaten = [point.name for point in points if point not in best]
    if len(points) < 3:
        return
    names = " and ".join([", ".join(p.name for p in best[:-1]), best[-1].name][len(best) < 2 :])
    text = f"With {_images(findings.headline)}, nothing beats {names} in parameters and RMSE both."
    yield text + (f" Beaten: {', '.join(beaten)}." if beaten else " None is beaten.")


def _jitters(findings: Findings) -> Iterator[str]:
    if not findings.jitters:
        yield (
            "The store has no jittered boxes of all test images, so what worse boxes cost is not "
            "measured."
            + (
                f" They are added by `{findings.add_jitters}` and measured by --resume."
                if findings.add_jitters
                else ""
            )
        )
        return
    shots, views = findings.headline, {head.views for head in findings.heads}
    ways = (
        ("mean token", TOKEN, 0),
        ("token", TOKEN, shots),
        ("fine-tuned decoder", DECODER, shots),
    )
    told = []
    for name, mode, count in ways:
        one = findings.summary(MAIN, mode, MEAN, count)
        if one is not None and one.jittered is not None:
            rmse, pck = one.jittered["rmse"], one.jittered[PCK]
            told.append(
                f"{name}: RMSE {_number(one.rmse)} to {_number(rmse)}, {PCK} "
                f"{_number(one.pck[PCK])} to {_number(pck)}"
            )
    yield (
        f"From the boxes of the data to worse ones ({', '.join(findings.jitters)}), with "
        f"{_images(shots)}: {'; '.join(told)}. The heads learned from "
        + ("plain crops alone." if views <= {PLAIN} else "the other stored views too.")
    )


def _distance(findings: Findings) -> Iterator[str]:
    rho = distance_correlation(findings)
    count = len(gains_by_distance(findings))
    if math.isnan(rho):
        yield (
            f"Whether the gain depends on the distance cannot be said of {count} identities "
            f"({_LEAST_RANKED} or more are ranked)."
        )
    else:
        yield (
            f"Spearman's correlation of the gain with the distance to the nearest training "
            f"identity is {rho:.2f} over {count} identities."
        )


def _inits(findings: Findings) -> Iterator[str]:
    few = [shots for shots in findings.plan.shots if shots != ALL and int(shots) <= 1]
    if not {"random", "interpolated"} <= set(findings.plan.inits) or not few:
        return
    for shots in few:
        pairs = []
        for variant in findings.plan.all_variants:
            one, other = (
                findings.summary(variant, TOKEN, init, shots) for init in ("interpolated", "random")
            )
            if one is not None and other is not None:
                pairs.append((one.rmse, other.rmse))
        n_lower = sum(one < other for one, other in pairs)
        values = "; ".join(f"{_number(one)} and {_number(other)}" for one, other in pairs)
        yield (
            f"From {_images(shots)}, a token that begins interpolated has a lower RMSE than one "
            f"that begins at random in {n_lower} of {len(pairs)} heads ({values})."
        )


def _variants(findings: Findings) -> Iterator[str]:
    for variant in findings.plan.variants:
        found = findings.summary(variant, TOKEN, MEAN, findings.headline)
        if found is None:
            continue
        std = [h.token_std for h in findings.heads if h.variant == variant and h.token_std]
        own = [h.token_std for h in findings.heads if h.variant == MAIN and h.token_std]
        spread = ""
        if std and own:
            spread = (
                f" Over random tokens its answers vary by {_number(sum(std) / len(std), 4)} of the "
                f"frame; those of {MAIN} by {_number(sum(own) / len(own), 4)}."
            )
        does = "adds" if found.relative < 0 else "takes"
        to = "to" if found.relative < 0 else "off"
        yield (
            f"{variant}: the token {does} {_percent(abs(found.relative))} {to} its own mean "
            f"token's RMSE, with {found.n_better} of {len(found.identities)} intervals above "
            f"zero.{spread}"
        )


def _failures(findings: Findings) -> Iterator[str]:
    failed = [line for line in findings.lines if line.error is not None]
    if failed:
        names = dict.fromkeys(f"{line.way.mode} on {line.identity}" for line in failed)
        yield f"{len(failed)} cells failed and have no part in any number: {', '.join(names)}."


def _images(shots: Shots) -> str:
    if shots == ALL:
        return "all images of the support half"
    return "no image" if shots == 0 else f"{shots} image{'s' * (shots != 1)}"


def _percent(share: float) -> str:
    return "an unknown share" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
