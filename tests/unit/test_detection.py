from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from featstore.errors import InvalidInputError
from featstore.geometry import place
from featstore.types import TapShape
from heads.base import TapTokens
from heads.build import build_head
from heads.metrics.boxes import box_stats, summarise_boxes
from heads.tasks import build_task


def frame(source_hw, input_hw=(64, 64), **changes):
    settings = {"crop": None, "resize": "squash", "view": "plain", **changes}
    return place(source_hw=source_hw, input_hw=input_hw, **settings)


def scene(source_hw=(96, 128)):
    ids = np.zeros(source_hw, np.int32)
    ids[5:30, 10:50] = 1
    ids[40:90, 70:120] = 2
    ids[60:80, 20:40] = 5
    return ids


def perfect(task, ids, placement, output_hw=(64, 64)):
    """The maps that a head would give if it had learned its targets by heart."""
    targets = task.prepare(ids, np.ones(ids.shape, bool), placement, output_hw)
    centre = np.maximum(targets["centre"].astype(np.float32), 0)
    return np.concatenate([centre[None], targets["size"].astype(np.float32)])


@pytest.mark.parametrize(
    "placement",
    [
        frame((96, 128)),
        frame((96, 128), resize="letterbox"),
        frame((96, 128), view="hflip"),
        frame((96, 128), resize="letterbox", view="hflip"),
    ],
)
def test_targets_read_back_give_the_boxes_they_were_made_of(placement):
    task = build_task("detection", {"min_score": 0.5})
    ids = scene()
    prediction = perfect(task, ids, placement)
    found = task.at_source(prediction, placement)
    assert found.shape == (3, 5)
    ordered = found[np.argsort(found[:, 0])][:, :4]
    expected = [[10, 5, 50, 30], [20, 60, 40, 80], [70, 40, 120, 90]]
    np.testing.assert_allclose(ordered, expected, atol=2.5)
    stats = task.measure(
        prediction,
        placement=placement,
        values_hw=ids,
        valid_hw=np.ones(ids.shape, bool),
        dataset_format="folder",
    )
    metrics = {m.name: m.value for m in task.summarise([stats], [None])}
    assert metrics["ap50@native"] == pytest.approx(1)
    assert metrics["ap@448"] > 0.6


def test_peaks_are_as_wide_as_the_thing_is_large():
    task = build_task("detection")
    targets = task.prepare(scene(), np.ones((96, 128), bool), frame((96, 128)), (224, 224))
    centre = targets["centre"].astype(np.float64)
    y, x = (65 / 96, 95 / 128)
    area = 50 * 50 / (96 * 128)
    spread = 0.12 * np.sqrt(area)
    row, column = int(y * 224), int(x * 224) + 8
    distance = np.hypot((row + 0.5) / 224 - y, (column + 0.5) / 224 - x)
    assert centre[row, column] == pytest.approx(np.exp(-(distance**2) / 2 / spread**2), abs=1e-3)
    assert centre.max() > 0.97


def test_the_loss_is_focal_on_centres_and_l1_on_sizes():
    task = build_task("detection")
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    centre = torch.rand(2, 6, 6, generator=generator, dtype=torch.float64)
    centre[0, 0] = -1
    size = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    size[:, :, 3, 3] = 0.4
    p, y, known = output[:, 0].sigmoid(), centre.clamp(min=0), centre >= 0
    ce = -(y * p.log() + (1 - y) * (1 - p).log())
    right = p * y + (1 - p) * (1 - y)
    focal = (0.25 * y + 0.75 * (1 - y)) * (1 - right) ** 2 * ce
    l1 = (output[:, 1:] - 0.4)[:, :, 3, 3].abs().mean()
    found = task.loss(output, {"centre": centre, "size": size})
    torch.testing.assert_close(found, focal[known].mean() + l1)


def random_boxes(rng, n):
    corner = rng.uniform(0, 250, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(8, 220, (n, 2))], axis=1)


