"""Which stored rows are trained on, held out and measured, and where their labels come from.

A pair is one row with one item: equal images share a row, and each item brings its own label. No
part ever cuts a group (scene, video, camera, individual): where a data set names no groups, an
image is its own group; where all of it is one group, contiguous blocks of it are held out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from featstore.errors import InvalidInputError, NotFoundError, invalid, not_found
from featstore.views import PLAIN
from heads.labels import LabelSource, reader_labels, stored_labels

if TYPE_CHECKING:
    from featstore.api import FeatureSet, Store

T = TypeVar("T")

TRAIN, VAL, TEST = "train", "val", "test"
_ROWS_WITH_TAPS = """
select "row"
from ledger
where feature_set = $feature_set and list_contains($taps, tap) and status = 'ok'
group by "row"
having count(distinct tap) = len($taps)
order by "row"
"""
_BLOCKS_HELD_OUT = 3  # blocks of one video that make up the validation part
_SHARED_NAMED = 3  # images named in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One row with one item."""

    row: int
    item: str
    dataset: str
    path: str
    group: str  # unique over data sets; the image itself where the data set names no groups
    image_key: str
    view: str
    label: str | None = None  # the item's own: a class, a species, an individual

    @property
    def key(self) -> tuple[int, str]:
        """What makes a pair one: its row and its item."""
        return (self.row, self.item)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The pairs of each part, and how the validation part was made."""

    train: tuple[Pair, ...]
    val: tuple[Pair, ...]
    test: tuple[Pair, ...]
    validation: Mapping[str, Any]
    messages: tuple[str, ...] = ()

    def parts(self) -> dict[str, tuple[Pair, ...]]:
        """Give the pairs by the name of their part."""
        return {TRAIN: self.train, VAL: self.val, TEST: self.test}

    def without(self, keys: Iterable[tuple[int, str]]) -> Selection:
        """Leave some pairs out of every part."""
        gone = set(keys)
        kept = {
            name: tuple(pair for pair in pairs if pair.key not in gone)
            for name, pairs in self.parts().items()
        }
        return replace(self, train=kept[TRAIN], val=kept[VAL], test=kept[TEST])

    def to_table(self) -> pa.Table:
        """Give all parts as one table: part and the fields of a pair."""
        lines = [
            {"part": name, **asdict(pair)} for name, pairs in self.parts().items() for pair in pairs
        ]
        return pa.Table.from_pylist(lines, schema=SCHEMA)


SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("row", pa.int64()),
        ("item", pa.string()),
        ("dataset", pa.string()),
        ("path", pa.string()),
        ("group", pa.string()),
        ("image_key", pa.string()),
        ("view", pa.string()),
        ("label", pa.string()),
    ]
)


def pairs_from_table(table: pa.Table, part: str) -> tuple[Pair, ...]:
    """Read the pairs of one part back from `Selection.to_table`."""
    lines = [line for line in table.to_pylist() if line.pop("part") == part]
    return tuple(Pair(**line) for line in lines)


def select(
    store: Store,
    features: FeatureSet,
    *,
    taps: Sequence[str],
    kind: str,
    split: str = TRAIN,
    val_fraction: float = 0.1,
    seed: int = 0,
    data: str | None = None,
    holdout: Collection[str] = (),
) -> tuple[Selection, LabelSource]:
    """Choose the pairs to train on, to hold out and to measure.

    A split named "val" is the validation part where there is one. Otherwise whole groups of
    `split` are held out, chosen by `seed`. Only plain views are held out or measured.

    Images that show one of the labels `holdout` are in no part, whatever else they show.

    Args:
        store: Store.
        features: Feature set whose rows are used.
        taps: Taps that a row must have, all of them.
        kind: Kind of label that the task learns from.
        split: Split to train on.
        val_fraction: Part of `split` to hold out, from 0 (nothing) to below 1.
        seed: Chooses the groups.
        data: Data set ``FORMAT:PATH`` whose labels are joined to stored rows by image, in place
            of the labels in the store.
        holdout: Labels of items (species, individuals) to leave out.

    Raises:
        InvalidInputError: The split is empty or nothing in it has such labels.
        NotFoundError: No item has a label of `holdout`.
    """
    if not 0 <= val_fraction < 1:
        raise invalid("val_fraction", val_fraction, "from 0 to below 1")
    if split == TEST:
        raise invalid("split", split, "a split to train on; test is what the head is measured on")
    labels, by_split = labelled_pairs(store, features, taps=taps, kind=kind, data=data)
    by_split = without_labels(by_split, holdout)
    train = _required(by_split, split, kind)
    test = plain_pairs(by_split.get(TEST, ()))
    train, val, validation = _hold_out(train, by_split, split, val_fraction, seed)
    selection = Selection(
        train=train,
        val=val,
        test=test,
        validation=validation,
        messages=(*_validation_messages(validation), *_overlap_messages(train, val, test)),
    )
    return selection, labels


def select_split(
    store: Store,
    features: FeatureSet,
    *,
    taps: Sequence[str],
    kind: str,
    split: str,
    data: str | None = None,
) -> tuple[tuple[Pair, ...], LabelSource]:
    """Choose the pairs of one split, in one view each, to measure a head on them.

    Raises:
        InvalidInputError: The split is empty or nothing in it has such labels.
    """
    labels, by_split = labelled_pairs(store, features, taps=taps, kind=kind, data=data)
    return plain_pairs(_required(by_split, split, kind)), labels


def select_items(
    store: Store,
    features: FeatureSet,
    *,
    taps: Sequence[str],
    kind: str,
    items: Collection[tuple[str, str]],
    data: str | None = None,
) -> tuple[tuple[Pair, ...], LabelSource]:
    """Choose the pairs of some items, by data set and item, in one view each.

    Raises:
        InvalidInputError: None of them has features and a label here.
    """
    labels, by_split = labelled_pairs(store, features, taps=taps, kind=kind, data=data)
    every = {pair.key: pair for pairs in by_split.values() for pair in plain_pairs(pairs)}
    found = tuple(every[key] for key in sorted(every))
    kept = tuple(pair for pair in found if (pair.dataset, pair.item) in items)
    if not kept:
        hint = "Extract the same images for both."
        expected = "a feature set that has the images of the run"
        raise invalid("feature_set", features.name, expected, hint=hint)
    return kept, labels


def labelled_pairs(
    store: Store, features: FeatureSet, *, taps: Sequence[str], kind: str, data: str | None
) -> tuple[LabelSource, dict[str, list[Pair]]]:
    """List the pairs that have all taps and a label, by split, ordered by row and item.

    Raises:
        InvalidInputError: The feature set has no rows, or none of them has taps and label.
    """
    has_taps = rows_with_taps(store, features, taps)
    lines = store.samples(feature_set=features.key).to_pylist()
    lines = [line for line in lines if line["row"] in has_taps]
    if not lines:
        raise InvalidInputError(
            f"Feature set {features.key} has no committed rows of {', '.join(taps)}. "
            "Run `featstore extract` first."
        )
    if data is not None:
        labels, lines = reader_labels(data, lines, kind=kind)
    else:
        labels, lines = stored_labels(store, lines, kind=kind)
    by_split: dict[str, list[Pair]] = {}
    for line in sorted(lines, key=lambda each: (each["row"], each["item"])):
        by_split.setdefault(line["split"], []).append(_pair(line))
    return labels, by_split


def without_labels(
    by_split: Mapping[str, Sequence[Pair]], labels: Collection[str]
) -> dict[str, list[Pair]]:
    """Leave out every image that shows an item of one of `labels`.

    Raises:
        NotFoundError: No item has such a label; the message offers the nearest.
    """
    known = {pair.label for pairs in by_split.values() for pair in pairs if pair.label is not None}
    for label in labels:
        if label not in known:
            raise not_found("label to hold out", label, known)
    every = (pair for pairs in by_split.values() for pair in pairs)
    gone = {pair.image_key for pair in every if pair.label in labels}
    return {
        name: [pair for pair in pairs if pair.image_key not in gone]
        for name, pairs in by_split.items()
    }


def labels_of(pairs: Iterable[Pair]) -> tuple[str, ...]:
    """List the labels that some pairs have, each once, by name."""
    return tuple(sorted({pair.label for pair in pairs if pair.label is not None}))


def rows_with_taps(store: Store, features: FeatureSet, taps: Sequence[str]) -> set[int]:
    """List the stored rows that have all of some taps."""
    chosen = {"feature_set": features.key, "taps": list(taps)}
    return set(store.sql(_ROWS_WITH_TAPS, chosen)["row"].to_pylist())


def evenly(things: Sequence[T], count: int) -> list[T]:
    """Choose at most `count` of some things, evenly spread, the first one included."""
    if len(things) <= count:
        return list(things)
    return [things[index * len(things) // count] for index in range(count)]


def _pair(line: Mapping[str, Any]) -> Pair:
    group = line["group_id"]
    return Pair(
        row=line["row"],
        item=line["item"],
        dataset=line["dataset"],
        path=line["path"],
        group=f"image {line['image_key']}" if group is None else f"{line['dataset']}/{group}",
        image_key=line["image_key"],
        view=line["view"],
        label=line["label"],
    )


def plain_pairs(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Keep the pairs that are held out or measured: those of plain views."""
    return tuple(pair for pair in pairs if pair.view == PLAIN)


