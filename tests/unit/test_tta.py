"""Flip-averaging: predictions of the stored mirror image, turned back and averaged."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

import featstore
import heads
from featstore.errors import InvalidInputError, NotFoundError
from featstore.plan import RunOptions
from heads.feed import Feed
from heads.model import load
from heads.predictions import flip_average, predict_rows
from heads.runs import read_run
from heads.selection import select_split
from tests.fakes import FakeReader, Things, fake_extract

SMALL = {"queries": 4, "checks": 1, "pictures": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("tta") / "s.zarr"
    fake_extract(path, [Things(15)])
    fake_extract(path, [Things(15)], options=RunOptions(views=("hflip",), n_threads=1))
    return path


def learn(path, task="depth", head="deap", **options):
    chosen = {"task": task, "head": head, "steps": 5, "batch_size": 4, "device": "cpu"}
    return heads.train(path, **chosen, options={"checks": 1, "pictures": 0, **options})


def parts(report, path):
    """Give model, feed and the plain test rows of a run."""
    model = load(read_run(Path(report.path)), device="cpu")
    features = featstore.open(path).feature_set()
    pairs, _ = select_split(
        features.store, features, taps=["norm"], kind=model.task.label_kind, split="test"
    )
    return model, Feed(features, model.array_names, model.device), features, pairs


@pytest.mark.parametrize(("task", "head"), [("depth", "linear"), ("segmentation", "linear")])
def test_a_head_that_treats_all_places_alike_gives_the_same_with_mirror_images(made, task, head):
    report = learn(made, task, head)
    model, feed, features, pairs = parts(report, made)
    rows = [pair.row for pair in pairs]
    plain = predict_rows(model, feed, rows)
    averaged = flip_average(features, pairs, ["norm"])(model, feed, pairs)
    assert averaged.dtype == plain.dtype
    np.testing.assert_allclose(averaged, plain, rtol=1e-3, atol=1e-3)
    # The mirror images themselves are told apart by more than that.
    others = [flip_average(features, pairs, ["norm"]).mirror_images[row] for row in rows]
    assert np.abs(predict_rows(model, feed, others) - plain).max() > 0.01


def test_both_predictions_count_half_and_the_metric_is_that_of_their_mean(made):
    report = learn(made, queries=4)
    model, feed, features, pairs = parts(report, made)
    average = flip_average(features, pairs, ["norm"])
    rows = [pair.row for pair in pairs]
    views = {line["row"]: line["view"] for line in features.folder.assignments().to_pylist()}
    keys = {line["row"]: line["image_key"] for line in features.folder.assignments().to_pylist()}
    for row in rows:
        other = average.mirror_images[row]
        assert (views[row], views[other]) == ("plain", "hflip")
        assert keys[row] == keys[other]
    flipped = predict_rows(model, feed, [average.mirror_images[row] for row in rows])
    expected = (predict_rows(model, feed, rows) + flipped[..., ::-1]) / 2
    np.testing.assert_allclose(average(model, feed, pairs), expected, rtol=1e-6)
    plain = heads.evaluate(report.path, device="cpu")
    tta = heads.evaluate(report.path, tta="hflip", device="cpu")
    assert (plain.tta, tta.tta, tta.images) == (None, "hflip", plain.images)
    assert tta.metrics["rmse"] != plain.metrics["rmse"]
    assert abs(tta.metrics["rmse"] - plain.metrics["rmse"]) < 0.5


def test_classification_averages_too(made):
    report = learn(made, "classification", "linear_pool")
    assert heads.evaluate(report.path, tta="hflip", device="cpu").metrics["ce"] > 0


def test_without_mirror_images_the_command_that_adds_them_is_named(tmp_path):
    path = tmp_path / "s.zarr"
    fake_extract(path, [FakeReader(10)])
    report = learn(path, queries=4)
    with pytest.raises(NotFoundError, match=r"2 of 2 images have no stored view hflip") as raised:
        heads.evaluate(report.path, tta="hflip", device="cpu")
    words = shlex.split(str(raised.value).split("`")[1])
    assert words[:2] == ["featstore", "extract"]
    assert words[words.index("--views") + 1] == "hflip"
    assert words[words.index("--taps") + 1] == "norm"
    with pytest.raises(InvalidInputError, match="hflip or None"):
        heads.evaluate(report.path, tta="vflip", device="cpu")
    # Some are not enough.
    options = RunOptions(views=("hflip",), limit=6, n_threads=1)
    fake_extract(path, [FakeReader(10)], options=options)
    with pytest.raises(NotFoundError, match="1 of 2 images have no stored view hflip"):
        heads.evaluate(report.path, tta="hflip", device="cpu")
