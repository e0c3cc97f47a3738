"""Which rows are learned from, held out and measured."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import InvalidInputError, NotFoundError
from featstore.hashing import image_key
from featstore.items import item_id
from featstore.types import Item
from heads import labels as label_sources
from heads.selection import labels_of, pairs_from_table, select, select_split

FEATURES = SimpleNamespace(key="f00d")


def line(number, **changes):
    """One line of the samples view."""
    return {
        "row": number,
        "item": f"item{number:04d}",
        "dataset": "set",
        "split": "train",
        "path": f"{number:04d}.png",
        "label": None,
        "image_key": f"key{number}",
        "height": 4,
        "width": 4,
        "crop": "",
        "view": "plain",
        "feature_set": "f00d",
        "group_id": None,
        "timestamp": None,
        **changes,
    }


class FakeStore:
    """Answers like a store whose every item has a depth label, or only those named."""

    def __init__(self, lines, labelled=None, rows=None):
        self.lines = lines
        self.labelled = labelled
        self.rows = [one["row"] for one in lines] if rows is None else rows

    def samples(self, where=None, *, feature_set=None):
        return pa.Table.from_pylist(self.lines)

    def sql(self, query, params=None):
        if "from ledger" in query:
            assert params == {"feature_set": "f00d", "taps": ["norm"]}
            return pa.table({"row": pa.array(self.rows, pa.int64())})
        if "unnest" in query:
            return pa.table({"kind": ["classes"]})
        assert params == {"kind": "depth"}
        named = {(one["dataset"], one["item"]) for one in self.lines}
        chosen = sorted(named if self.labelled is None else self.labelled)
        return pa.table({"dataset": [d for d, _ in chosen], "item": [i for _, i in chosen]})


def choose(lines, **options):
    return select(FakeStore(lines), FEATURES, taps=["norm"], kind="depth", **options)[0]


def rows(pairs):
    return [pair.row for pair in pairs]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_the_validation_part_never_cuts_a_group(sizes, fraction, seed):
    names = [f"scene{number}" for number, size in enumerate(sizes) for _ in range(size)]
    lines = [line(number, group_id=name) for number, name in enumerate(names)]
    found = choose(lines, val_fraction=fraction, seed=seed)
    learned, held = ({pair.group for pair in part} for part in (found.train, found.val))
    assert not learned & held
    assert learned
    assert held
    assert sorted(rows(found.train) + rows(found.val)) == list(range(len(lines)))


def test_about_the_asked_fraction_is_held_out():
    found = choose([line(number) for number in range(200)], val_fraction=0.1)
    assert len(found.val) == 20
    assert found.validation == {
        "how": "groups",
        "groups": 20,
        "of_groups": 200,
        "fraction": 0.1,
        "seed": 0,
        "images": 20,
    }


def test_a_group_that_is_far_too_large_is_not_held_out():
    lines = [line(number, group_id="big" if number < 90 else f"s{number}") for number in range(100)]
    for seed in range(10):
        assert "set/big" not in {pair.group for pair in choose(lines, seed=seed).val}


def test_the_seed_chooses_the_groups_and_nothing_else_does():
    lines = [line(number) for number in range(100)]
    assert choose(lines, seed=1) == choose(lines[::-1], seed=1)
    assert rows(choose(lines, seed=1).val) != rows(choose(lines, seed=2).val)


def test_one_video_is_cut_into_contiguous_blocks_and_that_is_said():
    lines = [line(number, group_id="video") for number in range(300)]
    found = choose(lines, val_fraction=0.1)
    held = rows(found.val)
    n_borders = sum(1 for here, after in pairwise(held) if after != here + 1)
    assert len(held) == 30
    assert n_borders <= 2
    assert found.validation["how"] == "blocks"
    assert any("contiguous blocks" in message for message in found.messages)


def test_groups_of_one_name_in_two_data_sets_are_two_groups():
    lines = [line(n, group_id="scene", dataset="a" if n < 5 else "b") for n in range(10)]
    assert Counter(pair.group for pair in choose(lines).train) in (
        {"a/scene": 5},
        {"b/scene": 5},
    )


def test_a_val_split_is_used_where_there_is_one():
    lines = [line(n, split="val" if n % 3 == 0 else "train") for n in range(12)]
    found = choose(lines)
    assert rows(found.val) == [0, 3, 6, 9]
    assert found.validation == {"how": "split", "split": "val", "images": 4}


def test_nothing_is_held_out_if_that_is_asked_for():
    found = choose([line(number) for number in range(5)], val_fraction=0)
    assert found.val == ()
    assert len(found.train) == 5


def test_mirrored_views_are_learned_from_but_never_measured_or_held_out():
    lines = []
    for number in range(20):
        split = "test" if number < 4 else "train"
        for place, view in enumerate(("plain", "hflip")):
            item = f"item{number:04d}"
            key = f"key{number}"
            lines.append(line(2 * number + place, view=view, split=split, item=item, image_key=key))
    found = choose(lines)
    assert {pair.view for pair in found.train} == {"plain", "hflip"}
    assert {pair.view for pair in (*found.val, *found.test)} == {"plain"}
    assert not {pair.item for pair in found.val} & {pair.item for pair in found.train}


def test_views_of_some_images_do_not_change_what_is_held_out():
    plain = [line(number, group_id=f"scene{number // 4}") for number in range(40)]
    more = [
        {**one, "row": 100 + 9 * one["row"] + n, "view": f"crop:0:{n}"}
        for one in plain[:12]
        for n in range(9)
    ]
    for seed in range(10):
        without, found = (
            choose(lines, seed=seed, val_fraction=0.2) for lines in (plain, plain + more)
        )
        assert found.val == without.val
        assert found.validation == without.validation


def test_only_items_with_a_label_are_taken():
    lines = [line(number) for number in range(10)]
    labelled = {("set", f"item{number:04d}") for number in range(0, 10, 2)}
    store = FakeStore(lines, labelled)
    found, _ = select(store, FEATURES, taps=["norm"], kind="depth", val_fraction=0)
    assert rows(found.train) == [0, 2, 4, 6, 8]


def test_only_rows_that_have_the_taps_are_taken():
    store = FakeStore([line(number) for number in range(10)], rows=[1, 4, 7])
    found, _ = select(store, FEATURES, taps=["norm"], kind="depth", val_fraction=0)
    assert rows(found.train) == [1, 4, 7]


def test_images_that_are_learned_from_and_measured_are_named():
    lines = [line(n) for n in range(10)] + [line(99, split="test", image_key="key3", path="t.png")]
    assert any("0003.png" in message for message in choose(lines).messages)
    assert choose(lines[:-1]).messages == ("Held out for validation: 1 of 10 groups (1 images).",)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "no committed rows"),
        ([line(1)], {"split": "trian"}, r"in split 'trian'. Splits that have some: train \(1\)"),
        ([line(1)], {"split": "test"}, "what the head is measured on"),
        ([line(1)], {"val_fraction": 1.0}, "from 0 to below 1"),
        ([line(1)], {}, "at least two images"),
    ],
)
def test_what_cannot_be_chosen_is_said(lines, options, message):
    with pytest.raises((InvalidInputError, NotFoundError), match=message):
        choose(lines, **options)


def test_a_store_without_such_labels_says_how_to_get_some():
    with pytest.raises(
        InvalidInputError, match=r"No stored row has depth labels.*they have: classes.*--data"
    ):
        select(FakeStore([line(1)], labelled=set()), FEATURES, taps=["norm"], kind="depth")


def test_pairs_survive_their_table():
    found = choose([line(n, split="test" if n < 3 else "train") for n in range(12)])
    table = found.to_table()
    for part, pairs in found.parts().items():
        assert pairs_from_table(table, part) == pairs


class OutsideReader:
    """A data set outside of the store, some of whose images are stored."""

    name = "outside"
    format = "outside.v1"
    spec = "outside:here"

    def __init__(self, splits=("train",), kinds=("depth",)):
        self.found = [
            Item(path=f"o{n}.png", splits=splits, label_kinds=kinds, group=f"g{n}")
            for n in range(6)
        ]

    def items(self):
        return self.found

    def read_image(self, item):
        return item.path.encode()


def stored_outside(numbers):
    return [line(n, image_key=image_key(f"o{n}.png".encode()), split="all") for n in numbers]


def join(monkeypatch, reader, lines, **options):
    monkeypatch.setattr(label_sources, "open_dataset", lambda text: reader)
    store = FakeStore(lines)
    return select_split(
        store, FEATURES, taps=["norm"], kind="depth", data="outside:here", **options
    )


def test_labels_of_another_data_set_join_stored_rows_by_image(monkeypatch):
    reader = OutsideReader()
    pairs, labels = join(monkeypatch, reader, stored_outside([1, 4, 5]), split="train")
    assert rows(pairs) == [1, 4, 5]
    assert [pair.item for pair in pairs] == [item_id("outside", reader.found[n]) for n in (1, 4, 5)]
    assert [pair.group for pair in pairs] == ["outside/g1", "outside/g4", "outside/g5"]
    assert labels.spec == "outside:here"
    assert labels.format_of("outside") == "outside.v1"


def test_items_without_a_split_take_that_of_the_stored_row(monkeypatch):
    pairs, _ = join(monkeypatch, OutsideReader(splits=()), stored_outside([2, 3]), split="all")
    assert rows(pairs) == [2, 3]


@pytest.mark.parametrize(
    ("reader", "lines", "message"),
    [
        (OutsideReader(kinds=()), stored_outside([1]), "has no depth labels"),
        (OutsideReader(), [line(1)], "None of the 6 labelled images of outside:here is stored"),
    ],
)
def test_labels_that_join_nothing_are_refused(monkeypatch, reader, lines, message):
    with pytest.raises(InvalidInputError, match=message):
        join(monkeypatch, reader, lines, split="train")


def test_images_of_a_held_out_label_are_in_no_part_whatever_else_they_show():
    labels = ["fox", "dog", "fox", "cat", "dog", "cat"]
    lines = [line(n, label=label) for n, label in enumerate(labels)]
    lines += [line(6, label="dog", image_key="key0"), line(7, label="fox", split="test")]
    lines += [line(8, label="cat", split="test"), line(9, split="test", image_key="key7")]
    store = FakeStore(lines)
    given = {"taps": ["norm"], "kind": "depth", "val_fraction": 0}
    selection, _ = select(store, FEATURES, **given, holdout=["fox"])
    # Row 6 shows a dog, in an image that shows a fox; row 9 is an image of one, too.
    assert [pair.row for pair in selection.train] == [1, 3, 4, 5]
    assert [pair.row for pair in selection.test] == [8]
    assert labels_of(selection.train) == ("cat", "dog")
    whole, _ = select(store, FEATURES, **given)
    assert labels_of((*whole.train, *whole.test)) == ("cat", "dog", "fox")
    with pytest.raises(NotFoundError, match=r"'foxx'\. Did you mean 'fox'.* Known: cat, dog, fox"):
        select(store, FEATURES, **given, holdout=["cat", "foxx"])


def test_labels_are_kept_with_the_pairs_of_a_run_and_older_runs_have_none():
    selection, _ = select(
        FakeStore([line(0, label="fox"), line(1)]), FEATURES, taps=["norm"], kind="depth"
    )
    table = selection.to_table()
    both = (*pairs_from_table(table, "train"), *pairs_from_table(table, "val"))
    assert {pair.row: pair.label for pair in both} == {0: "fox", 1: None}
    older = table.drop_columns(["label"])
    assert {pair.label for pair in pairs_from_table(older, "train")} == {None}
