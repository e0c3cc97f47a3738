import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError, NotFoundError
from featstore.images import decode, decode_label
from tests.datasets import make_nyu, save_depth, save_image, write_nyu_mat


@pytest.fixture
def folder(tmp_path):
    make_nyu(tmp_path)
    return tmp_path


def first_item(folder):
    reader = open_dataset(f"nyu:{folder}")
    return reader, reader.items()[0]


def test_paths_splits_groups_and_focal_come_from_the_lists(folder):
    items = open_dataset(f"nyu:{folder}").items()
    assert [item.path for item in items[:2]] == [f"train/kitchen/rgb_{n}.png" for n in range(2)]
    assert [item.splits for item in items] == [("train",)] * 3 + [("test",)] * 2
    assert [item.group for item in items] == ["train/kitchen"] * 3 + ["test/kitchen"] * 2
    assert items[0].attributes == {"focal": 518.8579}


def test_depth_is_the_files_bytes_in_millimetres(folder):
    reader, item = first_item(folder)
    path = folder / "train" / "kitchen" / "sync_depth_0.png"
    label = reader.read_label(item, "depth")
    assert label.data == path.read_bytes()
    values, valid = decode_label(label)
    np.testing.assert_allclose(values, np.asarray(Image.open(path)) / 1000, rtol=1e-6)
    assert not valid[0].any()
    assert valid[1:].all()


def test_lists_may_be_relative_to_the_root_and_begin_with_a_slash(tmp_path):
    save_image(tmp_path / "hall" / "a.png")
    save_depth(tmp_path / "hall" / "a_depth.png")
    (tmp_path / "train.txt").write_text("/hall/a.png /hall/a_depth.png 500\n")
    reader, item = first_item(tmp_path)
    assert item.path == "hall/a.png"
    assert item.group == "train/hall"
    assert reader.read_label(item, "depth").data


def test_an_image_in_both_lists_is_one_item_of_two_splits(tmp_path):
    save_image(tmp_path / "hall" / "a.png")
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("hall/a.png None 500\n")
    (item,) = open_dataset(f"nyu:{tmp_path}").items()
    assert item.splits == ("train", "test")
    assert item.label_kinds == ()


def test_an_empty_list_is_refused(folder):
    (folder / "test.txt").write_text("\n\n")
    with pytest.raises(InvalidInputError, match=r"test.txt lists no image"):
        open_dataset(f"nyu:{folder}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("only_one", r"Line 2 of .*train.txt must be `rgb depth focal`"),
        ("a b far", r"focal length in line 2"),
        ("a b -3", r"focal length in line 2"),
        ("../a b 3", r"leads out of it"),
    ],
)
def test_a_bad_line_is_named(folder, line, message):
    (folder / "train.txt").write_text(f"kitchen/rgb_0.png kitchen/sync_depth_0.png 5\n{line}\n")
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(f"nyu:{folder}")


def test_a_missing_image_or_depth_file_is_named(folder):
    (folder / "train" / "kitchen" / "sync_depth_0.png").unlink()
    (folder / "train" / "kitchen" / "rgb_1.png").unlink()
    reader, item = first_item(folder)
    with pytest.raises(BadImageError, match=r"sync_depth_0.png cannot be read"):
        reader.read_label(item, "depth")
    with pytest.raises(BadImageError, match=r"train/kitchen/rgb_1.png cannot be read"):
        reader.read_image(reader.items()[1])


def test_a_depth_file_of_another_size_is_refused(folder):
    save_depth(folder / "train" / "kitchen" / "sync_depth_0.png", hw=(12, 16))
    reader, item = first_item(folder)
    with pytest.raises(BadImageError, match=r"sync_depth_0.png is 12x16 but its image is 24x32"):
        reader.read_label(item, "depth")


def test_a_depth_file_without_a_value_is_refused(folder):
    path = folder / "train" / "kitchen" / "sync_depth_0.png"
    Image.fromarray(np.zeros((24, 32), np.uint16)).save(path)
    reader, item = first_item(folder)
    with pytest.raises(BadImageError, match=r"sync_depth_0.png has no valid depth"):
        reader.read_label(item, "depth")


def test_an_eight_bit_depth_file_is_refused(folder):
    path = folder / "train" / "kitchen" / "sync_depth_0.png"
    Image.fromarray(np.full((24, 32), 9, np.uint8)).save(path)
    reader, item = first_item(folder)
    with pytest.raises(BadImageError, match="16-bit grey PNG of millimetres"):
        reader.read_label(item, "depth")


