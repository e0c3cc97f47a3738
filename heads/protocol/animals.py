"""The marked instances of every identity, over all splits, as a protocol deals with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from featstore.errors import invalid
from featstore.views import is_jitter
from heads.identity_images import Instance, read_instances
from heads.labels import LabelSource
from heads.selection import Pair, labelled_pairs, plain_pairs

if TYPE_CHECKING:
    from featstore.api import FeatureSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Animals:
    """Instances that can be learned from and measured, by identity, in an order of their own."""

    instances: Mapping[str, tuple[Instance, ...]]
    labels: LabelSource
    left_out: Mapping[str, str]  # path to reason
    # The same instances in crops around worse boxes, by view and then by data set and item.
    jittered: Mapping[str, Mapping[tuple[str, str], Instance]] = field(default_factory=dict)

    def pairs(self, identity: str) -> list[Pair]:
        """Give the pairs of an identity, in the order of its instances."""
        return [one.pair for one in self.instances[identity]]

    def n_images(self) -> dict[str, int]:
        """Count the images of every identity."""
        return {
            name: len({one.pair.image_key for one in own}) for name, own in self.instances.items()
        }

    def jitters(self, identity: str, numbers: Sequence[int]) -> dict[str, tuple[Instance, ...]]:
        """Give some instances of an identity in every view of worse boxes that has all of them."""
        every = self.pairs(identity)
        asked = [(every[number].dataset, every[number].item) for number in numbers]
        return {
            view: tuple(shown[key] for key in asked)
            for view, shown in sorted(self.jittered.items())
            if all(key in shown for key in asked)
        }


def find_animals(
    features: FeatureSet, *, taps: Sequence[str], kind: str, data: str | None
) -> Animals:
    """Find all instances of all splits, each once, with labels that can be read.

    Args:
        features: Feature set.
        taps: Taps that a row must have, all of them.
        kind: Kind of label.
        data: Data set whose labels are joined to stored rows; None: labels of the store.

    Raises:
        InvalidInputError: No instance has a label and an identity.
    """
    labels, by_split = labelled_pairs(features.store, features, taps=taps, kind=kind, data=data)
    every = {pair.key: pair for pairs in by_split.values() for pair in plain_pairs(pairs)}
    found = [every[key] for key in sorted(every) if every[key].label is not None]
    known, left_out = read_instances(features, found, labels)
    by_identity: dict[str, list[Instance]] = {}
    for pair in found:
        if pair.key in known:
            by_identity.setdefault(str(pair.label), []).append(known[pair.key])
    if not by_identity:
        raise invalid("data", f"{len(every)} instances", "some with keypoints and an identity")
    return Animals(
        instances={name: tuple(by_identity[name]) for name in sorted(by_identity)},
        labels=labels,
        left_out=left_out,
        jittered=_jittered(features, by_split, known.values()),
    )


def _jittered(
    features: FeatureSet, by_split: Mapping[str, Sequence[Pair]], plain: Iterable[Instance]
) -> dict[str, dict[tuple[str, str], Instance]]:
    """Find the rows that show instances in crops around worse boxes."""
    known = {(one.pair.dataset, one.pair.item): one for one in plain}
    rows = {pair.key: pair for pairs in by_split.values() for pair in pairs if is_jitter(pair.view)}
    placements = features.placements(sorted({pair.row for pair in rows.values()}))
    found: dict[str, dict[tuple[str, str], Instance]] = {}
    for pair in rows.values():
        item = (pair.dataset, pair.item)
        if item in known:
            shown = replace(known[item], pair=pair, placement=placements[pair.row])
            found.setdefault(pair.view, {})[item] = shown
    return found
