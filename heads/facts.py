"""What labels tell a task: names of classes, a skeleton, identities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from featstore.errors import InvalidInputError, invalid
from heads.keypoint_labels import KEYPOINTS, keypoint_record
from heads.labels import CLASS, LabelSource
from heads.selection import Pair, Selection, labels_of
from heads.tasks import LabelFacts

T = TypeVar("T")


def training_facts(selection: Selection, labels: LabelSource) -> LabelFacts:
    """Tell what is learned from and measured on.

    Raises:
        InvalidInputError: Two data sets name other classes or mark other keypoints.
    """
    pairs = [pair for part in selection.parts().values() for pair in part]
    if labels.kind == KEYPOINTS:
        skeleton = measured_facts(pairs, labels).skeleton
        return LabelFacts(skeleton=skeleton, identities=labels_of(_marked(selection.train, labels)))
    if labels.kind in ("classes", CLASS):
        names = _common(pairs, labels.class_names, "data sets of the same classes")
        return LabelFacts(class_names=names)
    return LabelFacts()


def _marked(pairs: Sequence[Pair], labels: LabelSource) -> list[Pair]:
    """Keep the pairs with keypoints: a token that nothing trains would be noise in their mean."""
    found: set[tuple[str, str]] = set()
    for dataset in sorted({pair.dataset for pair in pairs}):
        items = sorted({pair.item for pair in pairs if pair.dataset == dataset})
        for item, label in labels.iterate(dataset, items):
            try:
                keypoint_record(label.data.decode())
            except InvalidInputError:  # left out when targets are prepared, with its reason
                continue
            found.add((dataset, item))
    return [pair for pair in pairs if (pair.dataset, pair.item) in found]


def measured_facts(pairs: Iterable[Pair], labels: LabelSource) -> LabelFacts:
    """Tell the keypoints of what is measured.

    Raises:
        InvalidInputError: Two data sets mark other keypoints.
    """
    if labels.kind != KEYPOINTS:
        return LabelFacts()
    return LabelFacts(skeleton=_common(pairs, labels.skeleton, "data sets of the same keypoints"))


def _common(pairs: Iterable[Pair], value_of: Callable[[str], T], expected: str) -> T:
    """Give what all data sets agree on."""
    known = {name: value_of(name) for name in sorted({pair.dataset for pair in pairs})}
    first, *others = known.values()
    if any(other != first for other in others):
        raise invalid("data", " and ".join(known), expected, hint="Use one of them.")
    return first
