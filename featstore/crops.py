"""Crops around one thing of an image: the region that a row of it shows."""

from __future__ import annotations

from featstore.types import Box

BOX_SCALE = 1.25
"""How much longer than the box's longer side the side of a crop is, where nothing else is said."""


def square_crop(box: Box, *, scale: float, image_hw: tuple[int, int] | None) -> Box:
    """Put a square around a box.

    What of a box hangs over the image's border does not count. A square that hangs over is moved
    into the image where it fits, so that it stays a square after it is cut at the border; one
    that is longer than the image covers it along that side.

    Args:
        box: In continuous pixels of the image.
        scale: Side of the square, in longer sides of the box.
        image_hw: Height and width of the image; None where nobody knows: then nothing is moved.

    Returns:
        Corners in hundredths of a pixel. A box beside the image gives a square beside it, which
        an extraction refuses.
    """
    if image_hw is not None and _overlaps(box, image_hw):
        height, width = image_hw
        x0, y0, x1, y1 = box
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    side = scale * max(box[2] - box[0], box[3] - box[1])
    x0, y0 = (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2
    square = (x0, y0, x0 + side, y0 + side)
    if image_hw is not None and _overlaps(box, image_hw):
        return inside(square, image_hw)
    return _rounded(square)


def inside(region: Box, image_hw: tuple[int, int]) -> Box:
    """Move a region into the image; along a side where it is longer, it then covers the image.

    Args:
        region: In continuous pixels of the image.
        image_hw: Height and width of the image.

    Returns:
        Corners in hundredths of a pixel.
    """
    x0, y0, x1, y1 = region
    width, height = x1 - x0, y1 - y0
    x0, y0 = _moved(x0, width, image_hw[1]), _moved(y0, height, image_hw[0])
    return _rounded((x0, y0, x0 + width, y0 + height))


def _rounded(box: Box) -> Box:
    x0, y0, x1, y1 = (round(value, 2) for value in box)
    return (x0, y0, x1, y1)


def _overlaps(box: Box, image_hw: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = box
    return x0 < image_hw[1] and y0 < image_hw[0] and x1 > 0 and y1 > 0


def _moved(start: float, side: float, length: int) -> float:
    """Move an interval so that it lies in ``[0, length]``, or covers it where it is longer."""
    low, high = sorted((0.0, length - side))
    return min(max(start, low), high)
