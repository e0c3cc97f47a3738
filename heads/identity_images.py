"""The stored images of one identity: those to learn from, those to measure on, and first tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import InvalidInputError, invalid, not_found
from featstore.order import draw_keys
from featstore.types import Placement
from heads.adaptation import Images
from heads.evaluate import labelled
from heads.facts import measured_facts
from heads.feed import Feed
from heads.identity_token import IdentityToken
from heads.interpolation import descriptors, interpolated_token
from heads.labels import LabelSource
from heads.model import Model
from heads.predictions import read_tokens
from heads.runs import PAIRS, Run
from heads.selection import (
    TEST,
    TRAIN,
    Pair,
    evenly,
    labelled_pairs,
    labels_of,
    pairs_from_table,
    plain_pairs,
)
from heads.targets import checked_label

if TYPE_CHECKING:
    from featstore.api import FeatureSet

MEAN, RANDOM, INTERPOLATED = "mean", "random", "interpolated"
INITS = (MEAN, RANDOM, INTERPOLATED)
_DESCRIBED = 32  # images of a trained identity that its descriptor is the mean of, at most
_DRAW = 4  # sets these random numbers apart from those of the order of an epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One animal of one stored image, with its keypoints."""

    pair: Pair
    record: np.ndarray  # see `heads.keypoint_labels`
    placement: Placement
    dataset_format: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Instances:
    """Those of one identity."""

    pool: tuple[Instance, ...]  # to learn from: of no image of the test split
    test: tuple[Instance, ...]
    left_out: Mapping[str, str]  # path to reason


def find_instances(
    model: Model, features: FeatureSet, identity: str, *, data: str | None
) -> Instances:
    """Find the stored instances of an identity whose keypoints can be used.

    Args:
        model: Whose task and taps they are for.
        features: Feature set.
        identity: Label of the items.
        data: Data set whose labels are joined to stored rows; None: the labels of the store.

    Raises:
        NotFoundError: No item has this label; the message offers the nearest.
        InvalidInputError: The data has other keypoints than the model, or none of the identity's
            can be used.
    """
    kind, taps = model.task.label_kind, model.tap_names
    labels, by_split = labelled_pairs(features.store, features, taps=taps, kind=kind, data=data)
    known = labels_of(pair for pairs in by_split.values() for pair in pairs)
    if identity not in known:
        raise not_found("identity", identity, known)
    of_split = {
        split: [pair for pair in plain_pairs(pairs) if pair.label == identity]
        for split, pairs in by_split.items()
    }
    every = {pair.key: pair for pairs in of_split.values() for pair in pairs}
    model.task.check(measured_facts(every.values(), labels))

    def prepare(one: Instance) -> None:
        model.task.prepare(one.record, np.array(True), one.placement, model.head.output_hw)

    ordered = [every[key] for key in sorted(every)]
    found, left_out = read_instances(features, ordered, labels, check=prepare)
    if not found:
        reason = next(iter(left_out.values()), "It has no label.")
        raise InvalidInputError(
            f"None of the {len(every)} instances of {identity} can be used: {reason} Label some, "
            "or choose another identity."
        )
    is_test = {pair.image_key for pair in of_split.get(TEST, ())}
    return Instances(
        pool=tuple(one for one in found.values() if one.pair.image_key not in is_test),
        test=tuple(one for one in found.values() if one.pair.image_key in is_test),
        left_out=left_out,
    )


def read_instances(
    features: FeatureSet,
    pairs: Sequence[Pair],
    labels: LabelSource,
    *,
    check: Callable[[Instance], None] = lambda one: None,
) -> tuple[dict[tuple[int, str], Instance], dict[str, str]]:
    """Read the labels of pairs.

    Args:
        features: Feature set.
        pairs: Rows with their items.
        labels: Where their labels come from.
        check: Raises InvalidInputError where a label is of no use.

    Returns:
        Instances by `Pair.key` in the order in which their labels come, and, by path, why others
        were left out.
    """
    placements = features.placements(sorted({pair.row for pair in pairs}))
    found: dict[tuple[int, str], Instance] = {}
    left_out: dict[str, str] = {}
    for pair, label in labelled(pairs, labels):
        placement = placements[pair.row]
        try:
            record, _ = checked_label(label, placement)
            one = Instance(
                pair=pair,
                record=record,
                placement=placement,
                dataset_format=labels.format_of(pair.dataset),
            )
            check(one)
        except InvalidInputError as error:
            left_out[pair.path] = str(error)
            continue
        found[pair.key] = one
    return found, left_out


