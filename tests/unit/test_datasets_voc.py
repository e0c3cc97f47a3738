import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from featstore.datasets import open_dataset
from featstore.datasets.voc import CLASSES
from featstore.errors import BadImageError, InvalidInputError, NotFoundError
from featstore.images import decode_label
from tests.datasets import index_map, make_voc, save_image, save_indices, write_list, write_voc


@pytest.fixture
def folder(tmp_path):
    make_voc(tmp_path)
    return tmp_path


def test_splits_and_order_come_from_the_lists(folder):
    write_list(folder, "trainval", ["val_000001", "train_000000"])
    items = open_dataset(f"voc:{folder}").items()
    assert [item.path for item in items[:2]] == [f"JPEGImages/train_00000{n}.jpg" for n in (0, 1)]
    assert [item.splits for item in items] == [
        ("train", "trainval"), ("train",), ("train",), ("test",), ("test", "trainval")
    ]  # fmt: skip
    assert {item.label_kinds for item in items} == {("classes", "instances")}


def test_val_is_what_is_measured_only_in_voc_and_only_where_no_test_image_has_a_label(folder):
    write_list(folder, "test", ["unknown"])
    save_image(folder / "JPEGImages/unknown.jpg", seed=3)
    assert [item.splits for item in open_dataset(f"voc:{folder}").items()][-3:] == [
        ("test",), ("test",), ("unlabelled",)
    ]  # fmt: skip
    for kind in ("classes", "instances"):
        source = folder / label_folder(kind) / "train_000000.png"
        (folder / label_folder(kind) / "unknown.png").write_bytes(source.read_bytes())
    assert [item.splits for item in open_dataset(f"voc:{folder}").items()][-3:] == [
        ("val",), ("val",), ("test",)
    ]  # fmt: skip
    shutil.rmtree(folder / "Annotations")  # now it could be anybody's
    write_list(folder, "test", ["train_000000"])
    assert ("val",) in [item.splits for item in open_dataset(f"voc:{folder}").items()]


def test_a_test_image_with_boxes_is_measured(folder):
    write_list(folder, "test", ["val_000001"])
    for kind in ("classes", "instances"):
        (folder / label_folder(kind) / "val_000001.png").unlink()
    splits = {item.path: item.splits for item in open_dataset(f"voc:{folder}").items()}
    assert splits["JPEGImages/val_000001.jpg"] == ("val", "test")


@pytest.mark.parametrize(("kind", "seed", "high"), [("classes", 0, 21), ("instances", 7, 4)])
def test_labels_are_the_palettes_indices_and_255_is_void(folder, kind, seed, high):
    reader = open_dataset(f"voc:{folder}")
    label = reader.read_label(reader.items()[0], kind)
    values, valid = decode_label(label)
    np.testing.assert_array_equal(values, index_map(seed, high))
    np.testing.assert_array_equal(valid, index_map(seed, high) != 255)
    assert valid[values == 0].all()
    assert label.data == (folder / label_folder(kind) / "train_000000.png").read_bytes()


def label_folder(kind):
    return {"classes": "SegmentationClass", "instances": "SegmentationObject"}[kind]


def test_boxes_are_continuous_pixels_with_their_flags(folder):
    item = open_dataset(f"voc:{folder}").items()[0]
    whole, thin = item.attributes["boxes"]
    assert whole == {
        "class": "cat", "box": [0.0, 0.0, 32.0, 24.0],
        "truncated": True, "difficult": False, "occluded": False,
    }  # fmt: skip
    assert thin["class"] == "dog"
    assert thin["box"] == [4.5, 5.0, 5.5, 9.0]
    assert thin["difficult"]
    assert not thin["truncated"]


