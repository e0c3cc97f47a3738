"""Boxes of objects from the XML files of PASCAL VOC."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from featstore.errors import InvalidInputError

FLAGS = ("truncated", "difficult", "occluded")


def read_boxes(path: Path) -> list[dict[str, Any]] | None:
    """Read the boxes of one image.

    VOC counts pixels from 1 and includes the last one, so that a box of the first pixel alone is
    (1, 1, 1, 1); in continuous pixels that is (0, 0, 1, 1).

    Returns:
        JSON values, a box each: "class", "box" (x0, y0, x1, y1 in continuous pixels), and, where
        the file tells, "truncated", "difficult" and "occluded". None where there is no file.

    Raises:
        InvalidInputError: The file is no XML, or a box in it is incomplete.
    """
    if not path.is_file():
        return None
    try:
        objects = ET.parse(path).getroot().findall("object")
    except (ET.ParseError, OSError) as error:
        raise InvalidInputError(f"{path} cannot be read as XML ({error}).") from error
    return [_read_object(node, source=f"Object {n} in {path}") for n, node in enumerate(objects, 1)]


def _read_object(node: ET.Element, *, source: str) -> dict[str, Any]:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise InvalidInputError(f"{source} must have a <name>. Got none; add the class.")
    sides = [_number(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = sides[0] - 1, sides[1] - 1, sides[2], sides[3]
    if not (x0 < x1 and y0 < y1):  # also false for a missing side, which is NaN
        raise InvalidInputError(
            f"{source} must have a <bndbox> with xmin <= xmax and ymin <= ymax. Got {sides}."
        )
    found: dict[str, Any] = {"class": name, "box": [x0, y0, x1, y1]}
    for flag in FLAGS:
        text = node.findtext(flag)
        if text is None:
            continue
        if text.strip() not in ("0", "1"):
            raise InvalidInputError(f"{source} must have 0 or 1 in <{flag}>. Got {text!r}.")
        found[flag] = text.strip() == "1"
    return found


def _number(text: str | None) -> float:
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    return number if math.isfinite(number) else math.nan
