from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from heads.svg import Mark, Series, histogram, line_chart, smooth, ticks


def elements(text, name):
    return ET.fromstring(text).findall(f".//{name}")


def points(text, style):
    (line,) = [one for one in elements(text, "polyline") if one.get("class") == style]
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 250, [50, 100, 150, 200, 250]), (-1, 1, None)],
)
def test_ticks_are_round_and_inside(low, high, expected):
    found = ticks(low, high)
    assert 3 <= len(found) <= 11
    assert all(low - 1e-9 <= each <= high + 1e-9 for each in found)
    assert expected is None or found == pytest.approx(expected)


def test_smoothing_averages_with_what_came_before():
    assert smooth([2, 4, 6, 8], 2) == [2, 3, 5, 7]
    assert smooth([2, 4], 9) == [2, 3]


def test_more_stands_higher_and_later_stands_to_the_right():
    one = Series(name="loss", x=[0, 10, 20], y=[3.0, 1.0, 2.0], style="train")
    drawn = points(line_chart([one], title="loss"), "train")
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x0 < x1 < x2
    assert y0 < y2 < y1


def test_a_spike_of_a_faint_line_does_not_flatten_the_rest():
    jumps = Series(name="each", x=range(300), y=[1000.0] + [1.0] * 299, style="faint")
    calm = Series(name="mean", x=[0, 299], y=[2.0, 1.0], style="train")
    text = line_chart([jumps, calm], title="loss")
    (_, high), (_, low) = points(text, "train")
    assert low - high > 80
    assert min(y for _, y in points(text, "faint")) >= 0


def test_what_is_not_finite_is_not_drawn():
    one = Series(name="loss", x=[0, 1, 2], y=[1.0, float("nan"), 2.0], style="train")
    assert len(points(line_chart([one], title="loss"), "train")) == 2


def test_a_constant_and_a_single_point_can_be_drawn():
    one = Series(name="loss", x=[5], y=[1.0], style="held-out")
    assert "nan" not in line_chart([one], title="loss", marks=[Mark(x=5, name="best")])
    assert "nan" not in histogram([1.0, 1.0, 1.0], title="scores")


def test_names_are_escaped():
    text = histogram([1.0, 2.0], title="<b>", marks=[Mark(x=1.5, name="a & b")])
    assert "<b>" not in text
    assert "a &amp; b" in text


def test_every_value_is_counted_in_some_bar():
    text = histogram([0.0, 1.0, 1.0, 4.0], title="scores")
    bars = [bar for bar in elements(text, "rect") if float(bar.get("height")) > 0]
    heights = sorted(float(bar.get("height")) for bar in bars)
    assert len(bars) == 3
    assert heights[-1] == pytest.approx(2 * heights[0], rel=0.01)
