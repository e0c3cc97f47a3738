"""Which of the stored taps a head reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featstore.commands import extract_command
from featstore.errors import invalid, not_found
from featstore.taps import from_first_to_last, parse_tap, resolve_taps
from featstore.types import TapShape
from heads.base import Head

if TYPE_CHECKING:
    from featstore.api import FeatureSet


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenTaps:
    """What a head reads."""

    shapes: tuple[TapShape, ...]  # in the head's order; a tap may come twice
    named: tuple[str, ...]  # what the user would have to name to get the same; () : nothing


def choose_taps(
    features: FeatureSet, head: type[Head], wanted: Sequence[str], options: Mapping[str, Any]
) -> ChosenTaps:
    """Choose the taps that a head reads: those named, else the head's own choice.

    Args:
        features: Feature set.
        head: Head.
        wanted: Taps that the user named.
        options: All options of the head by name.

    Raises:
        NotFoundError: A tap is not stored; the message says how to add it.
        InvalidInputError: It is no tap, or pooled, or the options choose other taps.
    """
    about, stored = features.backbone, features.taps
    depth = int(about["depth"]) if about.get("unit") == "block" and "depth" in about else None
    asked = head.asked_taps(options, depth=depth)
    added = head.added_taps(options, depth=depth)
    named: tuple[str, ...] = ()
    if asked is None:
        named = tuple(dict.fromkeys(_resolved(text, features) for text in wanted))
        named = named or _defaults(features, head)
    elif wanted:
        raise invalid("taps", tuple(wanted), "left out, as the options of the head choose them")
    names = (*(named if asked is None else asked), *added)
    _check_stored(features, names, n_tail=head.n_tail_blocks(options))
    _check_dense(features, names)
    return ChosenTaps(shapes=tuple(stored[name] for name in names), named=named)


def several_taps(
    features: FeatureSet, wanted: Sequence[str], *, least: int = 2
) -> tuple[TapShape, ...]:
    """Choose dense taps to compare: those named, else all that are stored; first to last.

    Raises:
        NotFoundError: A tap is not stored; the message says how to add it.
        InvalidInputError: It is no tap, or pooled, or there are fewer than `least`.
    """
    names = [_resolved(text, features) for text in wanted]
    _check_stored(features, names, n_tail=0)
    _check_dense(features, names)
    stored = features.taps
    dense = [name for name in names or stored if stored[name].grid is not None]
    if len(set(dense)) < least:
        hint = "Add some with `featstore extract --taps`."
        raise invalid("taps", tuple(dense), f"at least {least} dense taps to compare", hint=hint)
    return tuple(stored[tap] for tap in from_first_to_last(dict.fromkeys(dense)))


def _defaults(features: FeatureSet, head: type[Head]) -> tuple[str, ...]:
    dense = {tap: shape for tap, shape in features.taps.items() if shape.grid is not None}
    input_hw = None if features.plan is None else features.plan.image_size
    return head.default_taps(dense, input_hw=input_hw)


def _check_dense(features: FeatureSet, names: Sequence[str]) -> None:
    for name in names:
        if features.taps[name].grid is None:
            expected = "a dense tap; this one is pooled"
            raise invalid("tap", name, expected, hint="Leave out the pool.")


def _check_stored(features: FeatureSet, names: Sequence[str], *, n_tail: int) -> None:
    """Refuse taps that are not stored, with one command that adds all that is lacking."""
    missing = [name for name in dict.fromkeys(names) if name not in features.taps]
    if not missing:
        return
    hint = ""
    if not features.is_foreign:
        tail = features.tail_spec
        lacks_tail = n_tail > (0 if tail is None else tail.n_blocks)
        command = extract_command(
            features.folder, taps=missing, tail=n_tail if lacks_tail else None
        )
        which = "it" if len(missing) == 1 else " and ".join(missing)
        hint = f"Add {which}: `{command}`."
    raise not_found("tap", missing[0], features.taps, hint=hint)


def _resolved(text: str, features: FeatureSet) -> str:
    """Write a tap as it is stored: positive, where the depth of the backbone is known."""
    about = features.backbone
    if "depth" in about and "unit" in about:
        n_prefix = int(about.get("n_prefix", 0))
        return resolve_taps(
            [text], unit=about["unit"], depth=int(about["depth"]), n_prefix=n_prefix
        )[0]
    return str(parse_tap(text))
