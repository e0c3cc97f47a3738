import json
from dataclasses import replace

import numpy as np
import pytest

from featstore.datasets import open_dataset
from featstore.datasets.coco_names import COCO_PANOPTIC, COCO_STUFF
from featstore.errors import BadImageError, InvalidInputError, NotFoundError
from featstore.images import decode_label
from tests.datasets import (
    coco_annotation,
    index_map,
    make_coco,
    rectangle,
    save_image,
    save_indices,
    write_coco,
)


@pytest.fixture
def folder(tmp_path):
    make_coco(tmp_path)
    return tmp_path


def instances(folder, number=0):
    reader = open_dataset(f"coco:{folder}")
    return decode_label(reader.read_label(reader.items()[number], "instances"))


def paint(tmp_path, *annotations):
    """Give the map of one image with these annotations."""
    write_coco(tmp_path, "train2017", {1: list(annotations)})
    return instances(tmp_path)


def test_val_is_the_split_test_and_images_ascend(folder):
    items = open_dataset(f"coco:{folder}").items()
    assert [item.path for item in items] == [
        "train2017/000000000009.jpg", "train2017/000000000010.jpg",
        "val2017/000000000139.jpg", "val2017/000000000140.jpg",
    ]  # fmt: skip
    assert [item.splits[0] for item in items] == ["train", "train", "test", "test"]
    assert {item.label_kinds for item in items} == {("classes", "instances")}


def test_boxes_are_corners_with_names_areas_and_the_number_in_the_map(folder):
    first, second, crowd = open_dataset(f"coco:{folder}").items()[0].attributes["boxes"]
    assert first == {
        "class": "cat", "box": [1.5, 2.0, 11.5, 22.25],
        "area": 70.5, "iscrowd": False, "instance": 1,
    }  # fmt: skip
    assert second["instance"] == 2
    assert (crowd["class"], crowd["iscrowd"], crowd["instance"]) == ("toothbrush", True, None)


def test_a_small_object_stays_visible_on_a_large_one(folder):
    values, valid = instances(folder)
    expected = np.zeros((24, 32), int)
    expected[:, :4] = -1  # the crowd; a polygon covers its pixels' centres
    expected[2:20, 8:20] = expected[2:8, 24:30] = 2
    expected[4:8, 10:14] = 1
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(valid, expected != -1)


def test_a_crowd_is_void_only_where_no_object_is(tmp_path):
    crowd = {"size": [24, 32], "counts": [0, 24 * 32]}
    values, valid = paint(
        tmp_path,
        coco_annotation(1, 1, [rectangle(0, 0, 8, 8)]),
        coco_annotation(2, 1, crowd, iscrowd=1),
        coco_annotation(3, 1, [rectangle(8, 8, 16, 16)]),
    )
    assert (values[:8, :8] == 1).all()
    assert (values[8:16, 8:16] == 2).all()
    assert valid.sum() == 128


def test_of_two_objects_of_one_size_the_later_one_is_seen(tmp_path):
    pair = [coco_annotation(n, 1, [rectangle(4, 4, 8, 8)]) for n in (1, 2)]
    assert set(np.unique(paint(tmp_path, *pair)[0])) == {0, 2}


def test_an_image_without_annotation_is_all_background(folder):
    values, valid = instances(folder, 1)
    assert not values.any()
    assert valid.all()


def test_compressed_run_lengths_are_the_same_as_plain_ones(tmp_path):
    from pycocotools import mask

    drawn = np.zeros((24, 32), np.uint8, order="F")
    drawn[3:9, 5:30] = 1
    text = {"size": [24, 32], "counts": mask.encode(drawn)["counts"].decode()}
    np.testing.assert_array_equal(paint(tmp_path, coco_annotation(1, 1, text))[0], drawn)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], r"Annotation 7 of train2017/.*polygons of three corners.*Got \[\]"),
        ([[1, 1, 5, 5]], r"three corners.*Got \[4\]"),
        ([[1, 1, 5, 5, 3, 3, 2]], r"three corners.*Got \[7\]"),
        ([[1, 1, 5, 5, 1e9, 3]], r"lie in its image of 24x32 pixels. Got a corner at 1e\+09"),
        ({"size": [32, 24], "counts": [768]}, r"size \[24, 32\]. Got \[32, 24\]"),
        ({"size": [24, 32], "counts": [700]}, "add up to 768 pixels"),
        ({"size": [24, 32], "counts": [-1, 769]}, "add up to 768 pixels"),
        ({"size": [24, 32], "counts": "abc"}, "no readable run lengths"),
    ],
)
def test_a_bad_segmentation_is_an_error_of_its_image(tmp_path, segmentation, message):
    with pytest.raises(BadImageError, match=message):
        paint(tmp_path, coco_annotation(7, 1, segmentation))


def test_a_map_of_another_size_than_the_image_is_refused(folder):
    save_image(folder / "train2017" / "000000000009.jpg", hw=(12, 16))
    with pytest.raises(BadImageError, match=r"annotation of .*jpg is 24x32 but its image is 12x16"):
        instances(folder)


def test_stuffthingmaps_count_from_zero_and_255_is_void(folder):
    reader = open_dataset(f"coco:{folder}")
    values, valid = decode_label(reader.read_label(reader.items()[0], "classes"))
    np.testing.assert_array_equal(values, index_map(9, 182))
    np.testing.assert_array_equal(valid, values != 255)
    assert reader.class_names() == COCO_STUFF
    assert [COCO_STUFF[n] for n in (0, 11, 89, 91, 181)] == [
        "person", "street sign", "toothbrush", "banner", "wood"
    ]  # fmt: skip