def test_an_image_without_an_xml_file_has_no_boxes(folder):
    (folder / "Annotations" / "train_000000.xml").unlink()
    items = open_dataset(f"voc:{folder}").items()
    assert [("boxes" in item.attributes) for item in items[:2]] == [False, True]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<name>cat</name>", "", "Object 1 in .*xml must have a <name>"),
        ("<xmin>1<", "<xmin>33<", r"xmin <= xmax.*Got \[33"),
        ("<xmin>1<", "<xmin>one<", "must have a <bndbox>"),
        ("<truncated>1<", "<truncated>maybe<", "0 or 1 in <truncated>. Got 'maybe'"),
        ("</annotation>", "", "cannot be read as XML"),
    ],
)
def test_a_bad_xml_file_is_named(folder, old, new, message):
    path = folder / "Annotations" / "train_000000.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(f"voc:{folder}")


@pytest.mark.parametrize("place", ["VOC2012", "VOCdevkit/VOC2012"])
def test_the_year_is_found_below_the_path(tmp_path, place):
    write_voc(tmp_path / place, {"train": 1}, boxes=False)
    reader = open_dataset(f"voc:{tmp_path}")
    assert reader.spec == f"voc.v1:{tmp_path / place}"
    assert reader.class_names() == tuple(CLASSES)


def test_two_years_are_one_too_many(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / "VOCdevkit" / year, {"train": 1}, boxes=False)
    with pytest.raises(InvalidInputError, match=r"one year of VOC. Got VOC2007, VOC2012; give"):
        open_dataset(f"voc:{tmp_path}")


def test_boxes_of_vocs_classes_make_it_voc(folder):
    reader = open_dataset(f"voc:{folder}")
    assert reader.class_names()[8] == "cat"
    assert "Flickr" in reader.licence
    path = folder / "Annotations" / "train_000000.xml"
    path.write_text(path.read_text().replace("cat", "lynx"))
    other = open_dataset(f"voc:{folder}")
    assert (other.class_names(), other.licence, other.homepage) == (None, "", "")


def test_an_image_of_another_data_set_is_unknown(folder):
    reader = open_dataset(f"voc:{folder}")
    item = replace(reader.items()[0], path="JPEGImages/other.jpg")
    with pytest.raises(NotFoundError, match=r"Unknown image 'JPEGImages/other.jpg'"):
        reader.read_label(item, "classes")


def test_names_come_from_classes_txt_or_from_the_option(folder, tmp_path):
    names = [f"class {n}" for n in range(21)]
    (folder / "classes.txt").write_text("\n".join(names) + "\n\n")
    assert open_dataset(f"voc:{folder}").class_names() == tuple(names)
    (tmp_path / "other.txt").write_text("\n".join(names[::-1]))
    reader = open_dataset(f"voc:{folder},classes={tmp_path / 'other.txt'}")
    assert reader.class_names() == tuple(names[::-1])
    assert open_dataset(reader.spec).class_names() == tuple(names[::-1])


@pytest.mark.parametrize("text", ["", "a\n\nb\n", "a\nb\na\n"])
def test_a_list_of_names_with_a_gap_or_a_repeat_is_refused(folder, text):
    (folder / "classes.txt").write_text(text)
    with pytest.raises(InvalidInputError, match="one class name a line"):
        open_dataset(f"voc:{folder}")


def test_a_class_beyond_the_names_is_refused(folder):
    (folder / "classes.txt").write_text("background\nroad\n")
    reader = open_dataset(f"voc:{folder}")
    with pytest.raises(BadImageError, match=r"classes below 2.*Got 20"):
        reader.read_label(reader.items()[0], "classes")
    reader.read_label(reader.items()[0], "instances")


def test_a_missing_label_is_an_error_of_its_image(folder):
    (folder / "SegmentationClass" / "train_000000.png").unlink()
    reader = open_dataset(f"voc:{folder}")
    with pytest.raises(BadImageError, match=r"SegmentationClass/train_000000.png cannot be read"):
        reader.read_label(reader.items()[0], "classes")


def test_a_list_of_images_without_published_labels_has_none(folder):
    save_image(folder / "JPEGImages" / "t.jpg")
    write_list(folder, "test", ["t"])
    item = open_dataset(f"voc:{folder}").items()[-1]
    assert (item.splits, item.label_kinds) == (("unlabelled",), ())


