"""Skeletons: the keypoints that a data set marks, how they are joined and which are a pair."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featstore.errors import invalid

_SIDE = re.compile(r"(?:^|(?<=[_\- .]))(left|right|l|r)(?=$|[_\- .])", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """Keypoints in the order of their numbers, which count from 0."""

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...] = ()  # pairs of keypoints to draw a line between
    # Left and right of one part, which a mirror image exchanges; None: nobody knows.
    swaps: tuple[tuple[int, int], ...] | None = None
    sigmas: tuple[float, ...] | None = None  # of COCO's object keypoint similarity

    def __post_init__(self) -> None:
        n = len(self.names)
        if not n or len(set(self.names)) < n:
            raise invalid("keypoints", self.names, "one or more names, each once")
        if any(not 0 <= point < n for pair in (*self.edges, *(self.swaps or ())) for point in pair):
            numbers = (self.edges, self.swaps)
            raise invalid("skeleton", numbers, f"pairs of numbers from 0 to {n - 1}")
        mirrored = [point for pair in self.swaps or () for point in pair]
        if len(set(mirrored)) < len(mirrored):
            raise invalid("swaps", self.swaps, "pairs that share no keypoint")
        if self.sigmas is not None and (len(self.sigmas) != n or min(self.sigmas) <= 0):
            raise invalid("sigmas", self.sigmas, f"{n} positive numbers, one a keypoint")

    def mirror_order(self) -> tuple[int, ...] | None:
        """Tell which keypoint each becomes in a mirror image; None where nobody knows."""
        if self.swaps is None:
            return None
        order = list(range(len(self.names)))
        for one, other in self.swaps:
            order[one], order[other] = other, one
        return tuple(order)

    def to_json(self) -> dict[str, Any]:
        """Give JSON values; `skeleton_from_json` inverts it."""
        return {
            "keypoints": list(self.names),
            "edges": [list(edge) for edge in self.edges],
            "swaps": None if self.swaps is None else [list(pair) for pair in self.swaps],
            "sigmas": None if self.sigmas is None else list(self.sigmas),
        }


def skeleton_from_json(value: Mapping[str, Any]) -> Skeleton:
    """Rebuild a skeleton from `Skeleton.to_json`."""
    swaps, sigmas = value["swaps"], value["sigmas"]
    return Skeleton(
        names=tuple(value["keypoints"]),
        edges=tuple((one, other) for one, other in value["edges"]),
        swaps=None if swaps is None else tuple((one, other) for one, other in swaps),
        sigmas=None if sigmas is None else tuple(sigmas),
    )


def side_of(name: str) -> str | None:
    """Tell whether a keypoint's name says "left" or "right"; None where it says neither, or both.

    ``L_Knee`` and ``left_eye`` are left.
    """
    sides = {side[0].lower() for side in _SIDE.findall(name)}
    return {"l": "left", "r": "right"}[sides.pop()] if len(sides) == 1 else None


def swaps_from_names(names: Sequence[str]) -> tuple[tuple[int, int], ...] | None:
    """Find left and right by their names: "left_eye" and "right_eye", "L_Knee" and "R_Knee".

    Returns:
        The pairs by their numbers, or None where a name has a side and no other name the opposite
        one, or where no name has a side: then a mirror image cannot be told from the image.
    """
    numbers = {name.lower(): number for number, name in enumerate(names)}
    pairs: set[tuple[int, int]] = set()
    for number, name in enumerate(names):
        sides = _SIDE.findall(name)
        if len(sides) > 1:
            return None
        if not sides:
            continue
        mirrored = _SIDE.sub(lambda match: _OTHER[match[0].lower()], name.lower())
        if mirrored not in numbers:
            return None
        other = numbers[mirrored]
        pairs.add((min(number, other), max(number, other)))
    return tuple(sorted(pairs)) or None
