"""The marked instances of every identity, over all splits, as a protocol deals with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featstore.errors import InvalidInputError, invalid
from featstore.types import Placement
from heads.evaluate import labelled
from heads.labels import LabelSource
from heads.selection import Pair, labelled_pairs, plain_pairs
from heads.targets import checked_label

if TYPE_CHECKING:
    from featstore.api import FeatureSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Animals:
    """Instances that can be learned from and measured, by identity, in an order of their own."""

    pairs: Mapping[str, tuple[Pair, ...]]
    records: Mapping[tuple[int, str], np.ndarray]  # labels, see `heads.keypoint_labels`
    placements: Mapping[int, Placement]  # of the rows
    labels: LabelSource
    left_out: Mapping[str, str]  # path to reason

    def n_images(self) -> dict[str, int]:
        """Count the images of every identity."""
        return {name: len({pair.image_key for pair in pairs}) for name, pairs in self.pairs.items()}


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
    placements = features.placements(sorted({pair.row for pair in found}))
    records: dict[tuple[int, str], np.ndarray] = {}
    left_out: dict[str, str] = {}
    for pair, label in labelled(found, labels):
        try:
            records[pair.key], _ = checked_label(label, placements[pair.row])
        except InvalidInputError as error:
            left_out[pair.path] = str(error)
    by_identity: dict[str, list[Pair]] = {}
    for pair in found:
        if pair.key in records:
            by_identity.setdefault(str(pair.label), []).append(pair)
    if not by_identity:
        raise invalid("data", f"{len(every)} instances", "some with keypoints and an identity")
    return Animals(
        pairs={name: tuple(by_identity[name]) for name in sorted(by_identity)},
        records=records,
        placements=placements,
        labels=labels,
        left_out=left_out,
    )
