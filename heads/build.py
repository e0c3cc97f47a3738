"""Heads by name, those we ship included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featstore.tail import TailSpec
from featstore.types import TapShape
from heads import (  # noqa: F401  (each files itself)
    bicubic,
    conv,
    deap,
    identity_token,
    linear,
    maxa,
    pooled,
    self_attention,
    vit_split,
    vit_split_prior,
)
from heads.base import HEADS, Head
from heads.options import parse_options
from heads.side_by_side import SideBySide

__all__ = ["HEADS", "build_head"]


def build_head(
    name: str,
    *,
    taps: Sequence[TapShape],
    n_outputs: int | Sequence[int],
    options: Mapping[str, Any] | None = None,
    tail: TailSpec | None = None,
) -> Head:
    """Make a head by name; options may be text, as from a command line.

    Its weights come from torch's global random numbers: seed those first.

    Args:
        name: Registered name, with or without its version.
        taps: What it reads.
        n_outputs: Output channels; several numbers make as many heads, side by side.
        options: Options of the head; may be text.
        tail: The last blocks of the backbone, for a head that copies them.

    Raises:
        NotFoundError: The head or an option is not known.
        InvalidInputError: An option has a wrong value, or the taps do not suit the head.
    """
    head_type = HEADS[name]
    chosen = parse_options(head_type.OPTIONS, options or {})
    if tail is not None:
        chosen["tail"] = tail
    counts = (n_outputs,) if isinstance(n_outputs, int) else tuple(n_outputs)
    heads = [head_type(taps=taps, n_outputs=count, **chosen) for count in counts]
    return heads[0] if len(heads) == 1 else SideBySide(heads)
