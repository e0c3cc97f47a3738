from __future__ import annotations

import copy
import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.common import exit_code
from cli.heads_app import heads
from featstore.errors import NotFoundError
from heads.entries import read_entries
from heads.runs import Run, write_record
from heads.selection import SCHEMA
from heads.table import SEEDS, Entry, check_metrics, make_table

RECORD = {
    "status": "done",
    "head": "linear.v1",
    "task": "depth.v1",
    "feature_sets": ["aaaa"],
    "feature_set_names": ["net@224"],
    "backbone": {"name": "net", "tag": "in1k", "n_parameters": 22_000_000},
    "plan": {"image_size": [224, 224], "resize": "squash"},
    "taps": ["norm"],
    "normed_taps": [],
    "tap_shapes": [{"tap": "norm", "dim": 8, "grid": [16, 16], "n_prefix": 0}],
    "parameters": 10_486,
    "labels": {"kind": "depth", "data": None},
    "options": {
        "head": {"cls": False, "size": 224},
        "task": {"crop": "auto"},
        "loop": {"schedule": "cosine", "pictures": 4},
        "train": {"lr": 0.01, "seed": 0, "steps": 250},
    },
    "training": {"optimizer": "adamw", "steps": 250},
    "steps": 250,
    "seed": 0,
    "protocol": {"crop": "auto", "loss": "SigLoss"},
    "measured": {
        "split": "test",
        "images": 100,
        "primary_metric": "rmse",
        "metrics": {"rmse": 0.5, "delta1": 0.8},
        "intervals": {"rmse": [0.4, 0.6], "delta1": None},
    },
}


def record(rmse=0.5, *, seed=0, **changes):
    """A record with some values changed; a name with dots goes down."""
    made = copy.deepcopy(RECORD)
    made["seed"] = made["options"]["train"]["seed"] = seed
    made["measured"]["metrics"]["rmse"] = rmse
    for name, value in changes.items():
        *path, last = name.split("__")
        place = made
        for part in path:
            place = place[part]
        place[last] = value
    return made


def entry(run_id, *, data=("rooms",), measured="m", trained="400 images [t]", **changes):
    return Entry(
        run_id=run_id,
        record=record(**changes),
        datasets=data,
        measured_images=measured,
        trained_images=trained,
    )


def ids(board):
    return [line.run_ids for line in board.lines]


def test_runs_are_ranked_best_first():
    table = make_table([entry("a", rmse=0.5), entry("b", rmse=0.4, options__train__lr=0.1)])
    (board,) = table.boards
    assert ids(board) == [("b",), ("a",)]
    assert [line.rank for line in board.lines] == [1, 2]
    assert [line.recipe for line in board.lines] == [{"lr": 0.1}, {"lr": 0.01}]
    assert table.reasons == ()


def test_where_more_is_better_the_largest_is_first(monkeypatch):
    monkeypatch.setattr("heads.tasks.depth.DepthTask.is_lower_better", False)
    (board,) = make_table(
        [entry("a", rmse=0.5), entry("b", rmse=0.7, options__train__lr=0.1)]
    ).boards
    assert ids(board) == [("b",), ("a",)]


def test_runs_that_differ_in_nothing_but_the_seed_are_one_line():
    made = [entry(f"r{seed}", seed=seed, rmse=0.4 + 0.1 * seed) for seed in range(3)]
    (line,) = make_table(made[::-1]).boards[0].lines
    assert (line.seeds, line.run_ids) == ((0, 1, 2), ("r0", "r1", "r2"))
    value = line.values["rmse"]
    assert (value.value, value.low, value.high) == pytest.approx((0.5, 0.4, 0.6))
    assert value.kind == SEEDS


def test_one_run_keeps_its_interval():
    (line,) = make_table([entry("a")]).boards[0].lines
    assert (line.values["rmse"].low, line.values["rmse"].high) == (0.4, 0.6)
    assert line.values["rmse"].kind == "95 % interval"
    assert line.values["delta1"].kind == "none"


def test_a_repeated_run_counts_once_and_is_named():
    table = make_table([entry("old", rmse=0.9), entry("new", rmse=0.5)])
    assert ids(table.boards[0]) == [("new",)]
    assert table.left_out == {"old": "new repeats it and is newer."}


