import io
import tarfile
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError
from featstore.images import decode, decode_label
from tests.datasets import make_nyu_hf, nyu_h5, write_tar


@pytest.fixture
def folder(tmp_path):
    make_nyu_hf(tmp_path)
    return tmp_path


def first_item(folder):
    reader = open_dataset(f"nyu_hf:{folder}")
    return reader, reader.items()[0]


def test_items_are_the_members_of_the_shards_and_val_is_the_split_test(folder):
    items = open_dataset(f"nyu_hf:{folder}").items()
    assert [item.path for item in items] == [
        "train-000000.tar/train/hall_0001a/00000.h5", "train-000000.tar/train/hall_0002a/00000.h5",
        "train-000001.tar/train/hall_0001a/00001.h5", "train-000001.tar/train/hall_0002a/00001.h5",
        "val-000000.tar/val/official/00001.h5", "val-000000.tar/val/official/00002.h5",
    ]  # fmt: skip
    assert [item.splits[0] for item in items] == ["train"] * 4 + ["test"] * 2
    groups = ["train/hall_0001a", "train/hall_0002a"]
    assert [item.group for item in items] == [*groups, *groups, None, None]


def test_images_and_depths_are_those_of_the_files(folder):
    reader = open_dataset(f"nyu_hf:{folder}")
    for number, item in zip((1, 2, 11, 12, 21, 22), reader.items(), strict=True):
        _, rgb, depth = nyu_h5(number)
        np.testing.assert_array_equal(decode(reader.read_image(item)), rgb.transpose(1, 2, 0))
        values, valid = decode_label(reader.read_label(item, "depth"))
        np.testing.assert_array_equal(values, depth)
        np.testing.assert_array_equal(valid, depth > 0)


def test_many_threads_read_the_same(folder):
    reader = open_dataset(f"nyu_hf:{folder}")
    items = [*reader.items()] * 20
    serial = [reader.read_label(item, "depth").data for item in items]
    with ThreadPoolExecutor(8) as pool:
        assert [
            label.data for label in pool.map(lambda i: reader.read_label(i, "depth"), items)
        ] == (serial)


def test_the_folder_of_the_shards_will_do(folder):
    reader = open_dataset(f"nyu_hf:{folder / 'data'}")
    assert reader.spec == open_dataset(f"nyu_hf:{folder}").spec == f"nyu_hf.v1:{folder / 'data'}"


def test_no_shard_says_where_they_come_from(tmp_path):
    with pytest.raises(InvalidInputError, match=r"train-000000.tar or val-.*sayakpaul/nyu_depth"):
        open_dataset(f"nyu_hf:{tmp_path}")


def test_a_damaged_shard_is_named(folder):
    path = folder / "data" / "train-000001.tar"
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: last.offset_data + 100])
    with pytest.raises(InvalidInputError, match=r"train-000001.tar must hold .* is cut short"):
        open_dataset(f"nyu_hf:{folder}")
    path.write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(InvalidInputError, match="cannot be read as a plain tar file"):
        open_dataset(f"nyu_hf:{folder}")


def test_a_shard_without_images_or_with_one_twice_is_refused(folder):
    path = folder / "data" / "train-000001.tar"
    write_tar(path, {"a.txt": b"no image"})
    with pytest.raises(InvalidInputError, match=r"must hold .h5 files. Got none"):
        open_dataset(f"nyu_hf:{folder}")
    write_tar(path, {"a/b.h5": b"x", "./a/b.h5": b"y"})
    with pytest.raises(InvalidInputError, match=r"Got a/b.h5 twice"):
        open_dataset(f"nyu_hf:{folder}")


def test_a_shard_that_shrinks_later_is_an_error_of_the_image(folder):
    reader, item = first_item(folder)
    path = folder / "data" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadImageError, match="the file was changed"):
        reader.read_image(item)


def hdf5(**arrays):
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return sink.getvalue()


RGB = np.zeros((3, 4, 6), np.uint8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no HDF5", "must be an HDF5 file with rgb and depth"),
        (hdf5(rgb=RGB), "must be an HDF5 file with rgb and depth .*depth"),
        (hdf5(rgb=RGB.T, depth=np.ones((4, 6))), r"shape \(3, h, w\). Got uint8 of shape \(6, 4"),
        (hdf5(rgb=RGB / 1, depth=np.ones((4, 6))), r"must be uint8 .* Got float64"),
        (hdf5(rgb=RGB, depth=np.ones((6, 4))), "depth of .* is 6x4 but its image is 4x6"),
        (hdf5(rgb=RGB, depth=np.zeros((4, 6))), "has no valid depth value"),
    ],
)
def test_a_bad_file_is_an_error_of_its_image(folder, data, message):
    write_tar(folder / "data" / "train-000000.tar", {"hall/1.h5": data})
    reader, item = first_item(folder)
    with pytest.raises(BadImageError, match=message):
        reader.read_label(item, "depth")
