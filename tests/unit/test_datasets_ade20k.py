import numpy as np
import pytest

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError
from featstore.images import decode_label
from tests.datasets import index_map, make_ade20k, save_indices

FIRST = "annotations/training/ADE_train_00000001.png"


@pytest.fixture
def folder(tmp_path):
    make_ade20k(tmp_path)
    return tmp_path


def first_label(folder):
    reader = open_dataset(f"ade20k:{folder}")
    return decode_label(reader.read_label(reader.items()[0], "classes"))


def test_validation_is_the_split_test_and_scenes_are_labels(folder):
    items = open_dataset(f"ade20k:{folder}").items()
    assert [item.path for item in items[1:3]] == [
        "images/training/ADE_train_00000002.jpg", "images/validation/ADE_val_00000001.jpg"
    ]  # fmt: skip
    assert [item.splits[0] for item in items] == ["train", "train", "test", "test"]
    assert [item.label for item in items] == ["airport_terminal", "bedroom", None, None]


def test_other_becomes_void_and_the_classes_count_from_zero(folder):
    stored = index_map(1, 151).astype(int)
    stored[0] = 0
    values, valid = first_label(folder)
    np.testing.assert_array_equal(valid, stored > 0)
    np.testing.assert_array_equal(values[valid], stored[stored > 0] - 1)
    assert not valid[0].any()


def test_all_150_classes_keep_their_place(folder):
    values = np.zeros((24, 32), np.uint8)
    values.flat[:151] = np.arange(151)
    save_indices(folder / FIRST, values)
    decoded, _ = first_label(folder)
    assert decoded.flat[:151].tolist() == [255, *range(150)]


def test_names_are_those_of_the_table(folder):
    names = open_dataset(f"ade20k:{folder}").class_names()
    assert len(names) == 150
    assert (names[0], names[149]) == ("thing 1, object 1", "thing 150, object 150")
    (folder / "objectInfo150.txt").unlink()
    assert open_dataset(f"ade20k:{folder}").class_names() is None


def test_a_table_with_a_column_more_is_read_by_its_header(folder):
    path = folder / "objectInfo150.txt"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    lines = [[*line[:4], "Stuff" if line[0] == "Idx" else "1", line[4]] for line in lines]
    path.write_text("\n".join("\t".join(line) for line in lines))
    assert open_dataset(f"ade20k:{folder}").class_names()[2] == "thing 3, object 3"


@pytest.mark.parametrize("text", ["", "Idx\tName\n1\twall\n", "a\tb\n"])
def test_another_table_is_refused(folder, text):
    (folder / "objectInfo150.txt").write_text(text)
    with pytest.raises(InvalidInputError, match=r"objectInfo150.txt must be the table of ADE20K"):
        open_dataset(f"ade20k:{folder}")


def test_a_bad_line_of_scenes_is_named(folder):
    (folder / "sceneCategories.txt").write_text("a b\n\nADE_train_00000001\n")
    with pytest.raises(InvalidInputError, match=r"Line 3 of .* must be `image scene`"):
        open_dataset(f"ade20k:{folder}")


def test_a_number_beyond_150_is_refused(folder):
    save_indices(folder / FIRST, index_map(1, 150))
    with pytest.raises(BadImageError, match=r"0 to 150. Got 255"):
        first_label(folder)


def test_an_image_of_other_alone_is_refused(folder):
    save_indices(folder / FIRST, np.zeros((24, 32), np.uint8))
    with pytest.raises(BadImageError, match="no valid classes value"):
        first_label(folder)


def test_a_missing_annotation_is_an_error_of_its_image(folder):
    (folder / FIRST).unlink()
    with pytest.raises(BadImageError, match=r"ADE_train_00000001.png cannot be read"):
        first_label(folder)


def test_the_folder_above_will_do_and_one_without_images_will_not(tmp_path):
    make_ade20k(tmp_path / "ADEChallengeData2016")
    spec = open_dataset(f"ade20k:{tmp_path}").spec
    assert spec == f"ade20k.v1:{tmp_path / 'ADEChallengeData2016'}"
    (tmp_path / "images" / "training").mkdir(parents=True)
    (tmp_path / "annotations").mkdir()
    with pytest.raises(InvalidInputError, match=r"images in training/ or validation/. Got none"):
        open_dataset(f"ade20k:{tmp_path}")
