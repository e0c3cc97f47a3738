"""Learning from views: one an epoch or all, what is held out, and that nothing changes without."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

import featstore
import heads
from featstore.errors import InvalidInputError
from featstore.plan import RunOptions
from heads.runs import list_runs, read_run
from heads.selection import Pair
from heads.view_choice import balanced, choices_of, labels_of_choices, rows_of_epoch
from tests.fakes import FakeReader, fake_extract

SMALL = {"queries": 4, "checks": 2, "pictures": 0}
VIEWS = ("hflip", "crops:1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One store without other views than the plain one, and the same with some added."""
    folder = tmp_path_factory.mktemp("views")
    fake_extract(folder / "plain.zarr", [FakeReader(20)])
    shutil.copytree(folder / "plain.zarr", folder / "views.zarr")
    options = RunOptions(views=VIEWS, n_threads=1)
    fake_extract(folder / "views.zarr", [FakeReader(20)], options=options)
    return folder


@pytest.fixture
def plain_store(made, tmp_path):
    return shutil.copytree(made / "plain.zarr", tmp_path / "plain.zarr")


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made / "views.zarr", tmp_path / "views.zarr")


def learn(store, views=None, **changes):
    options = dict(SMALL) if views is None else {**SMALL, "views": views}
    chosen = {"task": "depth", "steps": 7, "batch_size": 4, "device": "cpu", **changes}
    return heads.train(store, options=options, **chosen)


def weights(report):
    return safetensors.numpy.load_file(Path(report.path) / "head.safetensors")


def same(one, other):
    return set(one) == set(other) and all(np.array_equal(one[name], other[name]) for name in one)


def pairs_of(report):
    return pq.read_table(Path(report.path) / "pairs.parquet").to_pylist()


def shown(pairs, view="plain"):
    """Pairs of rows 0, 1, ... with items and views as they are given."""
    return [
        Pair(
            row=row,
            item=item,
            dataset="d",
            path=item,
            group=item,
            image_key=item[0],
            view=view,
        )
        for row, item in pairs
    ]


