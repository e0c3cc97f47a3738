from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from featstore.errors import InvalidInputError, NotFoundError
from featstore.geometry import place
from heads.tasks import TASKS, LabelFacts, build_task


def squash(source_hw, **changes):
    settings = {"crop": None, "resize": "squash", "view": "plain", **changes}
    return place(source_hw=source_hw, input_hw=(32, 32), **settings)


def measure(task, prediction, values, *, valid=None, placement=None):
    return task.measure(
        prediction,
        placement=placement or squash(values.shape),
        values_hw=values,
        valid_hw=np.ones(values.shape, bool) if valid is None else valid,
        dataset_format="folder",
    )


def log_p(classes_yx, n, *, sure=0.9):
    p = np.full((n, *classes_yx.shape), (1 - sure) / (n - 1), np.float32)
    np.put_along_axis(p, classes_yx[None], sure, axis=0)
    return np.log(p)


def test_metrics_are_those_of_one_confusion_matrix_over_all_images():
    n, rng = 5, np.random.default_rng(0)
    task = build_task("segmentation", {"classes": n, "names": "a|b|c|d"})
    lines, truths, predictions = [], [], []
    for _ in range(4):
        truth, prediction = (rng.integers(0, 4, (16, 20)).astype(np.int32) for _ in range(2))
        valid = rng.random(truth.shape) < 0.7
        lines.append(measure(task, log_p(prediction, n), truth, valid=valid))
        truths.append(truth[valid])
        predictions.append(prediction[valid])
    matrix = confusion_matrix(np.concatenate(truths), np.concatenate(predictions), labels=range(n))
    hit = np.diag(matrix).astype(float)
    union = matrix.sum(0) + matrix.sum(1) - hit
    found = {metric.name: metric.value for metric in task.summarise(lines, [None] * 4)}
    # Class 4 is neither predicted nor present: no zero of it enters the mean.
    assert found["miou@native"] == pytest.approx((hit[:4] / union[:4]).mean())
    assert found["accuracy@native"] == pytest.approx(hit.sum() / matrix.sum())
    assert found["iou@native/b"] == pytest.approx(hit[1] / union[1])
    assert "iou@native/4" not in found


def test_the_mean_iou_is_not_that_of_each_image():
    task = build_task("segmentation", {"classes": 2})
    right = measure(task, log_p(np.zeros((8, 8), int), 2), np.zeros((8, 8), np.int32))
    half = np.repeat([[0, 1]], 8, axis=0).repeat(4, axis=1).astype(np.int32)
    wrong = measure(task, log_p(np.zeros((8, 8), int), 2), half)
    found = {m.name: m.value for m in task.summarise([right, wrong], [None] * 2)}
    assert found["miou@native"] == pytest.approx((96 / 128 + 0) / 2)


def test_cross_entropy_is_counted_at_224_over_labelled_pixels():
    task = build_task("segmentation", {"classes": 3})
    values = np.zeros((10, 10), np.int32)
    valid = np.ones((10, 10), bool)
    valid[:5] = False
    stats = measure(task, log_p(np.ones((28, 28), int), 3, sure=0.8), values, valid=valid)
    assert stats["n_pixels_224"] == 224 * 112
    assert stats["sum_ce_224"] / stats["n_pixels_224"] == pytest.approx(-np.log(0.1), rel=1e-5)


def test_a_larger_output_is_brought_to_224_first():
    task = build_task("segmentation", {"classes": 3})
    values = np.arange(9).reshape(3, 3).repeat(20, 0).repeat(20, 1).astype(np.int32) % 3
    large = log_p(values.repeat(8, 0).repeat(8, 1)[:448, :448], 3)
    stats = measure(task, large, values)
    assert stats["n_pixels_224"] == 224 * 224
    assert len(stats["truth_224"]) == 3
    assert sum(stats["truth_native"]) == values.size


def test_the_loss_is_cross_entropy_of_the_labelled_pixels():
    task = build_task("segmentation", {"classes": 3})
    output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([[[0, 1, 2, -1]] * 4] * 2, dtype=torch.int16)
    known = classes >= 0
    picked = output.log_softmax(1).gather(1, classes.clamp(min=0).long()[:, None])[:, 0]
    torch.testing.assert_close(task.loss(output, {"classes": classes}), -picked[known].mean())


def test_targets_take_the_class_under_the_centre_and_no_mean():
    values = np.array([[0, 5], [5, 0]], np.int32).repeat(8, 0).repeat(8, 1)
    valid = np.ones_like(values, bool)
    valid[:4] = False
    targets = build_task("segmentation", {"classes": 6}).prepare(
        values, valid, squash((16, 16)), (8, 8)
    )["classes"]
    assert set(np.unique(targets)) == {-1, 0, 5}
    assert (targets[:2] == -1).all()
    np.testing.assert_array_equal(targets[2:], values[1::2, 1::2][2:])


def test_a_class_that_is_not_declared_is_refused():
    task = build_task("segmentation", {"classes": 3})
    values = np.full((4, 4), 3, np.int32)
    with pytest.raises(InvalidInputError, match="from 0 to 2, or void"):
        task.prepare(values, np.ones((4, 4), bool), squash((4, 4)), (8, 8))
    void = np.zeros((4, 4), bool)
    with pytest.raises(InvalidInputError, match="no class at any pixel"):
        task.prepare(values, void, squash((4, 4)), (8, 8))


def test_without_a_number_of_classes_the_message_says_how_to_name_one():
    with pytest.raises(InvalidInputError, match="--set classes=N"):
        build_task("segmentation")
    with pytest.raises(InvalidInputError, match="at most one a class"):
        build_task("segmentation", {"classes": 2, "names": "a|b|c"})


def test_classes_come_from_the_data_unless_they_are_named():
    kind = TASKS["segmentation"]
    empty = {"classes": None, "names": ""}
    assert kind.completed(empty, LabelFacts(class_names=("a", "b|c"))) == {
        "classes": 2,
        "names": "a|b/c",
    }
    assert (
        kind.completed({**empty, "classes": 200}, LabelFacts(class_names=("a", "b")))["classes"]
        == 200
    )
    assert kind.completed(empty, LabelFacts()) == empty


def test_pixels_outside_of_a_crop_have_no_class():
    task = build_task("segmentation", {"classes": 20})
    placement = squash((8, 16), resize="crop")
    found = task.at_source(log_p(np.full((8, 8), 18), 20), placement)
    assert found.dtype == np.int32
    assert (found[:, :4] == -1).all()
    assert (found[:, 4:12] == 18).all()  # of the second block of channels


def test_the_legend_names_the_classes_that_are_there_the_largest_first():
    task = build_task("segmentation", {"classes": 3, "names": "sky|road|car"})
    legend = task.legend(np.array([[2, 2, 0], [-1, -1, -1]]))
    assert list(legend) == ["car", "sky"]
    picture = task.render(np.array([[2, -1]]), np.zeros((1, 2, 3), np.uint8))
    np.testing.assert_allclose(picture[0, 0], 0.65 * np.array(legend["car"]), atol=1)
    assert not picture[0, 1].any()


def test_an_unknown_task_is_told():
    with pytest.raises(NotFoundError, match="Did you mean 'segmentation'"):
        build_task("segmentaton")
