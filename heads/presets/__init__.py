"""Presets: published experiments by name, such as "deap-voc" or "deap-voc@paper".

A name without a variant means the release's reading for DeAP, and the paper's for MAXA.
"""

from __future__ import annotations

from featstore.errors import not_found
from heads.presets import deap, maxa
from heads.presets.base import PAPER, RELEASE, Needs, Preset

__all__ = ["PAPER", "PRESETS", "RELEASE", "Needs", "Preset", "find_preset"]

PRESETS: dict[str, Preset] = {one.name: one for one in (*deap.presets(), *maxa.presets())}
"""By full name; of an experiment, the reading that its short name means comes first."""


def find_preset(name: str) -> Preset:
    """Give a preset by its full name, or by its short one.

    Raises:
        NotFoundError: There is none of that name.
    """
    if name in PRESETS:
        return PRESETS[name]
    for preset in PRESETS.values():
        if preset.base == name:
            return preset
    base, at, _ = name.partition("@")
    short = {preset.base for preset in PRESETS.values()}
    if at and base in short:
        raise not_found("preset", name, [each for each in PRESETS if each.startswith(f"{base}@")])
    raise not_found("preset", base, short, hint="`heads presets` tells more.")
