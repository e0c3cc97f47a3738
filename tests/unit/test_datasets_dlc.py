"""The reader of DeepLabCut's projects."""

from __future__ import annotations

import pytest

from featstore.datasets import open_dataset
from featstore.errors import InvalidInputError, NotFoundError
from featstore.skeleton import Skeleton
from tests.animals import CONFIG, HW, PARTS, dlc_rows, make_dlc, write_pandas, write_rows
from tests.datasets import save_image
from tests.fakes import fake_extract

TWO = ("anna", "ben")


@pytest.fixture
def folder(tmp_path):
    make_dlc(tmp_path)
    return tmp_path


def write_video(root, rows, *, name="CollectedData_anna.csv"):
    """Write a project of one video without a config."""
    folder = root / "labeled-data" / "video"
    save_image(folder / "img1.png", hw=HW)
    write_rows(folder / name, rows)
    return f"dlc:{root}"


def test_each_image_is_an_animal_around_its_points(folder):
    items = open_dataset(f"mice=dlc:{folder}").items()
    assert [(item.path, item.group) for item in items] == [
        (f"labeled-data/{video}/img{number:04d}.png", f"labeled-data/{video}")
        for video in ("one", "two")
        for number in (3, 12)
    ]
    first = items[0]
    assert first.label == "mice"
    assert first.attributes["keypoints"] == [[10.75, 15.75, 2], [22.75, 24.75, 2], [0.0, 0.0, 0]]
    assert first.attributes["box"] == [10.75, 15.75, 22.75, 24.75]
    assert first.crop == (9.25, 12.75, 24.25, 27.75)


def test_the_config_gives_order_and_lines(folder):
    skeleton = open_dataset(f"dlc:{folder}").skeleton()
    assert skeleton == Skeleton(names=PARTS, edges=((0, 1), (1, 2)), swaps=((1, 2),))
    turned = CONFIG.replace("- nose\n- left_ear\n", "- left_ear\n- nose\n", 1)
    (folder / "config.yaml").write_text(turned)
    reader = open_dataset(f"dlc:{folder / 'config.yaml'}")
    assert reader.skeleton().names == ("left_ear", "nose", "right_ear")
    assert reader.items()[0].attributes["keypoints"][0] == [22.75, 24.75, 2]


def test_body_parts_that_only_the_config_has_are_not_marked(folder):
    (folder / "config.yaml").write_text(CONFIG.replace("- right_ear\n", "- right_ear\n- tail\n", 1))
    reader = open_dataset(f"dlc:{folder}")
    assert reader.skeleton().swaps == ((1, 2),)
    assert reader.items()[0].attributes["keypoints"][3] == [0.0, 0.0, 0]


def test_several_animals_are_several_items_and_landmarks_none(tmp_path):
    reader = open_dataset(write_video(tmp_path, dlc_rows(["img1.png"], individuals=TWO)))
    anna, ben = reader.items()
    assert reader.skeleton().names == PARTS
    assert anna.path == ben.path
    assert (anna.attributes["individual"], ben.attributes["individual"]) == TWO
    assert [point[2] for point in anna.attributes["keypoints"]] == [2, 2, 0]
    assert [point[2] for point in ben.attributes["keypoints"]] == [2, 2, 2]
    assert reader.notes() == ("1 annotation left out: they are of no animal but the scene's.",)


def test_a_project_of_several_animals_has_its_own_list_in_the_config(tmp_path):
    spec = write_video(tmp_path, dlc_rows(["img1.png"], individuals=TWO))
    config = "bodyparts: MULTI!\nmultianimalbodyparts: [right_ear, nose, left_ear]\n"
    (tmp_path / "config.yaml").write_text(config)
    assert open_dataset(spec).skeleton().names == ("right_ear", "nose", "left_ear")


@pytest.mark.parametrize(
    ("option", "labels"),
    [(",identity=mouse", ["mouse", "mouse"]), (",identity=individual", ["anna", "ben"])],
)
def test_identities_are_named_or_the_individuals(tmp_path, option, labels):
    spec = write_video(tmp_path, dlc_rows(["img1.png"], individuals=TWO)) + option
    reader = open_dataset(spec)
    assert [item.label for item in reader.items()] == labels
    assert open_dataset(reader.spec).items() == reader.items()


