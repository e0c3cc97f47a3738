from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from featstore.errors import InvalidInputError
from heads.metrics.keypoints import Judged, keypoint_stats, summarise_keypoints

SIGMAS = (0.025, 0.035, 0.079, 0.107)
NAMES = ("a", "b", "c", "d")


def judged(**changed):
    """Judge keypoints that are 0, 3, 5 and 8 source pixels off, in a crop of 60 x 80 pixels."""
    source = np.array([[0, 0], [3, 0], [3, 4], [0, 8]], float)
    given = {
        "frame_k2": source / [60, 80],
        "source_k2": source,
        "is_marked": np.array([True, True, True, True]),
        "diagonal": 100.0,
        "box_side": 60.0,
        "area": 1000.0,
    }
    return Judged(**{**given, **changed})


def stats(one=None, *, sigmas=SIGMAS, scale=None, confidence=None):
    return keypoint_stats(one or judged(), sigmas=sigmas, scale_k=scale, confidence_k=confidence)


def values(lines, groups=None):
    found = summarise_keypoints(lines, groups or [None] * len(lines), names=NAMES)
    return {metric.name: metric.value for metric in found}


def test_rmse_and_pck_are_those_computed_by_hand():
    found = values([stats()])
    # In shares of the frame: 0, 3/60 = 0.05, hypot(0.05, 0.05) and 8/80 = 0.1.
    assert found["rmse"] == pytest.approx(np.sqrt((0.05**2 + 2 * 0.05**2 + 0.1**2) / 4))
    assert found["distance"] == pytest.approx((0.05 + 0.05 * np.sqrt(2) + 0.1) / 4)
    assert found["pck@0.05"] == 0.75  # within 5 pixels, 0.05 of the diagonal: 0, 3 and 5
    assert found["pck@0.05u"] == 0.5
    assert found["pck@0.05box"] == 0.5  # within 3 pixels
    assert [found[f"pck@0.05/{name}"] for name in NAMES] == [1, 1, 1, 0]


def test_a_keypoint_that_is_not_marked_counts_nowhere():
    some = stats(judged(is_marked=np.array([True, False, False, True])))
    found = values([some])
    assert found["rmse"] == pytest.approx(np.sqrt(0.1**2 / 2))
    assert found["pck@0.05"] == 0.5
    assert "pck@0.05/b" not in found
    assert some["oks"] == pytest.approx((1 + np.exp(-64 / (2 * 1000 * (2 * SIGMAS[3]) ** 2))) / 2)


def test_all_marked_keypoints_weigh_the_same_in_whichever_image_they_are():
    one, other = stats(judged(is_marked=np.array([True, False, False, False]))), stats()
    assert values([one, other])["pck@0.05"] == pytest.approx(4 / 5)


def test_what_is_not_known_of_an_animal_leaves_its_metrics_out():
    without = stats(judged(box_side=float("nan"), area=float("nan")))
    assert without["oks"] == -1
    assert not {"pck@0.05box", "oks_ap", "aurc"} & values([without]).keys()
    assert values([without, stats()])["pck@0.05box"] == 0.5
    assert stats(sigmas=None)["oks"] == -1
    assert stats(judged(area=0.0))["oks"] == -1


def test_of_one_group_there_is_no_interval_and_of_no_image_no_metric():
    found = summarise_keypoints([stats(), stats()], ["a", "a"], names=NAMES)
    assert all(metric.low is None and "one group" in metric.note for metric in found)
    with pytest.raises(InvalidInputError, match="at least one image"):
        summarise_keypoints([], [], names=NAMES)


def coco_ap(animals):
    """Give what pycocotools says of (similar, score, points, truth, marked, area) an image."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        for each, dataset in ((truth, "truth"), (found, "points")):
            each.dataset = {
                "images": [{"id": n + 1} for n in range(len(animals))],
                "categories": [{"id": 1}],
                "annotations": [
                    {
                        "id": n + 1,
                        "image_id": n + 1,
                        "category_id": 1,
                        "iscrowd": 0,
                        "area": animal["area"],
                        "bbox": [0, 0, 50, 50],
                        "num_keypoints": int(animal["marked"].sum()),
                        "score": animal["score"],
                        "keypoints": np.column_stack([animal[dataset], 2 * animal["marked"]])
                        .ravel()
                        .tolist(),
                    }
                    for n, animal in enumerate(animals)
                ],
            }
            each.createIndex()
        judge = COCOeval(truth, found, iouType="keypoints")
        judge.params.kpt_oks_sigmas = np.array(SIGMAS)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[:3]


def test_average_precision_is_what_pycocotools_gives():
    rng = np.random.default_rng(0)
    animals, lines = [], []
    for _ in range(40):
        truth = rng.uniform(0, 50, (4, 2))
        points = truth + rng.normal(0, rng.uniform(0.5, 8), (4, 2))
        marked = rng.random(4) < 0.8
        marked[rng.integers(4)] = True
        confidence = rng.random(4)
        area = float(rng.uniform(200, 2000))
        animals.append(
            {
                "truth": truth,
                "points": points,
                "marked": marked,
                "area": area,
                "score": float(confidence.mean()),
            }
        )
        one = judged(source_k2=points - truth, is_marked=marked, area=area)
        lines.append(stats(one, scale=confidence, confidence=confidence))
    found = values(lines)
    ours = [found[name] for name in ("oks_ap", "oks_ap50", "oks_ap75")]
    np.testing.assert_allclose(ours, coco_ap(animals), atol=1e-9)
    assert 0.1 < ours[0] < 0.9


def test_without_scores_the_order_of_the_animals_decides_nothing():
    near, far = stats(judged(source_k2=np.zeros((4, 2)))), stats(judged(area=1.0))
    assert values([near, far])["oks_ap"] == values([far, near])["oks_ap"]
    # Half of them are right, so precision is 0.5 up to a recall of 0.5.
    assert values([near, far])["oks_ap"] == pytest.approx(0.5 * 51 / 101)


def test_a_scale_that_tells_nothing_leaves_the_risk_at_the_mean_distance():
    same = values([stats(scale=np.ones(4))])
    assert same["aurc"] == pytest.approx(same["distance"])


def test_a_scale_that_orders_keypoints_by_their_error_lowers_the_risk():
    good = values([stats(scale=np.array([1.0, 2, 3, 4]))])
    bad = values([stats(scale=np.array([4.0, 3, 2, 1]))])
    distances = np.array([0, 0.05, 0.05 * np.sqrt(2), 0.1])
    assert good["aurc"] == pytest.approx((distances.cumsum() / [1, 2, 3, 4]).mean())
    assert good["aurc"] < good["distance"] < bad["aurc"]
