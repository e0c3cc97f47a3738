"""The page of a run: it stands alone, and says what the run says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import heads
from cli.common import exit_code
from cli.heads_app import heads as program
from featstore.errors import FormatError, InvalidInputError
from heads import sections
from heads.page import write_page
from heads.runs import read_run, write_record
from heads.sections import command_line, gallery
from heads.showcase import Picture, Scored, Showcase, choose, image_scores, read_scores
from heads.tasks import build_task
from tests.fakes import FakeReader, fake_extract

VOID = {"meta", "br", "img", "line", "rect", "circle", "polyline"}


class Outline(HTMLParser):
    """Collects what a page opens, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    store = tmp_path_factory.mktemp("page") / "features.zarr"
    fake_extract(store, [FakeReader(60)])
    report = heads.train(
        store,
        task="depth",
        taps=["norm"],
        steps=30,
        batch_size=8,
        lr=2e-3,
        device="cpu",
        options={"queries": 4, "checks": 4, "pictures": 2},
    )
    return store, report.run_id


@pytest.fixture
def store(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "features.zarr")


@pytest.fixture
def run(store, trained):
    return read_run(store / "runs" / trained[1])


@pytest.fixture(scope="module")
def page(trained):
    store, run_id = trained
    report = write_page(read_run(store / "runs" / run_id), device="cpu")
    return Path(report.path).read_text()


def test_the_page_needs_no_other_file(page):
    outline = Outline(page)
    assert outline.open == []
    assert outline.sources
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert not outline.tags & {"script", "link", "iframe", "object"}
    assert "http" not in re.sub(r'src="[^"]*"', "", page)
    assert "@import" not in page
    assert "url(" not in page


def test_it_has_all_its_sections_and_best_median_and_worst_images(page):
    assert Outline(page).headings == [
        "Metrics", "Training", "Images", "Configuration", "Provenance",
    ]  # fmt: skip
    assert re.findall("<h3>(Best|Median|Worst)</h3>", page) == ["Best", "Median", "Worst"]
    assert page.count("<svg") == 3
    assert page.count("<figure>") == 9


def test_it_says_what_was_measured(run, page):
    measured = run.record["measured"]
    for name, value in measured["metrics"].items():
        assert f"<td>{name}" in page
        assert f"{value:.3f}" in page
    low, high = measured["intervals"]["rmse"]
    assert f"95 % interval {low:.3f} to {high:.3f}" in page
    assert measured["note"] in page
    for text in (run.run_id, run.record["weights_sha256"], run.record["versions"]["torch"]):
        assert text in page


def test_its_images_are_the_best_the_median_and_the_worst(run, page):
    scored = sorted(read_scores(run, build_task("depth")), key=lambda one: one.score)
    shown = re.findall(r"<b>rmse ([\d.]+)</b> · ([^<]+)<", page)
    assert len(scored) == 12
    assert shown[0] == (f"{scored[0].score:.3f}", scored[0].path)
    assert shown[-3] == (f"{scored[-1].score:.3f}", scored[-1].path)
    assert {path for _, path in shown[3:6]} == {one.path for one in scored[4:7]}


def test_an_image_alone_has_the_metric_of_its_own_sums(run):
    task = build_task("depth")
    lines = [
        {"row": 0, "item": "a", "path": "p", "n_pixels": 4.0, "sum_squared_error": 16.0},
        {"row": 1, "item": "b", "path": "q", "n_pixels": 0.0, "sum_squared_error": 0.0},
    ]
    rest = (
        "sum_relative_error sum_log10_error sum_log_difference sum_squared_log_difference "
        "n_delta1 n_delta2 n_delta3"
    )
    assert image_scores(task, [{**dict.fromkeys(rest.split(), 0.0), **line} for line in lines]) == [
        2.0,
        None,
    ]
    mean = sum(one.score for one in read_scores(run, task)) / 12
    assert mean == pytest.approx(run.record["measured"]["metrics"]["rmse"])


def scores(*values):
    return [Scored(key=(i, str(i)), path=f"{i}.png", score=v) for i, v in enumerate(values)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 30])
