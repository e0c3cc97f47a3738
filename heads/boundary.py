"""Where a backbone turns from extractor to adapter, and which taps stand for it: read off its CKA.

The rule: of all ways to cut the sequence of taps in two, the one with the largest difference of
the mean CKA of taps in the same part and that of taps in different parts. Then the last tap of
each part is taken, and one tap after another is added, each time the one that raises most how
well all are covered: the sum over all taps of the CKA with the most alike tap taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featstore.errors import invalid
from featstore.taps import parse_tap

MIN_TAPS = 3  # with two there is nothing to choose


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """Two parts of a backbone, and taps to read."""

    extractor: tuple[str, ...]
    adapter: tuple[str, ...]
    within: float  # mean CKA of taps in the same part
    between: float  # and in different parts; the nearer to `within`, the less the cut says
    taps: tuple[str, ...]
    kt: int | None  # blocks behind the extractor's last tap; None for stages


def propose(
    taps: Sequence[str], matrix: np.ndarray, *, kp: int = 4, depth: int | None = None
) -> Proposal:
    """Propose a boundary and taps from the CKA of blocks or stages.

    Args:
        taps: Blocks or stages from first to last, at least three.
        matrix: (taps, taps), the CKA of every two.
        kp: How many taps to propose, at least two; fewer where there are fewer.
        depth: Blocks of the backbone; None where it is not known.

    Raises:
        InvalidInputError: There are too few taps, or `kp` is below two.
    """
    if len(taps) < MIN_TAPS:
        raise invalid("taps", tuple(taps), f"at least {MIN_TAPS} for a boundary among them")
    if kp < 2:
        raise invalid("kp", kp, "at least 2: one tap of each part")
    scores = [_within_and_between(matrix, cut) for cut in range(1, len(taps))]
    cut = 1 + int(np.argmax([within - between for within, between in scores]))
    within, between = scores[cut - 1]
    last = parse_tap(taps[cut - 1])
    is_block = last.unit == "block" and last.index is not None
    return Proposal(
        extractor=tuple(taps[:cut]),
        adapter=tuple(taps[cut:]),
        within=within,
        between=between,
        taps=tuple(taps[place] for place in _cover(matrix, {cut - 1, len(taps) - 1}, kp)),
        kt=depth - 1 - (last.index or 0) if is_block and depth is not None else None,
    )


def _within_and_between(matrix: np.ndarray, cut: int) -> tuple[float, float]:
    """Give the mean CKA of two taps on the same side of the cut, and on different sides."""
    upper = np.triu(np.ones(matrix.shape, dtype=bool), k=1)
    is_first = np.arange(len(matrix)) < cut
    is_same = is_first[:, None] == is_first[None, :]
    return float(matrix[upper & is_same].mean()), float(matrix[upper & ~is_same].mean())


def _cover(matrix: np.ndarray, first: set[int], count: int) -> list[int]:
    """Add taps to the first ones until there are `count`; ascending."""
    chosen = sorted(first)
    while len(chosen) < min(count, len(matrix)):
        covered = [
            -np.inf if new in chosen else matrix[:, [*chosen, new]].max(axis=1).sum()
            for new in range(len(matrix))
        ]
        chosen.append(int(np.argmax(covered)))
    return sorted(chosen)