@pytest.mark.parametrize(
    "change",
    [
        {"options__head": {"cls": True, "size": 224}},
        {"options__train__lr": 0.1},
        {"options__loop__schedule": "constant"},
        {"feature_sets": ["bbbb"]},
        {"taps": ["block:1"]},
        {"head": "bicubic.v1"},
        {"trained": "200 images [u]"},
    ],
)
def test_whatever_else_differs_makes_another_line_of_the_same_board(change):
    table = make_table([entry("a"), entry("b", seed=1, **change)])
    assert len(table.boards) == 1
    assert len(table.boards[0].lines) == 2


def test_what_decides_no_number_makes_no_other_line():
    table = make_table([entry("a"), entry("b", seed=1, options__loop__pictures=0)])
    assert len(table.boards[0].lines) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": ("nyu",)}, "data sets (rooms, nyu)"),
        ({"measured": "n"}, "which images (as many)"),
        ({"measured__split": "val"}, "split (test, val)"),
        ({"measured__images": 90, "measured": "n"}, "images (100, 90)"),
        ({"plan__resize": "letterbox"}, "resize (squash, letterbox)"),
        ({"plan": None}, "resize (squash, not recorded)"),
        ({"protocol__crop": "eigen", "options__task__crop": "eigen"}, "crop (auto, eigen)"),
        ({"labels__data": "nyu:/there"}, "labels (those of the store, nyu:/there)"),
        ({"measured__primary_metric": "delta1"}, "primary metric (rmse, delta1)"),
    ],
)
def test_runs_that_cannot_be_compared_are_not_ranked_together(change, reason):
    one, other = entry("a"), entry("b", **change)
    table = make_table([one, other])
    assert [ids(board) for board in table.boards] == [[("a",)], [("b",)]]
    assert table.reasons == (f"Board 2 is not ranked with board 1: they differ in {reason}.",)


def test_where_a_rule_cuts_images_the_input_size_must_be_the_same():
    sizes = ([224, 224], [224, 448])
    for resize, n_boards in (("squash", 1), ("crop", 2), ("via:256", 2)):
        made = [
            entry(f"r{size}", plan={"image_size": size, "resize": resize}, feature_sets=[str(size)])
            for size in sizes
        ]
        assert len(make_table(made).boards) == n_boards


def test_another_loss_is_another_recipe_and_no_other_measurement():
    assert len(make_table([entry("a"), entry("b", protocol__loss="L1", seed=1)]).boards) == 1


def test_what_is_not_a_number_stands_last_without_a_rank():
    table = make_table([entry("a", rmse=None), entry("b", seed=1, options__train__lr=0.1)])
    assert [line.rank for line in table.boards[0].lines] == [1, None]
    assert ids(table.boards[0])[-1] == ("a",)


def test_random_weights_and_alike_feature_sets_are_told_apart():
    random = {"name": "net", "tag": "random:0"}
    made = [
        entry("a", feature_sets=["random_set"], backbone=random),
        entry("b", feature_sets=["one_one"]),
        entry("c", feature_sets=["two_two"]),
    ]
    names = {line.run_ids[0]: line.backbone for line in make_table(made).boards[0].lines}
    assert names == {"a": "net (random:0)", "b": "net [one_on]", "c": "net [two_tw]"}


def test_only_options_that_are_not_the_default_are_shown():
    table = make_table([entry("a", options__head={"cls": True, "size": 224})])
    assert table.boards[0].lines[0].options == {"cls": True}


def test_a_task_chooses_its_runs_and_an_unknown_one_is_refused():
    assert len(make_table([entry("a")], task="depth").boards) == 1
    with pytest.raises(NotFoundError, match="Did you mean 'depth'"):
        make_table([entry("a")], task="dept")


def test_a_task_that_is_not_installed_is_left_out():
    table = make_table([entry("a", task="other.v1")])
    assert table.boards == ()
    assert table.left_out == {"a": "Its task other.v1 is not installed here."}


def test_an_unknown_metric_is_refused():
    table = make_table([entry("a")])
    check_metrics(table, ["delta1"])
    with pytest.raises(NotFoundError, match="Did you mean 'delta1'"):
        check_metrics(table, ["delta"])


