import numpy as np
import pytest
from scipy.io import savemat

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError
from featstore.images import decode_label
from tests.datasets import bsds_regions, make_bsds, save_image, write_bsds_mat

FIRST = "groundTruth/train/100007.mat"


@pytest.fixture
def folder(tmp_path):
    make_bsds(tmp_path)
    return tmp_path


def first_label(folder, option=""):
    reader = open_dataset(f"bsds:{folder}{option}")
    return reader.read_label(reader.items()[0], "instances")


def test_splits_are_the_folders_and_other_files_are_passed_over(folder):
    items = open_dataset(f"bsds:{folder}").items()
    assert [item.path for item in items[:2]] == ["images/train/100007.jpg", "images/train/2092.jpg"]
    assert [item.splits[0] for item in items] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2


@pytest.mark.parametrize("annotator", [0, 1, 2])
def test_regions_are_those_of_the_annotator_and_none_is_background(folder, annotator):
    label = first_label(folder, f",annotator={annotator}" if annotator else "")
    values, valid = decode_label(label)
    np.testing.assert_array_equal(values, bsds_regions(100007 + annotator))
    assert valid.all()
    assert values.min() == 1
    assert label.source == f"annotator {annotator}"


def test_an_annotator_that_an_image_lacks_is_an_error_of_it(folder):
    with pytest.raises(BadImageError, match=r"has 3 annotators, from 0. Got annotator=3"):
        first_label(folder, ",annotator=3")
    with pytest.raises(InvalidInputError, match="`annotator` must be a whole number"):
        open_dataset(f"bsds:{folder},annotator=best")


def test_a_missing_file_is_an_error_of_its_image(folder):
    (folder / FIRST).unlink()
    with pytest.raises(BadImageError, match=r"100007.mat must hold the regions"):
        first_label(folder)


def test_a_region_0_is_refused(folder):
    write_bsds_mat(folder / FIRST, [bsds_regions(0) - 1])
    with pytest.raises(BadImageError, match=r"numbered from 1. Got uint16 .*, from 0"):
        first_label(folder)


def test_a_file_of_another_kind_is_refused(folder):
    for content in (b"", b"no matlab file at all" * 20):
        (folder / FIRST).write_bytes(content)
        with pytest.raises(BadImageError, match="must be a Matlab file with a cell `groundTruth`"):
            first_label(folder)
    for arrays in ({"other": 1}, {"groundTruth": np.ones((2, 2))}):
        savemat(folder / FIRST, arrays)
        with pytest.raises(BadImageError, match="must be a Matlab file with a cell `groundTruth`"):
            first_label(folder)


def test_regions_of_another_size_are_refused(folder):
    save_image(folder / "images" / "train" / "100007.jpg", hw=(32, 24))
    with pytest.raises(BadImageError, match=r"is 24x32 but its image is 32x24"):
        first_label(folder)


@pytest.mark.parametrize("place", ["data", "BSDS500/data", "BSR/BSDS500/data"])
def test_the_unpacked_archive_will_do(tmp_path, place):
    make_bsds(tmp_path / place)
    assert open_dataset(f"bsds:{tmp_path}").spec == f"bsds.v1:{tmp_path / place},annotator=0"


def test_folders_without_images_are_refused(tmp_path):
    for folder in ("images/train", "groundTruth"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(InvalidInputError, match=r"Got none; unpack BSR_bsds500.tgz"):
        open_dataset(f"bsds:{tmp_path}")
