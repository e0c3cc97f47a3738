"""Predictions on stored rows: of a row alone, or averaged with those of its mirror image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from featstore.views import HFLIP
from heads.base import TapTokens
from heads.feed import Feed
from heads.model import Model
from heads.other_views import rows_in_view
from heads.selection import Pair

if TYPE_CHECKING:
    from featstore.api import FeatureSet

Predict = Callable[[Model, Feed, Sequence[Pair]], np.ndarray]
"""Gives (pairs, channels, Ho, Wo) float32, what the task's `predict` gives, for stored rows."""


def predict_pairs(model: Model, feed: Feed, pairs: Sequence[Pair]) -> np.ndarray:
    """Predict pairs; of an identity that was trained, a head may know more. See `Predict`."""
    return predict_rows(model, feed, [pair.row for pair in pairs], [pair.label for pair in pairs])


def predict_unnamed(model: Model, feed: Feed, pairs: Sequence[Pair]) -> np.ndarray:
    """Predict pairs as if nobody knew whom they show. See `Predict`."""
    return predict_rows(model, feed, [pair.row for pair in pairs])


def read_tokens(model: Model, feed: Feed, rows: Sequence[int]) -> list[TapTokens]:
    """Read what a head needs of stored rows."""
    placements = feed.placements(rows)
    tensors = feed.tensors(rows, model.array_names)
    return model.tokens(tensors, [placements[row] for row in rows])


@torch.inference_mode()
def predict_rows(
    model: Model, feed: Feed, rows: Sequence[int], labels: Sequence[str | None] = ()
) -> np.ndarray:
    """Predict rows: (rows, channels, Ho, Wo) float32, physical values in the input frame.

    Args:
        model: Model.
        feed: Where the rows come from.
        rows: Rows.
        labels: Whom each row shows, where that is known and the head shall know it.
    """
    was_training = model.head.training
    model.head.eval()
    inputs = read_tokens(model, feed, rows)
    known = model.task.identities
    if known and labels:
        numbers = [known.index(label) if label in known else -1 for label in labels]
        identity = torch.tensor(numbers, device=model.device)
        output = model.head.output_for(inputs, {"identity": identity})
    else:
        output = model.head(inputs)
    prediction = model.task.predict(output)
    model.head.train(was_training)
    return prediction.float().cpu().numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipAverage:
    """Predicts pairs and their mirror images, turns the latter back, and averages the two."""

    mirror_images: Mapping[int, int]  # plain row -> flipped row
    predict: Predict = predict_pairs

    def __call__(self, model: Model, feed: Feed, pairs: Sequence[Pair]) -> np.ndarray:
        """Predict pairs of plain rows; see `Predict`."""
        others = [self.mirror_images[pair.row] for pair in pairs]
        placements = feed.placements(others)
        plain = self.predict(model, feed, pairs)
        mirrored = [replace(pair, row=row) for pair, row in zip(pairs, others, strict=True)]
        flipped = self.predict(model, feed, mirrored)
        averaged = [
            model.task.average([one, model.task.unflipped(other, placements[row])])
            for one, other, row in zip(plain, flipped, others, strict=True)
        ]
        return np.stack(averaged)


def flip_average(
    features: FeatureSet,
    pairs: Sequence[Pair],
    taps: Sequence[str],
    predict: Predict = predict_pairs,
) -> FlipAverage:
    """Find the mirror images of some plain rows.

    Args:
        features: Feature set.
        pairs: What shall be predicted.
        taps: That a row must have, all of them.
        predict: What is averaged.

    Raises:
        NotFoundError: One of them has none; the message says how to add them.
    """
    found = rows_in_view(features, pairs, taps, HFLIP, instead="Measure without --tta.")
    return FlipAverage(mirror_images=found, predict=predict)