def test_precisions_are_those_of_pycocotools_over_all_images():
    rng = np.random.default_rng(0)
    truths, found, lines = [], [], []
    for image in range(1, 13):
        true = random_boxes(rng, rng.integers(0, 6))
        moved = np.concatenate([true + rng.normal(0, 6, true.shape), random_boxes(rng, 4)])
        scores = rng.random(len(moved))
        order = np.argsort(-scores)
        moved, scores = moved[order], scores[order]
        area = (true[:, 2] - true[:, 0]) * (true[:, 3] - true[:, 1])
        lines.append({"scores": scores.tolist(), **box_stats(moved, scores, true, area, frame="f")})
        for box, a in zip(true, area, strict=True):
            xywh = [*box[:2], *(box[2:] - box[:2])]
            place_ = {"id": len(truths) + 1, "image_id": image, "category_id": 1, "iscrowd": 0}
            truths.append({**place_, "bbox": xywh, "area": a})
        for box, s in zip(moved, scores, strict=True):
            xywh = [float(v) for v in (*box[:2], *(box[2:] - box[:2]))]
            found.append({"image_id": image, "category_id": 1, "bbox": xywh, "score": float(s)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(1, 13)],
            "categories": [{"id": 1}],
            "annotations": truths,
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    metrics = {
        "ap": ("all_f", None),
        "ap50": ("all_f", 0),
        "ap75": ("all_f", 5),
        "lg": ("lg_f", None),
    }
    ours = {m.name: m.value for m in summarise_boxes(lines, [None] * 12, metrics=metrics)}
    assert 0.1 < ours["ap"] < 0.9
    theirs = (judge.stats[0], judge.stats[1], judge.stats[2], judge.stats[5])
    assert tuple(ours.values()) == pytest.approx(theirs, abs=1e-12)


def test_an_image_drawn_twice_counts_twice():
    from heads.metrics.boxes import PooledBoxes

    rng = np.random.default_rng(1)
    lines = []
    for _ in range(4):
        true = random_boxes(rng, 3)
        boxes, scores = true + rng.normal(0, 8, true.shape), np.sort(rng.random(3))[::-1]
        area = np.full(3, 1e4)
        lines.append({"scores": scores.tolist(), **box_stats(boxes, scores, true, area, frame="f")})
    weighted = PooledBoxes(lines, "all_f").precision(np.array([2.0, 0.0, 1.0, 1.0]))
    chosen = [lines[0], lines[0], lines[2], lines[3]]
    np.testing.assert_allclose(weighted, PooledBoxes(chosen, "all_f").precision(np.ones(4)))


def test_nothing_found_is_a_precision_of_zero_and_nothing_to_find_is_none():
    empty = np.zeros((0, 4))
    nothing = box_stats(empty, np.zeros(0), np.array([[0, 0, 9.0, 9]]), np.array([81.0]), frame="f")
    metrics = {"ap": ("all_f", None), "lg": ("lg_f", None)}
    found = summarise_boxes([{"scores": [], **nothing}], [None], metrics=metrics)
    assert [(m.name, m.value) for m in found] == [("ap", 0.0)]


def test_centres_and_sizes_are_learned_by_a_head_each():
    task = build_task("detection")
    tap = TapShape(tap="norm", dim=768, grid=(2, 2))
    head = build_head("deap", taps=[tap], n_outputs=task.readouts)
    assert head.n_parameters() == 100 * 768 + 9794  # HEADS.md 1.1
    assert head.dead_parameters() == 2 * 2 * (768 + 8)
    assert len(head.output_biases()) == 4


def test_labels_without_a_thing_are_refused():
    task = build_task("detection")
    blank = task.prepare(np.zeros((8, 8), int), np.ones((8, 8), bool), frame((8, 8)), (8, 8))
    with pytest.raises(InvalidInputError, match="No label shows an instance"):
        task.fit_to(SimpleNamespace(arrays={k: v[None] for k, v in blank.items()}))


def test_centres_begin_rare_and_sizes_where_the_head_begins():
    task = build_task("detection")
    tap = TapShape(tap="norm", dim=16, grid=(2, 2))
    torch.manual_seed(0)
    head = build_head("deap", taps=[tap], n_outputs=task.readouts, options={"queries": 4})
    tokens = [TapTokens(patch=torch.randn(2, 4, 16), grid=(2, 2))]
    before = head(tokens)
    task.start(head)
    shift = head(tokens) - before
    torch.testing.assert_close(shift[:, 0], torch.full_like(shift[:, 0], -2.19))
    assert not shift[:, 1:].any()
