"""A sweep: every combination of the values of some settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from featstore.errors import InvalidInputError, invalid
from heads.setup import Choices

_NUMBERS: dict[str, type] = {
    "lr": float,
    "val_fraction": float,
    "steps": int,
    "epochs": int,
    "batch_size": int,
    "seed": int,
}
MAX_CONFIGS = 256


def expand_sweep(
    base: Mapping[str, Any], sweep: Sequence[tuple[str, Sequence[str]]]
) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Make the configurations of a sweep, the last setting changing fastest.

    Args:
        base: What all have in common: arguments of `heads.train` by name.
        sweep: Settings and their values as text: arguments of `heads.train`, "tap", or options
            of the head, the task or the loop.

    Returns:
        For each, the swept values, and the arguments for `heads.train`.

    Raises:
        InvalidInputError: A setting is swept twice, a value is no number where one is needed, or
            there are more than `MAX_CONFIGS` combinations.
    """
    names = [name for name, _ in sweep]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        hint = f"Put all its values into one: {twice[0]}=VALUE,VALUE."
        raise invalid("sweep", twice[0], "named once", hint=hint)
    combinations = list(product(*(values for _, values in sweep)))
    if len(combinations) > MAX_CONFIGS:
        raise InvalidInputError(
            f"The sweep has {len(combinations)} combinations and {MAX_CONFIGS} at most are trained "
            "at once. Split it into several."
        )
    return [_config(base, dict(zip(names, values, strict=True))) for values in combinations]


def _config(
    base: Mapping[str, Any], swept: dict[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    config = {**base, "options": dict(base.get("options") or {})}
    for name, text in swept.items():
        if name == "tap":
            config["taps"] = text.split("+")
        elif name in Choices.__annotations__:
            config[name] = _value(name, text)
            if name in ("steps", "epochs"):  # one of the two
                config.pop("epochs" if name == "steps" else "steps", None)
        else:
            config["options"][name] = text
    return swept, config


def _value(name: str, text: str) -> Any:
    kind = _NUMBERS.get(name, str)
    try:
        return kind(text)
    except ValueError:
        raise invalid(name, text, "a whole number" if kind is int else "a number") from None
