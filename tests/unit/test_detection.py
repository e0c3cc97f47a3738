from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from featstore.errors import BadImageError, InvalidInputError
from featstore.geometry import place
from featstore.types import TapShape
from heads.base import TapTokens
from heads.box_labels import COUNTED, CROWD, DIFFICULT, box_table
from heads.build import build_head
from heads.metrics.boxes import box_stats, summarise_boxes
from heads.tasks import build_task
from heads.tasks.regions import void_shares


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


METRICS = {"ap": ("all_f", None), "ap50": ("all_f", 0), "ap75": ("all_f", 5), "lg": ("lg_f", None)}


def random_image(rng, *, n_crowds=0):
    """Boxes with scores, the best first; true boxes, their areas and kinds."""
    true = random_boxes(rng, rng.integers(0, 6))
    crowds = random_boxes(rng, n_crowds)
    inside = crowds.repeat(3, axis=0)  # found on crowds, some of them more than half
    inside[:, 2:] = inside[:, :2] + (inside[:, 2:] - inside[:, :2]) * rng.uniform(
        0.3, 1.4, (len(inside), 2)
    )
    found = np.concatenate([true + rng.normal(0, 6, true.shape), random_boxes(rng, 4), inside])
    scores = rng.random(len(found))
    order = np.argsort(-scores)
    true = np.concatenate([true, crowds])
    kind = np.repeat([COUNTED, CROWD], [len(true) - n_crowds, n_crowds])
    area = (true[:, 2] - true[:, 0]) * (true[:, 3] - true[:, 1])
    return found[order], scores[order], true, area, kind


def xywh(box):
    return [float(v) for v in (*box[:2], *(box[2:] - box[:2]))]


def pycocotools_ap(images):
    """Let pycocotools judge images by itself: AP, AP50, AP75 and AP of large things."""
    truths, found = [], []
    for image, (boxes, scores, true, area, kind) in enumerate(images, 1):
        for box, a, k in zip(true, area, kind, strict=True):
            place_ = {"id": len(truths) + 1, "image_id": image, "category_id": 1}
            truths.append({**place_, "bbox": xywh(box), "area": a, "iscrowd": int(k == CROWD)})
        found += [
            {"image_id": image, "category_id": 1, "bbox": xywh(box), "score": float(score)}
            for box, score in zip(boxes, scores, strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(1, len(images) + 1)],
            "categories": [{"id": 1}],
            "annotations": truths,
        }
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return (judge.stats[0], judge.stats[1], judge.stats[2], judge.stats[5])


def our_ap(images, **changes):
    lines = [
        {
            "scores": scores.tolist(),
            **box_stats(boxes, scores, true, area, frame="f", **{"kind_m": kind, **changes}),
        }
        for boxes, scores, true, area, kind in images
    ]
    found = summarise_boxes(lines, [None] * len(lines), metrics=METRICS)
    return tuple(metric.value for metric in found)


@pytest.mark.parametrize("n_crowds", [0, 1, 2])
def test_precisions_are_those_of_pycocotools_over_all_images(n_crowds):
    rng = np.random.default_rng(n_crowds)
    images = [random_image(rng, n_crowds=n_crowds) for _ in range(12)]
    ours = our_ap(images)
    assert 0.1 < ours[0] < 0.9
    assert ours == pytest.approx(pycocotools_ap(images), abs=1e-12)
    if n_crowds:  # the rule is seen: boxes on crowds would be wrong without it
        single = [(*line[:2], *(part[line[4] == COUNTED] for part in line[2:])) for line in images]
        assert our_ap(single)[0] < ours[0]


def test_pixels_without_a_label_are_a_crowd():
    rng = np.random.default_rng(3)
    lines = []
    for _ in range(8):
        boxes, scores, true, area, kind = random_image(rng, n_crowds=1)
        valid = np.ones((600, 600), bool)
        x0, y0, x1, y1 = true[-1] = np.rint(true[-1])
        valid[int(y0) : int(y1), int(x0) : int(x1)] = False
        boxes = boxes.clip(0, 600)
        as_crowd = box_stats(boxes, scores, true, area, frame="f", kind_m=kind)
        as_void = box_stats(
            boxes, scores, true[:-1], area[:-1], frame="f", void_n=void_shares(valid, boxes)
        )
        assert as_void == as_crowd
        lines += as_crowd["ignored_all_f"]
    assert any(lines)


