"""What every task meets by being registered."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from featstore.errors import NotFoundError
from featstore.geometry import place
from heads.keypoint_labels import keypoint_record
from heads.metrics import Metric
from heads.options import option_defaults
from heads.tasks import TASKS, Task, build_task

SOURCE_HW, OUTPUT_HW = (24, 36), (16, 16)
PLACEMENT = place(
    source_hw=SOURCE_HW, crop=None, input_hw=(32, 32), resize="letterbox", view="plain"
)


OPTIONS = {
    "segmentation.v1": {"classes": 6},
    "classification.v1": {"names": "a|b|c|d|e|f"},
    "instances.v1": {"restarts": 2},
    "pose.v1": {
        "names": "nose|left|right",
        "swaps": "1-2",
        "edges": "0-1|0-2",
        "sigmas": ".1|.1|.1",
        "identities": "fox|rabbit",
        "scales": True,
    },
}  # what a data set would tell, and what is quick


@pytest.fixture(params=list(TASKS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def task(name: str) -> Task:
    return build_task(name, OPTIONS.get(name))


def output_hw(task: Task) -> tuple[int, int]:
    return (1, 1) if task.stage == "pooled" else OUTPUT_HW


def make_label(task: Task, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    valid = rng.random(SOURCE_HW) < 0.8
    if task.label_kind == "class":
        return np.array(str(rng.choice(list("abcdef")))), np.array(True)
    if task.label_kind == "keypoints":
        return keypoints(rng), np.array(True)
    if task.label_kind == "classes":
        return rng.integers(0, 6, SOURCE_HW).astype(np.int32), valid
    if task.label_kind == "instances":
        ids = np.zeros(SOURCE_HW, np.int32)
        for number in range(1, 5):
            y, x = rng.integers(0, 16), rng.integers(0, 28)
            ids[y : y + 8, x : x + 8] = number
        return ids, np.ones(SOURCE_HW, bool)
    return rng.uniform(1, 5, SOURCE_HW), valid


def keypoints(rng: np.random.Generator) -> np.ndarray:
    points = np.concatenate([rng.uniform(2, 22, (3, 2)), [[2], [1], [rng.integers(0, 3)]]], axis=1)
    about = {"keypoints": points.tolist(), "box": [2, 2, 22, 22], "area": None}
    return keypoint_record(json.dumps({**about, "identity": str(rng.choice(["fox", "owl"]))}))


def make_targets(task: Task, n: int) -> dict[str, torch.Tensor]:
    prepared = [task.prepare(*make_label(task, seed), PLACEMENT, OUTPUT_HW) for seed in range(n)]
    arrays = {key: np.stack([targets[key] for targets in prepared]) for key in prepared[0]}
    task.fit_to(SimpleNamespace(arrays=arrays))
    return {key: torch.from_numpy(a) for key, a in arrays.items()} | {"slot": torch.arange(n)}


def make_output(task: Task, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, task.n_outputs, *output_hw(task), generator=generator) * 4 + 0.5


def measure(task: Task, seed: int) -> dict[str, float | list[float]]:
    values, valid = make_label(task, seed)
    return task.measure(
        task.predict(make_output(task, 1))[0].numpy(),
        placement=PLACEMENT,
        values_hw=values,
        valid_hw=valid,
        dataset_format="folder",
    )


def test_there_is_a_task_to_test():
    assert "depth.v1" in TASKS


def test_targets_have_one_shape_and_dtype_for_all_images(task):
    first, second = (task.prepare(*make_label(task, seed), PLACEMENT, OUTPUT_HW) for seed in (0, 1))
    assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
        k: (v.shape, v.dtype) for k, v in second.items()
    }


def test_the_loss_is_a_finite_scalar_with_a_gradient(task):
    torch.manual_seed(0)
    output = make_output(task, 3).requires_grad_()
    loss = task.loss(output, make_targets(task, 3))
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    assert output.grad.isfinite().all()
    assert output.grad.any()


def test_the_held_out_loss_is_a_finite_scalar(task):
    targets = make_targets(task, 3)
    loss = task.held_out_loss(make_output(task, 3), targets)
    assert loss.shape == ()
    assert loss.isfinite()


def test_readouts_share_out_the_outputs(task):
    assert sum(task.readouts) == task.n_outputs


def test_padding_reaches_neither_loss_nor_gradient(task):
    if task.stage == "pooled":
        pytest.skip("an answer an image has no padding")
    output = make_output(task, 2).requires_grad_()
    task.loss(output, make_targets(task, 2)).backward()
    top = (PLACEMENT.dst[1] * OUTPUT_HW[0]) // PLACEMENT.input_hw[0]
    assert top > 0
    assert not output.grad[:, :, :top].any()


def test_a_prediction_comes_back_at_the_size_of_the_image(task):
    predicted = task.predict(make_output(task, 2))
    assert predicted.shape[0] == 2
    assert predicted.shape[2:] == output_hw(task)
    found = task.at_source(predicted[0].numpy(), PLACEMENT)
    if task.label_kind == "instances" and found.shape[1:] == (5,):  # boxes
        assert (found[:, [0, 1]] >= 0).all()
        assert (found[:, [2, 3]] <= SOURCE_HW[::-1]).all()
    elif task.label_kind == "class":
        assert found.shape == (task.n_outputs,)
        assert found.sum() == pytest.approx(1)
    elif task.label_kind == "keypoints":
        assert found.shape == (3, 3)
        assert ((found[:, 2] > 0) & (found[:, 2] < 1)).all()
    else:
        assert found.shape == SOURCE_HW


def test_measures_are_plain_numbers_of_the_same_names_for_all_images(task):
    first, second = measure(task, 0), measure(task, 1)
    assert first.keys() == second.keys()
    for value in first.values():
        assert type(value) in (float, list)
        assert type(value) is float or all(type(each) is float for each in value)
    assert json.loads(json.dumps(first)) == first


def test_a_summary_has_the_primary_metric_and_ordered_intervals(task):
    metrics = task.summarise([measure(task, seed) for seed in range(6)], [None] * 6)
    assert all(isinstance(metric, Metric) for metric in metrics)
    assert task.primary_metric in {metric.name for metric in metrics}
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert metric.low <= metric.value <= metric.high


def test_a_summary_of_one_group_says_why_it_has_no_interval(task):
    metrics = task.summarise([measure(task, seed) for seed in range(3)], ["a"] * 3)
    assert all(m.low is None and m.high is None and "one group" in m.note for m in metrics)


def test_a_summary_does_not_depend_on_the_order_of_the_images(task):
    per_image = [measure(task, seed) for seed in range(6)]
    forward = task.summarise(per_image, [None] * 6)
    backward = task.summarise(per_image[::-1], [None] * 6)
    for a, b in zip(forward, backward, strict=True):
        assert a.value == pytest.approx(b.value)


def test_the_protocol_names_label_sources_and_is_json(task):
    protocol = task.protocol(["depths"])
    assert protocol["label_sources"] == ["depths"]
    assert json.loads(json.dumps(protocol)) == protocol


def test_pictures_are_rgb_of_the_size_of_the_image(task):
    values, valid = make_label(task, 0)
    at_source = task.at_source(task.predict(make_output(task, 1))[0].numpy(), PLACEMENT)
    image = np.full((*SOURCE_HW, 3), 90, np.uint8)
    panels = task.render_with_truth(at_source, values, valid, image)
    assert "truth" in panels
    assert len(panels) > 1
    assert (image == 90).all()
    for picture in (task.render(at_source, image), *panels.values()):
        assert picture.shape == (*SOURCE_HW, 3)
        assert picture.dtype == np.uint8


def test_options_are_a_frozen_dataclass_with_defaults(name):
    kind = TASKS[name].OPTIONS
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert set(option_defaults(kind)) == {f.name for f in dataclasses.fields(kind)}


def test_unknown_names_offer_the_nearest(name):
    short = name.rpartition(".v")[0]
    with pytest.raises(NotFoundError, match=f"Did you mean '{short}'"):
        build_task(short + "x")
    with pytest.raises(NotFoundError, match="Unknown option 'zzz'"):
        build_task(name, {**OPTIONS.get(name, {}), "zzz": "1"})


def test_settings_are_those_an_expert_would_start_with(task):
    assert task.settings.lr > 0
    assert task.settings.batch_size > 1
    assert task.settings.steps > 0
