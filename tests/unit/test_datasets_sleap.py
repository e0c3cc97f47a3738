"""The reader of SLEAP's files."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError, NotFoundError
from featstore.images import decode
from featstore.skeleton import Skeleton
from tests.animals import (
    EDGE,
    HW,
    embed_frames,
    make_sleap,
    png,
    sleap_skeleton,
    write_sleap,
)
from tests.datasets import save_image
from tests.fakes import fake_extract


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flies.slp"


def test_labels_of_people_count_and_points_move_by_half_a_pixel(tmp_path):
    reader = open_dataset(make_sleap(tmp_path))
    items = reader.items()
    assert [item.path for item in items] == ["video0/000002"] * 2 + ["video0/000004"] * 2
    first, second = items[:2]
    assert first.attributes["keypoints"] == [[12.5, 21.0, 2], [16.5, 28.0, 2], [0.0, 0.0, 0]]
    assert second.attributes["keypoints"] == [[42.5, 21.0, 2], [46.5, 28.0, 2], [0.0, 0.0, 0]]
    assert (first.group, first.label) == ("video0", "flies.pkg")
    assert first.attributes["individual"] == "anna"
    assert "individual" not in second.attributes
    assert reader.notes() == ("2 annotations left out: they are predicted.",)


def test_old_files_count_from_the_corner(tmp_path, path):
    write_sleap(path, version=1.0)
    embed_frames(path, {2: png(2)[0], 4: png(4)[0]})
    assert open_dataset(f"sleap:{path}").items()[0].attributes["keypoints"][0] == [12.0, 20.5, 2]


def test_the_skeleton_has_its_order_lines_and_symmetries(tmp_path):
    skeleton = open_dataset(make_sleap(tmp_path)).skeleton()
    names = ("head", "wing_a", "wing_b")
    assert skeleton == Skeleton(names=names, edges=((0, 1), (0, 2)), swaps=((1, 2),))


def test_without_symmetries_the_names_tell_left_and_right(path):
    about = sleap_skeleton(links=[{"source": 2, "target": 0, "type": EDGE}])
    about["nodes"][0]["name"], about["nodes"][1]["name"] = "wing_left", "wing_right"
    write_sleap(path, about=about)
    embed_frames(path, {2: png(2)[0], 4: png(4)[0]})
    assert open_dataset(f"sleap:{path}").skeleton().swaps == ((1, 2),)


@pytest.mark.parametrize(
    ("version", "attributes", "is_turned"),
    [(1.4, {}, False), (1.4, {"channel_order": "BGR"}, True), (1.2, {}, True)],
)
def test_colours_come_in_their_order(path, version, attributes, is_turned):
    write_sleap(path, version=version)
    data, pixels = png(4)
    embed_frames(path, {2: png(2)[0], 4: data}, **attributes)
    reader = open_dataset(f"sleap:{path}")
    found = decode(reader.read_image(reader.items()[-1]))
    np.testing.assert_array_equal(found, pixels[..., ::-1] if is_turned else pixels)


@pytest.mark.parametrize("n_channels", [1, 3])
def test_plain_arrays_are_frames_too(path, n_channels):
    write_sleap(path)
    pixels = np.random.default_rng(0).integers(0, 255, (5, *HW, n_channels), dtype=np.uint8)
    with h5py.File(path, "a") as file:
        file["video0/video"] = pixels
        file["video0/frame_numbers"] = range(5)
    reader = open_dataset(f"sleap:{path}")
    found = decode(reader.read_image(reader.items()[-1]))
    np.testing.assert_array_equal(found, np.broadcast_to(pixels[4], (*HW, 3)))
    assert fake_extract(path.with_suffix(".zarr"), [reader]).rows == 4


def test_images_beside_the_file_are_found(tmp_path, path):
    for number in range(5):
        save_image(tmp_path / "frames" / f"{number}.png", seed=number, hw=HW)
    files = [f"C:\\labs\\fly\\frames\\{number}.png" for number in range(5)]
    write_sleap(path, video={"backend": {"filename": files[0], "filenames": files}})
    reader = open_dataset(f"sleap:{path}")
    assert [item.path for item in reader.items()] == ["frames/2.png"] * 2 + ["frames/4.png"] * 2
    assert fake_extract(tmp_path / "f.zarr", [reader]).rows == 4


def test_frames_of_a_video_file_ask_for_a_package(path):
    write_sleap(path, video={"backend": {"filename": "fly.mp4"}})
    with pytest.raises(
        InvalidInputError, match=r"4 annotations left out: .* save a package, .pkg.slp"
    ):
        open_dataset(f"sleap:{path}")


def test_a_frame_that_is_not_embedded_is_listed(tmp_path, path):
    write_sleap(path)
    embed_frames(path, {2: png(2)[0]})
    reader = open_dataset(f"sleap:{path}")
    report = fake_extract(tmp_path / "f.zarr", [reader])
    assert report.rows == 2
    assert {bad.path for bad in report.bad} == {"video0/000004"}
    with pytest.raises(BadImageError, match="must hold frame 4 in video0/video"):
        reader.read_image(reader.items()[-1])


def test_identities_are_named_or_the_tracks(tmp_path):
    spec = make_sleap(tmp_path)
    assert {item.label for item in open_dataset(f"{spec},identity=fly").items()} == {"fly"}
    tracks = [item.label for item in open_dataset(f"{spec},identity=individual").items()]
    assert tracks == ["anna", None, "anna", None]


def test_what_cannot_be_told_is_refused(tmp_path, path):
    write_sleap(path, version=3.0)
    with pytest.raises(InvalidInputError, match=r"has format 3 of SLEAP; formats below 3"):
        open_dataset(f"sleap:{path}")
    write_sleap(path)
    with pytest.raises(NotFoundError, match=r"frames in flies\.slp"):
        open_dataset(f"sleap:{path}")
    with h5py.File(path, "a") as file:
        file["instances"][0:1] = np.array([(0, 0, 0, 1, 0, -1, 0, 0, 3)], file["instances"].dtype)
    with pytest.raises(InvalidInputError, match=r"must mark one skeleton\. Got 2"):
        open_dataset(f"sleap:{path}")
    with h5py.File(path, "a") as file:
        file["video_crops"] = [b"{}"]
    with pytest.raises(InvalidInputError, match="virtually cropped"):
        open_dataset(f"sleap:{path}")
    write_sleap(path, about=sleap_skeleton(links=[{"source": 7, "target": 0, "type": EDGE}]))
    with pytest.raises(InvalidInputError, match="must describe its skeleton"):
        open_dataset(f"sleap:{path}")
    with h5py.File(path, "a") as file:
        del file["points"]
    with pytest.raises(InvalidInputError, match=r"must be a .slp file of SLEAP \(KeyError"):
        open_dataset(f"sleap:{path}")
    with pytest.raises(InvalidInputError, match="is a folder"):
        open_dataset(f"sleap:{tmp_path}")
