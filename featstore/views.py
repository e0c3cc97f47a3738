"""Views: ways to show one image to the backbone, each a row of its own.

``plain`` is the image as it is, ``hflip`` its mirror image, ``crop:SEED:N`` a part of it. The name
and the image decide the part, whatever else is extracted with it, so that views can be added.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable

from featstore.errors import InvalidInputError, invalid
from featstore.order import draw_keys
from featstore.types import Box

PLAIN, HFLIP = "plain", "hflip"
MIN_CROP_AREA = 0.25
"""Of the whole: the least that a crop shows."""

_CROP = re.compile(r"crop:(0|[1-9][0-9]*):(0|[1-9][0-9]*)")
_CROPS = re.compile(r"crops:([1-9][0-9]*)(?:,seed=(0|[1-9][0-9]*))?")
_EXPECTED = "plain, hflip or crops:N[,seed=S]"


def parse_views(wanted: Iterable[str]) -> tuple[str, ...]:
    """List the views that are asked for, each once; the plain view is always the first.

    Args:
        wanted: "plain", "hflip", "crops:N" or "crops:N,seed=S" (N crops, seed 0 if none is
            named), names of single crops, or several of these with commas between them.

    Raises:
        InvalidInputError: One of them is no view.
    """
    views = [PLAIN]
    for text in wanted:
        # A comma also parts the options of a view, which have "=".
        for spec in re.split(r",(?!\w+=)", text):
            views += _expand(spec)
    return tuple(dict.fromkeys(views))


def _expand(spec: str) -> list[str]:
    if spec in (PLAIN, HFLIP) or _CROP.fullmatch(spec):
        return [spec]
    match = _CROPS.fullmatch(spec)
    if match is None:
        raise invalid("views", spec, _EXPECTED, hint="Try hflip or crops:4,seed=0.")
    return [f"crop:{match[2] or 0}:{number}" for number in range(int(match[1]))]


def check_view(view: str) -> None:
    """Check the name of one view.

    Raises:
        InvalidInputError: It is none.
    """
    if view not in (PLAIN, HFLIP) and _CROP.fullmatch(view) is None:
        raise invalid("view", view, "plain, hflip or crop:SEED:N")


def check_importable(views: Iterable[str]) -> None:
    """Refuse views of imported features: without a backbone there is only what was given.

    Raises:
        InvalidInputError: There is one beside the plain view.
    """
    others = [view for view in views if view != PLAIN]
    if others:
        raise InvalidInputError(
            f"Imported features have no image to show otherwise, so {others[0]} cannot be made. "
            "Leave out --views."
        )


def region_of(view: str, image_key: str, whole: Box) -> Box:
    """Give the part of an image that a view shows.

    A crop has the aspect of the whole, a quarter of its area or more, evenly spread, and lies
    anywhere in it, a whole number of pixels from its corner.

    Args:
        view: Name of the view.
        image_key: Of the image.
        whole: What the plain view shows, in source pixels.
    """
    match = _CROP.fullmatch(view)
    if match is None:
        return whole
    digest = hashlib.sha256(f"{image_key} {whole}".encode()).digest()
    drawn = draw_keys(3, int(match[1]), int(match[2]), int.from_bytes(digest[:16], "big"))
    area, x, y = ((int(key) >> 11) * 2.0**-53 for key in drawn)  # in [0, 1)
    side = math.sqrt(MIN_CROP_AREA + (1 - MIN_CROP_AREA) * area)
    x0, x1 = _part(whole[0], whole[2], side, x)
    y0, y1 = _part(whole[1], whole[3], side, y)
    return (x0, y0, x1, y1)


def _part(start: float, stop: float, side: float, place: float) -> tuple[float, float]:
    """Take `side` of an interval, in whole pixels, at one of the places that it can have."""
    length = stop - start
    n_pixels = max(round(length * side), 1)
    if n_pixels >= length:
        return start, stop
    first = start + math.floor(place * (math.floor(length) - n_pixels + 1))
    return first, first + n_pixels
