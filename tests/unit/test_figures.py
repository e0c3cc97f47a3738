"""Figures of finished runs: what may stand in one, the numbers behind it, the picture."""

from __future__ import annotations

import copy
import csv
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from cli.common import exit_code
from cli.figure_command import figure_csv
from cli.heads_app import heads
from featstore.errors import NotFoundError
from featstore.latency import Latency
from heads.charts import figure_png
from heads.figures import FIGURES, FigureData, make_figure, rank_correlation
from heads.speed import latencies_of, speed_figure
from heads.table import Entry, make_table

TASKS = {  # metric, options
    "depth.v1": ("rmse", {"crop": "auto"}),
    "segmentation.v1": ("miou@native", {"classes": 6, "names": ""}),
    "boundaries.v1": ("f_ods", {}),
}
RECORD = {
    "status": "done",
    "normed_taps": [],
    "labels": {"kind": "depth", "data": None},
    "training": {"optimizer": "adamw"},
    "protocol": {},
    "steps": 250,
}


def entry(
    value,
    *,
    task="depth.v1",
    backbone="net",
    head="deap.v1",
    parameters=40_000,
    size=224,
    tap="norm",
    options=None,
    lr=0.01,
    seed=0,
    images="m",
):
    metric, task_options = TASKS[task]
    run_id = f"{task}/{backbone}{size}{tap}/{head}{options}{lr}/{seed}/{images}"
    record = {
        **copy.deepcopy(RECORD),
        "head": head,
        "task": task,
        "feature_sets": [f"{backbone}@{size}"],
        "feature_set_names": [f"{backbone}@{size}"],
        "backbone": {"name": backbone, "tag": "x"},
        "plan": {"image_size": [size, size], "resize": "squash"},
        "taps": [tap],
        "tap_shapes": [{"tap": tap, "dim": 8, "grid": [16, 16], "n_prefix": 0}],
        "parameters": parameters,
        "options": {
            "head": options or {},
            "task": task_options,
            "loop": {},
            "train": {"lr": lr, "seed": seed},
        },
        "seed": seed,
        "measured": {
            "split": "test",
            "images": 100,
            "primary_metric": metric,
            "metrics": {metric: value},
            "intervals": {metric: [value - 0.05, value + 0.05]},
        },
    }
    return Entry(
        run_id=run_id,
        record=record,
        datasets=("rooms",),
        measured_images=images,
        trained_images="400 images [t]",
    )


def made(kind: str, *entries: Entry) -> FigureData:
    return make_figure(kind, make_table(entries))


def shares(data: FigureData) -> dict[str, float]:
    return {row["backbone"]: row["share"] for row in data.rows}


def three_backbones(task: str, values: tuple[float, ...]) -> list[Entry]:
    names = ("one", "two", "three")
    return [entry(v, task=task, backbone=n) for n, v in zip(names, values, strict=True)]


DEPTH = three_backbones("depth.v1", (0.4, 0.5, 0.8))
CLASSES = three_backbones("segmentation.v1", (0.8, 0.6, 0.4))
EDGES = three_backbones("boundaries.v1", (0.2, 0.7, 0.6))
HEADS_OF_ONE = [
    entry(0.5, parameters=20_000, options={"dim": 8}),
    entry(0.4, parameters=80_000, options={"dim": 32}),
    entry(0.6, parameters=2_000, head="linear.v1"),
]


def test_a_share_is_that_of_the_best_one_whichever_way_is_better():
    assert shares(made("relative", *DEPTH)) == pytest.approx({"one": 1, "two": 0.8, "three": 0.5})
    assert shares(made("relative", *CLASSES)) == pytest.approx(
        {"one": 1, "two": 0.75, "three": 0.5}
    )


def test_the_interval_of_a_share_turns_round_where_less_is_better():
    rows = [*made("relative", *DEPTH).rows, *made("relative", *CLASSES).rows]
    assert all(row["share_low"] < row["share"] < row["share_high"] for row in rows)


def test_backbones_stand_in_one_order_over_all_tasks():
    data = made("relative", *CLASSES, *EDGES)
    assert [[bar.name for bar in panel.bars] for panel in data.panels] == [
        ["two", "three", "one"]
    ] * 2


