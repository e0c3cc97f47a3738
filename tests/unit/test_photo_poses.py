"""Keypoints in new photos, whole or by boxes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

import heads
from featstore.errors import InvalidInputError, NotFoundError
from heads.model import load
from heads.runs import read_run
from tests.fakes import Things, fake_extract, fake_forward, npy

QUICK = {"checks": 1, "pictures": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("poses") / "features.zarr"
    fake_extract(path, [Things(20)])
    return path


def learn(store, head, **options):
    chosen = {"task": "pose", "steps": 4, "batch_size": 8, "device": "cpu"}
    report = heads.train(store, head=head, options={**QUICK, **options}, **chosen)
    return store / "runs" / report.run_id


@pytest.fixture(scope="module")
def run(store):
    return learn(store, "attentive_pool", scales=True)


@pytest.fixture(scope="module")
def tokens_run(store):
    return learn(store, "identity_token", heads=1, ff=8, hidden=4)


@pytest.fixture
def photos(tmp_path):
    """Write three photos of 60 x 80 pixels."""
    rng = np.random.default_rng(0)
    for name in "abc":
        pixels = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        (tmp_path / f"{name}.npy").write_bytes(npy(pixels))
    return tmp_path


def boxes_file(folder, **boxes):
    """Write boxes, x y w h, of the photos named."""
    images = [{"id": n, "file_name": f"{name}.npy"} for n, name in enumerate(boxes)]
    marks = [{"image_id": n, "bbox": box} for n, name in enumerate(boxes) for box in boxes[name]]
    path = folder / "boxes.json"
    path.write_text(json.dumps({"images": images, "annotations": marks}))
    return path


def predict(run, photos, **changes):
    given = {"device": "cpu", "batch_size": 2, **changes}
    names = [photos / f"{name}.npy" for name in "abc"]
    return heads.predict(run, names, photos / "out", fake_forward, **given)


def keypoints(photos, name):
    return np.load(photos / "out" / f"{name}.npy")


def test_each_box_gives_keypoints_in_pixels_of_the_photo(run, photos):
    boxes = [[10, 10, 20, 20], [40, 20, 30, 20]]
    report = predict(run, photos, boxes=boxes_file(photos, a=boxes, b=boxes[:1], c=[]))
    assert (report.images, report.animals, report.bad) == (3, 3, {})
    found = keypoints(photos, "a")
    assert found.shape == (2, 3, 3)
    assert keypoints(photos, "c").shape == (0, 3, 3)
    # What the model says of the crop itself, as shares of it.
    pixels = np.load(photos / "a.npy")
    model = load(read_run(run))
    for points, (x, y, width, height) in zip(found, boxes, strict=True):
        side = 1.25 * max(width, height)
        corner = np.array([x + width / 2 - side / 2, y + height / 2 - side / 2])
        crop = (*corner, *(corner + side))
        ((taps, _),) = fake_forward([pixels], [crop])
        said = model.predict({name: array[None] for name, array in taps.items()})[0, :, 0, 0]
        np.testing.assert_allclose(points[:, :2], corner + side * said[:6].reshape(3, 2), rtol=1e-4)


def test_the_lists_hold_every_keypoint_of_every_animal(run, photos):
    path = boxes_file(photos, a=[[10, 10, 20, 20]], b=[[0, 0, 9, 9], [5, 5, 9, 9]], c=[])
    report = predict(run, photos, boxes=path)
    assert {str(photos / "out" / name) for name in ("keypoints.json", "keypoints.csv")} <= set(
        report.files
    )
    about = json.loads((photos / "out" / "keypoints.json").read_text())
    assert [line["file_name"] for line in about["images"]] == ["a.npy", "b.npy", "c.npy"]
    assert about["categories"][0]["keypoints"] == ["nose", "left_ear", "right_ear"]
    assert about["categories"][0]["skeleton"] == [[1, 2], [1, 3]]
    assert [line["image_id"] for line in about["annotations"]] == [1, 2, 2]
    second = about["annotations"][2]
    assert second["bbox"] == [5, 5, 9, 9]
    found = keypoints(photos, "b")[1]
    np.testing.assert_allclose(
        np.reshape(second["keypoints"], (3, 3))[:, :2], found[:, :2], atol=0.006
    )
    with (photos / "out" / "keypoints.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9
    assert [line["animal"] for line in lines if line["image"] == "b.npy"] == list("111222")
    assert float(lines[8]["x"]) == pytest.approx(found[2, 0], abs=0.006)
    assert 0 < float(lines[8]["confidence"]) < 1


class Framed(Things):
    """Things whose reader says how it cropped them."""

    def __init__(self, box, **options):
        super().__init__(12, **options)
        self.spec += f",box={box}"


def test_a_crop_is_as_large_as_those_that_the_run_learned_from(tmp_path, photos):
    boxes = boxes_file(photos, a=[[10, 10, 20, 20]], b=[], c=[])

    def found(run, **changes):
        predict(run, photos, boxes=boxes, **changes)
        return keypoints(photos, "a")

    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    fake_extract(one, [Framed("2")])
    run = learn(one, "linear_pool")
    np.testing.assert_array_equal(found(run), found(run, box_scale=2.0))
    assert np.abs(found(run) - found(run, box_scale=1.25))[..., :2].max() > 0.1
    fake_extract(two, [Framed("image")])
    whole = learn(two, "linear_pool")
    with pytest.raises(InvalidInputError, match=r"learned from whole images.*--box-scale"):
        found(whole)
    assert found(whole, box_scale=1.0).shape == (1, 3, 3)
    assert predict(whole, photos).animals == 3
    fake_extract(one, [Framed("1.5", name="more", seed=9)])
    with pytest.raises(InvalidInputError, match=r"learned from box=1.5 and box=2, so"):
        found(learn(one, "linear_pool"))


def test_a_whole_photo_is_one_animal_where_no_box_is_named(run, photos):
    assert predict(run, photos).animals == 3
    whole = keypoints(photos, "a")
    assert predict(run, photos, boxes="full").animals == 3
    np.testing.assert_array_equal(keypoints(photos, "a"), whole)
    (annotation, *_) = json.loads((photos / "out" / "keypoints.json").read_text())["annotations"]
    assert annotation["bbox"] == [0, 0, 80, 60]


def test_without_scales_there_is_no_confidence(tokens_run, photos):
    predict(tokens_run, photos)
    (annotation, *_) = json.loads((photos / "out" / "keypoints.json").read_text())["annotations"]
    assert annotation["confidence"] == [None] * 3
    assert (photos / "out" / "keypoints.csv").read_text().splitlines()[1].endswith(",")


def test_a_box_or_a_photo_that_cannot_be_used_is_listed(run, photos):
    path = boxes_file(photos, a=[[10, 10, 20, 20], [200, 0, 9, 9]], b=[[1, 1, 0, 5]])
    report = predict(run, photos, boxes=path)
    assert report.animals == 1
    assert "lies outside" in report.bad[f"{photos / 'a.npy'}, box 2"]
    assert "no size" in report.bad[f"{photos / 'b.npy'}, box 1"]
    assert "lists 0 photos" in report.bad[str(photos / "c.npy")]
    assert report.images == 2


def test_the_picture_is_large_enough_to_be_looked_at(run, photos):
    predict(run, photos, boxes=boxes_file(photos, a=[[10, 10, 40, 40]], b=[], c=[]))
    with Image.open(photos / "out" / "a.png") as picture, Image.open(photos / "out/b.png") as bare:
        assert picture.size == bare.size == (640, 480)
        assert np.asarray(picture).std() > 0


def test_a_trained_identity_answers_otherwise_than_the_mean(tokens_run, photos):
    predict(tokens_run, photos)
    mean = keypoints(photos, "a")
    predict(tokens_run, photos, identity="dark")
    assert np.abs(keypoints(photos, "a")[..., :2] - mean[..., :2]).max() > 1e-3
    with pytest.raises(NotFoundError, match="Known: dark, light"):
        predict(tokens_run, photos, identity="drak")


def test_what_a_run_cannot_use_is_refused(store, run, photos):
    with pytest.raises(InvalidInputError, match="only the head identity_token"):
        predict(run, photos, identity="dark")
    depth = heads.train(store, task="depth", steps=1, device="cpu", options={**QUICK, "queries": 4})
    with pytest.raises(InvalidInputError, match=r"left out: depth.v1 finds no keypoints"):
        predict(store / "runs" / depth.run_id, photos, boxes="full")
