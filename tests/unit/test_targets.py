"""Supervision that is prepared once, checked when it is opened and made anew when it is damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from featstore.errors import InvalidInputError
from featstore.geometry import place
from featstore.types import Label
from heads.selection import Pair
from heads.targets import TargetJob, prepare_targets
from tests.fakes import npy


class FakeLabels:
    """Depth maps by item; one may be missing or of another size."""

    kind = "depth"
    spec = None

    def __init__(self, maps):
        self.maps = maps
        self.state = "one"

    def iterate(self, dataset, items):
        for item in sorted(items, reverse=True):  # any order will do
            if item in self.maps:
                yield item, Label(kind="depth", encoding="npy", data=npy(self.maps[item]))

    def version(self, dataset):
        return self.state

    def format_of(self, dataset):
        return "fake.v1"

    def image(self, dataset, item):
        return None


class Mean:
    """A task that keeps the mean of a label, and the left column of its input frame."""

    def __init__(self):
        self.n_calls = 0

    def prepare(self, values, valid, placement, output_hw):
        self.n_calls += 1
        left = values[:, -1] if placement.is_flipped else values[:, 0]
        return {"mean": np.float32(values[valid].mean()), "left": left.astype(np.float64)}


def pair(row, item, view="plain"):
    return Pair(
        row=row,
        item=item,
        dataset="set",
        path=f"{item}.png",
        group="g",
        image_key=f"k{item}",
        view=view,
    )


def job(maps, pairs, **changes):
    placements = {
        one.row: place(source_hw=(4, 6), crop=None, input_hw=(8, 8), resize="squash", view=one.view)
        for one in pairs
    }
    values = {
        "task": "mean.v1",
        "settings": {"crop": "none"},
        "output_hw": (8, 8),
        "feature_set": "f00d",
        "pairs": pairs,
        "placements": placements,
        "labels": FakeLabels(maps),
    }
    return TargetJob(**{**values, **changes})


@pytest.fixture
def maps():
    return {
        name: np.arange(24, dtype=np.float32).reshape(4, 6) + 10 * n for n, name in enumerate("abc")
    }


@pytest.fixture
def pairs():
    return [pair(3, "a"), pair(1, "b"), pair(2, "c")]


def test_each_pair_finds_its_own_target(tmp_path, maps, pairs):
    targets = prepare_targets(tmp_path, job(maps, pairs), Mean())
    found = targets.batch([one.key for one in pairs])
    assert found["mean"].tolist() == [maps[name].mean() for name in "abc"]
    assert found["left"].shape == (3, 4)


def test_a_mirrored_view_gets_its_own_target(tmp_path, maps):
    both = [pair(0, "a"), pair(1, "a", view="hflip")]
    targets = prepare_targets(tmp_path, job(maps, both), Mean())
    left = targets.batch([one.key for one in both])["left"]
    assert left[0].tolist() == maps["a"][:, 0].tolist()
    assert left[1].tolist() == maps["a"][:, -1].tolist()


def test_the_second_opening_prepares_nothing(tmp_path, maps, pairs):
    first, second = Mean(), Mean()
    made = prepare_targets(tmp_path, job(maps, pairs), first)
    again = prepare_targets(tmp_path, job(maps, pairs[::-1]), second)
    assert (first.n_calls, second.n_calls) == (3, 0)
    assert isinstance(again.arrays["mean"], np.memmap)
    np.testing.assert_array_equal(made.arrays["left"], again.arrays["left"])


def flip_a_bit(folder):
    path = folder / "left.npy"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut_short(folder):
    path = folder / "mean.npy"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_the_description(folder):
    (folder / "targets.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        cut_short,
        spoil_the_description,
        shutil.rmtree,
        lambda folder: (folder / "left.npy").unlink(),
    ],
)
def test_damaged_or_deleted_targets_are_made_anew(tmp_path, maps, pairs, damage):
    made = prepare_targets(tmp_path, job(maps, pairs), Mean())
    expected = {name: np.array(array) for name, array in made.arrays.items()}
    damage(tmp_path / job(maps, pairs).key())
    task = Mean()
    again = prepare_targets(tmp_path, job(maps, pairs), task)
    assert task.n_calls == 3
    for name, array in expected.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_everything_that_decides_a_number_is_in_the_key(maps, pairs):
    base = job(maps, pairs)
    moved = {
        row: replace(placement, dst=(0, 0, 8, 7)) for row, placement in base.placements.items()
    }
    edited = FakeLabels(maps)
    edited.state = "two"
    others = [
        replace(base, task="mean.v2"),
        replace(base, settings={"crop": "eigen"}),
        replace(base, output_hw=(8, 9)),
        replace(base, feature_set="beef"),
        replace(base, pairs=pairs[:2]),
        replace(base, placements=moved),
        replace(base, labels=edited),
    ]
    keys = {one.key() for one in (base, *others)}
    assert len(keys) == 1 + len(others)
    assert replace(base, pairs=[*pairs, pairs[0]]).key() == base.key()


def test_labels_that_cannot_be_used_are_left_out_with_a_reason(tmp_path, maps, pairs):
    maps["a"] = maps["a"][:3]
    maps["b"] = np.full_like(maps["b"], np.nan)
    targets = prepare_targets(tmp_path, job(maps, [*pairs, pair(4, "d")]), Mean())
    assert set(targets.slots) == {(2, "c")}
    assert targets.left_out == {
        (3, "a"): "Its depth label is 3x6 and the image is 4x6.",
        (1, "b"): "Its depth label holds no valid value.",
        (4, "d"): "Its depth label cannot be read.",
    }


def test_without_a_single_usable_label_the_reason_is_said(tmp_path, maps, pairs):
    short = {name: values[:2] for name, values in maps.items()}
    with pytest.raises(InvalidInputError, match=r"None of the 3 depth labels can be used.*2x6"):
        prepare_targets(tmp_path, job(short, pairs), Mean())


def test_an_interrupted_preparation_leaves_nothing_and_is_repeated(tmp_path, maps, pairs):
    class Interrupted(Mean):
        def prepare(self, values, valid, placement, output_hw):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_targets(tmp_path, job(maps, pairs), Interrupted())
    assert [path.name for path in tmp_path.iterdir() if path.name != ".locks"] == []
    leftover = tmp_path / f"{job(maps, pairs).key()}.12345.partial"
    leftover.mkdir()  # what a kill would leave
    assert len(prepare_targets(tmp_path, job(maps, pairs), Mean()).slots) == 3
    assert not leftover.exists()


def test_targets_open_without_this_library(tmp_path, maps, pairs):
    prepare_targets(tmp_path, job(maps, pairs), Mean())
    folder = tmp_path / job(maps, pairs).key()
    about = json.loads((folder / "targets.json").read_text())
    means = np.load(folder / "mean.npy")
    assert {item: means[slot] for _, item, slot in about["slots"]} == {
        name: values.mean() for name, values in maps.items()
    }
