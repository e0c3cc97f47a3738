"""Prediction on new images, with a backbone of NumPy behind the callable."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import heads
from featstore.errors import InvalidInputError, NotFoundError
from featstore.geometry import place
from featstore.images import decode
from featstore.types import Placement
from heads.model import valid_tokens
from heads.predict import find_images
from heads.runs import read_run, write_record
from tests.fakes import DIM, FakeReader, fake_extract, fake_forward

STORED = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "features.zarr"
    fake_extract(path, [FakeReader(STORED)])
    options = {"queries": 4, "pictures": 0}
    report = heads.train(path, task="depth", steps=120, batch_size=8, device="cpu", options=options)
    return report.path


@pytest.fixture
def photos(tmp_path):
    """Five images that were never stored, one of them in a folder of its own."""
    folder = tmp_path / "photos"
    reader = FakeReader(STORED + 5)
    for item in reader.items()[STORED:]:
        name = "deep/x.npy" if item.path == "00044.npy" else item.path
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(reader.read_image(item))
    return folder


def test_new_images_get_an_array_and_a_picture_each(run, photos, tmp_path):
    report = heads.predict(run, photos, tmp_path / "out", fake_forward, batch_size=2, device="cpu")
    assert report.images == 5
    assert report.bad == {}
    reader = FakeReader()
    for name, path in (("00040", "00040.npy"), ("deep/x", "00044.npy")):
        values = np.load(tmp_path / "out" / f"{name}.npy")
        assert values.dtype == np.float32
        assert values.shape == reader.source_hw
        assert np.abs(values - reader.depth(path)).mean() < 0.3
        assert decode((tmp_path / "out" / f"{name}.png").read_bytes()).shape[0] > 100
    assert len(report.files) == 10


def test_stored_images_get_what_evaluation_sees(run, tmp_path):
    """The same numbers, but for the float16 of the store."""
    reader = FakeReader(STORED)
    (tmp_path / "00000.npy").write_bytes(reader.read_image(reader.items()[0]))
    heads.predict(run, tmp_path / "00000.npy", tmp_path / "out", fake_forward, device="cpu")
    values = np.load(tmp_path / "out" / "00000.npy")
    error = np.sqrt(((values - reader.depth("00000.npy")) ** 2).mean())
    lines = pq.read_table(f"{run}/per_image.parquet").to_pylist()
    line = next(line for line in lines if line["path"] == "00000.npy")
    measured = np.sqrt(line["sum_squared_error"] / line["n_pixels"])
    assert error == pytest.approx(measured, rel=0.02)


def test_bad_images_are_left_out_and_listed(run, photos, tmp_path):
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.png").write_text("no image")
    (photos / "notes.txt").write_text("not looked at")
    report = heads.predict(run, photos, tmp_path / "out", fake_forward, device="cpu")
    assert report.images == 5
    assert set(report.bad) == {str(photos / "empty.jpg"), str(photos / "text.png")}
    assert "0 bytes" in report.bad[str(photos / "empty.jpg")]
    assert report.to_json()["bad_images"] == 2


def test_only_bad_images_are_an_error(run, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"None of 1 images can be used.*0 bytes"):
        heads.predict(run, tmp_path / "a.jpg", tmp_path / "out", fake_forward, device="cpu")
    assert not (tmp_path / "out").exists()


def test_images_of_one_name_do_not_overwrite_each_other(run, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "more")
    reader = FakeReader(1)
    (photos / "00040.png").write_bytes(reader.read_image(reader.items()[0]))
    given = [photos, tmp_path / "more"]
    report = heads.predict(run, given, tmp_path / "out", fake_forward, device="cpu")
    assert report.images == 11
    assert len(set(report.files)) == 22
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 11


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"No image at .*none\.jpg"):
        find_images(tmp_path / "none.jpg")


def test_a_folder_without_images_says_what_is_taken(tmp_path):
    with pytest.raises(InvalidInputError, match=r"No images in .*\.jpg"):
        find_images(tmp_path)


def test_imported_features_cannot_be_predicted_from(run, photos, tmp_path):
    copy = shutil.copytree(run, tmp_path / "foreign")
    write_record(copy, {**read_run(copy).record, "plan": None})
    with pytest.raises(InvalidInputError, match="imported features"):
        heads.predict(copy, photos, tmp_path / "out", fake_forward)


def test_tokens_on_padding_are_marked():
    square = place(
        source_hw=(8, 16), crop=None, input_hw=(16, 16), resize="letterbox", view="plain"
    )
    whole = place(source_hw=(9, 9), crop=None, input_hw=(16, 16), resize="squash", view="plain")
    valid = valid_tokens([square, None], (4, 4), torch.device("cpu"))
    assert valid is not None
    assert valid[0].view(4, 4).any(dim=1).tolist() == [False, True, True, False]
    assert valid[1].all()
    assert valid_tokens([whole, None], (4, 4), torch.device("cpu")) is None


@pytest.mark.parametrize("start", range(16))
def test_an_image_thinner_than_a_token_keeps_one(start):
    thin = Placement(
        source_hw=(4, 64),
        input_hw=(16, 16),
        box=(0, 0, 64, 4),
        dst=(0, start, 16, start + 1),
    )
    valid = valid_tokens([thin], (4, 4), torch.device("cpu"))
    assert valid is not None
    rows = valid[0].view(4, 4).any(dim=1).tolist()
    assert rows == [start // 4 == row for row in range(4)]


def test_padding_never_changes_a_prediction(run):
    """A letterboxed image gives the same whatever stands in its padding, NaN included."""
    model = heads.load(run)
    placement = place(
        source_hw=(8, 16), crop=None, input_hw=(16, 16), resize="letterbox", view="plain"
    )
    tokens = np.random.default_rng(0).standard_normal((1, 16, DIM)).astype(np.float32)
    other = tokens.copy()
    other[0, :4] = np.nan
    other[0, 12:] = 1e3
    expected = model.predict({"norm": tokens}, [placement])
    np.testing.assert_array_equal(model.predict({"norm": other}, [placement]), expected)