def read_images(model: Model, feed: Feed, instances: Sequence[Instance]) -> Images:
    """Read what a head needs of some instances, with their targets."""
    tensors = feed.tensors([one.pair.row for one in instances], model.array_names)
    with torch.no_grad():
        inputs = model.tokens(tensors, [one.placement for one in instances])
    prepared = [
        model.task.prepare(one.record, np.array(True), one.placement, model.head.output_hw)
        for one in instances
    ]
    targets = {
        name: torch.from_numpy(np.stack([each[name] for each in prepared])).to(model.device)
        for name in prepared[0]
    }
    return Images(inputs=inputs, targets=targets)


def draw_support(
    instances: Sequence[Instance], *, identity: str, shots: int | None, seed: int
) -> tuple[int, ...]:
    """Draw images, each with all of its instances: those of fewer shots are among those of more.

    Returns:
        Numbers of instances, ascending.

    Raises:
        InvalidInputError: There are fewer images than shots.
    """
    keys = sorted({one.pair.image_key for one in instances})
    if shots is not None and shots > len(keys):
        expected = f"at most {len(keys)}, the labelled images of {identity} beside its test split"
        raise invalid("shots", shots, expected)
    order = np.argsort(draw_keys(len(keys), seed, _DRAW), kind="stable")[:shots]
    drawn = {keys[number] for number in order}
    return tuple(n for n, one in enumerate(instances) if one.pair.image_key in drawn)


class FirstTokens:
    """Makes the tokens that adaptations begin with."""

    def __init__(self, run: Run, model: Model, feed: Feed) -> None:
        assert isinstance(model.head, IdentityToken)
        self._run, self._model, self._feed = run, model, feed
        self._head = model.head
        self._known: Tensor | None = None

    def __call__(self, init: str, seen: Images, *, seed: int) -> Tensor:
        """Give a token.

        Args:
            init: One of `INITS`.
            seen: Images of the new identity, for "interpolated": their labels are not looked at.
            seed: Of what is drawn.
        """
        if init == MEAN:
            return self._head.mean_token().detach()
        if init == RANDOM:
            return self._head.random_tokens(1, torch.Generator().manual_seed(seed))[0]
        tokens_nd, known_nc = self._trained(init)
        new_c = descriptors(seen.inputs).mean(dim=0)
        return interpolated_token(tokens_nd, known_nc, new_c, seed=seed)

    def nearest(self, seen: Images) -> Tensor:
        """Give the trained token of the identity whose images are most like some new ones.

        Args:
            seen: Images of the new identity: their labels are not looked at.
        """
        tokens_nd, known_nc = self._trained("nearest")
        new_c = descriptors(seen.inputs).mean(dim=0)
        similar_n = functional.cosine_similarity(known_nc, new_c[None].to(known_nc), dim=1)
        return tokens_nd[similar_n.argmax()].detach()

    def _trained(self, init: str) -> tuple[Tensor, Tensor]:
        """Give the trained tokens, and what their identities' images look like."""
        if self._head.tokens is None:
            raise invalid("init", init, f"{MEAN} or {RANDOM}: the run has no trained tokens")
        if self._known is None:
            self._known = self._described()
        return self._head.tokens, self._known

    def _described(self) -> Tensor:
        """Describe the trained identities by images that the run has learned from."""
        pairs = pairs_from_table(pq.read_table(self._run.path / PAIRS), TRAIN)
        found = []
        for name in self._head.options.identities:
            of_name = evenly([p for p in plain_pairs(pairs) if p.label == name], _DESCRIBED)
            inputs = read_tokens(self._model, self._feed, [pair.row for pair in of_name])
            found.append(descriptors(inputs).mean(dim=0))
        return torch.stack(found)
