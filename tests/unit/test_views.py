"""Views of an image: what they are called, what they show, and that they are rows like others."""

from __future__ import annotations

import numpy as np
import pytest

from featstore.api import open as open_store
from featstore.cleanup import gc
from featstore.errors import InvalidInputError
from featstore.extract import extract
from featstore.geometry import place
from featstore.index import refresh
from featstore.plan import RunOptions
from featstore.store import open_folder
from featstore.verify import verify
from featstore.views import (
    JITTER,
    MIN_CROP_AREA,
    check_view,
    jittered,
    parse_views,
    region_of,
)
from tests.fakes import FakeReader, content, fake_extract, fake_plan

WHOLE = (0.0, 0.0, 48.0, 32.0)


def with_views(*views):
    return RunOptions(views=views, n_threads=1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.zarr"


@pytest.mark.parametrize(
    ("wanted", "views"),
    [
        ((), ("plain",)),
        (("hflip",), ("plain", "hflip")),
        (("hflip", "plain"), ("plain", "hflip")),
        (("crops:2",), ("plain", "crop:0:0", "crop:0:1")),
        (("crops:1,seed=7",), ("plain", "crop:7:0")),
        (("hflip,crops:2,seed=3,plain",), ("plain", "hflip", "crop:3:0", "crop:3:1")),
        (("crops:2", "crops:1,seed=0"), ("plain", "crop:0:0", "crop:0:1")),
        (("crop:5:9",), ("plain", "crop:5:9")),
        (("jitter:2",), ("plain", "jitter:0:0", "jitter:0:1")),
        (("jitter:1,seed=3,amount=0.25,hflip",), ("plain", "jitter:3:0:0.25", "hflip")),
        (("jitter:1,amount=0.1", "jitter:0:0"), ("plain", "jitter:0:0")),
    ],
)
def test_views_are_listed_once_after_the_plain_one(wanted, views):
    assert parse_views(wanted) == views
    assert RunOptions(views=wanted).views == views
    assert parse_views(views) == views


@pytest.mark.parametrize(
    "wanted",
    [
        *("", "up", "crops", "crops:0", "crops:2,seed=-1", "hflip,", "crops:2,size=3"),
        *("jitter", "jitter:0", "jitter:1,amount=1.5", "jitter:1,amount=0", "jitter:0:0:0.1"),
    ],
)
def test_another_view_is_refused(wanted):
    with pytest.raises(InvalidInputError, match=r"plain, hflip, crops:N.*Try hflip"):
        parse_views([wanted])


@pytest.mark.parametrize("view", ["crops:2", "", "HFLIP", "crop:1", "crop:01:2", "jitter:0:0:0.1"])
def test_a_name_of_no_single_view_is_refused(view):
    with pytest.raises(InvalidInputError, match="crop:SEED:N"):
        check_view(view)
    with pytest.raises(InvalidInputError, match="crop:SEED:N"):
        place(source_hw=(4, 4), crop=None, input_hw=(4, 4), resize="squash", view=view)


def test_crops_lie_inside_keep_the_aspect_and_are_spread_over_sizes_and_places():
    whole = (10.5, 20.0, 210.5, 120.0)
    boxes = np.array(
        [region_of(f"crop:0:{n}", f"key{k}", whole) for n in range(20) for k in range(20)]
    )
    size = boxes[:, 2:] - boxes[:, :2]
    area = size.prod(axis=1) / (200 * 100)
    assert (boxes[:, :2] >= whole[:2]).all()
    assert (boxes[:, 2:] <= whole[2:]).all()
    np.testing.assert_allclose(size[:, 0] / size[:, 1], 2, rtol=0.02)
    assert area.min() >= MIN_CROP_AREA - 0.01
    assert area.min() < 0.3
    assert area.max() > 0.95
    assert abs(area.mean() - 0.625) < 0.04
    assert len(np.unique(boxes, axis=0)) > 380
    # From one border to the other, and as often left as right.
    slack = 200 - size[:, 0]
    at = (boxes[:, 0] - whole[0])[slack > 20] / slack[slack > 20]
    assert at.min() < 0.02
    assert at.max() > 0.98
    assert abs(at.mean() - 0.5) < 0.05
    assert ((boxes - [whole[0], whole[1], whole[0], whole[1]]) % 1 == 0).all()


def test_a_crop_depends_on_its_seed_its_number_and_its_image_only():
    one = region_of("crop:0:1", "key", WHOLE)
    assert region_of("crop:0:1", "key", WHOLE) == one
    others = [("crop:1:0", "key"), ("crop:0:2", "key"), ("crop:0:1", "other")]
    assert one not in [region_of(view, key, WHOLE) for view, key in others]
    assert region_of("hflip", "key", WHOLE) == region_of("plain", "key", WHOLE) == WHOLE
    # A literal: stores hold these numbers, so no library may change them.
    assert one == (6.0, 1.0, 48.0, 29.0)


def test_a_jittered_crop_is_spread_around_the_box_by_the_amount():
    crop, image_hw = (400.0, 300.0, 500.0, 400.0), (1000, 2000)
    for view, amount in (("jitter:0:0", JITTER), ("jitter:0:0:0.3", 0.3)):
        boxes = np.array([jittered(view, f"key{k}", crop, image_hw) for k in range(400)])
        side = boxes[:, 2:] - boxes[:, :2]
        np.testing.assert_allclose(side[:, 0], side[:, 1], atol=0.011)
        for off in (side[:, 0] / 100 - 1, *((boxes[:, :2] + boxes[:, 2:]) / 200 - [4.5, 3.5]).T):
            assert abs(off.mean()) < 0.1 * amount
            assert 0.97 * amount < np.abs(off).max() < 1.001 * amount
    one = jittered("jitter:0:1", "key", crop, image_hw)
    others = [("jitter:1:1", "key"), ("jitter:0:2", "key"), ("jitter:0:1", "other")]
    assert one not in [jittered(view, key, crop, image_hw) for view, key in others]
    assert one != jittered("jitter:0:1", "key", (400.0, 300.0, 500.0, 401.0), image_hw)
    # A literal: stores hold these numbers, so no library may change them.
    assert one == (395.11, 309.52, 493.47, 407.88)


def test_a_jittered_crop_stays_in_the_image_as_the_crop_itself_does():
    crops = [((0.0, 0.0, 90.0, 90.0), (100, 200)), ((-20.0, 5.0, 120.0, 145.0), (150, 100))]
    for crop, (height, width) in crops:
        for key in range(100):
            x0, y0, x1, y1 = jittered("jitter:0:0:0.3", str(key), crop, (height, width))
            for start, stop, length in ((x0, x1, width), (y0, y1, height)):
                low, high = (0, length) if stop - start <= length else (length - stop + start, 0)
                assert min(low, high) - 0.011 <= start <= max(low, high) + 0.011


def test_the_smallest_images_have_crops():
    for size in (1, 2, 3):
        x0, y0, x1, y1 = region_of("crop:0:0", "key", (0.0, 0.0, float(size), 1.0))
        assert 0 <= x0 < x1 <= size
        assert (y0, y1) == (0, 1)


def test_the_plain_view_is_stored_too_and_a_later_view_costs_only_its_own_rows(path):
    reader = FakeReader(6)
    first = fake_extract(path, [reader], options=with_views("hflip"))
    assert (first.rows, first.new_rows) == (12, 12)
    before = content(path)
    more = fake_extract(path, [reader], options=with_views("crops:2"))
    assert (more.rows, more.new_rows, more.reused_rows) == (18, 12, 6)
    after = content(path)
    assert all(after[name] == before[name] for name in before if "zarr.json" not in name)
    again = fake_extract(path, [reader], options=with_views("hflip", "crops:3"))
    assert (again.new_rows, again.reused_rows) == (6, 24)
    before = content(path)
    same = fake_extract(path, [reader], options=with_views("crops:3", "hflip"))
    assert (same.new_rows, same.reused_rows) == (0, 30)
    assert content(path) == before


def test_views_in_any_order_give_the_same_bytes(tmp_path):
    for name, views in (("a", ("hflip", "crops:2")), ("b", ("crops:2", "hflip", "plain"))):
        fake_extract(tmp_path / name, [FakeReader(6)], options=with_views(*views))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_sql_sees_the_view_and_the_geometry_of_each_row(path):
    fake_extract(path, [FakeReader(5)], options=with_views("hflip", "crops:2,seed=4"))
    refresh(path)
    store = open_store(path)
    found = store.sql(
        'select "view", count(*) as n from samples group by "view" order by "view"', {}
    )
    assert found.to_pylist() == [
        {"view": view, "n": 5} for view in ("crop:4:0", "crop:4:1", "hflip", "plain")
    ]
    features = store.feature_set()
    for line in store.sql("select * from rows order by row", {}).to_pylist():
        placement = features.placements([line["row"]])[line["row"]]
        assert placement.box == region_of(line["view"], line["image_key"], WHOLE)
        assert placement.is_flipped == (line["view"] == "hflip") == line["is_flipped"]
        assert placement.dst == (0, 0, 16, 16)


class Boxed(FakeReader):
    def items(self):
        return [
            item.__class__(path=item.path, splits=item.splits, crop=(8.0, 4.0, 40.0, 30.5))
            for item in super().items()
        ]


def test_jittered_boxes_are_rows_of_their_own(path):
    report = fake_extract(path, [Boxed(3)], options=with_views("jitter:2"))
    assert report.rows == 9
    lines = open_folder(path).feature_set(fake_plan().key()).assignments().to_pylist()
    for line in lines:
        box = tuple(line[f"box_{c}"] for c in ("x0", "y0", "x1", "y1"))
        crop = (8.0, 4.0, 40.0, 30.5)
        if line["view"] == "plain":
            assert box == crop
        else:
            assert box == jittered(line["view"], line["image_key"], crop, (32, 48)) != crop


def test_jittered_boxes_of_whole_images_are_refused_before_anything_is_stored(path):
    with pytest.raises(InvalidInputError, match=r"moves the crop around a box.*whole image"):
        fake_extract(path, [FakeReader(2)], options=with_views("jitter:1"))
    assert not path.exists() or not open_folder(path).feature_set_keys()


def test_a_crop_of_a_cropped_item_lies_inside_the_item(path):
    fake_extract(path, [Boxed(5)], options=with_views("crops:3"))
    folder = open_folder(path).feature_set(fake_plan().key())
    boxes = {line["view"]: [] for line in folder.assignments().to_pylist()}
    for line in folder.assignments().to_pylist():
        boxes[line["view"]].append([line[f"box_{c}"] for c in ("x0", "y0", "x1", "y1")])
    assert boxes["plain"] == [[8.0, 4.0, 40.0, 30.5]] * 5
    crops = np.array([box for view, each in boxes.items() if view != "plain" for box in each])
    assert (crops[:, :2] >= [8, 4]).all()
    assert (crops[:, 2:] <= [40, 30.5]).all()
    assert len(np.unique(crops, axis=0)) > 10


def test_a_damaged_view_is_found_and_gc_keeps_the_good_ones(path):
    fake_extract(path, [FakeReader(6)])
    fake_extract(path, [FakeReader(6)], options=with_views("hflip"))
    assert not verify(path).problems
    before = content(path)
    gc(path)
    assert content(path) == before
    folder = open_folder(path).feature_set(fake_plan().key())
    second = folder.shard_file("norm", "patch", 1)  # the flipped rows
    data = bytearray(second.read_bytes())
    data[3] ^= 16
    second.write_bytes(data)
    assert {problem.shard for problem in verify(path).problems} == {1}


def test_imported_features_have_one_view_only(tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros((2, 4, 3), np.float32))
    (tmp_path / "tokens.csv").write_text("path\na.png\nb.png\n")
    data = f"features:{tmp_path}/tokens.npy,tap=norm,grid=2x2"
    with pytest.raises(InvalidInputError, match="no image to show otherwise, so hflip"):
        extract(tmp_path / "s.zarr", data=[data], options=with_views("hflip"))
    assert not (tmp_path / "s.zarr").exists()
