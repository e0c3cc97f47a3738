from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from featstore.errors import BadImageError, InvalidInputError
from featstore.geometry import place
from featstore.skeleton import Skeleton
from heads.keypoint_labels import keypoint_record
from heads.tasks import TASKS, LabelFacts, build_task
from heads.tasks.pose_options import PoseOptions

SKELETON = Skeleton(
    names=("nose", "left", "right"), edges=((0, 1), (0, 2)), swaps=((1, 2),), sigmas=(0.1, 0.2, 0.3)
)
VALID = np.array(True)


def pose(**options):
    given = {"names": "nose|left|right", "swaps": "1-2", "sigmas": "0.1|0.2|0.3", **options}
    return build_task("pose", given)


def record(points, *, identity="fox", box=(0, 0, 20, 20), area=None):
    about = {"keypoints": points, "box": box, "area": area, "identity": identity}
    return keypoint_record(json.dumps(about))


def crop(box=(10, 20, 50, 60), view="plain"):
    return place(source_hw=(100, 100), crop=box, input_hw=(32, 32), resize="squash", view=view)


def output(*numbers):
    return torch.tensor(numbers, dtype=torch.float32)[None, :, None, None]


def targets(points, visible):
    return {"points": torch.tensor([points]), "visible": torch.tensor([visible])}


def test_marked_keypoints_become_shares_of_the_crop_wherever_they_lie():
    label = record([[30, 40, 2], [10, 20, 1], [99, 40, 0]], identity="owl")
    found = pose(identities="fox|owl").prepare(label, VALID, crop(), (1, 1))
    np.testing.assert_allclose(found["points"], [[0.5, 0.5], [0, 0], [0, 0]])
    np.testing.assert_array_equal(found["visible"], [1, 1, 0])
    assert found["identity"] == 1
    outside = pose().prepare(record([[70, 40, 2], [0, 0, 0], [0, 0, 0]]), VALID, crop(), (1, 1))
    np.testing.assert_allclose(outside["points"][0], [1.5, 0.5])
    assert outside["visible"][0] == 1
    assert outside["identity"] == -1


def test_another_number_of_keypoints_is_refused():
    with pytest.raises(BadImageError, match="has 2 keypoints, and 3 are learned"):
        pose().prepare(record([[1, 1, 2], [2, 2, 2]]), VALID, crop(), (1, 1))


def test_a_mirror_image_is_refused_where_nobody_knows_what_it_exchanges():
    label = record([[30, 40, 2], [10, 20, 1], [1, 1, 2]])
    with pytest.raises(InvalidInputError, match="--set swaps=0-1"):
        build_task("pose", {"names": "a|b|c"}).prepare(label, VALID, crop(view="hflip"), (1, 1))
    free = build_task("pose", {"names": "a|b|c", "swaps": ""})
    assert free.prepare(label, VALID, crop(view="hflip"), (1, 1))["points"][1, 0] == 1.0


def test_the_loss_is_the_mean_over_marked_keypoints_of_an_image():
    task = pose(loss="smooth_l1", beta=0.1)
    said = output(0.5, 0.5, 0.25, 0.5, 9, 9)
    # Of the second: 0.25 is above beta, so 0.25 - 0.05 along x and 0 along y.
    expected = (0 + 0.2 / 2) / 2
    aims = targets([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]], [1.0, 1.0, 0.0])
    assert task.losses(said, aims).tolist() == pytest.approx([expected])
    assert float(task.loss(said, aims)) == pytest.approx(expected)
    squared = pose(loss="l2").losses(said, aims)
    assert squared.tolist() == pytest.approx([0.25**2 / 2 / 2])


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
def test_with_scales_the_loss_is_least_where_the_scale_is_that_of_the_errors(loss):
    task = pose(loss=loss, scales=True, beta=1e-6)
    points = [[0.5, 0.5]] * 3
    aims = targets([[0.6, 0.4]] * 3, [1.0] * 3)
    said = torch.linspace(-3, 3, 301)

    def at(number):
        return task.losses(output(*np.ravel(points), *[float(number)] * 3), aims)

    best = said[torch.stack([at(number) for number in said]).argmin()]
    scale = task.predict(output(*np.ravel(points), *[float(best)] * 3))[0, -1, 0, 0]
    # Both have the scale of the errors as their best: the mean size, or the root mean square.
    assert float(scale) == pytest.approx(0.1, rel=0.02)


def test_a_keypoint_comes_back_to_where_it_was_with_its_confidence():
    label = record([[30, 40, 2], [12, 25, 1], [44, 33, 2]])
    task = pose(scales=True)
    points = task.prepare(label, VALID, crop(), (1, 1))["points"]
    prediction = np.concatenate([points.ravel(), [0.01, 0.05, 0.5]]).astype(np.float32)
    found = task.at_source(prediction[:, None, None], crop())
    np.testing.assert_allclose(found[:, :2], label["keypoints"][:, :2], atol=1e-4)
    np.testing.assert_allclose(found[1, 2], (1 - np.exp(-1)) ** 2, rtol=1e-5)
    assert (np.diff(found[:, 2]) < 0).all()
    plain = pose().at_source(prediction[:6, None, None], crop())
    assert np.isnan(plain[:, 2]).all()


