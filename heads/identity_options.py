"""The choices of an identity-token head."""

from __future__ import annotations

from dataclasses import dataclass

from featstore.errors import invalid

POSITIONS = ("sincos", "none")
MEMORY, FILM, FILM_QUERIES = "memory", "film", "film_queries"
INJECTIONS = (MEMORY, FILM, FILM_QUERIES)
RELATIVE, ABSOLUTE = "relative", "absolute"


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityTokenOptions:
    """Choices of an identity-token head.

    The token lies in the memory of the decoder; "film" scales and shifts the patches by it
    instead, "film_queries" the queries. `token_proj` maps it linearly first.

    The margin is a loss that makes the token matter: with the token of another identity of the
    batch, half of the time with the mean of all, the loss shall be greater by `margin`, which is
    a share of the loss (`margin_unit` "relative") or in its unit ("absolute"). It counts
    `margin_weight` times.
    """

    heads: int = 8
    ff: int = 2048  # channels inside the decoder's perceptron
    layers: int = 1
    hidden: int = 64  # channels before the numbers of a keypoint
    positions: str = "sincos"
    injection: str = MEMORY
    token_proj: bool = False
    tail_blocks: int = 0
    margin: float = 0.1
    margin_unit: str = RELATIVE
    margin_weight: float = 0.5
    numbers: int = 2  # of a keypoint: x and y, perhaps a scale; filled in by the task
    tokens: str = ""  # whom the trained ones are for, parted by "|"; filled in by the task

    def __post_init__(self) -> None:
        for name in ("heads", "ff", "layers", "hidden"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "a positive number")
        for name, known in (
            ("positions", POSITIONS),
            ("injection", INJECTIONS),
            ("margin_unit", (RELATIVE, ABSOLUTE)),
        ):
            if getattr(self, name) not in known:
                raise invalid(name, getattr(self, name), f"one of {', '.join(known)}")
        if self.tail_blocks < 0:
            raise invalid(
                "tail_blocks", self.tail_blocks, "0 or more of the backbone's last blocks"
            )
        for name in ("margin", "margin_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise invalid(name, getattr(self, name), "0 or more")
        if self.numbers not in (2, 3):
            raise invalid("numbers", self.numbers, "2 (x, y) or 3 (x, y and a scale)")
        names = self.identities
        if len(set(names)) < len(names) or (self.tokens and "" in names):
            raise invalid("tokens", self.tokens, "names, each once, parted by |")

    @property
    def identities(self) -> tuple[str, ...]:
        """Name whom the tokens are for, in their order."""
        return tuple(self.tokens.split("|")) if self.tokens else ()
