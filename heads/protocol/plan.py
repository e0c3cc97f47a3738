"""What a protocol does: which ways to adapt, how many images, which learning rates are tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from featstore.errors import invalid, not_found
from heads.identity_images import INITS, MEAN
from heads.protocol.design import ALL, Shots

MAIN = "main"
"""The variant that everything is done with: the head as it was asked for."""

TOKEN = "token"

SHARED, NEAREST, BEST = "shared", "nearest", "best"
BASELINES = (SHARED, NEAREST, BEST)
"""Tokens that answer for an identity as they are, no label of it looked at: one that was fitted to
images of all trained identities, that of the trained identity whose images are most alike, and the
trained one that does best on the validation identity."""
_TUNED_ON_SEEDS = 3

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "film": {"injection": "film"},
    "film_queries": {"injection": "film_queries"},
    "no_margin": {"margin_weight": 0.0},
    "token_proj": {"token_proj": True},
    "deep": {"layers": 2},
}
"""Variants that go by name: where the token enters, what makes it matter, other layouts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to adapt a head to an identity."""

    variant: str  # of the head, see `Plan.variants`
    mode: str  # what is trained
    init: str  # where the token begins
    shots: Shots

    @property
    def is_trained(self) -> bool:
        """Whether anything is learned: not from no images."""
        return self.shots != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that decides a protocol's numbers, beside what the heads are trained with."""

    folds: tuple[tuple[str, ...], ...]  # identities that are held out together, run by run
    shots: tuple[Shots, ...] = (0, 1, 5, 10, 20, ALL)
    modes: tuple[str, ...] = (TOKEN, "decoder")
    inits: tuple[str, ...] = (MEAN,)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options of the head
    n_seeds: int = 10
    steps: int = 300
    lr_factors: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)  # of a mode's own learning rate
    n_tuning_seeds: int = _TUNED_ON_SEEDS
    validation: str | None = None  # None: chosen for each fold
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_seeds", "steps", "n_tuning_seeds"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1")
        if self.seed < 0:
            raise invalid("seed", self.seed, "0 or more")
        for name in ("shots", "modes", "inits", "lr_factors"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise invalid(name, given, "one or more, each once")
        if not all(factor > 0 for factor in self.lr_factors):
            raise invalid("lr_factors", self.lr_factors, "positive numbers")
        for init in self.inits:
            if init not in INITS:
                raise not_found("init", init, INITS)
        if MAIN in self.variants:
            raise invalid("variants", MAIN, f"names other than {MAIN}, the head as it is")

    @property
    def all_variants(self) -> dict[str, Mapping[str, Any]]:
        """Give the options of every variant, the main one first."""
        return {MAIN: {}, **self.variants}

    def ways(self, variant: str) -> list[Way]:
        """List the ways to adapt one variant; the first one is the base, the mean token as it is.

        Of the main variant, other answers without any image of the identity follow it.
        Of the main variant all modes begin with the mean token, and the token alone begins in
        every way. Of the others only the token is adapted: they are there for what it does.
        """
        modes = self.modes if variant == MAIN else (TOKEN,)
        inits = dict.fromkeys((MEAN, *self.inits))
        kinds = [(TOKEN, init) for init in inits] + [(m, MEAN) for m in modes if m != TOKEN]
        shots = dict.fromkeys((0, *self.shots))
        found = [
            Way(variant=variant, mode=mode, init=init, shots=count)
            for mode, init in kinds
            for count in shots
            if count != 0 or mode == TOKEN  # from no images, every mode is its beginning
        ]
        others = BASELINES if variant == MAIN else ()
        found[1:1] = [Way(variant=variant, mode=TOKEN, init=init, shots=0) for init in others]
        return found

    def to_json(self) -> dict[str, Any]:
        """Give JSON values; `plan_from_json` inverts it."""
        return {
            name: [list(fold) for fold in value] if name == "folds" else _plain(value)
            for name, value in asdict(self).items()
        }


def plan_from_json(value: Mapping[str, Any]) -> Plan:
    """Rebuild a plan from `Plan.to_json`."""
    lists = ("shots", "modes", "inits", "lr_factors")
    folds = tuple(tuple(fold) for fold in value["folds"])
    return Plan(**{**value, **{name: tuple(value[name]) for name in lists}, "folds": folds})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``NAME`` of `VARIANTS`, or ``NAME:option=value,...``.

    Raises:
        NotFoundError: No variant goes by this name.
        InvalidInputError: It does not read so.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        if name not in VARIANTS:
            raise not_found("variant", name, VARIANTS)
        return name, dict(VARIANTS[name])
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if not name or not all(key and sign and value for key, sign, value in pairs):
        raise invalid("variant", text, "NAME:option=value,..., such as deep:layers=2")
    return name, {key: value for key, _, value in pairs}
