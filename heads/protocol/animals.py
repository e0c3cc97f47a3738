"""The marked instances of every identity, over all splits, as a protocol deals with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featstore.errors import invalid
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

    def pairs(self, identity: str) -> list[Pair]:
        """Give the pairs of an identity, in the order of its instances."""
        return [one.pair for one in self.instances[identity]]

    def n_images(self) -> dict[str, int]:
        """Count the images of every identity."""
        return {
            name: len({one.pair.image_key for one in own}) for name, own in self.instances.items()
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
    )
