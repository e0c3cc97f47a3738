"""Every task from training to pictures, on features that say what there is to learn."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from click.testing import CliRunner
from PIL import Image

import featstore
import heads
from cli.heads_app import heads as heads_app
from featstore.datasets import open_dataset
from featstore.errors import InvalidInputError
from featstore.items import read_dataset
from featstore.types import Item
from heads.reference import evaluate_baseline
from heads.runs import read_run
from heads.tasks import TASKS
from tests.datasets import write_voc
from tests.fakes import FakeReader, Things, fake_extract, fake_forward

SMALL = {"queries": 4, "checks": 2, "pictures": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "features.zarr"
    fake_extract(path, [Things(30)])
    return path


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "features.zarr")


@pytest.fixture(params=list(TASKS))
def task(request):
    return str(request.param)


def learn(store, task, **changes):
    options = {**SMALL, **changes.pop("options", {})}
    if task == "instances.v1":
        options |= {"restarts": 1, "pixels": 64, "embedding": 6}
    if TASKS[task].stage == "pooled":
        options.pop("queries", None)
        changes.setdefault("head", "attentive_pool")
    chosen = {"task": task, "steps": 8, "batch_size": 8, "device": "cpu", **changes}
    return heads.train(store, options=options, **chosen)


def weights(report):
    return safetensors.numpy.load_file(Path(report.path) / "head.safetensors")


def test_a_run_measures_draws_and_evaluates_to_the_same_numbers(store, task):
    report = learn(store, task, options={"pictures": 2})
    assert TASKS[task].primary_metric in report.metrics
    assert heads.evaluate(report.path, device="cpu").metrics == report.metrics
    assert len(report.pictures) == 2
    for path in report.pictures:
        with Image.open(path) as picture:
            assert min(picture.size) > 200


def test_new_images_get_the_answer_of_the_task(store, task, tmp_path):
    report = learn(store, task)
    reader = Things(33)
    photos = [tmp_path / f"{number}.npy" for number in (31, 32)]
    for photo, item in zip(photos, reader.items()[31:], strict=True):
        photo.write_bytes(reader.read_image(item))
    done = heads.predict(report.path, photos, tmp_path / "out", fake_forward, device="cpu")
    assert done.images == 2
    found = np.load(tmp_path / "out/31.npy")
    shape, dtype = {
        "detection.v1": ((len(found), 5), np.float32),
        "classification.v1": ((2,), np.float32),
        "pose.v1": ((1, 3, 3), np.float32),
        "segmentation.v1": (reader.source_hw, np.int32),
        "instances.v1": (reader.source_hw, np.int32),
    }.get(task, (reader.source_hw, np.float32))
    assert (found.shape, found.dtype) == (shape, dtype)
    with Image.open(tmp_path / "out/31.png") as picture:
        assert min(picture.size) > 100


def test_its_metrics_follow_from_what_each_image_keeps(store, task):
    report = learn(store, task)
    table = pq.read_table(Path(report.path) / "per_image.parquet")
    names = [
        n
        for n in table.column_names
        if n not in ("split", "row", "item", "dataset", "path", "group")
    ]
    lines = table.select(names).to_pylist()
    rebuilt = heads.load(report.path).task.summarise(lines, table["group"].to_pylist())
    assert {metric.name: metric.value for metric in rebuilt} == report.metrics


class Stop:
    def __call__(self, report):
        if report.stage == "train" and report.done == 5:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_numbers_of_an_undisturbed_one(store, task):
    undisturbed = learn(store, task)
    with pytest.raises(KeyboardInterrupt):
        learn(store, task, progress=Stop())
    resumed = heads.train(store, resume="@last", device="cpu")
    assert resumed.metrics == undisturbed.metrics
    one, other = weights(resumed), weights(undisturbed)
    assert all(np.array_equal(one[name], other[name]) for name in other)


def test_learning_lowers_the_loss(store, task):
    report = learn(store, task, steps=60, lr=5e-3, options={"patience": 0})
    curves = pq.read_table(Path(report.path) / "curves.parquet").to_pylist()
    losses = [c["value"] for c in curves if c["split"] == "train"]
    assert len(losses) == 60
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


@pytest.mark.parametrize("baseline", ["knn", "ridge"])
@pytest.mark.parametrize("name", ["classification", "depth", "distance", "segmentation"])
def test_a_baseline_is_fitted_and_measured_where_a_run_was(store, name, baseline):
    report = learn(store, name, steps=1, options={"pictures": 0})
    found = evaluate_baseline(report.path, baseline)
    own = heads.evaluate(report.path, device="cpu")
    assert (found.images, found.groups, found.split) == (own.images, own.groups, "test")
    assert found.metrics.keys() == own.metrics.keys()
    assert (found.answers, own.answers) == (baseline, "head")
    metric, kind = TASKS[f"{name}.v1"].primary_metric, TASKS[f"{name}.v1"]
    gain = own.metrics[metric] - found.metrics[metric]  # of a head that took a single step
    assert gain > 0 if kind.is_lower_better else gain < 0


def test_a_baseline_that_does_not_fit_is_refused(store):
    report = learn(store, "boundaries", steps=1, options={"pictures": 0})
    with pytest.raises(InvalidInputError, match="one of knn, ridge"):
        evaluate_baseline(report.path, "svm")
    expected = "`task` must be one of classification, depth, distance, segmentation"
    with pytest.raises(InvalidInputError, match=expected):
        evaluate_baseline(report.path, "ridge")


def test_the_command_says_what_answered(store):
    report = learn(store, "depth", steps=1, options={"pictures": 0})
    place = ["evaluate", report.run_id, "--store", str(store), "--against", "knn"]
    said = CliRunner().invoke(heads_app, place)
    assert said.exit_code == 0, said.output
    assert f"knn in place of the head of {report.run_id}, " in said.output
    assert CliRunner().invoke(heads_app, [*place, "--queries", "9"]).exit_code == 2


def test_classes_and_their_names_travel_with_the_store(store):
    opened = featstore.open(store)
    assert read_dataset(opened.folder, "fake")["classes"] == list(Things().class_names())
    report = learn(store, "segmentation")
    chosen = read_run(Path(report.path)).record["options"]["task"]
    assert chosen == {"classes": 4, "names": "near|middle|far|farthest"}
    assert "iou@native/near" in report.metrics
    fewer = learn(store, "segmentation", options={"classes": 2, "names": "a|b"})
    reasons = set(fewer.left_out.values())
    assert reasons
    assert all("from 0 to 1, or void" in reason for reason in reasons)


def test_data_that_names_no_classes_needs_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(Things, "class_names", lambda self: None)
    path = tmp_path / "features.zarr"
    fake_extract(path, [Things(20)])
    with pytest.raises(InvalidInputError, match="--set classes=N"):
        learn(path, "segmentation")
    assert learn(path, "segmentation", options={"classes": 4}).metrics["miou@native"] >= 0


def test_data_sets_that_name_other_classes_are_not_mixed(tmp_path, monkeypatch):
    path = tmp_path / "features.zarr"
    fake_extract(path, [Things(20)])
    monkeypatch.setattr(Things, "class_names", lambda self: ("a", "b", "c", "d"))
    fake_extract(path, [Things(20, name="other", seed=1)])
    with pytest.raises(InvalidInputError, match="data sets of the same classes"):
        learn(path, "segmentation")
    assert learn(path, "depth").metrics["rmse"] > 0  # classes are nothing to a depth head


def test_a_task_without_labels_says_what_the_data_has(tmp_path):
    path = tmp_path / "features.zarr"
    fake_extract(path, [FakeReader(20)])
    with pytest.raises(
        InvalidInputError, match=r"No stored row has classes labels .*they have: depth\)"
    ):
        learn(path, "segmentation")


def test_a_head_is_measured_at_another_resolution_than_it_was_trained_at(store, task):
    if TASKS[task].stage == "pooled":
        pytest.skip("an answer an image has no resolution")
    report = learn(store, task)
    same = heads.evaluate(report.path, device="cpu", queries=4)
    assert same.metrics == report.metrics
    finer = heads.evaluate(report.path, device="cpu", queries=9)
    assert finer.output_hw == (72, 72)
    assert finer.metrics != same.metrics


def test_a_head_without_queries_says_so(store):
    report = heads.train(store, task="depth", head="linear", steps=2, batch_size=8, device="cpu")
    with pytest.raises(InvalidInputError, match="Linear has no grid of queries"):
        heads.evaluate(report.path, device="cpu", queries=9)


def test_classes_of_images_come_from_the_items(store):
    report = learn(store, "classification", head="linear_pool", steps=40, options={"pool": "both"})
    record = read_run(Path(report.path)).record
    assert record["options"]["task"] == {"names": "dark|light"}
    assert record["labels"] == {"kind": "class", "data": None}
    assert report.metrics["top1"] > 0.9
    assert "top5" not in report.metrics


def test_a_head_that_does_not_fit_the_task_is_refused(store):
    with pytest.raises(InvalidInputError, match=r"this one gives a map.*attentive_pool"):
        heads.train(store, task="classification", steps=2)
    with pytest.raises(InvalidInputError, match=r"one answer an image.*deap"):
        heads.train(store, task="depth", head="linear_pool", steps=2)


def test_a_class_that_came_later_does_not_change_a_resumed_run(store, monkeypatch):
    undisturbed = learn(store, "classification")
    with pytest.raises(KeyboardInterrupt):
        learn(store, "classification", progress=Stop())
    found = Things.items
    more = [Item(path="00031.npy", splits=("train",), label="dim")]
    monkeypatch.setattr(Things, "items", lambda self: [*found(self), *more])
    fake_extract(store, [Things(30)])
    resumed = heads.train(store, resume="@last", device="cpu")
    assert resumed.metrics == undisturbed.metrics


def test_items_without_a_class_cannot_be_classified(tmp_path):
    path = tmp_path / "features.zarr"
    fake_extract(path, [FakeReader(20)])
    with pytest.raises(InvalidInputError, match="No stored row has class labels"):
        heads.train(path, task="classification", head="linear_pool", steps=2)


def test_a_class_that_was_not_learned_is_left_out_of_the_measure(store, monkeypatch):
    report = learn(store, "classification")
    found = Things.items

    def changed(self):
        return [
            Item(path=i.path, splits=i.splits, group=i.group, label="new" if n == 0 else i.label)
            for n, i in enumerate(found(self))
        ]

    monkeypatch.setattr(Things, "items", changed)
    fake_extract(store, [Things(30)])
    again = heads.evaluate(report.path, device="cpu")
    assert again.images == report.images - 1
    assert "Unknown class 'new'" in next(iter(again.left_out.values()))


class Boxed(Things):
    """Things as a data set of boxes alone; the last image has none, and is not annotated."""

    def items(self):
        items = []
        for number, item in enumerate(super().items()):
            far = {"class": "far", "box": [30, 4, 46, 30], "difficult": bool(number % 2)}
            boxes = [{"class": "near", "box": [0, 0, 18, 12]}, far]
            attributes = {} if number == self.n_images - 1 else {"boxes": boxes}
            items.append(replace(item, attributes=attributes, label_kinds=("depth",)))
        return items


def test_boxes_without_masks_are_learned_and_measured(tmp_path):
    path = tmp_path / "features.zarr"
    fake_extract(path, [Boxed(30)])
    with pytest.raises(InvalidInputError, match=r"kinds of labels they have: boxes, class, depth"):
        learn(path, "detection")
    options = {"truth": "boxes", "pictures": 2}
    report = learn(path, "detection", steps=40, lr=1e-2, options=options)
    assert "ap@native" in report.metrics
    again = heads.evaluate(report.path, device="cpu")
    assert (again.metrics, again.images) == (report.metrics, 6)
    record = read_run(Path(report.path)).record
    assert record["labels"] == {"kind": "boxes", "data": None}
    assert record["images"]["train"] + record["images"]["val"] == 23  # one is not annotated
    assert len(report.pictures) == 2


def test_boxes_of_another_data_set_are_joined_by_image(tmp_path, monkeypatch):
    path = tmp_path / "features.zarr"
    fake_extract(path, [FakeReader(30)])
    monkeypatch.setattr("heads.labels.open_dataset", lambda spec: Boxed(30))
    report = learn(path, "detection", steps=2, data="fake:x", options={"truth": "boxes"})
    assert read_run(Path(report.path)).record["labels"]["kind"] == "boxes"
    assert heads.evaluate(report.path, device="cpu").metrics == report.metrics


def test_the_boxes_of_vocs_files_are_learned(tmp_path):
    write_voc(tmp_path / "voc", {"train": 6, "val": 2})
    shutil.rmtree(tmp_path / "voc" / "SegmentationObject")
    path = tmp_path / "features.zarr"
    fake_extract(path, [open_dataset(f"voc:{tmp_path / 'voc'}")])
    report = learn(path, "detection", steps=2, options={"truth": "boxes"})
    line = pq.read_table(Path(report.path) / "per_image.parquet").to_pylist()[0]
    assert line["n_true_all_native"] == 1  # the cat; the dog is difficult
