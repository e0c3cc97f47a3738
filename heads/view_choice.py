"""Which of the stored views of an image an epoch of training shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from featstore.commands import extract_command
from featstore.errors import InvalidInputError
from featstore.order import draw_keys
from featstore.views import HFLIP, PLAIN
from heads.loop import AUTO, ONE
from heads.selection import Pair, Selection, plain_pairs

if TYPE_CHECKING:
    from featstore.api import FeatureSet

# Set these random numbers apart from those of the order of an epoch.
_CHOICE, _BALANCE = 2, 3


def settle_views(
    wanted: str, selection: Selection, features: FeatureSet
) -> tuple[str, Selection, list[str]]:
    """Decide what "auto" means here, and keep the pairs that are learned from then.

    Only the training part has other views than the plain one.

    Args:
        wanted: One of `loop.VIEWS`.
        selection: Pairs of all views that are stored.
        features: Their feature set.

    Returns:
        "one", "all" or "plain" ("plain" where nothing else is stored), the selection, messages.

    Raises:
        InvalidInputError: Other views are asked for and not stored, or the plain one is not.
    """
    others = sorted({pair.view for pair in selection.train} - {PLAIN})
    if wanted == AUTO:
        if not others:
            return PLAIN, selection, []
        text = (
            f"Besides the plain view, {', '.join(others)} of the training images are stored: an "
            "epoch shows one view of each image. Choose with --set views=one, all or plain."
        )
        return ONE, selection, [text]
    if wanted == PLAIN:
        return PLAIN, _plain_only(selection), []
    if not others:
        command = "" if features.is_foreign else _extract_flips(features)
        raise InvalidInputError(
            f"views={wanted} needs other views of the training images than the plain one, and none "
            f"are stored. {command}"
        )
    return wanted, selection, []


def _extract_flips(features: FeatureSet) -> str:
    command = extract_command(features.folder, taps=list(features.taps), views=[HFLIP])
    return f"Add some: `{command}`."


def _plain_only(selection: Selection) -> Selection:
    train = plain_pairs(selection.train)
    if not train:
        raise InvalidInputError(
            "views=plain leaves nothing to learn from: no plain view of a training image is "
            "stored. Use views=all."
        )
    return replace(selection, train=train)


def choices_of(pairs: Sequence[Pair], views: str) -> list[tuple[int, ...]]:
    """List what an epoch shows: of each entry, rows ascending, one row.

    With "one", the views of an image are one entry; else each row is one.

    Args:
        pairs: Of the training part.
        views: As settled.
    """
    first_item: dict[int, tuple[str, str]] = {}
    for pair in pairs:
        item = (pair.dataset, pair.item)
        first_item[pair.row] = min(first_item.get(pair.row, item), item)
    choices: dict[object, list[int]] = {}
    for row in sorted(first_item):
        # All views of an image belong to its items, so the first item tells which belong together.
        choices.setdefault(first_item[row] if views == ONE else row, []).append(row)
    return [tuple(rows) for rows in choices.values()]


def labels_of_choices(choices: Sequence[tuple[int, ...]], pairs: Sequence[Pair]) -> list[str]:
    """Give the label of each entry of `choices_of`: that of its first item, or ""."""
    first: dict[int, Pair] = {}
    for pair in sorted(pairs, key=lambda each: (each.dataset, each.item)):
        first.setdefault(pair.row, pair)
    return [first[rows[0]].label or "" for rows in choices]


def balanced(labels: Sequence[str], *, seed: int, epoch: int) -> list[int]:
    """Draw as many entries as there are, of each label equally many, by `seed` and `epoch`.

    No entry of a label is drawn once more before all of them were drawn. `labels` has one an
    entry; the numbers of entries come ascending.
    """
    members: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        members.setdefault(label, []).append(number)
    names = sorted(members)
    keys = draw_keys(len(labels) + len(names), seed, epoch, _BALANCE)
    # What the labels cannot share evenly goes to some of them, others in each epoch.
    extra = set(np.argsort(keys[len(labels) :], kind="stable")[: len(labels) % len(names)].tolist())
    drawn: list[int] = []
    for place, name in enumerate(names):
        quota = len(labels) // len(names) + (place in extra)
        of_label = np.array(members[name])
        whole, rest = divmod(quota, len(of_label))
        drawn += of_label.tolist() * whole
        drawn += of_label[np.argsort(keys[of_label], kind="stable")[:rest]].tolist()
    return sorted(drawn)


def rows_of_epoch(choices: Sequence[tuple[int, ...]], *, seed: int, epoch: int) -> list[int]:
    """Choose one row of each entry, by `seed` and `epoch`: ascending."""
    keys = draw_keys(len(choices), seed, epoch, _CHOICE).tolist()
    return sorted(rows[key % len(rows)] for rows, key in zip(choices, keys, strict=True))
