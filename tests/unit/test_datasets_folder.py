import pytest

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError
from tests.datasets import save_image


def listed(root):
    items = open_dataset(f"folder:{root}").items()
    return [(item.path, item.splits, item.label) for item in items]


def test_a_flat_folder_has_neither_splits_nor_labels(tmp_path):
    save_image(tmp_path / "b.png")
    save_image(tmp_path / "a.JPG")
    assert listed(tmp_path) == [("a.JPG", (), None), ("b.png", (), None)]


def test_a_class_folder_names_the_label(tmp_path):
    save_image(tmp_path / "dog" / "old" / "2.png")
    save_image(tmp_path / "cat" / "1.png")
    assert listed(tmp_path) == [("cat/1.png", (), "cat"), ("dog/old/2.png", (), "dog")]


def test_folders_named_like_splits_are_splits(tmp_path):
    save_image(tmp_path / "train" / "dog" / "1.png")
    save_image(tmp_path / "val" / "2.png")
    assert listed(tmp_path) == [
        ("train/dog/1.png", ("train",), "dog"),
        ("val/2.png", ("val",), None),
    ]


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / ".thumbs" / "b.png")
    save_image(tmp_path / ".c.png")
    (tmp_path / "readme.txt").write_text("hello")
    assert [path for path, *_ in listed(tmp_path)] == ["a.png"]


def test_the_order_is_by_parts_and_not_by_the_disk(tmp_path):
    for path in ("b/1.png", "a b/1.png", "a/1.png", "a-1/1.png"):
        save_image(tmp_path / path)
    paths = [path for path, *_ in listed(tmp_path)]
    assert paths == ["a/1.png", "a b/1.png", "a-1/1.png", "b/1.png"]


def test_a_folder_without_images_an_empty_split_and_a_file_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InvalidInputError, match="holds no image"):
        listed(tmp_path)
    with pytest.raises(InvalidInputError, match="is a file"):
        listed(tmp_path / "notes.txt")
    save_image(tmp_path / "train" / "a.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(InvalidInputError, match=r"split .*test holds no image"):
        listed(tmp_path)


def test_an_image_outside_of_the_splits_is_not_dropped_in_silence(tmp_path):
    save_image(tmp_path / "train" / "a.png")
    save_image(tmp_path / "extra" / "b.png")
    with pytest.raises(InvalidInputError, match=r"extra/b.png lies in none of them"):
        listed(tmp_path)


def test_an_image_that_vanished_is_named(tmp_path):
    save_image(tmp_path / "a.png")
    reader = open_dataset(f"folder:{tmp_path}")
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImageError, match=r"a.png cannot be read \(No such file"):
        reader.read_image(reader.items()[0])
