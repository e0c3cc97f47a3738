from __future__ import annotations

import numpy as np
import pytest
import torch

from featstore.errors import InvalidInputError
from featstore.geometry import place
from heads.metrics.depth import DEPTH_METRICS
from heads.tasks import build_task
from heads.tasks.depth import EIGEN_COLUMNS, EIGEN_ROWS


def squash(source_hw, input_hw=(32, 32), **changes):
    settings = {"crop": None, "resize": "squash", "view": "plain", **changes}
    return place(source_hw=source_hw, input_hw=input_hw, **settings)


def measure(task, prediction, values, *, valid=None, placement=None, dataset_format="folder"):
    return task.measure(
        prediction,
        placement=placement or squash(values.shape),
        values_hw=values,
        valid_hw=np.ones(values.shape, bool) if valid is None else valid,
        dataset_format=dataset_format,
    )


def test_the_loss_is_the_formula_over_the_valid_pixels_of_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, 1, 5, 4, generator=generator) + 1
    depth = torch.rand(3, 5, 4, generator=generator) * 9 + 0.5
    valid = torch.rand(3, 5, 4, generator=generator) < 0.6
    g = torch.log(output.relu() + 1e-3)[:, 0][valid] - torch.log(depth + 1e-3)[valid]
    expected = torch.sqrt(g.var() + 0.15 * g.mean() ** 2)
    found = build_task("depth").loss(output, {"depth": depth, "valid": valid})
    torch.testing.assert_close(found, expected)


def test_an_invalid_depth_reaches_neither_loss_nor_gradient():
    output = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0] = False
    losses = []
    for bad in (0.0, -5.0, 1e9, float("nan")):
        depth = torch.full((1, 4, 4), 2.0)
        depth[0, 0] = bad
        loss = build_task("depth").loss(output, {"depth": depth, "valid": valid})
        (gradient,) = torch.autograd.grad(loss, output)
        assert not gradient[0, 0, 0].any()
        assert gradient[0, 0, 1:].isfinite().all()
        losses.append(loss.item())
    assert len(set(losses)) == 1


def test_a_batch_without_two_valid_depths_is_refused():
    targets = {"depth": torch.ones(1, 4, 4), "valid": torch.zeros(1, 4, 4, dtype=torch.bool)}
    with pytest.raises(InvalidInputError, match="at least two valid depths"):
        build_task("depth").loss(torch.ones(1, 1, 4, 4), targets)


def test_targets_average_valid_depths_only_and_mark_what_has_none():
    values = np.full((4, 4), 2.0)
    values[0, 0], values[0, 1], values[1, 0] = np.nan, 50.0, 0.0  # missing, too far, too near
    values[2:, 2:] = 0.0
    targets = build_task("depth").prepare(values, values != 0, squash((4, 4)), (2, 2))
    assert targets["depth"].dtype == np.float32
    np.testing.assert_array_equal(targets["depth"], [[2, 2], [2, 0]])
    np.testing.assert_array_equal(targets["valid"], [[True, True], [True, False]])


def test_padding_has_no_target():
    placement = squash((16, 32), resize="letterbox")
    targets = build_task("depth").prepare(
        np.ones((16, 32)), np.ones((16, 32), bool), placement, (8, 8)
    )
    assert targets["valid"][2:6].all()
    assert not targets["valid"][[0, 1, 6, 7]].any()


def test_a_label_of_another_size_or_without_a_valid_depth_is_refused():
    task = build_task("depth")
    with pytest.raises(InvalidInputError, match=r"`depth` must be of its image's size \(8, 8\)"):
        task.prepare(np.ones((4, 8)), np.ones((4, 8), bool), squash((8, 8)), (2, 2))
    with pytest.raises(InvalidInputError, match="at least one value"):
        task.prepare(np.zeros((8, 8)), np.ones((8, 8), bool), squash((8, 8)), (2, 2))
    with pytest.raises(InvalidInputError, match="of its image's size"):
        measure(task, np.ones((1, 4, 4), np.float32), np.ones((4, 8)), placement=squash((8, 8)))


def test_predictions_are_clamped_to_the_range_of_valid_depths():
    output = torch.tensor([-1.0, 0.0, 5.0, 99.0]).view(1, 1, 1, 4)
    predicted = build_task("depth").predict(output).flatten().tolist()
    assert predicted == pytest.approx([1e-3, 1e-3, 5, 10])


def test_a_perfect_prediction_at_another_resolution_measures_as_perfect():
    values = np.broadcast_to(np.linspace(1, 3, 64), (48, 64)).copy()
    small = values.reshape(24, 2, 32, 2).mean(axis=(1, 3))[None].astype(np.float32)
    task = build_task("depth")
    stats = measure(task, small, values)
    found = {m.name: m.value for m in task.summarise([stats], [None])}
    assert stats["n_pixels"] == 48 * 64
    assert found["rmse"] < 0.01  # half a cell at two borders is continued, not extrapolated
    assert found["delta1"] == 1


