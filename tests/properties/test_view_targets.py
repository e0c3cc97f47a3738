"""Targets of views, over every task: of a flip the flipped ones, of a crop a part of a fine one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from featstore.errors import InvalidInputError
from featstore.geometry import place
from featstore.views import region_of
from heads.keypoint_labels import keypoint_record
from heads.tasks import TASKS, Task, build_task

OPTIONS = {
    "segmentation.v1": {"classes": 6},
    "classification.v1": {"names": "a|b|c|d|e|f"},
    "pose.v1": {"names": "nose|left|right|tail", "swaps": "1-2", "identities": "fox|rabbit"},
}
POWERS = st.sampled_from([8, 16, 32])


@pytest.fixture(scope="module", params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return build_task(str(request.param), OPTIONS.get(str(request.param)))


def label(task, source_hw, seed):
    """Give values and where they are valid, as `checked_label` gives them."""
    random = np.random.default_rng(seed)
    valid = random.random(source_hw) < 0.9
    if task.label_kind == "class":
        return np.array(str(random.choice(list("abcdef")))), np.array(True)
    if task.label_kind == "keypoints":
        return keypoints(random, source_hw), np.array(True)
    if task.label_kind == "classes":
        return random.integers(0, 6, source_hw).astype(np.int32), valid
    if task.label_kind == "instances":
        ids = np.zeros(source_hw, np.int32)
        for number in range(1, 6):
            y, x = (random.integers(0, size) for size in source_hw)
            ids[y : y + 7, x : x + 9] = number
        return ids, valid
    return random.uniform(1, 5, source_hw).astype(np.float32), valid


def keypoints(random, source_hw):
    """Mark four keypoints, the first always, anywhere on the image or a little outside of it."""
    height, width = source_hw
    marks = [2, *random.integers(0, 3, 3).tolist()]
    points = [
        [x * width, y * height, v]
        for (x, y), v in zip(random.uniform(-0.1, 1.1, (4, 2)), marks, strict=True)
    ]
    about = {"keypoints": points, "box": [0, 0, width, height], "area": None}
    return keypoint_record(json.dumps({**about, "identity": str(random.choice(["fox", "owl"]))}))


def flipped_target(task, name, target, plain):
    """Turn what a plain view is to be into what its mirror image is to be."""
    if task.label_kind != "keypoints" or not target.ndim:
        return target[..., ::-1] if target.ndim else target
    sides = target[[0, 2, 1, 3]]  # nose, left, right, tail
    if name != "points":
        return sides
    x0, _, x1, _ = plain.dst
    mirrored = np.stack([(x0 + x1) / plain.input_hw[1] - sides[:, 0], sides[:, 1]], axis=1)
    return np.where(sides.any(axis=1, keepdims=True), mirrored, 0)


def prepare(task, values, valid, placement, output_hw):
    try:
        return task.prepare(values, valid, placement, output_hw)
    except InvalidInputError:  # nothing is known there
        assume(False)


@settings(max_examples=25)
@given(
    source_hw=st.tuples(POWERS, POWERS),
    any_width=st.integers(5, 50),
    input_hw=st.tuples(POWERS, POWERS),
    output_hw=st.tuples(POWERS, POWERS),
    resize=st.sampled_from(["squash", "crop", "letterbox"]),
    seed=st.integers(0, 99),
)
def test_targets_of_a_flip_are_exactly_the_flipped_targets(
    task, source_hw, any_width, input_hw, output_hw, resize, seed
):
    if not task.meaning.startswith("probability of a centre"):
        source_hw = (source_hw[0], any_width)  # boxes are mirrored by a rounded subtraction
    plain = place(source_hw=source_hw, crop=None, input_hw=input_hw, resize=resize, view="plain")
    assume(plain.dst[0] + plain.dst[2] == input_hw[1])  # the image lies in the middle
    flipped = place(source_hw=source_hw, crop=None, input_hw=input_hw, resize=resize, view="hflip")
    values, valid = label(task, source_hw, seed)
    one = prepare(task, values, valid, plain, output_hw)
    other = prepare(task, values, valid, flipped, output_hw)
    assert one.keys() == other.keys()
    for name, target in one.items():
        expected = flipped_target(task, name, target, plain)
        tolerance = 1e-6 if name == "points" else 0  # places are mirrored by a rounded subtraction
        np.testing.assert_allclose(other[name], expected, rtol=0, atol=tolerance)
        assert other[name].dtype == target.dtype


@settings(max_examples=25)
@given(
    source_hw=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    number=st.integers(0, 99),
    seed=st.integers(0, 99),
)
def test_the_target_of_a_crop_is_that_part_of_a_fine_target(task, source_hw, number, seed):
    """At a cell a pixel nothing is resampled, so the two are equal where no border is made."""
    if task.meaning.startswith(("probability of a centre", "distance")):
        pytest.skip("boxes and distances are of the part of a thing that is shown")
    height, width = source_hw
    box = region_of(f"crop:0:{number}", "key", (0.0, 0.0, float(width), float(height)))
    x0, y0, x1, y1 = map(int, box)
    crop_hw = (y1 - y0, x1 - x0)
    whole = place(source_hw=source_hw, crop=None, input_hw=source_hw, resize="squash", view="plain")
    part = place(source_hw=source_hw, crop=box, input_hw=crop_hw, resize="squash", view="crop:0:0")
    values, valid = label(task, source_hw, seed)
    fine = prepare(task, values, valid, whole, source_hw)
    found = prepare(task, values, valid, part, crop_hw)
    for name, target in fine.items():
        expected = target[y0:y1, x0:x1] if target.ndim > 1 else target
        if name == "points":
            expected = (target * [width, height] - [x0, y0]) / [x1 - x0, y1 - y0]
            expected = np.where(fine["visible"][:, None] > 0, expected, 0)
        if name == "ids":
            pairs = set(zip(found[name].ravel().tolist(), expected.ravel().tolist(), strict=True))
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        elif name == "boundary":  # at the crop's border its other side is not seen
            inside = np.s_[1:-1, 1:-1]
            np.testing.assert_array_equal(found[name][inside], expected[inside])
        else:
            np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_a_crop_moves_and_cuts_the_box_of_a_thing():
    task = build_task("detection")
    ids = np.zeros((32, 32), np.int32)
    ids[8:16, 8:24] = 1
    whole = place(source_hw=(32, 32), crop=None, input_hw=(32, 32), resize="squash", view="plain")
    part = replace(whole, box=(16.0, 0.0, 32.0, 16.0))
    found = task.prepare(ids, np.ones_like(ids, bool), part, (16, 16))
    # In the crop, 16 x 16 pixels, the thing covers columns 0 to 8 and rows 8 to 16.
    at = np.argwhere(found["size"][0] > 0)
    assert (found["size"][:, found["size"][0] > 0] == 0.5).all()
    np.testing.assert_allclose(at.mean(axis=0) + 0.5, [12, 4], atol=0.51)


def test_views_averaged_are_what_each_of_them_says_where_they_agree(task):
    import torch

    torch.manual_seed(0)
    n_cells = 1 if task.stage == "pooled" else 4
    one, other = (
        task.predict(torch.rand(1, task.n_outputs, n_cells, n_cells) + 0.5)[0].numpy()
        for _ in range(2)
    )
    np.testing.assert_allclose(task.average([one, one]), one, rtol=1e-6, atol=1e-6)
    both = task.average([one, other])
    assert both.dtype == one.dtype
    assert (both >= np.minimum(one, other) - 1e-6).all()
    assert (both <= np.maximum(one, other) + 1e-6).all()
    if task.meaning.startswith("log-probability"):
        np.testing.assert_allclose(np.exp(both).sum(axis=0), 1, rtol=1e-5)
        np.testing.assert_allclose(np.exp(both), (np.exp(one) + np.exp(other)) / 2, rtol=1e-5)
    else:
        np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-6)


@settings(max_examples=25)
@given(
    source_hw=st.tuples(st.integers(5, 50), st.integers(5, 50)),
    resize=st.sampled_from(["squash", "crop", "letterbox"]),
    seed=st.integers(0, 99),
)
def test_what_is_predicted_for_a_mirror_image_is_turned_back(task, source_hw, resize, seed):
    """A head that answers a flipped view with its targets says, turned back, the plain ones."""
    if task.label_kind != "keypoints":
        pytest.skip("maps are turned back by `featstore.geometry.unflip`, which has its own tests")
    plain, flipped = (
        place(source_hw=source_hw, crop=None, input_hw=(32, 48), resize=resize, view=view)
        for view in ("plain", "hflip")
    )
    values, valid = label(task, source_hw, seed)
    one, other = (task.prepare(values, valid, each, (1, 1)) for each in (plain, flipped))
    said = other["points"].reshape(-1, 1, 1)
    marked = one["visible"] > 0
    back = task.unflipped(said, flipped).reshape(-1, 2)
    np.testing.assert_allclose(back[marked], one["points"][marked], atol=2e-6)
    at_source = task.at_source(said, flipped)[:, :2]
    np.testing.assert_allclose(at_source[marked], values["keypoints"][marked, :2], atol=2e-4)
