"""The page of a protocol: what it says in words, what it draws, that nothing is hidden."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import pytest

from featstore.errors import InvalidInputError, NotFoundError
from heads.protocol.design import ALL
from heads.protocol.distances import Distance
from heads.protocol.drawings import (
    Bar,
    Dot,
    colour,
    intervals_chart,
    legend,
    pareto_chart,
    plane_chart,
    shots_chart,
)
from heads.protocol.findings import Findings, HeadRun, statements
from heads.protocol.page import PosePicture, page_html
from heads.protocol.plan import Plan, parse_variant
from heads.protocol.results import analyse, summarise
from tests.protocol_cells import cell, cells, way

FILM = {"film": {"injection": "film"}}


def findings(found=None, *, variants=None, inits=("mean",), shots=(0, 5)):
    lines, notes = analyse(cells() if found is None else found, n_resamples=1000)
    names = tuple(dict.fromkeys(line.identity for line in lines))
    plan = Plan(folds=(names,), shots=shots, inits=inits, variants=variants or {}, n_seeds=3)
    return Findings(
        plan=plan,
        lines=tuple(lines),
        summaries=tuple(summarise(lines)),
        distances=tuple(
            Distance(identity=name, nearest="cow", cosine=0.9 - 0.1 * n)
            for n, name in enumerate(names)
        ),
        heads=tuple(head(variant, std) for variant, std in (("main", 0.02), ("film", 0.0001))),
        notes=tuple(notes),
        messages=("fox has 12 images beside its test half, so that 20 are left out.",),
        about={"taps": ["norm"], "backbone": {"name": "dinov2_s"}, "store": "features.zarr"},
    )


def head(variant, std):
    return HeadRun(
        fold=0,
        variant=variant,
        run_id=f"identity_token-{variant}",
        training=("cow", "goat"),
        validation="pig",
        parameters=1234,
        split="test",
        metrics={"rmse": 0.05, "pck@0.05": 0.611},
        token_std=std,
    )


def page(found, **changes):
    return page_html(found, run_id="run", day="1 May 2026", command="heads protocol", **changes)


def test_what_was_found_is_said_for_and_against():
    said = " ".join(statements(findings()))
    assert "lies above zero for 1 of 2 identities, below it for 0, and contains it for 1" in said
    assert "at least 15 % for 1 of 2" in said
    assert "125 times as many" in said
    assert "nothing beats mean token, token and decoder" in said
    assert "cannot be said of 2 identities" in said


def test_a_mean_token_that_others_beat_is_called_a_weak_baseline():
    def said(near, best, shared=0.3):
        others = [("shared", shared), ("nearest", near), ("best", best)]
        more = [cell("fox", way(shots=0, init=init), off) for init, off in others]
        (told,) = [t for t in statements(findings([*cells(), *more])) if "any label" in t]
        return told

    assert said(0.3, 0.25).endswith("validation identity.")
    for weak in (said(0.1, 0.25), said(0.3, 0.1), said(0.3, 0.25, shared=0.1)):
        assert "weak baseline here" in weak
    both = page(findings([*cells(), cell("fox", way(shots=0, init="best"), 0.1)]))
    assert both.count("best trained token") == 1


def test_no_gain_is_said_as_plainly_as_a_gain():
    worse = [
        cell("fox", way(shots=0), [0.2 + 0.01 * n for n in range(8)]),
        cell("fox", way(), [0.3 + 0.01 * n for n in range(8)]),
        cell("fox", way("decoder"), [0.25 + 0.01 * n for n in range(8)]),
    ]
    said = " ".join(statements(findings(worse)))
    assert "above zero for 0 of 1 identities, below it for 1" in said
    assert re.search(r"The RMSE rises by \d", said)
    assert "Fine-tuning itself does not lower the RMSE" in said
    assert "Beaten: token, decoder." in said


def test_a_variant_that_ignores_its_token_is_told_with_its_spread():
    film = [cell("fox", way(shots=0, variant="film"), 0.2), cell("fox", way(variant="film"), 0.2)]
    said = " ".join(statements(findings([*cells(), *film], variants=FILM)))
    assert "film: the token takes 0.0 % off its own mean token's RMSE, with 0 of 1" in said
    assert "vary by 0.0001 of the frame; those of main by 0.0200" in said


def test_beginnings_are_compared_in_every_head():
    few = [
        cell("fox", way(shots=0, init=init, variant=variant), level)
        for variant in ("main", "film")
        for init, level in (("mean", 0.2), ("random", 0.3), ("interpolated", 0.25))
    ]
    inits = ("mean", "random", "interpolated")
    said = " ".join(statements(findings(few, variants=FILM, inits=inits, shots=(0,))))
    assert "From no image" in said
    assert "lower RMSE than one that begins at random in 2 of 2 heads" in said


def test_failures_and_what_was_not_done_are_said():
    broken = cell("fox", way("decoder"), 0.1, error="The loss became nan.")
    found = [cell("fox", way(shots=0), 0.2), cell("fox", way(), 0.1), broken]
    said = " ".join(statements(findings(found)))
    assert "1 cells failed and have no part in any number: decoder on fox" in said
    assert "The decoder was not fine-tuned" in said


def test_the_headline_is_the_largest_number_of_images_that_all_have():
    found = [*cells(), cell("fox", way(shots=20), 0.1), cell("fox", way(shots=ALL), 0.1)]
    assert findings(found, shots=(0, 5, 20, ALL)).headline == 5


def test_the_page_is_whole_and_holds_every_part():
    text = page(
        findings(variants=FILM),
        pictures=[PosePicture(caption="fox, best", panels=(("marked", b"jpeg"),))],
    )
    headings = ("What was found", "Parameters against error", "Ways to adapt", "Other heads")
    for heading in (*headings, "Token only, 5 images", "Poses", "Trained heads", "Provenance"):
        assert f"<h2>{heading}" in text
    assert "12 images beside its test half" in text
    assert "resamples of 3 seeds and of 4 images" in text
    assert "$" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)
    assert not re.search(r"\bnan\b", text)


def test_names_of_identities_are_text_and_no_markup():
    found = [cell("<b>fox", way(shots=0), 0.2), cell("<b>fox", way(), 0.1)]
    assert "<b>fox" not in page(findings(found))


def numbers(svg, tag, name):
    found = ET.fromstring(svg).iter(tag)
    return [float(each.attrib[name]) for each in found]


def test_more_parameters_lie_to_the_right_and_none_lies_left_of_all():
    dots = [Dot(name=str(x), x=x, y=0.1) for x in (0, 768, 7_940_290)]
    svg = pareto_chart(dots, dots[:1], title="t", y_label="RMSE")
    places = numbers(svg, "circle", "cx")
    assert places == sorted(places)
    assert places[0] < places[1] - 60
    # Four powers of ten are four equal steps.
    assert (places[2] - places[1]) / math.log10(7_940_290 / 768) == pytest.approx(71, rel=0.2)


def test_names_cover_neither_dots_nor_each_other():
    dots = [Dot(name=f"name {n}", x=1000 + 10 * n, y=0.1 + 0.0005 * n) for n in range(4)]
    far = Dot(name="far", x=1_000_000, y=0.5)
    svg = pareto_chart([*dots, far], [far], title="t", y_label="RMSE")
    texts = [e for e in ET.fromstring(svg).iter("text") if e.get("class") == "name"]
    boxes = [(float(e.attrib["x"]), float(e.attrib["y"]), len(e.text or "")) for e in texts]
    for n, (x, y, length) in enumerate(boxes):
        for other_x, other_y, _ in boxes[n + 1 :]:
            assert abs(y - other_y) >= 12 or not x - 6 * length < other_x < x + 6 * length


def test_intervals_have_a_colour_only_where_they_exclude_zero():
    bars = [
        Bar(name="up", value=2, low=1, high=3),
        Bar(name="down", value=-2, low=-3, high=-1),
        Bar(name="unsure", value=1, low=-1, high=3),
        Bar(name="alone", value=1, low=None, high=None),
    ]
    svg = intervals_chart(bars, title="t", x_label="x")
    styles = [each.get("class") for each in ET.fromstring(svg).iter("circle")]
    assert styles == ["c1", "c2", "off", "off"]
    places = numbers(svg, "circle", "cx")
    assert places[1] < places[2] < places[0]


def test_what_has_no_number_has_no_dot():
    svg = shots_chart({"a": [0.3, math.nan, 0.1]}, ["0", "1", "5"], title="t", y_label="RMSE")
    assert len(numbers(svg, "circle", "cx")) == 2
    assert "nan" not in svg
    assert "dashed" not in legend(["a"])
    assert colour(7) == "c2 dashed"


def test_a_plane_shows_zero_and_intervals():
    dots = [Dot(name="fox", x=0.1, y=5, low=2, high=8), Dot(name="cow", x=0.2, y=6)]
    svg = plane_chart(dots, title="t", x_label="x", y_label="y")
    assert len(numbers(svg, "circle", "cy")) == 2
    assert svg.count('class="c1 thin"') == 1


def test_variants_go_by_name_or_with_options_of_their_own():
    assert parse_variant("film") == ("film", {"injection": "film"})
    assert parse_variant("mine:layers=2,ff=64") == ("mine", {"layers": "2", "ff": "64"})
    with pytest.raises(NotFoundError, match="no_margin"):
        parse_variant("nomargin")
    for wrong in ("mine:", "mine:layers", ":layers=2"):
        with pytest.raises(InvalidInputError, match="deep:layers=2"):
            parse_variant(wrong)