def _required(by_split: Mapping[str, Sequence[Pair]], split: str, kind: str) -> tuple[Pair, ...]:
    pairs = by_split.get(split, ())
    if not pairs:
        known = ", ".join(f"{name} ({len(each)})" for name, each in sorted(by_split.items()))
        raise NotFoundError(
            f"No rows with {kind} labels in split {split!r}. Splits that have some: {known}."
        )
    return tuple(pairs)


def _hold_out(
    train: tuple[Pair, ...],
    by_split: Mapping[str, Sequence[Pair]],
    split: str,
    val_fraction: float,
    seed: int,
) -> tuple[tuple[Pair, ...], tuple[Pair, ...], dict[str, Any]]:
    """Give the pairs to train on, those held out, and how the two were parted."""
    if split != VAL and by_split.get(VAL):
        val = plain_pairs(by_split[VAL])
        return train, val, {"how": "split", "split": VAL, "images": len(val)}
    if val_fraction == 0:
        return train, (), {"how": "none", "images": 0}
    if len({(pair.dataset, pair.path) for pair in train}) < 2:
        hint = "Use --val-fraction 0."
        raise invalid("split", split, "of at least two images, one to hold out", hint=hint)
    # Views that are stored or not must not change what is held out, so images are counted.
    sizes = Counter({(pair.dataset, pair.item): pair.group for pair in train}.values())
    if len(sizes) > 1:
        chosen = _choose_groups(sizes, val_fraction, seed)
        is_held = [pair.group in chosen for pair in train]
        how: dict[str, Any] = {"how": "groups", "groups": len(chosen), "of_groups": len(sizes)}
    else:
        paths = sorted({pair.path for pair in train})
        blocks = _choose_blocks(paths, val_fraction, seed)
        images = {path for block in blocks for path in block}
        is_held = [pair.path in images for pair in train]
        how = {"how": "blocks", "blocks": len(blocks), "of_groups": 1}
    val = plain_pairs(pair for pair, held in zip(train, is_held, strict=True) if held)
    kept = tuple(pair for pair, held in zip(train, is_held, strict=True) if not held)
    return kept, val, {**how, "fraction": val_fraction, "seed": seed, "images": len(val)}