def test_only_valid_pixels_in_range_are_measured():
    values = np.full((4, 4), 2.0)
    values[0] = [0.0, 11.0, np.nan, 2.0]
    valid = np.ones((4, 4), bool)
    valid[1] = False
    stats = measure(build_task("depth"), np.full((1, 2, 2), 3.0, np.float32), values, valid=valid)
    assert stats["n_pixels"] == 9
    assert stats["sum_squared_error"] == pytest.approx(9)


def test_pixels_outside_of_a_crop_are_not_measured():
    placement = squash((8, 16), resize="crop")
    values, prediction = np.full((8, 16), 2.0), np.full((1, 4, 4), 2.0, np.float32)
    task = build_task("depth")
    stats = measure(task, prediction, values, placement=placement)
    assert stats["n_pixels"] == 8 * 8
    assert np.isnan(task.at_source(prediction, placement)).sum() == 8 * 8


def test_a_mirrored_view_is_measured_the_right_way_round():
    values = np.tile([1.0, 1.0, 4.0, 4.0], (4, 1))
    prediction = np.ascontiguousarray(values[None, :, ::-1]).astype(np.float32)
    stats = measure(
        build_task("depth"), prediction, values, placement=squash((4, 4), (4, 4), view="hflip")
    )
    assert stats["sum_squared_error"] == 0


@pytest.mark.parametrize(
    ("crop", "dataset_format", "size", "cropped"),
    [
        ("auto", "nyu", (480, 640), True),
        ("auto", "nyu.v1", (480, 640), True),
        ("auto", "folder", (480, 640), False),
        ("auto", "nyu", (240, 320), False),
        ("none", "nyu", (480, 640), False),
        ("eigen", "folder", (480, 640), True),
    ],
)
def test_the_eigen_crop_is_for_nyu_labels_of_480_by_640(crop, dataset_format, size, cropped):
    values = np.full(size, 2.0)
    prediction = np.full((1, 4, 4), 2.0, np.float32)
    task = build_task("depth", {"crop": crop})
    stats = measure(task, prediction, values, dataset_format=dataset_format)
    assert stats["n_pixels"] == ((471 - 45) * (601 - 41) if cropped else size[0] * size[1])


def test_the_eigen_crop_keeps_the_right_pixels():
    values = np.full((480, 640), 5.0)
    values[EIGEN_ROWS, EIGEN_COLUMNS] = 2.0
    prediction = np.full((1, 4, 4), 2.0, np.float32)
    stats = measure(build_task("depth"), prediction, values, dataset_format="nyu")
    assert stats["sum_squared_error"] == 0


def test_the_eigen_crop_is_refused_on_labels_of_another_size():
    task = build_task("depth", {"crop": "eigen"})
    with pytest.raises(InvalidInputError, match=r"480 x 640, not \(240, 320\).*crop=none"):
        measure(task, np.ones((1, 4, 4), np.float32), np.ones((240, 320)), dataset_format="nyu")


def test_an_unknown_crop_is_refused():
    with pytest.raises(InvalidInputError, match="auto, eigen, none"):
        build_task("depth", {"crop": "garg"})


def test_the_protocol_names_the_source_of_the_labels():
    protocol = build_task("depth").protocol(["rawDepths", "depths", "rawDepths"])
    assert protocol["label_sources"] == ["depths", "rawDepths"]
    assert protocol["range_m"] == [1e-3, 10.0]
    assert protocol["crop"] == "auto"


def test_metrics_come_as_means_over_images_and_pooled():
    task = build_task("depth")
    stats = [
        measure(task, np.full((1, 2, 2), 2.0 + error, np.float32), np.full((4, 4), 2.0))
        for error in (1.0, 3.0)
    ]
    found = {m.name: m for m in task.summarise(stats, [None, None])}
    assert list(found)[:7] == list(DEPTH_METRICS)
    assert found["rmse"].value == pytest.approx(2.0)
    assert found["rmse_pooled"].value == pytest.approx(np.sqrt(5.0))
    assert found["rmse"].low is not None


def test_pictures_share_the_range_of_the_truth_and_are_black_where_there_is_none():
    task = build_task("depth")
    values = np.array([[1.0, 2.0], [3.0, 0.0]])
    panels = task.render_with_truth(
        np.array([[1.0, 2.5], [9.0, 2.0]]), values, values > 0, np.zeros((2, 2, 3), np.uint8)
    )
    assert {name: (p.shape, p.dtype) for name, p in panels.items()} == dict.fromkeys(
        ("prediction", "truth", "error"), ((2, 2, 3), np.uint8)
    )
    np.testing.assert_array_equal(panels["truth"][0, 0], panels["prediction"][0, 0])
    np.testing.assert_array_equal(panels["truth"][1, 0], panels["prediction"][1, 0])  # clamped
    assert not panels["truth"][1, 1].any()
    assert not panels["error"][1, 1].any()
    assert panels["prediction"][1, 1].any()


def test_a_prediction_alone_spans_its_own_range():
    picture = build_task("depth").render(
        np.array([[1.0, 5.0], [np.nan, 3.0]]), np.zeros((2, 2, 3), np.uint8)
    )
    np.testing.assert_array_equal(picture[0, 0], [68, 1, 84])
    np.testing.assert_array_equal(picture[0, 1], [253, 231, 37])
    assert not picture[1, 0].any()
