"""Pose from a store: training, measuring, resuming."""

from __future__ import annotations

import pytest

import heads
from featstore.errors import InvalidInputError
from featstore.plan import RunOptions
from featstore.skeleton import Skeleton
from heads.runs import read_run
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
