from __future__ import annotations

import json
from pathlib import Path

import pytest

from featstore.errors import BadImageError, InvalidInputError, NotFoundError
from heads.photo_boxes import FoundBox, crop_of, read_photo_boxes

PHOTO_HW = (100, 200)


def written(path, content):
    path.write_text(json.dumps(content))
    return path


def detections(*lines, **changes):
    return {
        "images": list(lines),
        "detection_categories": {"1": "animal", "2": "person"},
        "info": {"format_version": "1.3"},
        **changes,
    }


def test_boxes_of_megadetector_are_shares_of_the_photo(tmp_path):
    found = [
        {"category": "1", "conf": 0.9, "bbox": [0.25, 0.5, 0.5, 0.25]},
        {"category": "1", "conf": 0.19, "bbox": [0, 0, 1, 1]},
        {"category": "2", "conf": 0.9, "bbox": [0, 0, 1, 1]},
    ]
    none = {"file": "b.jpg", "detections": []}
    failed = {"file": "c.jpg", "detections": None, "failure": "image access failure"}
    photos = detections({"file": "site\\a.jpg", "detections": found}, none, failed)
    boxes = read_photo_boxes(written(tmp_path / "md.json", photos))
    assert boxes.of(Path("a.jpg"), PHOTO_HW) == [FoundBox(box=(50, 50, 150, 75), score=0.9)]
    assert boxes.of(Path("b.jpg"), PHOTO_HW) == []
    with pytest.raises(BadImageError, match="lists 0 photos"):
        boxes.of(Path("c.jpg"), PHOTO_HW)
    low = read_photo_boxes(tmp_path / "md.json", min_score=0.1)
    assert len(low.of(Path("a.jpg"), PHOTO_HW)) == 2


def test_without_names_of_categories_all_detections_count(tmp_path):
    found = [{"category": "7", "conf": 0.5, "bbox": [0, 0, 1, 1]}]
    content = {"images": [{"file": "a.jpg", "detections": found}]}
    boxes = read_photo_boxes(written(tmp_path / "md.json", content))
    assert len(boxes.of(Path("a.jpg"), PHOTO_HW)) == 1


def coco(**changes):
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "height": 100, "width": 200}],
        "annotations": [
            {"image_id": 5, "bbox": [10, 20, 30, 40]},
            {"image_id": 5, "bbox": [1, 2, 3, 4], "score": 0.1},
        ],
        **changes,
    }


def test_boxes_of_coco_are_pixels_and_need_no_score(tmp_path):
    boxes = read_photo_boxes(written(tmp_path / "coco.json", coco()))
    assert boxes.of(Path("a.jpg"), PHOTO_HW) == [FoundBox(box=(10, 20, 40, 60), score=None)]
    with pytest.raises(BadImageError, match=r"boxes of a photo of \(100, 200\)"):
        boxes.of(Path("a.jpg"), (50, 100))


def test_photos_of_one_name_are_told_apart_by_their_folders(tmp_path):
    images = [{"id": n, "file_name": f"{site}/a.jpg"} for n, site in enumerate(("north", "south"))]
    marks = [{"image_id": n, "bbox": [n, 0, 10, 10]} for n in range(2)]
    path = written(tmp_path / "coco.json", {"images": images, "annotations": marks})
    boxes = read_photo_boxes(path)
    assert boxes.of(Path("/photos/south/a.jpg"), PHOTO_HW)[0].box[0] == 1
    with pytest.raises(BadImageError, match="lists 2 photos"):
        boxes.of(Path("/photos/west/a.jpg"), PHOTO_HW)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"images": []},
        {"images": [{"file": "a.jpg"}]},
        coco(annotations=[{"image_id": 9, "bbox": [0, 0, 1, 1]}]),
        coco(annotations=[{"image_id": 5, "bbox": [0, 0, 1]}]),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content):
    path = written(tmp_path / "boxes.json", content)
    with pytest.raises(InvalidInputError, match="MegaDetector"):
        read_photo_boxes(path)


def test_a_file_that_is_not_there_or_no_json_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="Name a JSON file"):
        read_photo_boxes(tmp_path / "none.json")
    (tmp_path / "no.json").write_text("x, y")
    with pytest.raises(InvalidInputError, match="MegaDetector"):
        read_photo_boxes(tmp_path / "no.json")


def test_a_crop_is_a_square_around_the_box():
    assert crop_of(FoundBox(box=(90, 40, 110, 50)), PHOTO_HW, 1.25) == (87.5, 32.5, 112.5, 57.5)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5, 5, 5, 9), "has no size"),
        ((float("nan"), 5, 5, 9), "has no size"),
        ((200, 0, 210, 10), "lies outside of the photo of 200 x 100"),
        ((-9, 0, 0, 10), "lies outside"),
    ],
)
def test_a_box_that_shows_nothing_is_refused(box, message):
    with pytest.raises(BadImageError, match=message):
        crop_of(FoundBox(box=box), PHOTO_HW, 1.25)
