"""The reader of AP-10K, and of JSON like it, with what is found in such files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import featstore
from featstore.datasets import open_dataset
from featstore.errors import InvalidInputError, NotFoundError
from featstore.items import read_dataset
from featstore.plan import RunOptions
from featstore.skeleton import Skeleton
from heads.keypoint_labels import KEYPOINTS
from heads.labels import reader_labels, stored_labels
from heads.targets import checked_label
from tests.animals import HW, NAMES, animal, category, image, keypoint_json, make_ap10k, write_json
from tests.datasets import save_image
from tests.fakes import fake_extract


@pytest.fixture
def folder(tmp_path):
    make_ap10k(tmp_path)
    return tmp_path


def write_one(root, animals, *, images=None, **more):
    """Write a folder with one JSON of a name without a split, and its images."""
    images = images or [image(1)]
    for entry in images:
        save_image(root / "data" / entry["file_name"], seed=entry["id"], hw=HW)
    write_json(root / "annotations" / "animals.json", keypoint_json(images, animals, **more))
    return f"ap10k:{root}"


def test_all_files_are_read_and_each_animal_is_one_item(folder):
    items = open_dataset(f"ap10k:{folder}").items()
    assert [(item.path[-6:], item.label, item.splits) for item in items] == [
        ("01.jpg", "dog", ("train",)),
        ("02.jpg", "fox", ("train",)),
        ("02.jpg", "fox", ("train",)),
        ("03.jpg", "dog", ("val",)),
        ("04.jpg", "fox", ("test",)),
        ("04.jpg", "fox", ("test",)),
    ]
    assert {item.group for item in items} == {item.path for item in items}
    first = items[0]
    assert first.attributes["keypoints"] == [[20.5, 20.25, 2], [32.5, 21.25, 2], [26.5, 25.25, 1]]
    assert first.attributes["box"] == [16.5, 17.25, 36.5, 27.25]
    assert first.crop == (14.0, 9.75, 39.0, 34.75)
    assert (first.attributes["family"], first.attributes["background"]) == ("Canidae", 5)
    assert first.attributes["area"] == 150.0


def test_another_numbered_split_has_the_same_animals_in_other_splits(folder):
    first, second = (open_dataset(f"ap10k:{folder},split={n}") for n in (1, 2))
    assert [item.splits for item in second.items()] == [
        *[("val",)],
        *[("test",)] * 2,
        *[("train",)] * 3,
    ]
    about = [[(i.path, i.crop, i.attributes) for i in r.items()] for r in (first, second)]
    assert about[0] == about[1]
    assert "split=2" in second.spec
    with pytest.raises(InvalidInputError, match=r"`split` must be .*split 1, 2. Got 3"):
        open_dataset(f"ap10k:{folder},split=3")


def test_the_skeleton_counts_from_0_and_knows_its_sides(folder):
    skeleton = open_dataset(f"ap10k:{folder}").skeleton()
    assert skeleton == Skeleton(names=NAMES, edges=((0, 1), (0, 2), (1, 2)), swaps=((0, 1),))


LONG = """left_eye right_eye nose neck root_of_tail left_shoulder left_elbow left_front_paw
right_shoulder right_elbow right_front_paw left_hip left_knee left_back_paw right_hip right_knee
right_back_paw"""
SHORT = """L_Eye R_Eye Nose Neck Root-of-tail L_Shoulder L_Elbow L_F_Paw R_Shoulder R_Elbow R_F_Paw
L_Hip L_Knee L_B_Paw R_Hip R_Knee R_B_Paw"""


@pytest.mark.parametrize("names", [LONG, SHORT])
def test_ap10ks_keypoints_have_its_sigmas(tmp_path, names):
    points = [number for n in range(17) for number in (n, n + 1, 2)]
    kinds = [category(1, "dog", keypoints=names.split(), skeleton=[])]
    spec = write_one(tmp_path, [animal(1, 1, keypoints=points)], categories=kinds)
    skeleton = open_dataset(spec).skeleton()
    assert skeleton.sigmas == (
        *(0.025, 0.025, 0.026, 0.035, 0.035, 0.079, 0.072, 0.062, 0.079, 0.072, 0.062),
        *(0.107, 0.087, 0.089, 0.107, 0.087, 0.089),
    )
    assert len(skeleton.swaps) == 7


def test_sigmas_of_the_file_are_taken(tmp_path):
    kinds = [category(1, "dog", sigmas=[0.1, 0.2, 0.3])]
    spec = write_one(tmp_path, [animal(1, 1)], categories=kinds)
    assert open_dataset(spec).skeleton().sigmas == (0.1, 0.2, 0.3)


def test_what_marks_nothing_is_left_out_and_said(tmp_path):
    none = [0, 0, 0] * 3
    spec = write_one(
        tmp_path,
        [
            animal(1, 1, num_keypoints=0),  # the keypoints themselves tell
            animal(2, 1, keypoints=none, num_keypoints=3),
            animal(3, 1, keypoints=[], num_keypoints=0),
            {key: value for key, value in animal(4, 1).items() if key != "keypoints"},
            animal(5, 1, iscrowd=1),
            animal(6, 1, keypoints=[9, 9, 2, 0, 0, 0, 0, 0, 0], bbox=[9, 9, 0, 0]),
        ],
    )
    reader = open_dataset(spec)
    assert [item.attributes["annotation"] for item in reader.items()] == ["1"]
    assert set(reader.notes()) == {
        "2 annotations left out: they list no keypoints.",
        "1 annotation left out: none of their keypoints is marked.",
        "1 annotation left out: they are crowds.",
        "1 annotation left out: they have no box, and their keypoints span none.",
    }


@pytest.mark.parametrize("box", [[16.5, 17.25, 0, 0], [16.5, 17.25, 20, 0], [], None])
def test_a_box_of_no_size_gives_way_to_that_of_the_keypoints(tmp_path, box):
    bare = {k: v for k, v in animal(1, 1).items() if k not in ("iscrowd", "area", "id")}
    (item,) = open_dataset(write_one(tmp_path, [bare | {"bbox": box}])).items()
    assert item.attributes["box"] == [11.5, 20.25, 23.5, 25.25]
    assert item.crop == (10.0, 15.25, 25.0, 30.25)
    assert item.attributes["area"] is None


def test_the_same_animal_told_twice_is_one_and_two_in_one_box_are_two(tmp_path):
    twin = animal(2, 1, bbox=animal(1, 1)["bbox"])
    spec = write_one(tmp_path, [animal(1, 1), animal(1, 1), twin])
    first, second = open_dataset(spec).items()
    assert first.crop == second.crop
    assert (first.instance, second.instance) == (None, "2")


def test_the_whole_image_keeps_its_animals_apart(folder):
    items = open_dataset(f"ap10k:{folder},box=image").items()
    assert {item.crop for item in items} == {None}
    assert [item.instance for item in items] == ["10", "20", "21", "30", "40", "41"]
    report = fake_extract(folder / "f.zarr", [open_dataset(f"a=ap10k:{folder},box=image")])
    assert report.rows == 4
    assert len(featstore.open(folder / "f.zarr").samples()) == 6


def test_another_scale_gives_other_crops(folder):
    first = open_dataset(f"ap10k:{folder},box=2").items()[0]
    assert first.crop == (6.5, 2.25, 46.5, 42.25)
    for wrong in ("0.5", "wide", "nan"):
        with pytest.raises(InvalidInputError, match=r"`box` must be image, or a scale"):
            open_dataset(f"ap10k:{folder},box={wrong}")


def test_animal_pose_maps_ids_to_names_and_gives_corners(tmp_path):
    save_image(tmp_path / "images" / "2007_000063.jpg", hw=HW)
    points = [[10, 20, 1], [30, 25, 1], [0, 0, 0]]
    entry = {"image_id": 1, "category_id": 1, "bbox": [5, 15, 45, 35], "keypoints": points}
    kinds = [category(1, "dog", skeleton=[[0, 1], [1, 2]])]
    content = {"images": {"1": "2007_000063.jpg"}, "annotations": [entry], "categories": kinds}
    write_json(tmp_path / "keypoints.json", content)
    reader = open_dataset(f"ap10k:{tmp_path}")
    (item,) = reader.items()
    assert item.path == "images/2007_000063.jpg"
    assert item.attributes["box"] == [5.0, 15.0, 45.0, 35.0]
    assert item.crop == (0.0, 0.0, 50.0, 50.0)  # moved into an image whose size the file hides
    assert item.attributes["keypoints"] == [[10.0, 20.0, 1], [30.0, 25.0, 1], [0.0, 0.0, 0]]
    assert reader.skeleton().edges == ((0, 1), (1, 2))
    (sizes,) = open_dataset(f"ap10k:{tmp_path},bbox=sizes").items()
    assert sizes.attributes["box"] == [5.0, 15.0, 50.0, 50.0]


def test_apt36ks_windows_paths_are_found_and_clips_can_be_groups(tmp_path):
    names = ["D:\\Animals\\AP-36k-part1\\29wolf\\v3c2\\frame7.jpg", "30fox\\v1\\frame1.jpg"]
    save_image(tmp_path / "AP-36k-part1/29wolf/v3c2/frame7.jpg", hw=HW)
    save_image(tmp_path / "AP-36k-part1/30fox/v1/frame1.jpg", hw=HW)
    images = [
        image(n, file_name=name, video_id=10 * n) for n, name in zip((1, 2), names, strict=True)
    ]
    animals = [animal(1, 1, track_id=4), animal(2, 2, category_id=2)]
    write_json(tmp_path / "apt36k_annotations.json", keypoint_json(images, animals))
    with pytest.raises(InvalidInputError, match=r"^`group` must be image or video"):
        open_dataset(f"ap10k:{tmp_path},group=clip")
    first, _ = open_dataset(f"ap10k:{tmp_path},group=video").items()
    assert (first.path, first.group) == ("AP-36k-part1/29wolf/v3c2/frame7.jpg", "10")
    assert first.attributes["track"] == 4


def test_one_file_and_a_folder_of_images_can_be_named(folder, tmp_path):
    (folder / "data").rename(folder / "photos")
    one = folder / "annotations" / "ap10k-val-split1.json"
    with pytest.raises(InvalidInputError, match=r"None of the 1 images .* images=DIR"):
        open_dataset(f"ap10k:{one}")
    reader = open_dataset(f"ap10k:{one},images=photos")
    assert [item.path for item in reader.items()] == ["photos/000000000003.jpg"]
    assert open_dataset(reader.spec).items() == reader.items()


def test_a_missing_image_and_one_of_another_size_are_listed(folder):
    (folder / "data" / f"{2:012d}.jpg").unlink()
    Image.new("RGB", HW).save(folder / "data" / f"{4:012d}.jpg")  # lies on its side
    report = fake_extract(folder / "f.zarr", [open_dataset(f"ap10k:{folder}")])
    assert report.rows == 2
    reasons = [bad.reason for bad in report.bad]
    assert sum("cannot be read" in reason for reason in reasons) == 2
    assert sum("must be 60x80, as its annotation says" in reason for reason in reasons) == 2


def test_a_box_beside_its_image_is_listed(tmp_path):
    spec = write_one(tmp_path, [animal(1, 1), animal(2, 1, bbox=[200, 10, 20, 20])])
    report = fake_extract(tmp_path / "f.zarr", [open_dataset(spec)])
    assert report.rows == 1
    assert "overlaps the 60x80 image" in report.bad[0].reason


def test_keypoints_outside_of_crop_and_image_stay(tmp_path):
    points = [-5.5, 20, 2, 70, 59.5, 1, 26, 25, 2]
    (item,) = open_dataset(write_one(tmp_path, [animal(1, 1, keypoints=points)])).items()
    assert item.attributes["keypoints"][:2] == [[-5.5, 20.0, 2], [70.0, 59.5, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "Got KeyError: 'categories'"),
        (lambda c: c["annotations"][0].update(image_id=9), "Annotation 10 of .*Got KeyError: 9"),
        (lambda c: c["annotations"][0].update(category_id=9), "listed image_id and category_id"),
        (lambda c: c["annotations"][0]["keypoints"].pop(), "8 numbers for 3 keypoints"),
        (lambda c: c["annotations"][0]["keypoints"].__setitem__(2, 3), "v is 3"),
        (lambda c: c["annotations"][0]["keypoints"].__setitem__(0, None), "TypeError"),
        (lambda c: c["annotations"][0]["keypoints"].__setitem__(0, float("nan")), "lies at"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "Annotation 10 of .*ValueError"),
        (lambda c: c["annotations"][0].update(area=float("inf")), "area inf"),
        (lambda c: c["images"][0].update(file_name="../a.jpg"), "leads out of its folder"),
        (lambda c: c["categories"][1].update(keypoints=["a", "b", "c"]), "'dog' and 'fox' must"),
        (
            lambda c: [kind.update(keypoints=list("abc")) for kind in c["categories"]],
            "must name the same keypoints in the same order",
        ),
    ],
)
def test_a_bad_json_file_is_named(folder, change, message):
    path = folder / "annotations" / "ap10k-train-split1.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(f"ap10k:{folder}")


def test_a_folder_without_keypoints_is_refused(tmp_path):
    write_json(tmp_path / "boxes.json", {"images": [], "annotations": [], "categories": []})
    with pytest.raises(InvalidInputError, match=r"must hold keypoints in JSON .*Got boxes.json"):
        open_dataset(f"ap10k:{tmp_path}")
    (tmp_path / "boxes.json").write_text("{")
    with pytest.raises(InvalidInputError, match="cannot be read as JSON"):
        open_dataset(f"ap10k:{tmp_path}")


def test_animals_that_nobody_marked_make_no_data_set(tmp_path):
    spec = write_one(tmp_path, [animal(1, 1, keypoints=[0] * 9)])
    with pytest.raises(InvalidInputError, match=r"must mark a keypoint of an animal. 1 annotation"):
        open_dataset(spec)


def test_an_image_in_two_splits_is_refused(folder):
    path = folder / "annotations" / "ap10k-val-split1.json"
    content = keypoint_json([image(2)], [animal(20, 2, 2)])
    write_json(path, content)
    with pytest.raises(InvalidInputError, match=r"is in the splits train and val"):
        open_dataset(f"ap10k:{folder}")


def test_keypoints_travel_with_the_store(folder):
    reader = open_dataset(f"a=ap10k:{folder}")
    fake_extract(folder / "f.zarr", [reader])
    store = featstore.open(folder / "f.zarr")
    assert read_dataset(store.folder, "a")["skeleton"] == reader.skeleton().to_json()
    lines = store.samples().to_pylist()
    own, kept = stored_labels(store, lines, kind=KEYPOINTS)
    joined, matched = reader_labels(f"a=ap10k:{folder}", lines, kind=KEYPOINTS)
    assert len(kept) == len(matched) == 6
    assert own.skeleton("a") == joined.skeleton("a") == reader.skeleton()
    assert own.class_names("a") is None
    names = [line["item"] for line in lines]
    labels = dict(own.iterate("a", names))
    assert labels == dict(joined.iterate("a", names))
    assert own.version("a") == joined.version("a")
    features = store.feature_sets()[0]
    for line in lines:
        placement = features.placements([line["row"]])[line["row"]]
        record, valid = checked_label(labels[line["item"]], placement)
        assert valid
        assert record.dtype.names == ("keypoints", "box", "area", "identity")
        assert str(record["identity"]) == line["label"]
        np.testing.assert_array_equal(record["keypoints"][:, 2], [2, 2, 1])


def test_corrected_keypoints_are_another_version_of_the_same_items(folder):
    fake_extract(folder / "f.zarr", [open_dataset(f"a=ap10k:{folder}")])
    store = featstore.open(folder / "f.zarr")

    def version():
        return stored_labels(store, store.samples().to_pylist(), kind=KEYPOINTS)[0].version("a")

    before = version()
    for part in ("train-split1", "test-split2", "val-split2"):
        path = folder / "annotations" / f"ap10k-{part}.json"
        path.write_text(path.read_text().replace("20.25, 2", "20.5, 2"))
    fake_extract(folder / "f.zarr", [open_dataset(f"a=ap10k:{folder}")])
    assert len(store.samples()) == 6
    assert version() != before


def test_data_without_keypoints_says_which_labels_there_are(folder):
    fake_extract(folder / "f.zarr", [open_dataset(f"a=ap10k:{folder}")])
    store = featstore.open(folder / "f.zarr")
    with pytest.raises(InvalidInputError, match=r"kinds of labels they have: class, keypoints\)"):
        stored_labels(store, store.samples().to_pylist(), kind="depth")


def test_mirror_images_need_left_and_right(tmp_path):
    kinds = [category(1, "dog", keypoints=["collar", "rear", "tail"])]
    reader = open_dataset(write_one(tmp_path, [animal(1, 1)], categories=kinds))
    options = RunOptions(views=("hflip",), n_threads=1)
    with pytest.raises(InvalidInputError, match=r"must be named left and right.*collar, rear"):
        fake_extract(tmp_path / "f.zarr", [reader], options=options)


def test_mirror_images_of_named_sides_are_stored(folder):
    options = RunOptions(views=("hflip",), n_threads=1)
    assert (
        fake_extract(folder / "f.zarr", [open_dataset(f"ap10k:{folder}")], options=options).rows
        == 12
    )


def test_an_extraction_says_what_was_left_out(tmp_path):
    reader = open_dataset(write_one(tmp_path, [animal(1, 1), animal(2, 1, iscrowd=1)]))
    reports = []
    fake_extract(tmp_path / "f.zarr", [reader], progress=reports.append)
    name = tmp_path.name
    said = [report.message for report in reports if report.message]
    assert said[0] == f"{name}: 1 annotation left out: they are crowds."


def test_an_unknown_option_is_refused(folder):
    with pytest.raises(NotFoundError, match="Did you mean 'split'"):
        open_dataset(f"ap10k:{folder},splits=1")


def test_the_rendered_animals_read(shared):
    root = shared / "data" / "kp_synth_ap10k"
    if not root.is_dir():
        pytest.skip("no kp_synth_ap10k in ../shared/data")
    reader = open_dataset(f"ap10k:{root}")
    items = reader.items()
    assert len(items) == 240
    assert {item.label for item in items} == {"dog", "rodent", "human", "quadruped"}
    assert len(reader.skeleton().swaps) == 7
