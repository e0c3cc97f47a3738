import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError
from featstore.images import decode_label
from tests.datasets import make_manifest, save_depth, save_image


def write(root, *lines, name="table.csv"):
    (root / name).write_text("\n".join(lines) + "\n")
    return f"manifest:{root / name}"


def test_every_column_finds_its_place(tmp_path):
    first = open_dataset(make_manifest(tmp_path)).items()[0]
    assert first.path == "images/0.png"
    assert first.splits == ("train",)
    assert first.label == "cat"
    assert first.group == "train_scene"
    assert first.timestamp == "2024-05-01T12:00:00"
    assert first.crop == (1.0, 2.0, 20.0, 22.5)
    assert first.attributes == {"iso": 100, "note": "fine"}
    assert first.label_kinds == ("depth",)


def test_only_the_path_is_needed_and_empty_cells_are_no_values(tmp_path):
    text = write(tmp_path, "path,label,x0,depth", "a.png,,,", "b.png,dog,,")
    items = open_dataset(text).items()
    assert [(i.path, i.splits, i.label, i.crop) for i in items] == [
        ("a.png", (), None, None),
        ("b.png", (), "dog", None),
    ]
    assert items[0].label_kinds == ()


def test_several_splits_and_a_crop_in_one_cell(tmp_path):
    text = write(tmp_path, "path,split,crop", 'a.png,train|val,"1,2,3.5,4"')
    (item,) = open_dataset(text).items()
    assert item.splits == ("train", "val")
    assert item.crop == (1.0, 2.0, 3.5, 4.0)


def test_one_image_may_have_several_crops_but_not_the_same_twice(tmp_path):
    lines = ["path,x0,y0,x1,y1", "a.png,0,0,5,5", "a.png,5,0,9,5"]
    assert len(open_dataset(write(tmp_path, *lines)).items()) == 2
    with pytest.raises(InvalidInputError, match=r"Line 4 .*'a.png' is there before \(Line 2"):
        open_dataset(write(tmp_path, *lines, "a.png,0,0,5,5"))


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("path,x0,y0,x1,y1", "a.png,1,2,oops,4", r"Line 2 of .*column 'x1'.*'oops'"),
        ("path,x0,y0,x1,y1", "a.png,1,2,,4", r"Line 2 of .*column 'x1'.*Got nothing"),
        ("path,x0,y0,x1,y1", "a.png,9,2,3,4", r"column 'x1'.*x1 > x0"),
        ("path,crop", 'a.png,"1,2,3"', r"column 'crop'.*four numbers"),
        ("path,crop,x0", 'a.png,"1,2,3,4",1', r"column 'crop'.*empty where x0"),
        ("path,split", "a.png,train|", r"column 'split'"),
        ("path,timestamp", "a.png,yesterday", r"column 'timestamp'.*ISO 8601"),
        ("path,label", ",dog", r"Line 2 of .*column 'path'.*Got nothing"),
        ("path,label", "../a.png,dog", r"column 'path'.*root=DIR"),
        ("path,label", "/elsewhere/a.png,dog", r"column 'path'.*root=DIR"),
        ("path,label", "a.png", r"Line 2 of .* must have 2 fields.*Got 1"),
        ("path,label", "a.png,dog,3", r"Line 2 of .* must have 2 fields.*Got 3"),
        ("image,label", "a.png,dog", r"must have a column 'path'. Its columns are image, label"),
        ("path,path", "a.png,b.png", r"has the column 'path' twice"),
        ("path,label", 'a.png,"dog', r"cannot be read as CSV"),
    ],
)
def test_a_bad_cell_is_named_by_line_and_column(tmp_path, header, line, message):
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(write(tmp_path, header, line))


def test_a_table_without_rows_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="lists no image"):
        open_dataset(write(tmp_path, "path,label"))
    with pytest.raises(InvalidInputError, match=r"must have a column 'path'. Its columns are none"):
        open_dataset(write(tmp_path))
    with pytest.raises(InvalidInputError, match=r"must be a .csv"):
        open_dataset(write(tmp_path, "path", "a.png", name="table.xlsx"))
    with pytest.raises(InvalidInputError, match="is a folder"):
        open_dataset(f"manifest:{tmp_path}")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InvalidInputError, match="cannot be read as Parquet"):
        open_dataset(f"manifest:{tmp_path}/broken.parquet")
    (tmp_path / "latin.csv").write_bytes("path,label\na.png,caf\xe9".encode("latin-1"))
    with pytest.raises(InvalidInputError, match="cannot be read as CSV"):
        open_dataset(f"manifest:{tmp_path}/latin.csv")


