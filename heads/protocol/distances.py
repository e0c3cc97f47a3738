"""How far an identity lies from those that were learned from, in the backbone's own features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from featstore.errors import not_found


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """The nearest training identity of a held-out one."""

    identity: str
    nearest: str
    cosine: float  # the largest over the training identities

    @property
    def distance(self) -> float:
        """Give 1 - cosine: 0 for the same direction."""
        return 1.0 - self.cosine


def identity_distances(
    means: Mapping[str, np.ndarray], held_out: Sequence[str], training: Sequence[str]
) -> list[Distance]:
    """Find the nearest training identity of each held-out one, by the cosine of their means.

    The published distance is "maximum cosine", whose sign is open: both the cosine and 1 - it are
    kept.

    Args:
        means: Of every identity: the mean of its images' features, each of length 1.
        held_out: Identities to tell of, in this order.
        training: Identities that were learned from.

    Raises:
        NotFoundError: An identity has no mean.
    """
    for name in (*held_out, *training):
        if name not in means:
            raise not_found("identity", name, means)
    return [_nearest(name, means, training) for name in held_out]


def _nearest(name: str, means: Mapping[str, np.ndarray], training: Sequence[str]) -> Distance:
    own = _unit(means[name])
    cosines = {other: float(own @ _unit(means[other])) for other in training}
    nearest = max(sorted(cosines), key=lambda other: cosines[other])
    return Distance(identity=name, nearest=nearest, cosine=cosines[nearest])


def _unit(vector_d: np.ndarray) -> np.ndarray:
    return vector_d / np.linalg.norm(vector_d)
