"""Boxes that a data set names, as labels of the kind "boxes": a table in place of a map.

They stand among the attributes of items, as JSON, with the words of COCO and PASCAL VOC:
``box`` (x0, y0, x1, y1 in continuous source pixels), ``area``, ``iscrowd``, ``difficult``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from featstore.errors import InvalidInputError

BOXES = "boxes"
"""The kind of label that lists boxes, and is no map."""

COUNTED, CROWD, DIFFICULT = 0, 1, 2
"""What a box is: to be found, a region of many things, or one that need not be found."""


def boxes_text(attributes: str) -> str | None:
    """Take the boxes out of an item's attributes, JSON both; None where it names none."""
    boxes = json.loads(attributes).get(BOXES)
    return None if boxes is None else json.dumps(boxes, sort_keys=True)


def box_table(text: str) -> np.ndarray:
    """Read boxes as a table.

    Returns:
        (n, 6) float64: x0, y0, x1, y1, the area in square pixels (of the box where none is told),
        and `COUNTED`, `CROWD` or `DIFFICULT`.

    Raises:
        InvalidInputError: A box has no size or no corners.
    """
    try:
        rows = [_row(box) for box in json.loads(text)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"Its boxes do not read as x0, y0, x1, y1 ({error}).") from error
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def _row(box: Mapping[str, Any]) -> list[float]:
    x0, y0, x1, y1 = (float(side) for side in box["box"])
    if not (x0 < x1 and y0 < y1):  # also false for NaN
        raise ValueError(f"a box of no size: {[x0, y0, x1, y1]}")
    area = box.get("area")
    size = (x1 - x0) * (y1 - y0) if area is None else float(area)
    kind = CROWD if box.get("iscrowd") else DIFFICULT if box.get("difficult") else COUNTED
    return [x0, y0, x1, y1, size, float(kind)]
