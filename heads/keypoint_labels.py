"""Keypoints that a data set marks, as labels of the kind "keypoints": a record, not a map.

They stand among the attributes of an item, as JSON: ``keypoints`` lists (x, y, v) in continuous
source pixels, in the order of the data set's skeleton, v being 0 where a point is not marked, 1
where it is hidden and 2 where it is seen; ``box`` (x0, y0, x1, y1) is that of the animal and
``area`` its size. Who it is (the species, the individual) is the item's own label.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from featstore.errors import InvalidInputError

KEYPOINTS = "keypoints"
"""The kind of label that marks keypoints, and is no map."""


def keypoints_text(attributes: str, identity: str | None) -> str | None:
    """Take what a keypoint label holds out of an item; None where it marks none.

    Args:
        attributes: Of the item, as JSON.
        identity: The item's label.
    """
    values = json.loads(attributes)
    if values.get(KEYPOINTS) is None:
        return None
    about = {name: values.get(name) for name in (KEYPOINTS, "box", "area")}
    return json.dumps({**about, "identity": identity}, sort_keys=True)


def keypoint_record(text: str) -> np.ndarray:
    """Read a keypoint label.

    Returns:
        A record without axes: ``keypoints`` (K, 3) float64, x and y in continuous source pixels
        (0 where v is 0) and v; ``box`` (4,) float64, NaN where none is known; ``area`` in square
        pixels (of the box where it is not told, else NaN); ``identity``, "" where nobody knows.

    Raises:
        InvalidInputError: It does not read so, or no keypoint in it is marked.
    """
    try:
        about = json.loads(text)
        points = np.array(about[KEYPOINTS], dtype=np.float64).reshape(-1, 3)
        is_marked = points[:, 2] > 0
        if not np.isfinite(points[is_marked]).all():
            raise ValueError("a marked keypoint has no place")
        box = np.full(4, np.nan) if about["box"] is None else np.array(about["box"], dtype=float)
        x0, y0, x1, y1 = box.tolist()
        area = (x1 - x0) * (y1 - y0) if about["area"] is None else float(about["area"])
        identity = about["identity"] or ""
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidInputError(f"Its keypoints do not read as x, y, v ({error}).") from error
    if not is_marked.any():
        raise InvalidInputError("None of its keypoints is marked (v is 0 for all).")
    points[~is_marked] = 0.0
    kinds: Any = [
        (KEYPOINTS, np.float64, points.shape),
        ("box", np.float64, (4,)),
        ("area", np.float64),
        ("identity", f"U{max(1, len(identity))}"),
    ]
    return np.array((points, box, area if math.isfinite(area) else np.nan, identity), dtype=kinds)
