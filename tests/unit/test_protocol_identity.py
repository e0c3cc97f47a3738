"""The identity protocol from a store to its page: on animals whose ears only the identity tells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import featstore
from cli.common import exit_code
from cli.heads_app import heads as program
from featstore.errors import InvalidInputError, NotFoundError
from featstore.plan import RunOptions
from heads.adaptation import Recipe, Start, adapt_many
from heads.feed import Feed
from heads.identity_images import read_images
from heads.model import load
from heads.predictions import predict_rows
from heads.protocol.animals import find_animals
from heads.protocol.bench import mean_feature
from heads.protocol.design import make_design
from heads.protocol.identity import resume_identity_protocol, run_identity_protocol
from heads.protocol.plan import Plan
from heads.runs import PAIRS, list_runs, read_run
from heads.selection import pairs_from_table
from tests.fake_animals import Animals
from tests.fakes import fake_extract

PLAN = Plan(
    folds=(("cat", "dog"),),
    shots=(0, 2),
    modes=("token", "decoder"),
    n_seeds=2,
    steps=4,
    lr_factors=(1.0,),
    n_tuning_seeds=1,
)
ASKED = {
    "steps": 6,
    "batch_size": 8,
    "options": {"heads": 1, "ff": 8, "hidden": 8, "checks": 2},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol") / "features.zarr"
    fake_extract(path, [Animals(60, n_identities=5)])
    return path


@pytest.fixture(scope="module")
def done(store):
    return run_identity_protocol(store, PLAN, asked=ASKED, device="cpu", n_resamples=1000)


def test_a_protocol_leaves_its_numbers_where_sql_finds_them(store, done):
    opened = featstore.open(store)
    lines = opened.sql(
        "select split, name, value, low from metrics where run_id = $run order by split, name",
        {"run": done.run_id},
    ).to_pylist()
    found = {(line["split"], line["name"]): line for line in lines}
    assert found["cat", "main/token/mean/2/rmse"]["value"] > 0
    reduction = found["dog", "main/token/mean/2/rmse_reduction"]
    assert reduction["low"] <= reduction["value"]
    assert found["all identities", "main/decoder/mean/2/identities"]["value"] == 2
    (status,) = opened.sql(
        "select status from runs where run_id = $run", {"run": done.run_id}
    ).to_pylist()
    assert status["status"] == "done"
    table = pq.read_table(f"{done.path}/lines.parquet").to_pylist()
    assert {(line["identity"], line["mode"]) for line in table} >= {("cat", "decoder")}


def test_answers_without_a_label_are_those_of_trained_tokens(store, done):
    features = featstore.open(store).feature_set()
    (run,) = [run for run in list_runs(store) if run.run_id == done.heads[0]]
    model = load(run)
    feed = Feed(features, model.array_names, model.device)
    animals = find_animals(features, taps=["norm"], kind="keypoints", data=None)
    (validation,) = {*run.record["command"]["holdout"]} - {"cat", "dog"}

    def half(name, part):
        design = make_design(name, animals.pairs(name), n_seeds=1)
        numbers = design.test if part == "test" else design.support("all", 0)
        return [animals.instances[name][number] for number in numbers]

    def rmse(name, token):
        found = half(name, "test")
        model.head.set_token(token)
        places = predict_rows(model, feed, [one.pair.row for one in found])[:, :, 0, 0]
        truth = np.array([one.record["keypoints"][:, :2] for one in found]) / 32
        return np.sqrt(((places.reshape(truth.shape) - truth) ** 2).sum(axis=2).mean())

    tokens = model.head.tokens.detach()
    learned = {pair.key for pair in pairs_from_table(pq.read_table(run.path / PAIRS), "train")}
    alike = {}
    for name in model.head.options.identities:
        own = [one for one in animals.instances[name] if one.pair.key in learned]
        alike[name] = mean_feature(model, feed, own)

    def nearest(name):
        new = mean_feature(model, feed, half(name, "support"))
        cosine = [one @ new / np.linalg.norm(one) for one in alike.values()]
        return tokens[int(np.argmax(cosine))]

    def shared(rate):
        chosen = [one for n in model.head.options.identities for one in animals.instances[n]]
        start = Start(token=tokens.mean(dim=0), support=tuple(range(len(chosen))))
        recipe = Recipe(lr=rate, batch_size=64)
        images = read_images(model, feed, chosen)
        return adapt_many(model.head, model.task, images, [start], recipe)[0].token

    best = min(tokens, key=lambda token: rmse(validation, token))
    for_all = min(map(shared, (0.001, 0.003, 0.01, 0.03)), key=lambda t: rmse(validation, t))
    assert not torch.allclose(for_all, tokens.mean(dim=0))
    lines = pq.read_table(f"{done.path}/lines.parquet").to_pylist()
    for line in lines:
        if line["init"] == "best":
            assert line["rmse"] == pytest.approx(rmse(line["identity"], best), rel=1e-5)
        elif line["init"] == "shared":
            assert line["rmse"] == pytest.approx(rmse(line["identity"], for_all), rel=1e-5)
        elif line["init"] == "nearest":
            who = line["identity"]
            assert line["rmse"] == pytest.approx(rmse(who, nearest(who)), rel=1e-5)
    assert {line["init"] for line in lines} == {"mean", "shared", "nearest", "best"}
    compared = {line["shots"] for line in lines if line["nearest_reduction"] is not None}
    assert compared == {"0", "2"}


def test_its_heads_never_saw_what_is_held_out_nor_what_chose_the_rates(store, done):
    (head,) = done.heads
    record = next(run.record for run in list_runs(store) if run.run_id == head)
    assert len(record["command"]["holdout"]) == 3
    assert {"cat", "dog"} < set(record["command"]["holdout"])
    learned_from = record["options"]["task"]["identities"].split("|")
    assert not set(learned_from) & set(record["command"]["holdout"])


def test_the_page_needs_no_other_file_and_shows_poses(done):
    text = Path(done.page).read_text(encoding="utf-8")
    assert "Adapting to cat, dog" in text
    assert text.count("data:image/jpeg;base64,") == 2 * 3 * 4
    assert 'src="http' not in text
    assert "--train-steps 6" in text
    assert done.statements[0] in text


def test_the_images_of_halves_and_supports_are_written_down(done):
    design = json.loads(Path(done.path, "design.json").read_text())
    assert design.keys() == {"cat", "dog"}
    drawn = {item for image in design["cat"]["drawn"][0] for item in image}
    assert len(drawn) + len(design["cat"]["test"]) == 12
    assert not drawn & set(design["cat"]["test"])


def test_an_interrupted_protocol_goes_on_to_the_same_numbers(store, done, tmp_path):
    class Stop:
        def __call__(self, report):
            if report.stage == "protocol" and report.done == 4:
                raise KeyboardInterrupt

    given = {"asked": ASKED, "device": "cpu", "n_resamples": 1000, "runs": tmp_path}
    with pytest.raises(KeyboardInterrupt, match="--resume identity_protocol-pose-"):
        run_identity_protocol(store, PLAN, progress=Stop(), **given)
    (begun,) = [r for r in list_runs(store, runs=tmp_path) if r.is_protocol]
    assert begun.status == "interrupted"
    n_cells = len(list((begun.path / "cells").iterdir()))
    assert n_cells == 4
    finished = resume_identity_protocol(store, begun.run_id, runs=tmp_path, device="cpu")
    assert len(list_runs(store, runs=tmp_path)) == 2  # the head was not trained again
    assert finished.statements == done.statements
    names = ["identity", "mode", "shots", "rmse", "rmse_reduction_low"]
    tables = [
        pq.read_table(f"{each.path}/lines.parquet", columns=names) for each in (done, finished)
    ]
    assert tables[0].equals(tables[1])


def test_worse_boxes_are_measured_once_the_store_has_some(tmp_path):
    path, crop = tmp_path / "s.zarr", (4.0, 4.0, 28.0, 28.0)
    animals = Animals(60, n_identities=5, crop=crop)
    fake_extract(path, [animals])
    given = {"asked": ASKED | {"steps": 2}, "device": "cpu", "n_resamples": 1000}
    plan = replace(PLAN, folds=(("cat",),), n_seeds=1, steps=2)
    first = run_identity_protocol(path, plan, **given)
    (told,) = [text for text in first.statements if "no jittered boxes" in text]
    assert "--views jitter:2" in told
    before = pq.read_table(f"{first.path}/lines.parquet").to_pylist()
    assert {line["jittered_rmse"] for line in before} == {None}
    fake_extract(path, [animals], options=RunOptions(views=("jitter:2",), n_threads=1))
    second = resume_identity_protocol(path, first.run_id, device="cpu")
    assert second.heads == first.heads
    (told,) = [text for text in second.statements if "to worse ones" in text]
    assert "(jitter:0:0, jitter:0:1)" in told
    assert told.endswith("plain crops alone.")
    after = pq.read_table(f"{first.path}/lines.parquet").to_pylist()
    for old, new in zip(before, after, strict=True):
        assert new["rmse"] == old["rmse"]
        assert 0 < abs(new["jittered_rmse"] - new["rmse"]) < 0.1
        assert 0 <= new["jittered_pck@0.05"] <= 1
    assert "jittered: RMSE" in Path(second.page).read_text(encoding="utf-8")
    base = by_hand(path, second.heads[0], Path(second.path) / "design.json", animals)
    (mean,) = [line for line in after if line["shots"] == "0" and line["init"] == "mean"]
    assert mean["jittered_rmse"] == pytest.approx(base, rel=1e-5)


def by_hand(path, head, design, animals):
    """What the mean token says of all jittered rows of the test half, in shares of their boxes."""
    features = featstore.open(path).feature_set()
    (run,) = [run for run in list_runs(path) if run.run_id == head]
    model, wanted = load(run), json.loads(design.read_text())["cat"]["test"]
    samples = features.samples().to_pylist()
    lines = {
        line["row"]: line
        for line in samples
        if line["item"] in wanted and line["view"].startswith("jitter")
    }
    feed = Feed(features, model.array_names, model.device)
    predicted = predict_rows(model, feed, list(lines))[:, :, 0, 0].reshape(len(lines), -1, 2)
    boxes = np.array([placement.box for placement in features.placements(list(lines)).values()])
    points = np.array([animals.keypoints(int(line["path"][:5])) for line in lines.values()])
    truth = (points[..., :2] - boxes[:, None, :2]) / (boxes[:, 2:] - boxes[:, :2])[:, None]
    return np.sqrt(((predicted - truth) ** 2).sum(axis=2).mean())


def test_a_finished_protocol_is_no_training(store, done):
    (head,) = done.heads
    with pytest.raises(InvalidInputError, match="no identity protocol but a training"):
        resume_identity_protocol(store, head)
    assert exit_code(program, ["train", "--resume", done.run_id, "--store", str(store)]) == 1
    assert exit_code(program, ["show", done.run_id, "--store", str(store)]) == 1
    assert exit_code(program, ["ls", "--store", str(store)]) == 0
    assert exit_code(program, ["table", "--store", str(store)]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--holdout", "cta"], "Did you mean 'cat'"),
        (["--holdout", "cat", "--modes", "tokens"], "Unknown mode 'tokens'"),
        (["--holdout", "cat,dog,elk"], "2 are left"),
        (["--holdout", "cat", "--validation", "dgo"], "Did you mean 'dog'"),
        (["--holdout", "cat", "--variant", "flim"], "Did you mean 'film'"),
        (["--holdout", "cat", "--shots", "five"], "a whole number of images"),
        ([], "one or more identities"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(store, capsys, words, said):
    before = len(list_runs(store))
    assert exit_code(program, ["protocol", "identity", *words, "--store", str(store)]) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert len(list_runs(store)) == before


def test_a_protocol_runs_from_the_command_line(store, capsys, tmp_path):
    words = (
        "protocol identity --holdout cat --shots 0,2 --modes token --inits mean,random --seeds 2"
    )
    words += " --steps 2 --lr-factors 1 --tuning-seeds 1 --variant no_margin --train-steps 2"
    words += " --batch-size 4 --set heads=1 --set ff=8 --set checks=1 --device cpu --json"
    args = [*words.split(), "--store", str(store), "--runs", str(tmp_path)]
    assert exit_code(program, args) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["heads"]) == 2
    record = read_run(tmp_path / found["run_id"]).record
    assert record["plan"]["variants"] == {"no_margin": {"margin_weight": 0.0}}
    again = ["protocol", "identity", "--resume", found["run_id"], "--seeds", "3"]
    assert exit_code(program, [*again, "--store", str(store), "--runs", str(tmp_path)]) == 2


def test_an_identity_that_is_not_there_is_named(store):
    with pytest.raises(NotFoundError, match="Unknown identity 'cta'"):
        run_identity_protocol(store, Plan(folds=(("cta",),)), device="cpu")