def test_no_image_is_chosen_twice(n):
    chosen = choose(scores(*range(n)), is_lower_better=True, count=3)
    keys = [one.key for group in chosen.values() for one in group]
    assert len(keys) == len(set(keys)) == min(n, 3 * max(1, min(3, n // 3)))
    assert all(chosen.values())


def test_which_is_best_is_the_tasks_to_say():
    lower = choose(scores(3, 1, 2), is_lower_better=True, count=3)
    higher = choose(scores(3, 1, 2), is_lower_better=False, count=3)
    assert [lower[name][0].score for name in ("best", "median", "worst")] == [1, 2, 3]
    assert [higher[name][0].score for name in ("best", "median", "worst")] == [3, 2, 1]


def test_without_the_features_the_runs_own_pictures_are_shown_and_said_to_be(store, run, tmp_path):
    for folder in (store / "feature_sets").iterdir():
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    report = write_page(run, out=tmp_path / "pages", device="cpu")
    text = Path(report.path).read_text()
    assert report.path == str(tmp_path / "pages" / f"{run.run_id}.html")
    assert "could not be predicted again" in report.note
    assert "could not be predicted again" in text
    assert text.count("<figure>") == 2
    assert "Drawn at the end" in text


def test_without_a_test_or_held_out_part_there_are_no_images(run):
    write_record(run.path, {**run.record, "measured": None})
    text = Path(write_page(run.path, device="cpu").path).read_text()
    assert Outline(text).headings[0] == "Training"
    assert "Nothing was measured" in text


def test_a_run_that_is_not_finished_has_no_page(run):
    write_record(run.path, {**run.record, "status": "interrupted"})
    with pytest.raises(InvalidInputError, match=r"is interrupted; finish it with .*--resume"):
        write_page(run.path)


@pytest.mark.parametrize("name", ["curves.parquet", "per_image.parquet"])
def test_a_damaged_file_is_named(run, name):
    (run.path / name).write_bytes(b"damaged")
    with pytest.raises(FormatError, match=name):
        write_page(run, device="cpu")


def test_names_of_images_cannot_change_the_page():
    evil = '"><script>alert(1)</script>'
    shown = Showcase(pictures={"best": [Picture(png=b"", path=evil, score=1.0)]}, note="<i>")
    text = gallery(build_task("depth"), shown)
    assert "script" not in Outline(text).tags
    assert "<i>" not in text


def test_many_metrics_are_folded_away_and_the_first_one_stays(run):
    measured = run.record["measured"]
    many = {f"iou_{number:02d}": 0.5 for number in range(40)}
    values = {**many, "rmse": 0.25}
    record = {**run.record, "measured": {**measured, "metrics": values, "intervals": {}}}
    text = sections.metrics(record, build_task("depth"), [])
    shown, folded = text.split("<details>")
    assert shown.index("rmse") < shown.index("iou_00")
    assert "25 more" in folded
    assert [name for name in many if text.count(f"<td>{name}<") != 1] == []


def test_the_command_trains_such_a_run_again(run):
    words = command_line(run.record)
    assert words.startswith("heads train --task depth --batch-size 8")
    assert "--set queries=4" in words
    assert "--tap norm" in words
    assert "--seed" not in words
    _, name, *args = words.split()
    program.commands[name].make_context(name, args).close()


def test_the_command_names_what_was_held_out(run):
    asked = {**run.record["command"], "holdout": ["fox", "red panda"]}
    words = shlex.split(command_line({**run.record, "command": asked}))
    assert words[words.index("--holdout-species") + 1] == "fox,red panda"
    program.commands["train"].make_context("train", words[2:]).close()


def test_the_command_writes_the_page_and_tells_where(store, run, tmp_path, capsys):
    args = ["show", "@last", "--store", str(store), "--out", str(tmp_path), "--json"]
    assert exit_code(program, [*args, "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["path"]).stat().st_size > 10_000
    assert said == {"run_id": run.run_id, "path": said["path"], "note": ""}


def test_the_template_is_part_of_the_package():
    code = (
        "from importlib.resources import files\n"
        "print(files('heads').joinpath('page.html').is_file())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