@pytest.mark.parametrize("n_index", [1, 3])
@pytest.mark.parametrize("individuals", [(), TWO])
def test_hdf5_and_csv_with_either_index_say_the_same(tmp_path, n_index, individuals):
    rows = dlc_rows(["img1.png"], individuals=individuals, n_index=n_index)
    spec = write_video(tmp_path, rows)
    from_csv = open_dataset(spec).items()
    path = tmp_path / "labeled-data" / "video" / "CollectedData_anna.csv"
    write_pandas(path.with_suffix(".h5"), rows, n_index=n_index)
    path.unlink()
    assert open_dataset(spec).items() == from_csv
    path.with_suffix(".h5").write_bytes(b"nothing")
    with pytest.raises(InvalidInputError, match="is no readable HDF5 file"):
        open_dataset(spec)


def test_other_hdf5_files_are_refused(tmp_path):
    import h5py

    spec = write_video(tmp_path, dlc_rows(["img1.png"]))
    path = tmp_path / "labeled-data" / "video" / "CollectedData_anna.csv"
    path.unlink()
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file["df_with_missing/table"] = [1, 2]
    with pytest.raises(InvalidInputError, match=r"fixed format of pandas .* Save it as CSV"):
        open_dataset(spec)


def test_the_scorer_of_the_config_decides_between_two(folder):
    other = folder / "labeled-data" / "one" / "CollectedData_ben.csv"
    write_rows(other, dlc_rows(["img0003.png"]))
    assert len(open_dataset(f"dlc:{folder}").items()) == 4
    (folder / "config.yaml").unlink()
    with pytest.raises(InvalidInputError, match=r"labels of one person.*_anna, CollectedData_ben"):
        open_dataset(f"dlc:{folder}")


def test_images_without_marks_give_no_item_and_missing_images_are_listed(folder):
    path = folder / "labeled-data" / "one" / "CollectedData_anna.csv"
    rows = dlc_rows(["img0003.png", "img0012.png", "gone.png"])
    rows[3][3:] = [""] * 6
    write_rows(path, rows)
    report = fake_extract(folder / "f.zarr", [open_dataset(f"dlc:{folder}")])
    assert report.rows == 3
    assert [bad.path for bad in report.bad] == ["labeled-data/one/gone.png"]


def test_half_a_point_and_a_lone_point_are_left_out(tmp_path):
    rows = dlc_rows(["img1.png"])
    rows[3][4] = "nan"
    with pytest.raises(
        InvalidInputError, match=r"must have a marked animal. 1 annotation left out"
    ):
        open_dataset(write_video(tmp_path, rows))
    reader = open_dataset(f"dlc:{tmp_path},box=image")
    assert [point[2] for point in reader.items()[0].attributes["keypoints"]] == [0, 2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3].__setitem__(5, "x"), r"Line 4 of .* must hold numbers or nothing"),
        (lambda rows: rows[3].pop(), r"Line 4 of .* must have 6 numbers.*Got 5"),
        (lambda rows: rows.append(list(rows[3])), r"each image once. Got img1.png twice"),
        (lambda rows: rows.pop(2), "must be a table of DeepLabCut, headed by"),
        (lambda rows: rows[1].pop(), "rows of different lengths"),
    ],
)
def test_a_bad_table_is_named(tmp_path, change, message):
    rows = dlc_rows(["img1.png"])
    change(rows)
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(write_video(tmp_path, rows))


def test_tables_of_other_body_parts_are_refused(folder):
    (folder / "config.yaml").write_text(CONFIG.replace("- nose\n", "- snout\n", 1))
    with pytest.raises(InvalidInputError, match=r"body parts of config.yaml.*Got nose, left_ear"):
        open_dataset(f"dlc:{folder}")
    (folder / "config.yaml").unlink()
    path = folder / "labeled-data" / "two" / "CollectedData_anna.csv"
    path.write_text(path.read_text().replace("nose", "snout"))
    with pytest.raises(InvalidInputError, match=r"which are nose, .*Got snout"):
        open_dataset(f"dlc:{folder}")


def test_what_is_no_project_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"must be a project of DeepLabCut.*Got 0 folders"):
        open_dataset(f"dlc:{tmp_path}")
    with pytest.raises(NotFoundError, match="option of 'dlc' 'split'"):
        open_dataset(f"dlc:{tmp_path},split=1")
    make_dlc(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(InvalidInputError, match="cannot be read as DeepLabCut's"):
        open_dataset(f"dlc:{tmp_path}")