def test_runs_of_other_images_do_not_enter_a_panel():
    other = entry(0.1, backbone="four", images="others")
    data = made("relative", *DEPTH, other)
    assert "four" not in shares(data)
    assert data.notes[0].startswith("1 of 4 finished runs is not drawn")


def test_runs_of_another_head_or_recipe_do_not_enter_a_comparison_of_backbones():
    others = (entry(0.1, backbone="four", head="maxa.v1"), entry(0.1, backbone="five", lr=0.1))
    assert set(shares(made("relative", *DEPTH, *others))) == {"one", "two", "three"}


def test_a_backbone_in_two_sizes_or_of_two_taps_has_two_names():
    sizes = made("relative", entry(0.4), entry(0.5, size=448), entry(0.6, backbone="other"))
    assert set(shares(sizes)) == {"net@224", "net@448", "other"}
    taps = made("relative", entry(0.4), entry(0.5, tap="block:3"))
    assert set(shares(taps)) == {"net norm", "net block:3"}


def test_the_budget_shows_each_head_over_its_parameters():
    data = made("budget", *HEADS_OF_ONE)
    (panel,) = data.panels
    assert {name: [dot.x for dot in dots] for name, dots in panel.series.items()} == {
        "deap": [20_000, 80_000],
        "linear": [2_000],
    }
    assert data.rows[0]["options"] == "dim 32"
    assert (data.rows[0]["low"], data.rows[0]["high"]) == pytest.approx((0.35, 0.45))


def test_the_budget_is_one_of_one_backbone_and_of_the_best_recipe():
    others = (entry(0.1, backbone="other"), entry(0.45, lr=0.1, head="linear.v1", parameters=2_000))
    data = made("budget", *HEADS_OF_ONE, *others)
    assert {row["backbone"] for row in data.rows} == {"net@224"}
    assert [row["score"] for row in data.rows if row["head"] == "linear.v1"] == [0.45]


def test_a_rank_correlation_is_positive_where_both_tasks_order_backbones_alike():
    alike = made("correlation", *DEPTH, *CLASSES)  # less is better in one of them
    assert alike.rows[0]["rank_correlation"] == pytest.approx(1)
    assert alike.panels[0].turned == (True, False)
    against = made("correlation", *CLASSES, *EDGES)
    assert against.rows[0]["rank_correlation"] == pytest.approx(-0.5)


def test_a_rank_correlation_is_that_of_scipy_also_with_ties():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 5, 20), random.integers(0, 5, 20)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize(
    ("kind", "entries", "missing"),
    [
        ("relative", [], "the store has no finished run"),
        ("relative", DEPTH[:1], "1 backbone .one."),
        ("budget", DEPTH, "1 head .deap."),
        ("correlation", DEPTH, "1 task .depth."),
        ("correlation", [*DEPTH[:2], *CLASSES[:2]], "2 backbones .one, two."),
    ],
)
def test_a_figure_that_lacks_runs_says_which_in_one_sentence(kind, entries, missing):
    with pytest.raises(NotFoundError, match=missing) as caught:
        made(kind, *entries)
    assert str(caught.value).startswith(f"The figure {kind} needs finished runs of ")
    assert str(caught.value).count(". ") == 0


def test_an_unknown_figure_names_the_known_ones():
    with pytest.raises(NotFoundError, match="budget, correlation, relative"):
        made("speed", *DEPTH)


FULL = [*DEPTH, *CLASSES, *EDGES, entry(0.6, backbone="one", parameters=2_000, head="linear.v1")]


@pytest.mark.parametrize("kind", list(FIGURES))
def test_every_figure_is_a_picture_of_the_same_bytes_each_time(kind):
    data = made(kind, *FULL)
    png = figure_png(data)
    image = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert image.min() < 60  # text
    assert image[-1].min() == 255  # nothing is cut at the bottom
    assert figure_png(data) == png


@pytest.mark.parametrize("kind", list(FIGURES))
def test_the_table_behind_a_figure_has_one_row_a_value(kind):
    data = made(kind, *FULL)
    rows = list(csv.DictReader(io.StringIO(figure_csv(data))))
    shown = [len(p.bars) or sum(map(len, p.series.values())) for p in data.panels]
    assert len(rows) == sum(shown)
    assert all(float(row["score"]) for row in rows)


