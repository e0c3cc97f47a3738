"""A head a tap, side by side: which tap serves which task."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest

import heads
from cli.common import FAILED, exit_code
from cli.heads_app import heads as app
from cli.layers_command import map_csv, map_text
from featstore.errors import InvalidInputError, NotFoundError
from featstore.types import TapShape
from heads.layers import map_layers
from heads.runs import find_run, list_runs
from tests.fakes import DIM, GRID, SHAPES, FakeReader, Things, fake_extract

BLOCKS = tuple(TapShape(tap=f"block:{n}", dim=DIM, grid=GRID, n_prefix=1) for n in (2, 10))
SCALE = {"block:2": 0.0, "block:10": 2.0}  # the first says nothing; the second equals norm
TAPS = ("block:2", "block:10", "norm")
TWO = ["norm", "block:10"]
COMMON = {"steps": 8, "batch_size": 8, "device": "cpu"}
SMALL = {"checks": 2, "size": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("layers") / "s.zarr"
    fake_extract(path, [Things(30)], shapes=[*SHAPES[1:], *BLOCKS], scale=SCALE)
    return path


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "s.zarr")


@pytest.fixture(scope="module")
def mapped(made, tmp_path_factory):
    """All taps against two tasks."""
    path = shutil.copytree(made, tmp_path_factory.mktemp("mapped") / "s.zarr")
    found = map_layers(path, tasks=["depth", "segmentation"], options=SMALL, **COMMON)
    return path, found


def test_every_tap_gets_the_head_it_would_get_alone(mapped):
    path, found = mapped
    assert found.taps == TAPS  # from first to last, block 10 behind block 2
    assert [(cell.task, cell.tap) for cell in found.cells] == [
        (task, tap) for task in ("depth.v1", "segmentation.v1") for tap in TAPS
    ]
    cell = found.cells[1]
    options = {**SMALL, "pictures": 0}
    alone = heads.train(
        path, task="depth", head="linear", taps=["block:10"], options=options, **COMMON
    )
    assert cell.metrics == alone.metrics
    assert (cell.value, cell.metric, cell.split) == (alone.metrics["rmse"], "rmse", "test")
    assert [cell.low, cell.high] == alone.intervals["rmse"]
    assert cell.held_out_loss == alone.best_loss


def test_the_lowest_loss_on_the_held_out_part_chooses_one_tap_a_task(mapped):
    _, found = mapped
    for task in found.tasks:
        cells = [cell for cell in found.cells if cell.task == task]
        lowest = int(np.argmin([cell.held_out_loss for cell in cells]))
        assert [cell.is_best for cell in cells] == [at == lowest for at in range(3)]
        assert found.best(task) == cells[lowest]
        assert found.best(task).tap != "block:2"


def test_tasks_of_the_same_rows_share_a_pass(mapped):
    _, found = mapped
    assert found.n_passes == 1
    assert found.notes == ()


def test_one_tap_of_two_with_equal_losses_is_best(store):
    # The same numbers twice: without the final norm the two differ by nothing.
    found = map_layers(store, tasks=["depth"], taps=TWO, options=SMALL, tap_norm="none", **COMMON)
    assert found.cells[0].held_out_loss == found.cells[1].held_out_loss
    assert [cell.is_best for cell in found.cells] == [True, False]


def test_a_task_of_whole_images_gets_a_head_that_pools(store):
    found = map_layers(store, tasks=["classification"], taps=TWO, options={"checks": 2}, **COMMON)
    assert found.heads == ("linear_pool",)
    assert all(cell.error is None for cell in found.cells)


def test_without_a_held_out_part_none_is_best(store):
    options = {**SMALL, "pictures": 1}
    found = map_layers(
        store, tasks=["depth"], taps=TWO, val_fraction=0.0, options=options, **COMMON
    )
    assert found.best("depth.v1") is None
    assert all(cell.value is not None for cell in found.cells)
    assert "none is called best" in map_text(found)
    assert all((each.path / "pictures").is_dir() for each in list_runs(store))


def test_pictures_are_drawn_only_where_they_are_asked_for(mapped):
    path, found = mapped
    kept = [find_run(path, cell.run_id).path for cell in found.cells]
    assert len(set(kept)) == 6
    assert not any((folder / "pictures").exists() for folder in kept)


def test_taps_stored_for_different_images_are_told(store):
    extra = FakeReader(30, name="more", seed=1)
    fake_extract(store, [extra], shapes=SHAPES[1:])  # the tap norm alone
    found = map_layers(store, tasks=["depth"], taps=TWO, options=SMALL, **COMMON)
    (note,) = found.notes
    assert "depth.v1 are stored for different images" in note
    assert "featstore extract" in note


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"tasks": []}, InvalidInputError, "name a task"),
        ({"tasks": ["depth"], "taps": ["norm"]}, InvalidInputError, "at least 2 dense taps"),
        (
            {"tasks": ["depth"], "taps": ["norm", "norm"]},
            InvalidInputError,
            "at least 2 dense taps",
        ),
        ({"tasks": ["depth", "sleep"]}, NotFoundError, "Unknown task"),
        ({"tasks": ["depth"], "taps": ["norm", "block:7"]}, NotFoundError, "--taps block:7"),
        ({"tasks": ["depth"], "head": "linear_pool"}, InvalidInputError, "another head for depth"),
    ],
)
def test_what_cannot_be_mapped_is_refused_before_a_run_begins(store, arguments, error, match):
    with pytest.raises(error, match=match):
        map_layers(store, **arguments, **COMMON)
    assert list_runs(store) == []


def test_a_task_without_labels_is_refused_before_another_is_learned(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(20)])
    with pytest.raises(InvalidInputError, match=r"No stored row has classes labels.*depth"):
        map_layers(path, tasks=["depth", "segmentation"], **COMMON)
    assert list_runs(path) == []


def test_the_text_has_taps_against_tasks(mapped):
    lines = map_text(mapped[1]).splitlines()
    assert "depth.v1 (linear): test rmse ↓" in lines[0]
    assert "segmentation.v1 (linear): test miou@native ↑" in lines[0]
    assert [line.split()[0] for line in lines[2:5]] == list(TAPS)
    assert sum(line.count("best") for line in lines[2:5]) == 2
    assert all(line.count("[") == 2 for line in lines[2:5])
    assert "the test split does not choose" in lines[-1]


def test_the_csv_has_a_line_a_cell_unrounded(mapped):
    _, found = mapped
    lines = list(csv.DictReader(io.StringIO(map_csv(found))))
    for line, cell in zip(lines, found.cells, strict=True):
        assert (line["task"], line["tap"]) == (cell.task, cell.tap)
        assert float(line["value"]) == cell.value
        assert float(line["held_out_loss"]) == cell.held_out_loss
        assert line["is_best"] == str(cell.is_best)


def run(store, *args):
    fixed = ["--steps", "4", "--batch-size", "8", "--device", "cpu", "--set", "size=16"]
    taps = [part for tap in TWO for part in ("--tap", tap)]
    return exit_code(
        app, ["layers", "--store", str(store), "--task", "depth", *taps, *fixed, *args]
    )


def test_the_command_prints_the_csv(store, capsys):
    assert run(store, "--format", "csv", "--val-fraction", "0.3", "--seed", "1") == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["tap"] for line in lines] == ["block:10", "norm"]
    record = find_run(store, lines[0]["run_id"]).record
    assert (record["seed"], record["validation"]["fraction"]) == (1, 0.3)


def test_a_head_that_fails_is_named_and_the_map_is_whole(store, capsys):
    assert run(store, "--lr", "1e30", "--json") == FAILED
    captured = capsys.readouterr()
    cells = json.loads(captured.out)["cells"]
    assert [cell["tap"] for cell in cells] == ["block:10", "norm"]
    assert all(cell["value"] is None and cell["error"] for cell in cells)
    assert "depth.v1 on block:10: " in captured.err
