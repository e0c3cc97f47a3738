from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from featstore.errors import InvalidInputError
from featstore.geometry import place
from heads.metrics.boundaries import THRESHOLDS, boundary_sums, summarise_boundaries
from heads.tasks import build_task
from heads.tasks.regions import boxes_of, distance_inside, find_boundaries, ids_in_frame, relabel

MAPS = arrays.arrays(
    np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-1, 3)
)


def squash(source_hw, input_hw=(32, 32), **changes):
    settings = {"crop": None, "resize": "squash", "view": "plain", **changes}
    return place(source_hw=source_hw, input_hw=input_hw, **settings)


@given(MAPS)
def test_a_boundary_touches_another_id_at_a_side(ids):
    found = find_boundaries(ids)
    for (y, x), here in np.ndenumerate(ids):
        sides = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        around = [ids[a, b] for a, b in sides if 0 <= a < ids.shape[0] and 0 <= b < ids.shape[1]]
        assert found[y, x] == (here != -1 and any(i not in (here, -1) for i in around))


@given(MAPS)
def test_distances_are_to_the_nearest_pixel_of_another_over_the_largest(ids):
    found = distance_inside(ids)
    assert not found[ids <= 0].any()
    for number in range(1, 4):
        mine, others = np.argwhere(ids == number), np.argwhere(ids != number)
        if not len(mine):
            continue
        if not len(others):
            assert (found == 1).all()
            continue
        distance = np.sqrt(((mine[:, None] - others[None]) ** 2).sum(-1)).min(1)
        np.testing.assert_allclose(found[ids == number], distance / distance.max(), rtol=1e-5)


@given(MAPS)
def test_relabelling_leaves_no_gap_and_parts_nothing(ids):
    found = relabel(ids)
    np.testing.assert_array_equal(found <= 0, ids <= 0)
    np.testing.assert_array_equal(found[ids <= 0], ids[ids <= 0])
    numbers = np.unique(found[found > 0])
    np.testing.assert_array_equal(numbers, np.arange(1, len(numbers) + 1))
    assert len(np.unique(np.stack([ids, found]).reshape(2, -1), axis=1).T) == len(np.unique(ids))


def test_boxes_hold_the_visible_pixels_and_are_cut_with_the_frame():
    ids = np.zeros((20, 40), np.int32)
    ids[2:6, 3:9] = 1
    ids[10:14, 0:20] = 7
    ids[0, 39] = 9  # outside of the crop
    placement = squash((20, 40), resize="crop")
    boxes = boxes_of(ids, np.ones(ids.shape, bool), placement)
    assert boxes.source.tolist() == [[0, 10, 20, 14]]
    np.testing.assert_allclose(boxes.frame, [[0, 0.5, 0.5, 0.7]])
    assert boxes.area.tolist() == [80]
    assert boxes.frame_area == pytest.approx([0.1])


def test_an_image_without_things_has_no_box():
    boxes = boxes_of(np.zeros((4, 4), np.int32), np.ones((4, 4), bool), squash((4, 4)))
    assert boxes.source.shape == boxes.frame.shape == (0, 4)


def test_negative_ids_and_empty_frames_are_refused():
    with pytest.raises(InvalidInputError, match="must be 0 or more"):
        ids_in_frame(np.full((4, 4), -3), np.ones((4, 4), bool), squash((4, 4)), (2, 2))
    with pytest.raises(InvalidInputError, match="knows nothing"):
        ids_in_frame(np.zeros((4, 4), int), np.zeros((4, 4), bool), squash((4, 4)), (2, 2))


def test_f_counts_hits_within_the_tolerance():
    thin = np.zeros((40, 40), bool)
    thin[:, 20] = True
    known = np.ones_like(thin)
    for shift, expected in ((0, 1.0), (2, 1.0), (4, 0.0)):
        p = np.zeros((40, 40))
        p[:, 20 + shift] = 0.72
        stats = boundary_sums(p, thin, thin, known, tolerance=3 / np.hypot(40, 40))
        found = {m.name: m.value for m in summarise_boundaries([stats], [None])}
        assert found["f_ods"] == pytest.approx(expected, abs=1e-6)
        above = THRESHOLDS < 0.72
        np.testing.assert_array_equal(np.array(stats["n_predicted"]) == 40, above)
        assert stats["n_both"] == (40 if shift == 0 else 0)


def test_one_threshold_for_all_images_is_never_better_than_one_for_each():
    rng = np.random.default_rng(0)
    lines = []
    for scale in (0.3, 0.6, 1.0):
        thin = rng.random((30, 30)) < 0.1
        p = np.clip(thin * scale * 0.8 + rng.random(thin.shape) * 0.3 * scale, 0, 1)
        lines.append(boundary_sums(p, thin, thin, np.ones_like(thin), tolerance=0.01))
    found = {m.name: m.value for m in summarise_boundaries(lines, [None] * 3)}
    assert found["f_ods"] < found["f_ois"] <= 1


def test_a_split_without_a_boundary_is_refused():
    from types import SimpleNamespace

    task = build_task("boundaries")
    prepared = task.prepare(np.ones((8, 8), int), np.ones((8, 8), bool), squash((8, 8)), (8, 8))
    with pytest.raises(InvalidInputError, match="No label has a boundary"):
        task.fit_to(SimpleNamespace(arrays={"boundary": prepared["boundary"][None]}))


def test_distance_metrics_of_a_perfect_and_of_a_constant_map():
    task = build_task("distance")
    ids = np.zeros((32, 32), np.int32)
    ids[4:20, 6:26] = 3
    known = np.ones(ids.shape, bool)
    truth = task.prepare(ids, known, squash((32, 32)), (32, 32))["distance"].astype(np.float32)
    for prediction, mse, r2 in (
        (truth, 0.0, 1.0),
        (np.full_like(truth, truth.mean()), truth.var(), 0),
    ):
        stats = task.measure(
            prediction[None],
            placement=squash((32, 32)),
            values_hw=ids,
            valid_hw=known,
            dataset_format="folder",
        )
        found = {m.name: m.value for m in task.summarise([stats], [None])}
        assert found["mse"] == pytest.approx(mse, abs=1e-5)
        assert found["r2"] == pytest.approx(r2, abs=1e-3)
