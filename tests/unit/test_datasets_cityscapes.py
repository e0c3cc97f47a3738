import numpy as np
import pytest

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError
from featstore.images import decode_label
from tests.datasets import make_cityscapes, save_image, save_indices

FIRST = "gtFine/train/aachen/aachen_000000_000019_gtFine"


@pytest.fixture
def folder(tmp_path):
    make_cityscapes(tmp_path)
    return tmp_path


def first_label(folder, kind):
    reader = open_dataset(f"cityscapes:{folder}")
    return decode_label(reader.read_label(reader.items()[0], kind))


def test_val_is_the_split_test_and_the_dummies_of_test_are_left_out(folder):
    items = open_dataset(f"cityscapes:{folder}").items()
    assert [item.path for item in items[::2]] == [
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
        "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png",
    ]
    assert [item.splits[0] for item in items] == ["train", "train", "test", "test"]
    assert [item.group for item in items[:2]] == ["aachen_000000", "aachen_000001"]
    assert items[0].attributes == {"city": "aachen"}


def test_label_ids_become_the_19_classes_and_the_rest_is_void(folder):
    values = np.zeros((24, 32), np.uint8)
    values.flat[:34] = np.arange(34)
    save_indices(folder / f"{FIRST}_labelIds.png", values)
    decoded, valid = first_label(folder, "classes")
    v = 255
    assert decoded.flat[:34].tolist() == [
        *[v] * 7, 0, 1, v, v, 2, 3, 4, v, v, v, 5, v, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, v, v,
        16, 17, 18,
    ]  # fmt: skip
    np.testing.assert_array_equal(valid, decoded != v)
    names = open_dataset(f"cityscapes:{folder}").class_names()
    assert (len(names), names[0], names[13], names[18]) == (19, "road", "car", "bicycle")


def test_instances_are_the_numbers_from_1000_on_and_groups_are_void(folder):
    values = np.full((24, 32), 7, np.uint16)
    values[4:8], values[8:12], values[12:16] = 26000, 24001, 33
    save_indices(folder / f"{FIRST}_instanceIds.png", values)
    decoded, valid = first_label(folder, "instances")
    assert decoded[::4, 0].tolist() == [0, 26000, 24001, -1, 0, 0]
    np.testing.assert_array_equal(valid, values != 33)


@pytest.mark.parametrize("number", [34, 255])
def test_a_number_that_is_no_label_id_is_refused(folder, number):
    save_indices(folder / f"{FIRST}_labelIds.png", np.full((24, 32), number, np.uint8))
    with pytest.raises(BadImageError, match=rf"0 to 33. Got {number}"):
        first_label(folder, "classes")


@pytest.mark.parametrize(("kind", "file"), [("classes", "labelIds"), ("instances", "instanceIds")])
def test_a_missing_label_is_an_error_of_its_image(folder, kind, file):
    (folder / f"{FIRST}_{file}.png").unlink()
    with pytest.raises(BadImageError, match=rf"gtFine_{file}.png cannot be read"):
        first_label(folder, kind)


@pytest.mark.parametrize("name", ["bonn_000000_000019", "aachen_1_000019"])
def test_an_image_that_is_named_otherwise_is_refused(folder, name):
    save_image(folder / "leftImg8bit" / "train" / "aachen" / f"{name}_leftImg8bit.png")
    with pytest.raises(InvalidInputError, match=rf"Got aachen/{name}_leftImg8bit.png"):
        open_dataset(f"cityscapes:{folder}")


def test_a_folder_without_images_says_what_to_unpack(tmp_path):
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / folder).mkdir()
    with pytest.raises(InvalidInputError, match=r"unpack leftImg8bit_trainvaltest.zip"):
        open_dataset(f"cityscapes:{tmp_path}")