def test_semantic_maps_hold_category_ids_and_0_is_void(tmp_path):
    write_coco(tmp_path, "val2017", {5: []})
    values = index_map(0, 90)
    values[0], values[1:5], values[5:9] = 0, 17, 200
    save_indices(tmp_path / "semantic_val2017" / "000000000005.png", values)
    reader = open_dataset(f"coco:{tmp_path}")
    decoded, valid = decode_label(reader.read_label(reader.items()[0], "classes"))
    np.testing.assert_array_equal(decoded, values)
    np.testing.assert_array_equal(valid, values != 0)
    names = reader.class_names()
    assert names == COCO_PANOPTIC
    assert [names[n] for n in (0, 17, 92, 184, 200)] == [
        "void", "cat", "banner", "tree-merged", "rug-merged"
    ]  # fmt: skip


def test_a_semantic_map_in_the_numbers_of_coco_stuff_is_refused(tmp_path):
    write_coco(tmp_path, "val2017", {5: []})
    save_indices(tmp_path / "semantic_val2017" / "000000000005.png", index_map(0, 182))
    reader = open_dataset(f"coco:{tmp_path}")
    with pytest.raises(BadImageError, match=r"classes below 201.*Got 255"):
        reader.read_label(reader.items()[0], "classes")


def test_two_kinds_of_class_maps_are_one_too_many(folder):
    (folder / "semantic_train2017").mkdir()
    with pytest.raises(InvalidInputError, match="stuffthingmaps/train2017 and semantic_train2017"):
        open_dataset(f"coco:{folder}")


def test_without_class_maps_there_are_instances_alone(tmp_path):
    write_coco(tmp_path, "train2017", {1: []})
    reader = open_dataset(f"coco:{tmp_path}")
    assert reader.items()[0].label_kinds == ("instances",)
    assert reader.class_names() is None


def test_a_missing_class_map_is_an_error_of_its_image(folder):
    (folder / "stuffthingmaps" / "train2017" / "000000000009.png").unlink()
    reader = open_dataset(f"coco:{folder}")
    with pytest.raises(BadImageError, match=r"000000000009.png cannot be read"):
        reader.read_label(reader.items()[0], "classes")


def test_images_may_lie_one_folder_down_and_the_year_is_an_option(tmp_path):
    write_coco(tmp_path, "val2014", {1: []})
    (tmp_path / "images").mkdir()
    (tmp_path / "val2014").rename(tmp_path / "images" / "val2014")
    with pytest.raises(InvalidInputError, match="must hold train2017 or val2017"):
        open_dataset(f"coco:{tmp_path}")
    reader = open_dataset(f"coco:{tmp_path},year=2014")
    assert reader.items()[0].path == "images/val2014/000000000001.jpg"
    assert reader.read_image(reader.items()[0])


def test_an_image_of_another_data_set_is_unknown(folder):
    reader = open_dataset(f"coco:{folder}")
    item = replace(reader.items()[0], path="train2017/other.jpg")
    with pytest.raises(NotFoundError, match=r"Unknown image 'train2017/other.jpg'"):
        reader.read_label(item, "classes")


def test_images_without_annotations_are_refused(folder):
    (folder / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(InvalidInputError, match=r"instances_train2017.json must hold"):
        open_dataset(f"coco:{folder}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "Got no 'categories'"),
        (lambda c: c["images"].append(c["images"][0]), "name every image once. Got 3 images"),
        (lambda c: c["images"].clear(), "Annotation 0 of .* must be of a listed image. Got image"),
        (lambda c: c["annotations"][1].pop("bbox"), "Annotation 1 of .*Got KeyError: 'bbox'"),
        (lambda c: c["annotations"][0].update(category_id=3), "Annotation 0 of .*listed category"),
        (lambda c: c["annotations"][0].update(area=float("nan")), "Annotation 0 .*area nan"),
        (lambda c: c["annotations"][0].update(segmentation=[["x"]]), "as COCO's JSON"),
        (lambda c: c["images"][1].pop("height"), "Image 9 of .* must have file_name, height"),
        (lambda c: c["images"][1].update(file_name="../a.jpg"), "leads out of its folder"),
    ],
)
def test_a_bad_json_file_is_named(folder, change, message):
    path = folder / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(f"coco:{folder}")


def test_the_real_folder_reads_and_both_labels_agree(shared):
    root = shared / "data" / "coco"
    if not root.is_dir():
        pytest.skip("no coco in ../shared/data")
    reader = open_dataset(f"coco:{root}")
    items, names = reader.items(), reader.class_names()
    assert [sum(split in item.splits for item in items) for split in ("train", "test")] == [100] * 2
    agrees = []
    for item in items[::10]:
        classes, _ = decode_label(reader.read_label(item, "classes"))
        numbers, _ = decode_label(reader.read_label(item, "instances"))
        for box in item.attributes["boxes"]:
            inside = classes[numbers == box["instance"]]
            if inside.size >= 50:
                agrees.append(names[np.bincount(inside).argmax()] == box["class"])
    assert len(agrees) > 50
    assert np.mean(agrees) > 0.95
