"""What can be tapped out of a backbone, and how it is written.

* ``block:8``   raw output of block 8 (0-based), before any norm;
* ``stage:2``   raw output of stage 2 of a convolutional or hierarchical net;
* ``norm``      the last block after the backbone's final norm (absent on stage models);
* ``X.cls``     pooled: the CLS token of tap X;  ``X.mean``: the mean of its patch tokens.

Negative numbers count from the end and are made positive before anything is hashed or written.
On disk ``:`` becomes ``_``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from featstore.errors import invalid
from featstore.layer_choice import uniform_layers

_TAP = re.compile(r"(?:(norm)|(block|stage):(-?\d+))(?:\.(cls|mean))?")
_HINT = "Examples: block:8, block:-1, norm, stage:2, norm.cls, norm.mean."


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Tap:
    """One parsed tap. `index` is None for the final norm; `pool` is None for a dense tap."""

    unit: str  # "block", "stage" or "norm"
    index: int | None = None
    pool: str | None = None  # "cls", "mean" or None

    def __str__(self) -> str:
        base = "norm" if self.index is None else f"{self.unit}:{self.index}"
        return f"{base}.{self.pool}" if self.pool else base

    @property
    def folder(self) -> str:
        """Name of the tap's folder in a store."""
        return str(self).replace(":", "_")


def parse_tap(text: str) -> Tap:
    """Parse one tap; the number may still be negative.

    Raises:
        InvalidInputError: `text` is not a tap.
    """
    match = _TAP.fullmatch(text.strip())
    if match is None:
        raise invalid(
            "tap", text, "block:N, stage:N or norm, with .cls or .mean to pool", hint=_HINT
        )
    norm, unit, index, pool = match.groups()
    if norm:
        return Tap(unit="norm", pool=pool)
    return Tap(unit=unit, index=int(index), pool=pool)


def resolve_taps(texts: Iterable[str], *, unit: str, depth: int, n_prefix: int) -> tuple[str, ...]:
    """Check taps against one backbone and give their positive, sorted, repeat-free names.

    Args:
        texts: Taps as the user wrote them.
        unit: What the backbone is made of: "block" or "stage".
        depth: How many of them it has.
        n_prefix: Prefix tokens of the backbone; without one there is no ``.cls``.

    Raises:
        InvalidInputError: A tap does not parse, is out of range or does not exist here.
    """
    taps = {_resolve(parse_tap(text), unit, depth, n_prefix) for text in texts}
    if not taps:
        raise invalid("taps", (), "at least one tap", hint=_HINT)
    return tuple(str(tap) for tap in sorted(taps, key=_order))


def from_first_to_last(texts: Iterable[str]) -> tuple[str, ...]:
    """Sort taps as the backbone computes them, the final norm last."""
    return tuple(sorted(texts, key=lambda text: _order(parse_tap(text))))


def _order(tap: Tap) -> tuple[int, int, str]:
    return (tap.index is None, tap.index or 0, tap.pool or "")


def _resolve(tap: Tap, unit: str, depth: int, n_prefix: int) -> Tap:
    if tap.unit == "norm" and unit == "stage":
        hint = f"Use stage:0 to stage:{depth - 1}."
        raise invalid("tap", str(tap), "a stage; stage models have no norm tap", hint=hint)
    if tap.unit not in (unit, "norm"):
        hint = f"This backbone has {depth} {unit}s: {unit}:0 to {unit}:{depth - 1}."
        raise invalid("tap", str(tap), f"a {unit} of this backbone", hint=hint)
    if tap.pool == "cls" and not n_prefix:
        raise invalid("tap", str(tap), "one that exists; this backbone has no CLS token")
    if tap.index is None:
        return tap
    if not -depth <= tap.index < depth:
        raise invalid("tap", str(tap), f"from {unit}:0 to {unit}:{depth - 1} (or {unit}:-1)")
    return Tap(unit=unit, index=tap.index % depth, pool=tap.pool)


def uniform_blocks(depth: int, *, first: int = 2, count: int = 4) -> tuple[int, ...]:
    """Spread `count` blocks as `uniform_layers` does; all, or from earlier on, where few are."""
    if depth <= count:
        return tuple(range(depth))
    return tuple(uniform_layers(depth, count, min(first, depth - count)))


def default_taps(*, unit: str, depth: int) -> tuple[str, ...]:
    """Give the taps stored when the user names none: four blocks and the norm, or all stages."""
    if unit == "stage":
        return tuple(f"stage:{index}" for index in range(depth))
    return (*(f"block:{index}" for index in uniform_blocks(depth)), "norm")


def base_tap(tap: str) -> str:
    """Give the dense tap that a pooled tap pools (itself, for a dense tap)."""
    return tap.partition(".")[0]


def tap_folder(tap: str) -> str:
    """Name of a tap's folder in a store."""
    return tap.replace(":", "_")


def missing_taps(wanted: Sequence[str], present: Iterable[str]) -> tuple[str, ...]:
    """List the wanted taps that are not present, in the wanted order."""
    have = set(present)
    return tuple(tap for tap in wanted if tap not in have)