@pytest.mark.parametrize(("name", "starts"), [("x.csv", b"task,"), ("x.png", b"\x89PNG")])
def test_the_command_writes_what_the_file_ends_in(tmp_path, monkeypatch, capsys, name, starts):
    monkeypatch.setattr("heads.runs.list_runs", lambda *given, **named: [])
    monkeypatch.setattr("heads.entries.read_entries", lambda runs: (DEPTH, {}))
    out = tmp_path / name
    assert exit_code(heads, ["figure", "relative", "--out", str(out), "--json"]) == 0
    assert out.read_bytes().startswith(starts)
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 3


def test_without_runs_the_command_fails_with_the_sentence_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("heads.runs.list_runs", lambda *given, **named: [])
    out = tmp_path / "x.png"
    assert exit_code(heads, ["figure", "budget", "--out", str(out)]) == 1
    assert "the store has no finished run" in capsys.readouterr().err
    assert not out.exists()


def latency(ms, *, device="GPU", blocks=12):
    return Latency(
        device="cuda", device_name=device, blocks=blocks, depth=12, batch_size=8, batches=10,
        seconds=ms * 8 / 1000, libraries={},
    )  # fmt: skip


def speed(entries, times, **options):
    """Make the figure; `times` are latencies by the backbone's name."""
    named = {e.run_id: times.get(e.record["backbone"]["name"], ()) for e in entries}
    return speed_figure(make_table(entries), named, **options)


def test_speed_sets_the_time_of_each_backbone_against_its_score():
    times = {"one": [latency(5.0)], "two": [latency(2.0)], "three": [latency(8.0)]}
    data = speed([*DEPTH, *CLASSES], times)
    assert [panel.title for panel in data.panels] == [
        "depth: rmse ↓",
        "segmentation: miou@native ↑",
    ]
    dots = data.panels[0].series[""]
    assert [(dot.name, dot.x, dot.y) for dot in dots] == [
        ("two", pytest.approx(2.0), 0.5),
        ("one", pytest.approx(5.0), 0.4),
        ("three", pytest.approx(8.0), 0.8),
    ]
    assert "timed on GPU" in data.panels[0].subtitle
    factors = {row["backbone"]: row["times_fastest"] for row in data.rows[:3]}
    assert factors == pytest.approx({"one": 2.5, "two": 1.0, "three": 4.0})
    assert figure_png(data) == figure_png(data)


def test_speed_takes_the_deepest_run_and_one_device():
    times = {
        "one": [latency(1.0, blocks=3), latency(5.0), latency(50.0, device="CPU")],
        "two": [latency(2.0)],
        "three": [latency(70.0, device="Abacus")],
    }
    data = speed(DEPTH, times)
    assert {row["backbone"]: row["ms_per_image"] for row in data.rows} == pytest.approx(
        {"one": 5.0, "two": 2.0}
    )
    assert "Not drawn, as their latency was not measured on GPU: three." in data.notes[0]
    together = speed(DEPTH, times, is_any_device=True)
    assert {row["device"] for row in together.rows} == {"Abacus", "GPU"}
    assert "timed on Abacus and GPU" in together.panels[0].subtitle


def test_speed_without_a_latency_names_the_command():
    with pytest.raises(NotFoundError, match=r"of one, three, two was not measured.*featstore extr"):
        speed(DEPTH, {})


def test_speed_on_different_devices_is_refused_unless_asked():
    times = {"one": [latency(5.0)], "two": [latency(2.0, device="CPU")]}
    with pytest.raises(NotFoundError, match=r"timed on CPU and GPU. --any-device"):
        speed(DEPTH, times)
    assert len(speed(DEPTH, times, is_any_device=True).rows) == 2


def test_speed_without_a_run_says_so():
    with pytest.raises(NotFoundError, match="the store has no finished run"):
        speed([], {})


def test_latencies_are_read_by_feature_set(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/latency-one@224.json").write_text(
        json.dumps({"latency": [asdict(latency(3.0))]})
    )
    found = latencies_of(tmp_path, DEPTH)
    assert [found[each.run_id] for each in DEPTH] == [(latency(3.0),), (), ()]


def test_any_device_is_for_speed_alone(tmp_path):
    words = ["figure", "budget", "--out", str(tmp_path / "a.png"), "--any-device"]
    assert exit_code(heads, [*words, "--store", str(tmp_path)]) == 2