def test_confidence_is_the_share_of_errors_below_the_threshold():
    rng = np.random.default_rng(0)
    laplace = np.abs(rng.laplace(0, 0.04, (200_000, 2))).max(axis=1)
    normal = np.hypot(*rng.normal(0, 0.04, (2, 200_000)))
    for loss, errors in (("smooth_l1", laplace), ("l2", normal)):
        prediction = np.array([0.5, 0.5] * 3 + [0.04] * 3, np.float32)[:, None, None]
        found = pose(loss=loss, scales=True).at_source(prediction, crop())[0, 2]
        assert found == pytest.approx((errors <= 0.05).mean(), abs=0.005)


def test_a_perfect_answer_measures_perfect_also_on_a_mirror_image():
    label = record([[30, 40, 2], [12, 25, 1], [44, 33, 2]])
    for view in ("plain", "hflip"):
        placement = crop(view=view)
        task = pose(scales=True)
        points = task.prepare(label, VALID, placement, (1, 1))["points"]
        said = np.concatenate([points.ravel(), [0.1] * 3])[:, None, None]
        found = task.measure(
            said, placement=placement, values_hw=label, valid_hw=VALID, dataset_format="ap10k.v1"
        )
        np.testing.assert_allclose(found["distance"], 0, atol=1e-6)
        assert found["oks"] == pytest.approx(1)


def test_distances_are_measured_against_the_crop_and_the_box():
    label = record([[30, 40, 2], [12, 25, 0], [44, 33, 2]], box=(20, 20, 40, 45), area=500)
    said = pose().prepare(label, VALID, crop(), (1, 1))["points"]
    said[0] += [0.1, 0]  # of 40 source pixels
    found = pose().measure(
        said.reshape(-1, 1, 1),
        placement=crop(),
        values_hw=label,
        valid_hw=VALID,
        dataset_format="ap10k.v1",
    )
    assert found["distance"] == pytest.approx([0.1, -1, 0], abs=1e-6)
    assert found["of_diagonal"] == pytest.approx([4 / np.hypot(40, 40), -1, 0], abs=1e-6)
    assert found["of_box"] == pytest.approx([4 / 25, -1, 0], abs=1e-6)
    assert found["oks"] == pytest.approx((np.exp(-16 / (2 * 500 * 0.2**2)) + 1) / 2)


def test_options_take_over_the_skeleton_and_give_it_back():
    kind = TASKS["pose"]
    told = LabelFacts(skeleton=SKELETON, identities=("fox", "owl"))
    defaults = {"names": "", "edges": "", "swaps": None, "sigmas": "", "identities": ""}
    filled = kind.completed(defaults, told)
    assert PoseOptions(**filled).skeleton() == SKELETON
    assert build_task("pose", filled).identities == ("fox", "owl")
    mine = kind.completed({**defaults, "edges": "1-2", "identities": "cat"}, told)
    assert (mine["edges"], mine["identities"], mine["swaps"]) == ("1-2", "cat", "1-2")
    unsided = Skeleton(names=("a", "b"))
    bare = kind.completed(defaults, LabelFacts(skeleton=unsided))
    assert PoseOptions(**bare).skeleton() == unsided
    assert kind.completed(defaults, LabelFacts()) == defaults


def test_other_keypoints_than_those_that_are_named_are_refused():
    told = LabelFacts(skeleton=SKELETON)
    empty = {"edges": "", "swaps": None, "sigmas": "", "identities": ""}
    with pytest.raises(InvalidInputError, match="the 2 that are learned: nose, tail"):
        TASKS["pose"].completed({**empty, "names": "nose|tail"}, told)
    with pytest.raises(InvalidInputError, match="where number 1 is 'right'"):
        TASKS["pose"].completed({**empty, "names": "nose|right|left"}, told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l3"}, "one of smooth_l1, l2"),
        ({"beta": 0}, "a positive number"),
        ({"edges": "0:1"}, "pairs of numbers"),
        ({"edges": "0-7"}, "from 0 to 2"),
        ({"sigmas": "0.1|x"}, "numbers parted by"),
        ({"sigmas": "0.1"}, "3 positive numbers"),
        ({"identities": "fox|fox"}, "each once"),
        ({"names": ""}, "--set names=nose"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        pose(**options)


def test_names_with_the_mark_that_parts_them_are_refused():
    told = LabelFacts(identities=("a|b",))
    with pytest.raises(InvalidInputError, match="names without"):
        TASKS["pose"].completed({"names": "nose", "identities": ""}, told)
