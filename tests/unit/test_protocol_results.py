"""From cells to lines and summaries, on cells whose errors are chosen."""

from __future__ import annotations

import math

import pytest

from heads.protocol.cells import READINGS, Cell, Outcome, Unit
from heads.protocol.design import ALL
from heads.protocol.pareto import Point
from heads.protocol.plan import MAIN, Way
from heads.protocol.results import analyse, pareto_points, summarise

N_TEST = 8
PARAMETERS = {"token": 8, "decoder": 1000, "token+norms": 40}


def way(mode="token", shots=5, *, init="mean", variant=MAIN):
    return Way(variant=variant, mode=mode, init=init, shots=shots)


def cell(identity, of, distances, *, n_seeds=3, error=None):
    """A cell whose instances are off by `distances`, the same for all, or one an instance."""
    each = distances if isinstance(distances, list) else [distances] * N_TEST
    outcomes = [
        Outcome(
            squares=2 * d**2,
            points=2,
            hits=dict.fromkeys(READINGS, 2 * (d <= 0.05)),
            counted=dict.fromkeys(READINGS, 2),
            oks=0.7,
            score=1.0,
        )
        for d in each
    ]
    seeds = n_seeds if of.shots else 1
    unit = Unit(fold=0, way=of, identity=identity, is_tuning=False, lr=0.1, n_seeds=seeds, steps=3)
    return Cell(
        unit=unit,
        parameters=PARAMETERS[of.mode] if of.shots else 0,
        seconds=1.0,
        error=error,
        outcomes=() if error else (tuple(outcomes),) * seeds,
        groups=tuple(f"image {n // 2}" for n in range(N_TEST)),
    )


def cells():
    found = []
    for name, gained in (("fox", 0.08), ("hare", 0.0)):
        spread = [0.2 - gained + 0.001 * n for n in range(N_TEST)]
        found += [
            cell(name, way(shots=0), [0.2 + 0.001 * n for n in range(N_TEST)]),
            cell(name, way(), spread),
            cell(name, way("decoder"), 0.1),
            cell(name, way(init="random"), 0.3),
        ]
    return found


def line_of(lines, identity, of):
    (found,) = [line for line in lines if (line.identity, line.way) == (identity, of)]
    return found


def test_a_line_compares_with_the_base_and_with_fine_tuning():
    lines, notes = analyse(cells(), n_resamples=1000)
    fox = line_of(lines, "fox", way())
    assert fox.against_base.reduction.value == pytest.approx(0.08, abs=1e-3)
    assert fox.against_base.reduction.sign == 1
    assert fox.against_base.is_reduction
    assert fox.against_decoder.ratio.value == pytest.approx(fox.rmse / 0.1)
    assert fox.recovery.value == pytest.approx(0.08 / 0.1035, abs=0.01)
    hare = line_of(lines, "hare", way())
    assert (hare.against_base.reduction.value, hare.against_base.reduction.sign) == (0, 0)
    assert line_of(lines, "fox", way(init="random")).against_base.reduction.sign == -1
    assert [note.partition(":")[0] for note in notes] == ["fox", "hare"]
    assert "3 seeds and of 4 images (8 instances)" in notes[0]


def test_the_base_and_the_decoder_are_not_compared_with_themselves():
    lines, _ = analyse(cells(), n_resamples=1000)
    base, decoder = line_of(lines, "fox", way(shots=0)), line_of(lines, "fox", way("decoder"))
    assert base.against_base is None
    assert decoder.against_decoder is None
    assert (base.parameters, decoder.parameters) == (0, 1000)
    # All similarities are 0.7: found at the limits 0.50 to 0.70, of ten.
    assert base.oks_ap == pytest.approx(0.5)


def test_pck_is_compared_as_a_share_of_the_decoders():
    found = [
        cell("fox", way(shots=0), 0.2),
        cell("fox", way(), [0.01, 0.02] + [0.2] * 6),
        cell("fox", way("decoder"), [0.01] * 4 + [0.2] * 4),
    ]
    lines, _ = analyse(found, n_resamples=1000)
    token = line_of(lines, "fox", way())
    assert (token.pck["pck@0.05"], token.pck_recovery) == (0.25, 0.5)
    assert token.pck_gain.value == 0.25


def test_a_variant_has_its_own_base():
    film = cell("fox", way(shots=0, variant="film"), 0.4), cell("fox", way(variant="film"), 0.3)
    lines, _ = analyse([*cells(), *film], n_resamples=1000)
    found = line_of(lines, "fox", way(variant="film"))
    assert found.against_base.base_rmse == pytest.approx(0.4)
    # How much of fine-tuning's gain is recovered says nothing for another head.
    assert found.recovery is None


def test_a_summary_counts_identities():
    lines, _ = analyse(cells(), n_resamples=1000)
    found = {summary.way: summary for summary in summarise(lines)}
    token = found[way()]
    assert (token.n_better, token.n_worse, token.n_reductions) == (1, 0, 1)
    assert token.identities == ("fox", "hare")
    assert token.rmse == pytest.approx((0.1235 + 0.2035) / 2, abs=1e-3)
    assert token.relative == pytest.approx(0.08 / 0.2035 / 2, abs=1e-3)
    assert found[way(init="random")].n_worse == 2
    assert math.isnan(found[way("decoder")].ratio)


def test_failures_have_a_line_and_no_part_in_a_summary():
    found = [*cells(), cell("fox", way("token+norms"), 0.1, error="The loss became nan.")]
    lines, _ = analyse(found, n_resamples=1000)
    assert line_of(lines, "fox", way("token+norms")).error == "The loss became nan."
    assert way("token+norms") not in {summary.way for summary in summarise(lines)}


def test_the_frontier_compares_what_every_identity_has():
    found = [*cells(), cell("fox", way("token+norms"), 0.01)]
    lines, _ = analyse(found, n_resamples=1000)
    points = pareto_points(summarise(lines), 5)
    assert [point.name for point in points] == ["mean token", "token", "decoder"]
    assert points[2] == Point(name="decoder", parameters=1000, rmse=pytest.approx(0.1))
    assert [point.name for point in pareto_points(summarise(lines), ALL)] == ["mean token"]
