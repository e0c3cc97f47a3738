"""What every registered reader promises; a new one is tested by being registered."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from featstore.datasets import READERS, open_dataset
from featstore.errors import NotFoundError
from featstore.images import decode, decode_label, probe
from featstore.types import FeatureReader, Reader
from tests.animals import ANIMAL_MAKERS
from tests.datasets import MAKERS


@pytest.fixture(params=list(READERS))
def text(request, tmp_path):
    return {**MAKERS, **ANIMAL_MAKERS}[request.param](tmp_path)


@pytest.fixture
def reader(text):
    return open_dataset(text)


def test_it_keeps_the_protocol(reader):
    assert isinstance(reader, Reader)
    assert reader.format in READERS
    assert reader.name


def test_items_are_there_and_told_apart(reader):
    items = reader.items()
    assert len(items) >= 4
    assert len({(item.path, item.crop, item.instance) for item in items}) == len(items)
    for item in items:
        assert not item.path.startswith("/")
        assert "\\" not in item.path


def test_attributes_are_json(reader):
    for item in reader.items():
        json.dumps(dict(item.attributes), allow_nan=False)


def test_its_spec_reopens_the_same_items_and_images(reader, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = open_dataset(reader.spec)
    assert list(again.items()) == list(reader.items())
    assert again.spec == reader.spec
    item = reader.items()[1]
    assert again.read_image(item) == reader.read_image(item)


def test_a_relative_path_becomes_absolute_in_the_spec(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    relative = text.replace(f"{tmp_path}/", "").replace(str(tmp_path), ".")
    spec = open_dataset(relative).spec
    assert open_dataset(text).spec in (spec, spec.replace("/.,", ",").removesuffix("/."))


def test_the_given_name_is_taken(text):
    assert open_dataset(f"mine={text}").name == "mine"


def test_every_image_decodes_and_is_the_same_from_threads(reader):
    items = reader.items()
    serial = [reader.read_image(item) for item in items]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reader.read_image, items)) == serial
    if not isinstance(reader, FeatureReader):
        for data in serial:
            assert decode(data).shape == (*probe(data), 3)


def test_every_label_is_of_its_images_size_and_has_values(reader):
    for item in reader.items():
        for kind in item.label_kinds:
            label = reader.read_label(item, kind)
            values, valid = decode_label(label)
            assert label.kind == kind
            assert values.shape == valid.shape == probe(reader.read_image(item))
            assert valid.any()


def test_an_unknown_label_kind_is_refused(reader):
    with pytest.raises(NotFoundError, match="label kind 'smell'"):
        reader.read_label(reader.items()[0], "smell")


def test_an_unknown_option_is_refused_with_the_known_ones(text):
    with pytest.raises(NotFoundError, match=r"option of .* 'colour'"):
        open_dataset(f"{text},colour=red")


def test_features_have_the_shape_of_their_tap(reader):
    if not isinstance(reader, FeatureReader):
        pytest.skip("gives images, not features")
    (tap,) = reader.taps()
    for item in reader.items():
        features = reader.read_features(item)
        shapes = dict(zip([tap.tap, f"{tap.tap}/prefix"], tap.arrays.values(), strict=False))
        assert {name: array.shape for name, array in features.items()} == shapes
        assert all(array.dtype == np.float32 for array in features.values())