def test_a_truncated_depth_file_is_named(folder):
    path = folder / "train" / "kitchen" / "sync_depth_0.png"
    path.write_bytes(path.read_bytes()[:-200])
    reader, item = first_item(folder)
    with pytest.raises(BadImageError, match=r"sync_depth_0.png: The image does not decode"):
        reader.read_label(item, "depth")


def test_the_option_depth_belongs_to_the_mat_file(folder):
    with pytest.raises(InvalidInputError, match="left out for a folder"):
        open_dataset(f"nyu:{folder},depth=rawDepths")


def test_the_mat_file_gives_upright_images_and_depths(tmp_path):
    path, arrays = write_nyu_mat(tmp_path)
    reader = open_dataset(f"nyu:{path}")
    assert reader.name == "nyu_depth_v2_labeled"
    item = reader.items()[2]
    pixels = decode(reader.read_image(item))
    assert pixels.shape == (6, 8, 3)
    np.testing.assert_array_equal(pixels, arrays["images"][2].transpose(2, 1, 0))
    label = reader.read_label(item, "depth")
    assert label.source == "depths"
    np.testing.assert_array_equal(decode_label(label)[0], arrays["depths"][2].T)


def test_the_split_counts_from_one_and_groups_are_scenes(tmp_path):
    path, _ = write_nyu_mat(tmp_path)
    items = open_dataset(f"nyu:{path}").items()
    splits = [item.splits[0] for item in items]
    assert splits == ["train", "train", "test", "train", "test"]
    assert [item.group for item in items[:3]] == ["kitchen_0000", "kitchen_0000", "kitchen_0001"]


def test_raw_depths_have_holes_and_another_source(tmp_path):
    path, arrays = write_nyu_mat(tmp_path)
    reader = open_dataset(f"nyu:{path},depth=rawDepths")
    label = reader.read_label(reader.items()[0], "depth")
    assert label.source == "rawDepths"
    np.testing.assert_array_equal(decode_label(label)[1], arrays["rawDepths"][0].T > 0)
    assert open_dataset(reader.spec).spec == reader.spec


def test_a_missing_splits_file_says_what_to_put_where(tmp_path):
    path, _ = write_nyu_mat(tmp_path)
    (tmp_path / "splits.mat").unlink()
    with pytest.raises(InvalidInputError, match=r"splits.mat is missing.*put it beside"):
        open_dataset(f"nyu:{path}")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [([0, 1], [2], "Got 0"), ([1, 6], [2], "Got 6"), ([1, 2], [2], "each once in all. Got 2")],
)
def test_a_split_that_names_no_image_or_one_twice_is_refused(tmp_path, train, test, message):
    path, _ = write_nyu_mat(tmp_path)
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array(train), "testNdxs": np.array(test)})
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(f"nyu:{path}")


def test_a_splits_file_that_does_not_parse_is_refused(tmp_path):
    path, _ = write_nyu_mat(tmp_path)
    for content in (b"", b"no matlab file at all" * 20):
        (tmp_path / "splits.mat").write_bytes(content)
        with pytest.raises(InvalidInputError, match="trainNdxs and testNdxs"):
            open_dataset(f"nyu:{path}")
    savemat(tmp_path / "splits.mat", {"other": np.array([1])})
    with pytest.raises(InvalidInputError, match="trainNdxs and testNdxs"):
        open_dataset(f"nyu:{path}")


def test_a_file_that_is_no_hdf5_or_an_unknown_depth_is_refused(tmp_path):
    path, _ = write_nyu_mat(tmp_path)
    with pytest.raises(InvalidInputError, match="one of depths, rawDepths"):
        open_dataset(f"nyu:{path},depth=best")
    path.write_bytes(b"not HDF5")
    with pytest.raises(InvalidInputError, match="no readable HDF5 file"):
        open_dataset(f"nyu:{path}")


def test_a_mat_file_without_images_is_refused(tmp_path):
    import h5py

    path, _ = write_nyu_mat(tmp_path)
    with h5py.File(path, "a") as file:
        del file["images"]
    with pytest.raises(NotFoundError, match="'images'"):
        open_dataset(f"nyu:{path}")


def test_the_real_folder_reads(shared):
    root = shared / "data" / "depth_nyu_layout"
    if not root.is_dir():
        pytest.skip("no depth_nyu_layout in ../shared/data")
    reader = open_dataset(f"nyu:{root}")
    items = reader.items()
    assert [sum(split in item.splits for item in items) for split in ("train", "test")] == [85, 65]
    values, valid = decode_label(reader.read_label(items[0], "depth"))
    assert values.shape == (240, 320)
    assert 0.3 < values[valid].mean() < 5
