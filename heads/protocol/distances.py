"""How far an identity lies from those that were learned from, in the backbone's own features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from featstore.errors import invalid, not_found


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


def identity_means(features_nd: np.ndarray, identities: Sequence[str]) -> dict[str, np.ndarray]:
    """Give the mean of the L2-normalised features of each identity.

    Args:
        features_nd: (images, dim): one vector an image, such as its class token.
        identities: Of each image.

    Raises:
        InvalidInputError: A vector is 0 or not finite.
    """
    lengths = np.linalg.norm(features_nd.astype(np.float64), axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        image = int(np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))[0])
        raise invalid("features", float(lengths[image, 0]), f"of a length above 0 in image {image}")
    units = features_nd / lengths
    names = np.array(identities, dtype=object)
    return {str(name): units[names == name].mean(axis=0) for name in sorted(set(identities))}


def identity_distances(
    means: Mapping[str, np.ndarray], held_out: Sequence[str], training: Sequence[str]
) -> list[Distance]:
    """Find the nearest training identity of each held-out one, by cosine.

    The published distance is "maximum cosine", whose sign is open: both the cosine and 1 - it are
    kept.

    Args:
        means: Of every identity, see `identity_means`.
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