def test_a_difficult_thing_need_not_be_found_and_is_matched_once():
    thing, box = np.array([[0, 0, 10.0, 10]]), np.array([[0, 0, 10.0, 10]] * 2)
    scores, kind = np.array([0.9, 0.8]), np.array([DIFFICULT])
    stats = box_stats(box, scores, thing, np.array([100.0]), frame="f", kind_m=kind)
    assert stats["n_true_all_f"] == 0
    assert stats["ignored_all_f"] == [1023, 0]  # the second one is a false box, as VOC counts it
    crowd = box_stats(box, scores, thing, np.array([100.0]), frame="f", kind_m=np.array([CROWD]))
    assert crowd["ignored_all_f"] == [1023, 1023]


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


NAMED = [
    {"box": [10, 5, 50, 30], "class": "cat"},
    {"box": [70, 40, 120, 90], "area": 700.0, "iscrowd": False},
    {"box": [0, 60, 60, 96], "iscrowd": True, "area": 900.5},
    {"box": [30, 10, 90, 28], "difficult": True},
]


def named():
    table = box_table(json.dumps(NAMED))
    return table, np.ones(table.shape, bool)


def test_named_boxes_are_a_table_with_areas_and_kinds():
    table, _ = named()
    assert table[:, :4].tolist() == [box["box"] for box in NAMED]
    assert table[:, 4].tolist() == [1000, 700, 900.5, 1080]
    assert table[:, 5].tolist() == [COUNTED, COUNTED, CROWD, DIFFICULT]
    assert box_table("[]").shape == (0, 6)


@pytest.mark.parametrize("boxes", ['[{"box": [1, 2, 1, 4]}]', "[{}]", "[3]", "{", "null"])
def test_boxes_that_do_not_read_are_refused(boxes):
    with pytest.raises(InvalidInputError, match="do not read as x0, y0, x1, y1"):
        box_table(boxes)


def test_what_is_left_out_is_not_learned_but_for_the_counted_boxes_on_it():
    task = build_task("detection", {"truth": "boxes"})
    targets = task.prepare(*named(), frame((96, 128)), (48, 64))
    unknown = targets["centre"] < 0
    expected = np.zeros((48, 64), bool)
    expected[30:48, :30] = True  # the crowd
    expected[5:14, 15:45] = True  # the difficult one,
    expected[2:15, 5:25] = False  # where it does not lie on the first
    np.testing.assert_array_equal(unknown, expected)
    assert (targets["size"] > 0).any(axis=(1, 2)).all()
    sizes = {tuple(np.round(s, 2)) for s in targets["size"][:, targets["size"][0] > 0].T.tolist()}
    assert sizes == {(0.31, 0.26), (0.39, 0.52)}


def test_a_frame_of_nothing_but_crowd_is_a_bad_label():
    task = build_task("detection", {"truth": "boxes"})
    table = box_table(json.dumps([{"box": [0, 0, 128, 96], "iscrowd": True}]))
    with pytest.raises(BadImageError, match="nothing of the input frame"):
        task.prepare(table, np.ones(table.shape, bool), frame((96, 128)), (48, 64))


@pytest.mark.parametrize("view", ["plain", "hflip"])
def test_targets_of_named_boxes_read_back_are_found(view):
    placement = frame((96, 128), view=view, resize="letterbox")
    task = build_task("detection", {"truth": "boxes", "min_score": 0.5})
    table, valid = named()
    targets = task.prepare(table, valid, placement, (64, 64))
    centre = np.maximum(targets["centre"].astype(np.float32), 0)
    maps = np.concatenate([centre[None], targets["size"].astype(np.float32)])
    maps[0, 44:48, 4:10] = 0.9 if view == "plain" else 0  # found on the crowd
    maps[1:, 44:48, 4:10] = 0.05
    stats = task.measure(
        maps, placement=placement, values_hw=table, valid_hw=valid, dataset_format="voc"
    )
    assert stats["n_true_all_native"] == 2
    metrics = {m.name: m.value for m in task.summarise([stats], [None])}
    assert metrics["ap50@native"] == pytest.approx(1)
    assert task.protocol(["boxes"])["left out"].startswith("crowds by COCO's rule")


def test_the_option_truth_decides_the_label():
    assert build_task("detection").label_kind == "instances"
    assert build_task("detection", {"truth": "boxes"}).label_kind == "boxes"
    with pytest.raises(InvalidInputError, match="`truth` must be one of instances, boxes"):
        build_task("detection", {"truth": "masks"})
