"""From cells to lines and summaries, on cells whose errors are chosen."""

from __future__ import annotations

import math

import pytest

from heads.protocol.design import ALL
from heads.protocol.pareto import Point
from heads.protocol.results import analyse, pareto_points, summarise
from tests.protocol_cells import cell, cells, way


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
