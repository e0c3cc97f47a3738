"""Views: ways to show one image to the backbone, each a row of its own.

``plain`` is the image as it is, ``hflip`` its mirror image, ``crop:SEED:N`` a part of it, and
``jitter:SEED:N`` the crop around a box as a worse box would have it. The name and the image decide
the part, whatever else is extracted with it, so that views can be added.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable

from featstore.crops import inside
from featstore.errors import InvalidInputError, invalid
from featstore.order import draw_keys
from featstore.types import Box

PLAIN, HFLIP = "plain", "hflip"
MIN_CROP_AREA = 0.25
"""Of the whole: the least that a crop shows."""

JITTER = 0.1
"""How far a jittered crop is moved and scaled at most, in its sides, where nothing else is said."""

_NUMBER = r"(0|[1-9][0-9]*)"
_AMOUNT = r"(0\.[0-9]*[1-9])"  # in (0, 1), written in one way alone
_CROP = re.compile(rf"crop:{_NUMBER}:{_NUMBER}")
_CROPS = re.compile(rf"crops:([1-9][0-9]*)(?:,seed={_NUMBER})?")
_JITTER = re.compile(rf"jitter:{_NUMBER}:{_NUMBER}(?::{_AMOUNT})?")
_JITTERS = re.compile(rf"jitter:([1-9][0-9]*)(?:,seed={_NUMBER})?(?:,amount={_AMOUNT})?")
_EXPECTED = "plain, hflip, crops:N[,seed=S] or jitter:N[,seed=S][,amount=A]"


def parse_views(wanted: Iterable[str]) -> tuple[str, ...]:
    """List the views that are asked for, each once; the plain view is always the first.

    Args:
        wanted: "plain", "hflip", "crops:N" or "crops:N,seed=S" (N crops, seed 0 if none is
            named), "jitter:N", "jitter:N,seed=S" or "jitter:N,seed=S,amount=A" (N jittered crops,
            `JITTER` if no amount is named), names of single ones, or several of these with commas
            between them.

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
    if _is_view(spec):
        return [spec]
    if match := _CROPS.fullmatch(spec):
        return [f"crop:{match[2] or 0}:{number}" for number in range(int(match[1]))]
    match = _JITTERS.fullmatch(spec)
    if match is None:
        raise invalid("views", spec, _EXPECTED, hint="Try hflip or crops:4,seed=0.")
    # One view has one name, whether its amount was said or not.
    amount = "" if match[3] in (None, str(JITTER)) else f":{match[3]}"
    return [f"jitter:{match[2] or 0}:{number}{amount}" for number in range(int(match[1]))]


def _is_view(name: str) -> bool:
    """Tell whether this is the name of one view."""
    match = _JITTER.fullmatch(name)
    is_jitter = match is not None and match[3] != str(JITTER)
    return name in (PLAIN, HFLIP) or _CROP.fullmatch(name) is not None or is_jitter


def is_jitter(view: str) -> bool:
    """Tell whether a view moves a crop around a box, so that without a box there is none."""
    return _JITTER.fullmatch(view) is not None


def check_view(view: str) -> None:
    """Check the name of one view.

    Raises:
        InvalidInputError: It is none.
    """
    if not _is_view(view):
        raise invalid("view", view, "plain, hflip, crop:SEED:N or jitter:SEED:N[:AMOUNT]")


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
    """Give the part of an image that a view shows, a jittered crop alone left to `jittered`.

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
    area, x, y = _drawn(match, image_key, whole)
    side = math.sqrt(MIN_CROP_AREA + (1 - MIN_CROP_AREA) * area)
    x0, x1 = _part(whole[0], whole[2], side, x)
    y0, y1 = _part(whole[1], whole[3], side, y)
    return (x0, y0, x1, y1)


def jittered(view: str, image_key: str, crop: Box, image_hw: tuple[int, int]) -> Box:
    """Move and scale the crop around a box, as if the box had been found a little wrong.

    The crop goes along x and y by up to the view's amount of its sides and its sides grow or
    shrink by up to that part, each evenly spread. At the image's border it is moved in, as
    `crops.square_crop` does; what then hangs over is for the caller to cut.

    Args:
        view: Name of a view that `is_jitter`.
        image_key: Of the image.
        crop: What the plain view shows, in source pixels, uncut.
        image_hw: Height and width of the image.

    Returns:
        Corners in hundredths of a pixel.
    """
    match = _JITTER.fullmatch(view)
    assert match is not None
    amount = JITTER if match[3] is None else float(match[3])
    by = [amount * (2 * each - 1) for each in _drawn(match, image_key, crop)]
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    middle = ((crop[0] + crop[2]) / 2 + by[1] * width, (crop[1] + crop[3]) / 2 + by[2] * height)
    half = (width * (1 + by[0]) / 2, height * (1 + by[0]) / 2)
    (x, y), (dx, dy) = middle, half
    return inside((x - dx, y - dy, x + dx, y + dy), image_hw)


def _drawn(match: re.Match[str], image_key: str, region: Box) -> tuple[float, float, float]:
    """Draw three numbers in [0, 1) by seed and number of a view, the image and its region."""
    digest = hashlib.sha256(f"{image_key} {region}".encode()).digest()
    keys = draw_keys(3, int(match[1]), int(match[2]), int.from_bytes(digest[:16], "big"))
    first, second, third = ((int(key) >> 11) * 2.0**-53 for key in keys)
    return first, second, third


def _part(start: float, stop: float, side: float, place: float) -> tuple[float, float]:
    """Take `side` of an interval, in whole pixels, at one of the places that it can have."""
    length = stop - start
    n_pixels = max(round(length * side), 1)
    if n_pixels >= length:
        return start, stop
    first = start + math.floor(place * (math.floor(length) - n_pixels + 1))
    return first, first + n_pixels