def _choose_groups(sizes: Mapping[str, int], fraction: float, seed: int) -> set[str]:
    """Choose whole groups at random until `fraction` is reached, avoiding those far too large."""
    total = sum(sizes.values())
    names = sorted(sizes)
    order = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    chosen: set[str] = set()
    count = 0
    for name in order:
        is_too_much = count + sizes[name] > min(1.5 * fraction * total, total - 1)
        if count < fraction * total and not is_too_much:
            chosen.add(name)
            count += sizes[name]
    # Where every group alone is more than was asked for, the smallest costs least.
    return chosen or {min(order, key=lambda name: sizes[name])}


def _choose_blocks(paths: Sequence[str], fraction: float, seed: int) -> list[Sequence[str]]:
    """Choose contiguous blocks of the sorted paths, so that few neighbouring frames are parted."""
    n_blocks = max(2, min(len(paths), round(_BLOCKS_HELD_OUT / fraction)))
    edges = [len(paths) * block // n_blocks for block in range(n_blocks + 1)]
    n_chosen = max(1, min(n_blocks - 1, round(fraction * n_blocks)))
    chosen = np.random.default_rng(seed).permutation(n_blocks)[:n_chosen]
    return [paths[edges[block] : edges[block + 1]] for block in chosen]


def _validation_messages(validation: Mapping[str, Any]) -> list[str]:
    images = validation["images"]
    if validation["how"] == "blocks":
        text = (
            f"All training images are one group, so contiguous blocks of it are held out "
            f"({images} images); their borders still touch what is trained on."
        )
        return [text]
    if validation["how"] == "groups":
        groups = f"{validation['groups']} of {validation['of_groups']} groups"
        return [f"Held out for validation: {groups} ({images} images)."]
    return []


def _overlap_messages(
    train: Sequence[Pair], val: Sequence[Pair], test: Sequence[Pair]
) -> list[str]:
    """Warn of images that are both learned from and measured on."""
    seen = {pair.image_key: pair.path for pair in (*train, *val)}
    shared = sorted({seen[pair.image_key] for pair in test if pair.image_key in seen})
    if not shared:
        return []
    named = ", ".join(shared[:_SHARED_NAMED])
    return [f"{len(shared)} test images are also trained on ({named}): their numbers flatter."]
