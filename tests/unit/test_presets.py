"""Training and extracting by a preset: what is said wins, and what differs is told and recorded."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest

import featstore as featstore_package
import heads
from cli.common import exit_code
from cli.featstore_app import featstore
from cli.heads_app import heads as program
from featstore.errors import InvalidInputError, NotFoundError
from heads.presets import PRESETS, find_preset
from heads.presets.use import data_formats
from heads.runs import list_runs, read_run
from heads.sections import command_line
from tests.fakes import Things, fake_extract, fake_plan

# 32 x 32 outputs, so that a test takes a second; the rest is the preset's.
SMALL = {"queries": 4, "pictures": 0, "checks": 1}
CHEAP = {"instances": {"restarts": 1, "pixels": 32}}
SHORT = {"steps": 2, "batch_size": 4, "device": "cpu"}
OWN_PLAN = fake_plan(
    architecture="vit_base_patch14_reg4_dinov2",
    tag="lvd142m",
    image_size=(518, 518),
    resize="via:224:nearest",
    interpolation="bicubic",
)


class VocThings(Things):
    format = "voc.v1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("presets") / "s.zarr"
    fake_extract(path, [Things(30)])
    return path


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "s.zarr")


@pytest.fixture(scope="module")
def fitting(tmp_path_factory):
    """A store whose features and data are those of deap-voc, but for how many there are."""
    path = tmp_path_factory.mktemp("fitting") / "s.zarr"
    fake_extract(path, [VocThings(60)], plan=OWN_PLAN)
    return path


def learn(store, preset, **changes):
    options = SMALL | CHEAP.get(find_preset(preset).task, {}) | changes.pop("options", {})
    return heads.train(store, preset=preset, options=options, **{**SHORT, **changes})


def record_of(report):
    return read_run(Path(report.path)).record


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("vit-split")])
def test_every_preset_trains(store, name):
    preset = PRESETS[name]
    record = record_of(learn(store, name))
    assert record["head"].startswith(preset.head)
    assert record["task"].startswith(preset.task)
    assert record["training"]["lr"] == preset.lr
    assert record["training"]["weight_decay"] == preset.weight_decay
    assert record["options"]["head"]["mask_form"] == preset.head_options["mask_form"]
    about = record["preset"]
    assert (about["name"], about["variant"]) == (name, preset.variant)
    given = {key: each["given"] for key, each in about["deviations"].items()}
    assert given == {"steps": 2, "batch_size": 4, **SMALL, **CHEAP.get(preset.task, {})}
    assert any("This is not the paper's data" in text for text in about["misfits"])


def test_what_is_said_wins_and_is_recorded(fitting, tmp_path):
    messages = []
    report = learn(
        fitting,
        "deap-voc",
        lr=3e-3,
        batch_size=32,
        runs=tmp_path,
        options={"mask_form": "paper", "classes": "21"},
        progress=lambda p: messages.append(p.message),
    )
    record = record_of(report)
    deviations = record["preset"]["deviations"]
    assert deviations["lr"] == {"preset": 1e-3, "given": 3e-3}
    assert deviations["queries"] == {"preset": 56, "given": 4}
    assert deviations["mask_form"] == {"preset": "code", "given": "paper"}
    assert not deviations.keys() & {"classes", "batch_size", "head", "task", "patience"}
    assert record["training"]["lr"] == 3e-3
    assert record["options"]["head"]["mask_form"] == "paper"
    told = [text for text in messages if text and text.startswith("deap-voc@release")]
    assert "lr 0.003 (preset: 0.001)" in told[0]


def test_features_and_data_of_the_paper_are_no_misfit(fitting, tmp_path):
    record = record_of(learn(fitting, "deap-voc", runs=tmp_path))
    (only,) = record["preset"]["misfits"]
    n_images = record["images"]["train"]
    assert only == f"It learns from {n_images} images, the paper from 1,464."


def test_features_of_another_recipe_are_told_one_by_one(store):
    misfits = record_of(learn(store, "deap-nyu", taps=["block:0"]))["preset"]["misfits"]
    for expected in (
        "its format is fake, not nyu_hf",
        "backbone is fake_net.fake, not vit_base_patch14_reg4_dinov2.lvd142m",
        "image size is 16x16, not 518x518",
        "resize is squash, not via:224:nearest",
        "tap is block:0, not norm",
    ):
        assert sum(expected in text for text in misfits) == 1


def test_options_that_belong_to_the_papers_data_are_not_asked_of_other_data(store):
    assert find_preset("deap-nyu").data_options == {"crop": "eigen"}
    record = record_of(learn(store, "deap-nyu"))
    assert record["options"]["task"] == {"crop": "auto"}
    with pytest.raises(InvalidInputError, match="480 x 640"):
        learn(store, "deap-nyu", options={"crop": "eigen"})


def test_another_head_leaves_the_options_of_the_presets_head(store):
    report = heads.train(store, preset="deap-nyu", head="linear", **SHORT)
    record = record_of(report)
    assert record["head"] == "linear.v1"
    assert record["preset"]["deviations"]["head"] == {"preset": "deap", "given": "linear"}
    assert record["training"]["lr"] == 1e-3


def test_epochs_take_the_place_of_the_presets_steps(store):
    options = {"steps": None, "epochs": 1}
    record = record_of(learn(store, "deap-nyu", **options))
    assert record["preset"]["deviations"]["steps"] == {"preset": 3000, "given": "1 epochs"}
    assert record["steps"] < 20


def test_a_run_without_a_preset_says_so(store):
    record = record_of(heads.train(store, task="depth", options=SMALL, **SHORT))
    assert record["preset"] is None


def test_an_unknown_preset_is_refused_before_anything_is_written(store):
    with pytest.raises(NotFoundError, match="Did you mean 'deap-nyu'"):
        heads.train(store, preset="deap-nyv", **SHORT)
    assert list_runs(store) == []


def test_the_command_line_wins_where_it_says_something(store, capsys):
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    args = ["train", "--preset", "maxa-depth", "--steps", "2", "--val-fraction", "0.1", *settings]
    assert exit_code(program, [*args, "--store", str(store), "--device", "cpu", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["head"] == "maxa.v1"
    assert "maxa-depth@paper, but with steps 2 (preset: 3000)" in said.err
    assert "maxa-depth@paper: This is not the paper's data" in said.err
    record = list_runs(store)[-1].record
    assert record["command"]["lr"] == 2e-3
    assert record["command"]["preset"] == "maxa-depth@paper"
    assert record["preset"]["deviations"].keys() == {"steps", *SMALL}


def test_the_command_of_a_run_repeats_it_with_its_preset(store):
    record = record_of(learn(store, "maxa-coco-stuff", val_fraction=0.1))
    words = command_line(record).split()
    assert words[words.index("--preset") + 1] == "maxa-coco-stuff@paper"
    assert exit_code(program, [*words[1:], "--store", str(store), "--device", "cpu"]) == 0
    again = list_runs(store)[-1].record
    assert again["preset"] == record["preset"]
    assert again["command"] == record["command"]
    assert again["measured"] == record["measured"]


def test_an_interrupted_run_keeps_its_preset(store):
    def stop(report):
        if report.stage == "train" and report.total and report.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(store, "deap-nyu", progress=stop)
    before = list_runs(store)[-1].record["preset"]
    report = heads.train(store, resume="@last", device="cpu")
    assert record_of(report)["preset"] == before
    with pytest.raises(InvalidInputError, match="preset cannot be given"):
        heads.train(store, resume="@last", preset="deap-nyu")


def test_presets_are_swept_side_by_side(store, capsys):
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    args = ["--sweep", "preset=deap-nyu,deap-nyu@paper", "--steps", "2", "--batch-size", "4"]
    common = ["--store", str(store), "--device", "cpu"]
    assert exit_code(program, ["train", *args, *settings, *common]) == 0
    capsys.readouterr()
    names = [run.record["preset"]["name"] for run in list_runs(store)]
    assert sorted(names) == ["deap-nyu@paper", "deap-nyu@release"]


def test_presets_are_listed_and_shown(capsys):
    assert exit_code(program, ["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(PRESETS)
    assert exit_code(program, ["presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["presets"]
    assert [each["name"] for each in listed] == list(PRESETS)
    assert exit_code(program, ["presets", "deap-voc"]) == 0
    text = capsys.readouterr().out
    assert "47,272 parameters" in text
    assert text.count("\n* ") == len(find_preset("deap-voc").notes)
    assert exit_code(program, ["presets", "deap-voc@paper", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "paper"
    assert exit_code(program, ["presets", "deep-voc"]) == 1
    assert "Did you mean 'deap-voc'" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """What `featstore extract` asks of the library, which then does nothing."""
    calls = []

    def instead(store, **arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    # The package's attribute of that name is the function.
    monkeypatch.setattr(import_module("featstore.extract"), "extract", instead)
    return calls


def ask(*words):
    assert exit_code(featstore, ["extract", *words]) == 130


def test_extract_takes_what_a_preset_needs(asked, capsys):
    ask("--for", "deap-coco-stuff", "--data", "coco:/data/coco")
    (arguments,) = asked
    assert arguments["backbone"] == "dinov2_b_reg"
    assert arguments["image_size"] == (518, 518)
    assert arguments["resize"] == "crop+via:224:nearest"
    assert arguments["taps"] == ["norm"]
    assert arguments["dtype"] == "float16"
    said = capsys.readouterr().err
    assert "--resize crop+via:224:nearest" in said
    assert "Not as" not in said
    assert "not the paper's data" not in said


@pytest.mark.parametrize(
    ("backbone", "taps", "tail", "variant"),
    [
        ([], ["block:2", "block:5", "block:8", "block:11"], 3, "s"),
        (["--backbone", "dinov2_b"], [f"block:{n}" for n in (2, 5, 7, 8, 11)], 4, "b"),
        (["--backbone", "dinov2_l"], [f"block:{n}" for n in (6, 11, 17, 20, 23)], 3, "l"),
    ],
)
def test_extract_stores_the_taps_and_the_tail_of_the_backbones_size(
    asked, capsys, backbone, taps, tail, variant
):
    ask("--for", "vit-split-nyu", "--data", "nyu_hf:/data", *backbone)
    (arguments,) = asked
    assert arguments["backbone"] == (backbone[1] if backbone else "dinov2_s")
    assert (arguments["taps"], arguments["tail"]) == (taps, tail)
    assert (arguments["image_size"], arguments["resize"]) == ((490, 644), "pad")
    said = capsys.readouterr().err
    assert f"For vit-split-nyu@{variant}:" in said
    assert f"--tail {tail}" in said
    assert "Not as" not in said


@pytest.mark.parametrize("data", ["nyu_hf:/x", "mine=nyu_hf.v1:/x"])
def test_the_format_of_data_that_is_joined_counts(store, data):
    assert data_formats(featstore_package.open(store), data) == {"nyu_hf"}
    assert data_formats(featstore_package.open(store), None) == {"fake"}
    with pytest.raises(InvalidInputError, match="FORMAT:PATH"):
        data_formats(featstore_package.open(store), "/x")


def test_extract_keeps_what_was_said(asked, capsys):
    words = "--taps norm,block:8 --image-size 224 --upscale bicubic --basis 112".split()
    ask("--for", "deap-voc", "--data", "x=rooms:n=5", *words)
    (arguments,) = asked
    assert arguments["resize"] == "via:112:bicubic"
    assert arguments["image_size"] == (224, 224)
    assert arguments["taps"] == ["norm", "block:8"]
    said = capsys.readouterr().err
    assert "image_size (preset: 518x518), taps (preset: norm), resize" in said
    assert "x=rooms:n=5 is not the paper's data" in said


def test_a_resize_rule_that_was_said_takes_the_place_of_the_presets(asked):
    ask("--for", "deap-voc", "--data", "voc:/data", "--resize", "letterbox")
    ask("--for", "deap-voc", "--data", "voc:/data", "--resize", "crop", "--basis", "64")
    ask("--for", "maxa-voc", "--data", "voc:/data")
    assert [each["resize"] for each in asked] == ["letterbox", "crop+via:64", "squash"]
