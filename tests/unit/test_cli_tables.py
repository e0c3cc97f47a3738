from __future__ import annotations

import json
import math

import pytest

from cli.sql_command import rows_text
from cli.tables import cell, count, duration, facts, interval, metrics, size, table


def test_columns_are_aligned_and_numbers_stand_to_the_right():
    assert table(["name", "rows"], [["a", 5], ["bcdef", 1200]]).splitlines() == [
        "name   rows",
        "-----  ----",
        "a         5",
        "bcdef  1200",
    ]


def test_a_table_without_rows_shows_its_columns():
    assert table(["name", "rows"], []).splitlines() == ["name  rows", "----  ----"]


def test_sizes_with_units_stand_to_the_right():
    assert table(["size"], [["1.0 MB"], ["900 B"]]).splitlines()[2:] == ["1.0 MB", " 900 B"]


def test_facts_are_two_columns():
    assert facts({"a": 1, "long": None}) == "a     1\nlong  -"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (2.5e9, "2.5 GB"),
        (7e15, "7000.0 TB"),
    ],
)
def test_sizes(n_bytes, text):
    assert size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_metric_carries_its_interval():
    assert interval(0.4123, 0.39, 0.4331, unit="m") == "0.412 m [0.390, 0.433]"
    assert interval(0.4123, None, None) == "0.412"
    assert interval(0.4123, math.nan, math.nan) == "0.412"


def test_cells():
    assert [cell(value) for value in (None, 1.0, 0.123456, (1, 2), {"a": 1}, "x", math.nan)] == [
        "-",
        "1",
        "0.1235",
        "1, 2",
        "a 1",
        "x",
        "nan",
    ]


def test_counts():
    assert (count(1, "image"), count(1200, "image")) == ("1 image", "1,200 images")


def test_metrics_are_listed_with_their_intervals():
    text = metrics({"rmse": 0.41234, "delta1": 0.5}, {"rmse": [0.4, 0.5], "delta1": None})
    assert text.splitlines()[2:] == ["rmse    0.4123  [0.4000, 0.5000]", "delta1  0.5000  -"]


ROWS = [{"name": "a,b", "value": 0.125}, {"name": None, "value": math.nan}]


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("csv", 'name,value\n"a,b",0.125\n,nan\n'),
        ("jsonl", '{"name": "a,b", "value": 0.125}\n{"name": null, "value": null}\n'),
        ("table", "name  value\n----  -----\na,b   0.125\n-       nan\n"),
    ],
)
def test_rows_are_written_in_each_style(style, text):
    assert rows_text(["name", "value"], ROWS, style) == text


def test_the_json_style_is_one_array():
    assert json.loads(rows_text(["name", "value"], ROWS, "json")) == [
        {"name": "a,b", "value": 0.125},
        {"name": None, "value": None},
    ]


def test_of_hundreds_of_metrics_the_first_are_shown_and_the_rest_counted():
    text = metrics({f"iou/{number}": 0.5 for number in range(204)}, {})
    assert "iou/29 " in text
    assert "iou/30 " not in text
    assert text.endswith("174 more metrics: --json lists all.")
