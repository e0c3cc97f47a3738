"""Which of the stored taps a head reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from featstore.commands import extract_command
from featstore.errors import invalid, not_found
from featstore.taps import parse_tap, resolve_taps
from featstore.types import TapShape
from heads.base import Head

if TYPE_CHECKING:
    from featstore.api import FeatureSet


def choose_taps(
    features: FeatureSet, head: type[Head], wanted: Sequence[str]
) -> tuple[TapShape, ...]:
    """Choose the taps that a head reads: those named, else the head's own choice.

    Raises:
        NotFoundError: A tap is not stored; the message says how to add it.
        InvalidInputError: It is no tap, or pooled.
    """
    stored = features.taps
    if not wanted:
        dense = {tap: shape for tap, shape in stored.items() if shape.grid is not None}
        input_hw = None if features.plan is None else features.plan.image_size
        return tuple(stored[tap] for tap in head.default_taps(dense, input_hw=input_hw))
    names = [_resolved(text, features) for text in wanted]
    for name in names:
        if name not in stored:
            hint = (
                ""
                if features.is_foreign
                else f"Add it: `{extract_command(features.folder, taps=[name])}`."
            )
            raise not_found("tap", name, stored, hint=hint)
        if stored[name].grid is None:
            raise invalid(
                "tap", name, "a dense tap; this one is pooled", hint="Leave out the pool."
            )
    return tuple(stored[name] for name in dict.fromkeys(names))


def _resolved(text: str, features: FeatureSet) -> str:
    """Write a tap as it is stored: positive, where the depth of the backbone is known."""
    about = features.backbone
    if "depth" in about and "unit" in about:
        n_prefix = int(about.get("n_prefix", 0))
        return resolve_taps(
            [text], unit=about["unit"], depth=int(about["depth"]), n_prefix=n_prefix
        )[0]
    return str(parse_tap(text))
