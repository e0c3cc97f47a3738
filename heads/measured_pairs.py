"""Which pairs a run is measured on: those of a split, of one identity, in one stored view."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from featstore.errors import InvalidInputError, not_found
from heads.labels import LabelSource, open_stored_labels
from heads.runs import PAIRS, Run
from heads.selection import (
    TEST,
    TRAIN,
    VAL,
    Pair,
    labelled_pairs,
    labels_of,
    pairs_from_table,
    plain_pairs,
    select_items,
    select_split,
)
from heads.tasks import Task
from heads.token_file import support_of

if TYPE_CHECKING:
    from featstore.api import FeatureSet


def without_support(
    pairs: Sequence[Pair], support: Collection[str], *, token: str
) -> tuple[Pair, ...]:
    """Leave out the images that a token has learned from.

    Args:
        pairs: To measure.
        support: Names of these images, see `token_file.support_of`.
        token: Name of the token.

    Raises:
        InvalidInputError: Nothing is left.
    """
    left = tuple(pair for pair in pairs if not support_of([pair.image_key]) & set(support))
    if not left:
        raise InvalidInputError(
            f"{token} has learned from all {len(pairs)} instances that would be measured. Choose "
            "another --split, or measure them too: --with-support."
        )
    return left


def pairs_to_measure(
    run: Run,
    features: FeatureSet,
    task: Task,
    split: str,
    data: str | None,
    *,
    identity: str | None = None,
) -> tuple[Sequence[Pair], LabelSource]:
    """Give the pairs of a split as a run means it, with where their labels come from.

    Args:
        run: Run.
        features: Its feature set.
        task: Its task.
        split: "train", "val" and "test" are the run's own parts.
        data: In place of the labels that the run used.
        identity: Label of the pairs, all others being left out; then the split is that of the
            store, as a run may have held the label out.

    Raises:
        InvalidInputError: Nothing in the split can be measured.
        NotFoundError: Nothing in the split has the label.
    """
    store = features.store
    own_data, taps, kind = run.record["labels"]["data"], run.record["taps"], task.label_kind
    if identity is not None:
        every, labels = select_split(
            store, features, taps=taps, kind=kind, split=split, data=data or own_data
        )
        pairs = tuple(pair for pair in every if pair.label == identity)
        if not pairs:
            raise not_found(f"label in split {split!r}", identity, labels_of(every))
        return pairs, labels
    if data is None and split in (TRAIN, VAL, TEST):
        pairs = pairs_from_table(pq.read_table(run.path / PAIRS), split)
        pairs = plain_pairs(pairs)
        if not pairs:
            raise InvalidInputError(
                f"Run {run.run_id} has no {split} part. Choose another --split."
            )
        if features.key != run.record["feature_sets"][0]:
            items = {(pair.dataset, pair.item) for pair in pairs}
            return select_items(store, features, taps=taps, kind=kind, items=items, data=own_data)
        if own_data is None:
            return pairs, open_stored_labels(store, kind)
        return pairs, labelled_pairs(store, features, taps=taps, kind=kind, data=own_data)[0]
    return select_split(store, features, taps=taps, kind=kind, split=split, data=data or own_data)
