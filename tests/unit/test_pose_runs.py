"""Pose from a store: training, measuring, resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import featstore
import heads
from featstore.errors import InvalidInputError, NotFoundError
from featstore.plan import RunOptions
from featstore.skeleton import Skeleton
from heads.feed import Feed
from heads.model import load
from heads.predictions import predict_rows
from heads.runs import read_run
from heads.token_file import TokenFile, weights_hash, write_token
from tests.fake_animals import Animals
from tests.fakes import Things, fake_extract

QUICK = {"checks": 2, "pictures": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("pose") / "features.zarr"
    fake_extract(path, [Things(30)])
    fake_extract(path, [Things(30)], options=RunOptions(views=("hflip",), n_threads=1))
    return path


def learn(store, head="attentive_pool", **changes):
    options = {**QUICK, **changes.pop("options", {})}
    chosen = {"task": "pose", "steps": 8, "batch_size": 8, "device": "cpu", **changes}
    return heads.train(store, head=head, options=options, **chosen)


@pytest.mark.parametrize("head", ["linear_pool", "attentive_pool", "identity_token"])
def test_a_run_takes_skeleton_and_identities_from_the_store(store, head, tmp_path):
    report = learn(
        store, head, runs=tmp_path, options={"heads": 1} if head != "linear_pool" else {}
    )
    options = read_run(tmp_path / report.run_id).record["options"]["task"]
    assert options["names"] == "nose|left_ear|right_ear"
    assert (options["edges"], options["swaps"], options["sigmas"]) == (
        "0-1|0-2",
        "1-2",
        "0.1|0.1|0.1",
    )
    assert options["identities"] == "dark|light"
    assert {"rmse", "pck@0.05", "pck@0.05box", "oks_ap"} <= report.metrics.keys()


@pytest.mark.parametrize("head", ["linear_pool", "attentive_pool"])
def test_a_pooled_head_begins_at_the_mean_pose_and_gets_better_from_there(head, tmp_path):
    animals = Animals(48)
    fake_extract(tmp_path / "s.zarr", [animals])

    def rmse(**changes):
        options = {"views": "plain"}
        return learn(tmp_path / "s.zarr", head, options=options, **changes).metrics["rmse"]

    begun = learn(tmp_path / "s.zarr", head, steps=1, lr=1e-12)
    parts = pq.read_table(Path(begun.path) / "pairs.parquet", columns=["part", "path"]).to_pylist()
    points = {
        name: np.array(
            [animals.keypoints(int(line["path"][:5])) for line in parts if line["part"] == name]
        )[..., :2]
        / 32
        for name in ("train", "test")
    }
    mean = points["train"].mean(axis=0)
    expected = np.sqrt(((points["test"] - mean) ** 2).sum(axis=2).mean())
    assert begun.metrics["rmse"] == pytest.approx(expected, rel=1e-5)
    assert rmse(steps=60, val_fraction=0) < 0.999 * expected


@pytest.mark.parametrize(
    ("task", "head", "lr"),
    [
        ("pose", "linear_pool", 3e-4),
        ("classification", "linear_pool", 1e-2),
        ("pose", "attentive_pool", 1e-3),
        ("pose", "identity_token", 1e-4),
    ],
)
def test_a_head_learns_at_its_own_rate_unless_the_task_knows_better(store, task, head, lr):
    options = {"heads": 1, "ff": 8} if head == "identity_token" else {}
    report = learn(store, head, task=task, steps=1, options=options)
    assert read_run(Path(report.path)).record["options"]["train"]["lr"] == lr


def test_an_interrupted_run_of_identities_resumes_to_the_same_numbers(store, tmp_path):
    class Stop:
        def __call__(self, report):
            if report.stage == "train" and report.done == 5:
                raise KeyboardInterrupt

    given = {"head": "identity_token", "runs": tmp_path, "options": {"heads": 1, "ff": 8}}
    undisturbed = learn(store, **given)
    with pytest.raises(KeyboardInterrupt):
        learn(store, progress=Stop(), **given)
    resumed = heads.train(store, resume="@last", runs=tmp_path, device="cpu")
    assert resumed.run_id != undisturbed.run_id
    assert resumed.metrics == undisturbed.metrics


def test_flip_averaging_exchanges_left_and_right(store, tmp_path):
    # Mirror images are learned too, so the head says of each what that image shows.
    report = learn(store, runs=tmp_path, steps=60, lr=5e-3, options={"views": "all"})
    alone = heads.evaluate(report.run_id, store=store, runs=tmp_path, device="cpu").metrics
    both = heads.evaluate(
        report.run_id, store=store, runs=tmp_path, tta="hflip", device="cpu"
    ).metrics
    assert both["rmse"] < 1.5 * alone["rmse"]


def test_other_keypoints_than_those_of_the_run_are_refused(store, tmp_path, monkeypatch):
    report = learn(store, runs=tmp_path)
    other = Skeleton(names=("nose", "right_ear", "left_ear"))
    monkeypatch.setattr("heads.labels.StoredLabels.skeleton", lambda self, dataset: other)
    with pytest.raises(InvalidInputError, match="where number 1 is 'left_ear'"):
        heads.evaluate(report.run_id, store=store, runs=tmp_path, device="cpu")


def test_a_head_that_gives_maps_is_refused_for_keypoints(store):
    with pytest.raises(InvalidInputError, match=r"Use one of attentive_pool, .*linear_pool"):
        learn(store, "deap")


@pytest.fixture(scope="module")
def tokens_run(store, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    options = {"heads": 1, "ff": 8}
    return runs / learn(store, "identity_token", runs=runs, options=options).run_id


def measured(run, store, **changes):
    return heads.evaluate(read_run(Path(run)), store=store, device="cpu", **changes)


def test_own_tokens_answer_for_trained_identities_unless_the_mean_is_asked_for(store, tokens_run):
    own, mean = measured(tokens_run, store), measured(tokens_run, store, token="mean")
    assert (own.token, mean.token, own.identity) == ("own", "mean", None)
    recorded = read_run(tokens_run).record["measured"]["metrics"]
    assert own.metrics == pytest.approx(recorded)
    assert abs(own.metrics["rmse"] - mean.metrics["rmse"]) > 1e-4


def test_a_token_file_is_measured_on_images_of_its_identity(store, tokens_run, tmp_path):
    model = load(read_run(tokens_run))
    dark = model.head.tokens[model.task.identities.index("dark")].detach()
    saved = TokenFile(
        run_id=tokens_run.name,
        weights_hash=weights_hash(read_run(tokens_run)),
        identity="dark",
        token=dark,
    )
    path = tmp_path / "dark.safetensors"
    write_token(path, saved)
    by_file = measured(tokens_run, store, token=path)
    own = measured(tokens_run, store, identity="dark")
    assert (by_file.identity, by_file.images) == ("dark", own.images)
    assert by_file.images < measured(tokens_run, store).images
    assert by_file.metrics == pytest.approx(own.metrics)
    others = measured(tokens_run, store, token=path, identity="light")
    assert others.identity == "light"
    tta = measured(tokens_run, store, token=path, tta="hflip")
    assert tta.metrics["rmse"] != by_file.metrics["rmse"]


def test_a_run_is_measured_under_worse_boxes(tmp_path):
    store, crop = tmp_path / "s.zarr", (4.0, 4.0, 28.0, 28.0)
    fake_extract(store, [Animals(16, crop=crop)])
    report = learn(store, "linear_pool", steps=2)
    with pytest.raises(NotFoundError, match=r"4 of 4 images have no stored view jitter:0:0 with"):
        measured(report.path, store, view="jitter:0:0")
    options = RunOptions(views=("jitter:2",), n_threads=1)
    fake_extract(store, [Animals(16, crop=crop)], options=options)
    plain, worse = measured(report.path, store), measured(report.path, store, view="jitter:0:1")
    assert (plain.view, worse.view, worse.images) == ("plain", "jitter:0:1", plain.images)
    assert worse.metrics["rmse"] == pytest.approx(rmse_by_hand(report.path, store, "jitter:0:1"))
    assert plain.metrics["rmse"] == pytest.approx(rmse_by_hand(report.path, store, "plain"))
    assert abs(worse.metrics["rmse"] - plain.metrics["rmse"]) > 1e-4
    with pytest.raises(InvalidInputError, match="plain with tta"):
        measured(report.path, store, view="jitter:0:0", tta="hflip")


def rmse_by_hand(run, store, view):
    """Where the keypoints are in the box that a row shows, against what the head says."""
    features = featstore.open(store).feature_set()
    model = load(read_run(Path(run)))
    lines = [line for line in features.folder.assignments().to_pylist() if line["view"] == view]
    reader = Animals(16, crop=(4.0, 4.0, 28.0, 28.0))
    test = {item.path: int(item.path[:5]) for item in reader.items() if "test" in item.splits}
    lines = [line for line in lines if line["path"] in test]
    feed = Feed(features, model.array_names, model.device)
    predicted = predict_rows(model, feed, [line["row"] for line in lines])[:, :, 0, 0]
    points = np.array([reader.keypoints(test[line["path"]]) for line in lines])[..., :2]
    box = np.array([[line[f"box_{c}"] for c in ("x0", "y0", "x1", "y1")] for line in lines])
    truth = (points - box[:, None, :2]) / (box[:, 2:] - box[:, :2])[:, None]
    return np.sqrt(((predicted.reshape(truth.shape) - truth) ** 2).sum(axis=2).mean())


def test_a_head_without_tokens_and_a_label_that_is_not_there_are_refused(
    store, tokens_run, tmp_path
):
    run = tmp_path / learn(store, runs=tmp_path, steps=1).run_id
    with pytest.raises(InvalidInputError, match="only the head identity_token takes one"):
        measured(run, store, token="mean")
    with pytest.raises(NotFoundError, match="Did you mean 'dark'"):
        measured(tokens_run, store, identity="drak")