def test_an_epoch_shows_one_row_of_each_image_and_in_time_every_row():
    pairs = shown([(0, "a"), (1, "b"), (1, "b2"), (4, "a"), (5, "b"), (5, "b2"), (7, "a")])
    choices = choices_of(pairs, "one")
    assert choices == [(0, 4, 7), (1, 5)]
    seen = Counter()
    for epoch in range(300):
        rows = rows_of_epoch(choices, seed=0, epoch=epoch)
        assert rows == sorted(rows)
        assert [len(set(rows) & set(choice)) for choice in choices] == [1, 1]
        assert rows == rows_of_epoch(choices, seed=0, epoch=epoch)
        seen.update(rows)
    assert all(80 < seen[row] < 120 for row in (0, 4, 7))
    assert all(125 < seen[row] < 175 for row in (1, 5))
    drawn = [[rows_of_epoch(choices, seed=seed, epoch=e) for e in range(9)] for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_all_views_are_rows_of_an_epoch_each():
    choices = choices_of(shown([(4, "a"), (0, "a"), (1, "b")]), "all")
    assert rows_of_epoch(choices, seed=0, epoch=3) == [0, 1, 4]


def test_a_balanced_epoch_shows_each_label_equally_often_and_its_images_in_turn():
    labels = ["cat"] * 6 + ["dog"] * 20 + ["fox"] * 2
    seen, extra = Counter(), Counter()
    for epoch in range(60):
        drawn = balanced(labels, seed=0, epoch=epoch)
        assert drawn == sorted(drawn)
        assert len(drawn) == len(labels)
        counts = Counter(labels[number] for number in drawn)
        assert sorted(counts.values()) == [9, 9, 10]
        extra.update(label for label, n in counts.items() if n == 10)
        # A dog at most once, a cat once or twice, a fox four or five times.
        times = Counter(drawn)
        assert all(times[n] in (1, 2) for n in range(6))
        assert all(times[n] <= 1 for n in range(6, 26))
        assert all(times[n] in (4, 5) for n in (26, 27))
        seen.update(drawn)
        assert drawn == balanced(labels, seed=0, epoch=epoch)
    assert all(15 < seen[n] < 45 for n in range(6, 26))
    assert all(8 < extra[label] < 32 for label in ("cat", "dog", "fox"))
    assert balanced(labels, seed=1, epoch=0) != balanced(labels, seed=0, epoch=0)
    assert balanced(["", ""], seed=0, epoch=0) == [0, 1]


def test_an_entry_has_the_label_of_its_first_item():
    pairs = [
        replace(pair, label=label)
        for pair, label in zip(
            shown([(0, "b"), (0, "a"), (1, "c"), (4, "a"), (4, "b")]),
            ["fox", "dog", None, "dog", "fox"],
            strict=True,
        )
    ]
    choices = choices_of(pairs, "one")
    assert choices == [(0, 4), (1,)]
    assert labels_of_choices(choices, pairs) == ["dog", ""]


def test_without_other_views_the_choice_changes_nothing(plain_store, monkeypatch):
    report = learn(plain_store)
    assert read_run(Path(report.path)).record["options"]["loop"]["views"] == "plain"

    def all_rows(choices, *, seed, epoch):
        return sorted(row for rows in choices for row in rows)

    monkeypatch.setattr("heads.supply.rows_of_epoch", all_rows)  # as it was before there were views
    assert same(weights(learn(plain_store)), weights(report))


def test_views_that_are_not_used_change_no_bit(plain_store, store):
    one, other = learn(plain_store), learn(store, "plain")
    assert same(weights(one), weights(other))
    assert one.metrics == other.metrics


def test_the_held_out_part_is_the_same_images_with_views_and_without(plain_store, store):
    parts = []
    for each, views in ((plain_store, None), (store, "one"), (store, "all")):
        pairs = pairs_of(learn(each, views, steps=1, val_fraction=0.3))
        held = {pair["item"] for pair in pairs if pair["part"] != "train"}
        assert not held & {pair["item"] for pair in pairs if pair["part"] == "train"}
        assert {pair["view"] for pair in pairs if pair["part"] != "train"} == {"plain"}
        parts.append({(pair["part"], pair["item"]) for pair in pairs})
    assert parts[0] == parts[1] == parts[2]


def test_each_choice_learns_something_else_and_one_is_taken_where_none_is_named(store):
    told = []
    by_default = learn(store, progress=lambda each: told.append(each.message))
    assert any("crop:0:0, hflip of the training images are stored" in text for text in told)
    assert read_run(Path(by_default.path)).record["options"]["loop"]["views"] == "one"
    assert same(weights(by_default), weights(learn(store, "one")))
    others = [learn(store, views) for views in ("all", "plain")]
    assert not any(same(weights(by_default), weights(other)) for other in others)
    assert not same(*map(weights, others))
    record = read_run(Path(others[0].path)).record
    assert record["images"]["train"] == len(
        {p["path"] for p in pairs_of(others[0]) if p["part"] == "train"}
    )
    assert (
        heads.evaluate(others[0].path, split="train", device="cpu").images
        == record["images"]["train"]
    )


def test_an_epoch_counts_images_with_one_and_rows_with_all(store):
    steps = {}
    for views in ("one", "all", "plain"):
        report = learn(store, views, steps=None, epochs=1)
        steps[views] = read_run(Path(report.path)).record["steps"]
    assert steps["one"] == steps["plain"]
    assert steps["all"] >= 3 * steps["one"]


def test_swept_choices_end_as_they_do_alone(store):
    configs = [
        {"task": "depth", "steps": 7, "batch_size": 4, "options": {**SMALL, "views": views}}
        for views in ("one", "all", "plain")
    ]
    found = heads.train_many(store, configs, device="cpu")
    assert found.n_passes == 3
    for config, report in zip(configs, found.runs, strict=True):
        assert same(weights(report), weights(learn(store, config["options"]["views"])))


@pytest.mark.parametrize("views", ["one", "all"])
def test_a_run_on_views_that_was_stopped_ends_as_if_it_was_not(store, views):
    class Stop:
        def __call__(self, report):
            if report.stage == "train" and report.done == 5:  # in the second epoch
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(store, views, progress=Stop())
    resumed = heads.train(store, resume="@last", device="cpu")
    assert same(weights(resumed), weights(learn(store, views)))


def test_a_crop_without_a_label_is_left_out_by_its_name(tmp_path):
    class Corner(FakeReader):
        """Depth is known in one corner only, which crops may miss."""

        def read_label(self, item, kind):
            from tests.fakes import npy

            depth = np.zeros(self.source_hw, np.float32)
            depth[:3, :3] = 2
            label = super().read_label(item, kind)
            return label.__class__(kind=kind, encoding="npy", data=npy(depth), invalid=0.0)

    path = tmp_path / "s.zarr"
    fake_extract(path, [Corner(20)], options=RunOptions(views=("crops:2",), n_threads=1))
    report = learn(path, steps=2)
    assert report.left_out
    assert all(" (crop:0:" in name for name in report.left_out)
    assert report.images == 4


def test_views_that_are_not_stored_are_refused_with_the_command_that_adds_them(plain_store):
    with pytest.raises(
        InvalidInputError, match=r"views=all needs .*`featstore extract .*--views hflip"
    ):
        learn(plain_store, "all")
    with pytest.raises(InvalidInputError, match="one of auto, one, all, plain"):
        learn(plain_store, "two")
    assert list_runs(plain_store) == []
    assert featstore.open(plain_store).feature_set().key