def write_run(folder, run_id, *, test=(2, 3), rows=0, **changes):
    """Write a run's record and tables; `rows` moves the numbers of its rows."""
    write_record(folder / run_id, {**record(**changes), "created": run_id})
    lines = [
        {
            "part": "test" if number in test else "val" if number == 1 else "train",
            "row": number + rows,
            "item": f"i{number}",
            "dataset": "rooms",
            "path": f"{number}.png",
            "group": "g",
            "image_key": f"k{number}",
            "view": "plain",
        }
        for number in range(4)
    ]
    pairs = pa.Table.from_pylist(lines, schema=SCHEMA)
    pq.write_table(pairs, folder / run_id / "pairs.parquet")
    measured = [line for line in lines if line["part"] == "test"]
    pq.write_table(pa.Table.from_pylist(measured), folder / run_id / "per_image.parquet")
    return Run(path=folder / run_id, record=record(**changes))


def test_equal_images_have_one_name_in_whatever_rows_they_lie(tmp_path):
    runs = [
        write_run(tmp_path, "a"),
        write_run(tmp_path, "b", rows=7),
        write_run(tmp_path, "c", test=(3,)),
    ]
    entries, left_out = read_entries(runs)
    assert left_out == {}
    assert entries[0].measured_images == entries[1].measured_images != entries[2].measured_images
    assert entries[0].trained_images == entries[1].trained_images
    assert entries[0].trained_images.startswith("2 images [")


def test_runs_that_cannot_be_ranked_come_with_the_reason(tmp_path):
    runs = [
        write_run(tmp_path, "failed", status="failed"),
        write_run(tmp_path, "unmeasured", measured=None),
        write_run(tmp_path, "damaged"),
    ]
    (tmp_path / "damaged" / "pairs.parquet").write_bytes(b"not parquet")
    entries, left_out = read_entries(runs)
    assert entries == []
    assert left_out["failed"] == "It is failed."
    assert left_out["unmeasured"].startswith("It was not measured")
    assert "pairs.parquet" in left_out["damaged"]


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path, "a_1", rmse=0.5)
    write_run(tmp_path, "b_2", rmse=0.45, seed=1)
    write_run(tmp_path, "c_3", rmse=0.4, plan__resize="letterbox")
    write_run(tmp_path, "d_4", status="failed")
    return tmp_path


def shown(capsys, folder, *args):
    assert exit_code(heads, ["table", "--runs", str(folder), *args]) == 0
    return capsys.readouterr()


def test_the_text_has_a_heading_a_board_and_says_why_there_are_two(folder, capsys):
    found = shown(capsys, folder, "--metric", "delta1")
    assert "Board 1: depth.v1 on rooms, test split, 100 images; resize squash" in found.out
    assert "0.475 (min 0.450, max 0.500)" in found.out
    assert "0.400 [0.400, 0.600]" in found.out
    assert "2 seeds" in found.out
    assert "16x16 norm" in found.out
    assert "22.000" in found.out
    assert "0.010" in found.out
    assert "not ranked with board 1: they differ in resize (squash, letterbox)" in found.out
    assert found.err == "Not ranked: d_4. It is failed.\n"


def test_a_head_that_learns_little_is_not_shown_as_learning_nothing(tmp_path, capsys):
    write_run(tmp_path, "a_1", parameters=113)
    assert "<0.001" in shown(capsys, tmp_path).out


def test_csv_json_and_text_tell_the_same(folder, capsys):
    lines = list(csv.DictReader(io.StringIO(shown(capsys, folder, "--format", "csv").out)))
    as_json = json.loads(shown(capsys, folder, "--format", "json").out)
    assert as_json == json.loads(shown(capsys, folder, "--json").out)
    from_json = [line for board in as_json["boards"] for line in board["lines"]]
    assert [float(line["rmse"]) for line in lines] == [
        line["values"]["rmse"]["value"] for line in from_json
    ]
    assert [line["parameters"] for line in lines] == ["10486", "10486"]
    assert [line["board"] for line in lines] == ["1", "2"]
    assert as_json["left_out"] == {"d_4": "It is failed."}


def test_latex_has_a_table_a_board_and_nothing_that_latex_would_misread(folder, capsys):
    text = shown(capsys, folder, "--format", "latex").out
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count(" & ") for line in body}) == 1
    assert r"P\_learn" in text
    assert r"rmse $\downarrow$" in text
    assert r"95 \% interval" in text


def test_without_a_finished_run_it_says_how_to_make_one(tmp_path, capsys):
    assert "heads train" in shown(capsys, tmp_path).err