def test_an_image_of_the_main_lists_has_a_label_where_it_has_a_file(tmp_path):
    write_voc(tmp_path, {"train": 2})
    (tmp_path / "SegmentationClass" / "train_000001.png").unlink()
    (tmp_path / "ImageSets" / "Segmentation").rename(tmp_path / "ImageSets" / "Main")
    kinds = [item.label_kinds for item in open_dataset(f"voc:{tmp_path}").items()]
    assert kinds == [("classes", "instances"), ("instances",)]


def test_lists_may_lie_in_imagesets_itself_and_images_be_png(tmp_path):
    save_image(tmp_path / "JPEGImages" / "a" / "x.png")
    save_indices(tmp_path / "SegmentationClass" / "a" / "x.png", index_map(0, 3))
    write_list(tmp_path, "train", ["a/x"], folder=".")
    reader = open_dataset(f"voc:{tmp_path}")
    (item,) = reader.items()
    assert item.path == "JPEGImages/a/x.png"
    assert decode_label(reader.read_label(item, "classes"))[1][1:].all()
    assert reader.class_names() is None


@pytest.mark.parametrize(
    ("line", "message"),
    [("2007_000032 1", "Line 2 of .*must be the name of one image"), ("../x", "leads out of it")],
)
def test_a_bad_line_is_named(folder, line, message):
    write_list(folder, "train", ["train_000000", line])
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(f"voc:{folder}")


def test_an_empty_list_and_no_list_are_refused(folder):
    write_list(folder, "train", [""])
    with pytest.raises(InvalidInputError, match=r"train.txt lists no image"):
        open_dataset(f"voc:{folder}")
    for path in (folder / "ImageSets" / "Segmentation").iterdir():
        path.unlink()
    with pytest.raises(InvalidInputError, match=r"must hold train.txt, val.txt, trainval.txt"):
        open_dataset(f"voc:{folder}")


def test_two_images_of_one_name_are_refused(folder):
    save_image(folder / "JPEGImages" / "train_000000.png")
    with pytest.raises(InvalidInputError, match=r"one file a name. Got train_000000.jpg and"):
        open_dataset(f"voc:{folder}")


def test_a_coloured_or_a_one_bit_label_is_refused(folder):
    path = folder / "SegmentationClass" / "train_000000.png"
    reader = open_dataset(f"voc:{folder}")
    for picture in (Image.open(path).convert("RGB"), Image.new("1", (32, 24), 1)):
        picture.save(path)
        with pytest.raises(BadImageError, match="palette PNG or a grey PNG of 8 or 16 bits"):
            reader.read_label(reader.items()[0], "classes")
    path.write_bytes(b"GIF89a")
    with pytest.raises(BadImageError, match="is no PNG"):
        reader.read_label(reader.items()[0], "classes")


def test_a_label_of_another_size_is_refused(folder):
    save_indices(folder / "SegmentationClass" / "train_000000.png", index_map(0, 3, hw=(12, 16)))
    reader = open_dataset(f"voc:{folder}")
    with pytest.raises(BadImageError, match=r"is 12x16 but its image is 24x32"):
        reader.read_label(reader.items()[0], "classes")
    with pytest.raises(NotFoundError, match="label kind 'depth'"):
        reader.read_label(reader.items()[0], "depth")


def test_the_real_folder_reads(shared):
    root = shared / "data" / "seg_camvid_voc"
    if not root.is_dir():
        pytest.skip("no seg_camvid_voc in ../shared/data")
    reader = open_dataset(f"voc:{root}")
    items = reader.items()
    assert [sum(split in item.splits for item in items) for split in ("train", "test")] == [123, 78]
    assert reader.class_names() is None
    seen = set()
    for item in items[::20]:
        values, valid = decode_label(reader.read_label(item, "classes"))
        assert values.shape == (240, 320)
        seen |= set(np.unique(values[valid]).tolist())
    assert seen == set(range(11))