def test_a_group_in_two_splits_is_refused(tmp_path):
    lines = ["path,split,group", "a.png,train,kitchen", "b.png,test,kitchen"]
    with pytest.raises(InvalidInputError, match=r"group 'kitchen' is in the splits test and train"):
        open_dataset(write(tmp_path, *lines))


def test_parquet_gives_the_same_items_as_csv(tmp_path):
    lines = ["path,split,label,x0,y0,x1,y1,score", "a.png,train,dog,1,2,3,4,0.5", "b.png,,,,,,,"]
    text = write(tmp_path, *lines)
    table = pa.table(
        {
            "path": ["a.png", "b.png"],
            "split": ["train", None],
            "label": ["dog", None],
            **{name: [float(n), None] for n, name in enumerate(("x0", "y0", "x1", "y1"), 1)},
            "score": [0.5, None],
        }
    )
    pq.write_table(table, tmp_path / "table.parquet")
    assert list(open_dataset(f"manifest:{tmp_path}/table.parquet").items()) == list(
        open_dataset(text).items()
    )


def test_parquet_lists_and_times_are_understood_and_errors_name_the_row(tmp_path):
    time = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
    columns = {
        "path": ["a.png", "b.png"],
        "split": [["train", "val"], ["test"]],
        "timestamp": [time, time],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    first = open_dataset(f"manifest:{tmp_path}/t.parquet").items()[0]
    assert first.splits == ("train", "val")
    assert first.timestamp == "2024-05-01T12:00:00+00:00"
    pq.write_table(pa.table({"path": ["a.png", None]}), tmp_path / "bad.parquet")
    with pytest.raises(InvalidInputError, match=r"Row 1 of .*column 'path'"):
        open_dataset(f"manifest:{tmp_path}/bad.parquet")


def test_depth_in_png_is_millimetres_unless_told_otherwise(tmp_path):
    save_image(tmp_path / "a.png")
    numbers = save_depth(tmp_path / "d.png")
    np.save(tmp_path / "m.npy", np.full((24, 32), 2.5, np.float32))
    save_image(tmp_path / "b.png")
    text = write(tmp_path, "path,depth", "a.png,d.png", "b.png,m.npy")
    reader = open_dataset(text)
    millimetres, metres = (
        decode_label(reader.read_label(item, "depth"))[0] for item in reader.items()
    )
    np.testing.assert_allclose(millimetres, numbers / 1000, rtol=1e-6)
    assert (metres == 2.5).all()
    scaled = open_dataset(f"{text},depth_scale=0.5")
    values, _ = decode_label(scaled.read_label(scaled.items()[0], "depth"))
    np.testing.assert_allclose(values, numbers * 0.5)
    assert open_dataset(scaled.spec).spec == scaled.spec
    with pytest.raises(InvalidInputError, match="positive number of metres"):
        open_dataset(f"{text},depth_scale=0")


def test_classes_have_a_void_number_and_other_kinds_are_named(tmp_path):
    save_image(tmp_path / "a.png")
    classes = np.full((24, 32), 3, np.uint8)
    classes[0] = 255
    Image.fromarray(classes).save(tmp_path / "c.png")
    text = write(tmp_path, "path,classes,label:saliency", "a.png,c.png,c.png")
    reader = open_dataset(text)
    (item,) = reader.items()
    assert item.label_kinds == ("classes", "saliency")
    values, valid = decode_label(reader.read_label(item, "classes"))
    assert values.dtype == np.int32
    assert not valid[0].any()
    assert decode_label(reader.read_label(item, "saliency"))[1].all()


@pytest.mark.parametrize(
    ("file", "message"),
    [("absent.png", r"absent.png cannot be read"), ("d.tif", r"must be a .png or .npy file")],
)
def test_a_label_file_that_is_missing_or_of_another_kind_is_named(tmp_path, file, message):
    save_image(tmp_path / "a.png")
    reader = open_dataset(write(tmp_path, "path,depth", f"a.png,{file}"))
    with pytest.raises(BadImageError, match=message):
        reader.read_label(reader.items()[0], "depth")


def test_images_may_lie_elsewhere(tmp_path):
    save_image(tmp_path / "pictures" / "a.png")
    (tmp_path / "tables").mkdir()
    text = write(tmp_path / "tables", "path", f"{tmp_path}/pictures/a.png")
    reader = open_dataset(f"{text},root={tmp_path / 'pictures'}")
    (item,) = reader.items()
    assert item.path == "a.png"
    assert reader.read_image(item) == (tmp_path / "pictures" / "a.png").read_bytes()
