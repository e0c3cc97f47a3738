"""Options of the pose task: a skeleton and identities, spelled out as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from featstore.errors import invalid
from featstore.skeleton import Skeleton

LOSSES = ("smooth_l1", "l2")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoseOptions:
    """Choices of the pose task.

    What the data set's skeleton tells stands here too, so that a run needs nothing else to be
    read: `names` of keypoints, parted by "|"; `edges` to draw, as "0-1|1-2"; `swaps`, the pairs
    that a mirror image exchanges, likewise (none: nobody knows); `sigmas` of COCO's similarity,
    parted by "|". `identities` are the species or individuals that are trained on, parted by "|".

    The `loss` is smooth L1, squared below `beta` (in shares of the frame), or the squared error
    ("l2"). With `scales` the head also says how sure it is of each keypoint, and the loss is the
    negative log-likelihood: of a Laplace distribution (of the smooth distance), or of a normal one
    with "l2".
    """

    names: str = ""
    edges: str = ""
    swaps: str | None = None
    sigmas: str = ""
    identities: str = ""
    loss: str = "smooth_l1"
    beta: float = 0.05
    scales: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise invalid("loss", self.loss, f"one of {', '.join(LOSSES)}")
        if not 0 < self.beta < math.inf:
            raise invalid("beta", self.beta, "a positive number", hint="Try 0.05.")
        identities = parts_of(self.identities)
        if len(set(identities)) < len(identities):
            raise invalid("identities", self.identities, "names, each once, parted by |")
        if self.names:
            self.skeleton()

    def skeleton(self) -> Skeleton:
        """Give the skeleton that the options spell out.

        Raises:
            InvalidInputError: They spell none.
        """
        return Skeleton(
            names=parts_of(self.names),
            edges=_pairs("edges", self.edges),
            swaps=None if self.swaps is None else _pairs("swaps", self.swaps),
            sigmas=_numbers("sigmas", self.sigmas) if self.sigmas else None,
        )


def parts_of(text: str) -> tuple[str, ...]:
    """Part a text at its "|"."""
    return tuple(text.split("|")) if text else ()


def _pairs(name: str, text: str) -> tuple[tuple[int, int], ...]:
    try:
        ends = [part.split("-") for part in parts_of(text)]
        return tuple((int(one), int(other)) for one, other in ends)
    except ValueError:
        raise invalid(name, text, "pairs of numbers, such as 0-1|1-2") from None


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in parts_of(text))
    except ValueError:
        raise invalid(name, text, "numbers parted by |") from None


def as_options(skeleton: Skeleton) -> dict[str, str | None]:
    """Spell a skeleton out; `PoseOptions.skeleton` inverts it."""

    def text(pairs: Iterable[tuple[int, int]]) -> str:
        return "|".join(f"{one}-{other}" for one, other in pairs)

    return {
        "names": joined("keypoints", skeleton.names),
        "edges": text(skeleton.edges),
        "swaps": None if skeleton.swaps is None else text(skeleton.swaps),
        "sigmas": "|".join(map(repr, skeleton.sigmas or ())),
    }


def joined(what: str, names: Iterable[str]) -> str:
    """Join names by "|".

    Raises:
        InvalidInputError: A name has one already.
    """
    listed = list(names)
    if any("|" in name for name in listed):
        raise invalid(f"{what} of the data", ", ".join(listed), "names without |")
    return "|".join(listed)


def check_names(given: Sequence[str], expected: Sequence[str]) -> None:
    """Refuse keypoints of another number or order.

    Raises:
        InvalidInputError: They differ; the message names the first that does.
    """
    if len(given) != len(expected):
        wanted = f"the {len(expected)} that are learned: {', '.join(expected)}"
        raise invalid("keypoints of the data", ", ".join(given), wanted)
    for number, (one, other) in enumerate(zip(given, expected, strict=True)):
        if one != other:
            wanted = f"in the order that is learned, where number {number} is {other!r}"
            raise invalid("keypoints of the data", ", ".join(given), wanted)
