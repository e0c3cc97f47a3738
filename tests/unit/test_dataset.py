"""The map-style data set, under a DataLoader with and without workers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import featstore
from featstore.dataset import FeatureDataset
from featstore.errors import InvalidInputError, NotFoundError
from tests.fakes import FakeReader, fake_extract

TAPS = ("norm", "norm/prefix", "norm.mean")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "s.zarr"
    fake_extract(path, [FakeReader(20)])
    return featstore.open(path).feature_set()


def test_an_item_is_a_dict_of_tensors(features):
    data = FeatureDataset(features, TAPS, rows=[4, 9, 4])
    assert len(data) == 3
    item = data[1]
    assert set(item) == {*TAPS, "row"}
    assert item["row"] == 9
    for tap in TAPS:
        assert item[tap].dtype == torch.float16
        np.testing.assert_array_equal(item[tap].numpy(), features.read(tap, [9])[0])
    assert data[-1]["row"] == 4
    with pytest.raises(IndexError):
        data[3]


def test_where_and_dtype_are_those_of_a_stream(features):
    data = FeatureDataset(features, ["norm"], where="split = 'test'", dtype="float32")
    (batch,) = features.stream(["norm"], where="split = 'test'", dtype="float32")
    assert data.rows.tolist() == batch.rows.tolist()
    assert data[0]["norm"].dtype == torch.float32
    np.testing.assert_array_equal(data[0]["norm"].numpy(), batch["norm"][0])


def test_a_pickle_holds_no_open_file(features):
    data = FeatureDataset(features, ["norm"], rows=range(10))
    first = data[3]["norm"]
    copy = pickle.loads(pickle.dumps(data))
    assert copy._readers == {}
    assert torch.equal(copy[3]["norm"], first)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rows": [1], "where": "true"}, InvalidInputError),
        ({"dtype": "float16"}, InvalidInputError),
        ({"taps": "norm"}, InvalidInputError),
        ({"taps": []}, InvalidInputError),
        ({"taps": ["nrom"]}, NotFoundError),
        ({"rows": [99]}, NotFoundError),
    ],
)
def test_wrong_arguments_are_refused(features, options, error):
    with pytest.raises(error):
        FeatureDataset(features, **{"taps": ["norm"], **options})


def test_two_spawned_workers_give_the_same_as_none(features):
    data = FeatureDataset(features, ["norm", "norm.mean"], rows=[7, 3, 3, 19, 0, 11])
    alone = list(DataLoader(data, batch_size=2))
    together = list(DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="spawn"))
    assert len(alone) == len(together) == 3
    for first, second in zip(alone, together, strict=True):
        assert first["row"].tolist() == second["row"].tolist()
        assert torch.equal(first["norm"], second["norm"])
        assert torch.equal(first["norm.mean"], second["norm.mean"])
