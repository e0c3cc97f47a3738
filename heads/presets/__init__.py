"""Presets: published experiments by name, such as "deap-voc" or "deap-voc@paper".

A name without a variant means the release's reading for DeAP, the paper's for MAXA, and for
ViT-Split the size of the backbone that is used, else the smallest.
"""

from __future__ import annotations

from featstore.errors import not_found
from heads.presets import deap, maxa, vit_split
from heads.presets.base import PAPER, RELEASE, Needs, Preset

__all__ = ["PAPER", "PRESETS", "RELEASE", "Needs", "Preset", "find_preset"]

PRESETS: dict[str, Preset] = {
    one.name: one for one in (*deap.presets(), *maxa.presets(), *vit_split.presets())
}
"""By full name; of an experiment, the reading that its short name means comes first."""


def find_preset(name: str, *, backbone: str | None = None) -> Preset:
    """Give a preset by its full name, or by its short one.

    Args:
        name: "deap-voc@paper", or "deap-voc".
        backbone: Of the catalogue: of several sizes, a short name means the one that it has.
            Twins with registers count as the one without.

    Raises:
        NotFoundError: There is none of that name.
    """
    if name in PRESETS:
        return PRESETS[name]
    fitting = [preset for preset in PRESETS.values() if preset.base == name]
    if fitting:
        wanted = (backbone or "").removesuffix("_reg")
        return next((one for one in fitting if one.needs.backbone == wanted), fitting[0])
    base, at, _ = name.partition("@")
    short = {preset.base for preset in PRESETS.values()}
    if at and base in short:
        raise not_found("preset", name, [each for each in PRESETS if each.startswith(f"{base}@")])
    raise not_found("preset", base, short, hint="`heads presets` tells more.")
