"""Which of the stored views of an image an epoch of training shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from featstore.commands import extract_command
from featstore.errors import InvalidInputError
from featstore.order import draw_keys
from featstore.views import HFLIP, PLAIN
from heads.loop import AUTO, ONE
from heads.selection import Pair, Selection, plain_pairs

if TYPE_CHECKING:
    from featstore.api import FeatureSet

_CHOICE = 2  # sets these random numbers apart from those of the order of an epoch


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


def rows_of_epoch(choices: Sequence[tuple[int, ...]], *, seed: int, epoch: int) -> list[int]:
    """Choose one row of each entry, by `seed` and `epoch`: ascending."""
    keys = draw_keys(len(choices), seed, epoch, _CHOICE).tolist()
    return sorted(rows[key % len(rows)] for rows, key in zip(choices, keys, strict=True))
