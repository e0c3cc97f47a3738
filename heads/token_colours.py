"""Features as colours: the first three principal components of tokens as red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featstore.errors import invalid

_SPAN = (1.0, 99.0)  # percentiles that become 0 and 255: an odd token costs no contrast


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenColours:
    """Tokens as colours; padding is transparent."""

    colours: np.ndarray  # (images, tokens, 4) uint8 RGBA
    share: float  # of the variance that the three components hold, 0 to 1


def pca_colours(tokens_ntd: np.ndarray, valid_nt: np.ndarray | None = None) -> TokenColours:
    """Paint tokens by the three directions in which they differ most, over all images together.

    One fit for all images, so that a colour means the same in each of them. The sign of a
    component, which is arbitrary, is chosen so that its largest weight is positive.

    Args:
        tokens_ntd: (images, tokens, dim), any float dtype; finite where valid.
        valid_nt: (images, tokens) bool; what is not valid is padding. None: all of it is valid.

    Raises:
        InvalidInputError: There are fewer than two tokens, or one is not finite.
    """
    n_images, n_tokens, dim = tokens_ntd.shape
    valid = np.ones((n_images, n_tokens), dtype=bool) if valid_nt is None else valid_nt
    tokens = tokens_ntd[valid].astype(np.float64)
    if len(tokens) < 2 or not np.isfinite(tokens).all():
        given = f"{len(tokens)} tokens of {dim}"
        raise invalid("tokens_ntd", given, "at least two tokens of finite numbers")
    centred = tokens - tokens.mean(axis=0)
    # The covariance is small whatever the number of tokens; its singular vectors are the same.
    vectors, variances, _ = np.linalg.svd(centred.T @ centred)
    chosen = vectors[:, :3]
    largest = np.abs(chosen).argmax(axis=0)
    chosen = chosen * np.where(chosen[largest, np.arange(chosen.shape[1])] < 0, -1.0, 1.0)
    colours = np.zeros((n_images, n_tokens, 4), dtype=np.uint8)
    colours[valid, :3] = _stretched(centred @ chosen)
    colours[valid, 3] = 255
    total = variances.sum()
    return TokenColours(
        colours=colours, share=float(variances[:3].sum() / total) if total > 0 else 0.0
    )


def _stretched(values_pc: np.ndarray) -> np.ndarray:
    """Scale each component from its low to its high percentile; (tokens, 3) uint8."""
    low, high = np.percentile(values_pc, _SPAN, axis=0)
    span = np.where(high > low, high - low, 1.0)
    scaled = np.where(high > low, (values_pc - low) / span, 0.5)
    stretched = np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)
    # Fewer components than colours, from tokens of one or two numbers, leave grey.
    return np.pad(stretched, ((0, 0), (0, 3 - stretched.shape[1])), constant_values=128)
