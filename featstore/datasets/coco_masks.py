"""The one door to pycocotools: polygons and run lengths of COCO become a map of instances."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from featstore.datasets.coco_json import CocoObject
from featstore.errors import BadImageError

CROWD = -1


def instance_map(objects: Sequence[CocoObject], hw: tuple[int, int], *, source: str) -> np.ndarray:
    """Paint all objects of one image.

    Annotations may overlap, which a map cannot: the object of more pixels is painted first, so
    that a small one on it stays visible; of two of equal size the later one is seen.

    Args:
        objects: Annotations of one image.
        hw: Height and width of the image.
        source: What to call the image in messages.

    Returns:
        (H, W) int32: 0 background, 1 to n the objects in the order of their annotations, crowds
        left out of the count; `CROWD` where a crowd is and no object.

    Raises:
        BadImageError: A segmentation does not decode or is of another size.
    """
    values = np.zeros(hw, dtype=np.int32)
    masks = [_decode(entry, hw, source=source) for entry in objects]
    for entry, mask in zip(objects, masks, strict=True):
        if entry.is_crowd:
            values[mask] = CROWD
    single = [mask for entry, mask in zip(objects, masks, strict=True) if not entry.is_crowd]
    n_pixels = np.array([int(mask.sum()) for mask in single], dtype=np.int64)
    for index in np.argsort(-n_pixels, kind="stable"):
        values[single[index]] = index + 1
    return values


def _decode(entry: CocoObject, hw: tuple[int, int], *, source: str) -> np.ndarray:
    """Give one object's mask, (H, W) bool."""
    place = f"Annotation {entry.annotation_id} of {source}"
    if isinstance(entry.segmentation, Mapping):
        runs = _check_runs(entry.segmentation, hw, place=place)
    else:
        runs = _join_polygons(entry.segmentation, hw, place=place)
    try:
        return np.asarray(coco_mask.decode(runs), dtype=bool)
    except (ValueError, TypeError, KeyError) as error:
        raise BadImageError(f"{place} has no readable run lengths ({error}).") from error


def _join_polygons(
    polygons: Sequence[array[float]], hw: tuple[int, int], *, place: str
) -> dict[str, Any]:
    # pycocotools takes four numbers for a box, and would paint that instead.
    if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise BadImageError(
            f"{place} must have polygons of three corners (6 numbers) or more. "
            f"Got {[len(polygon) for polygon in polygons]} numbers."
        )
    reach = max(max(map(abs, polygon)) for polygon in polygons)
    if not reach <= 2 * max(hw):  # also false for NaN
        raise BadImageError(
            f"{place} must lie in its image of {hw[0]}x{hw[1]} pixels. Got a corner at {reach:g}."
        )
    runs = coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], *hw)
    joined: dict[str, Any] = coco_mask.merge(runs)
    return joined


def _check_runs(runs: Mapping[str, Any], hw: tuple[int, int], *, place: str) -> dict[str, Any]:
    size, counts = runs.get("size"), runs.get("counts")
    if size is None or tuple(size) != hw:
        raise BadImageError(
            f"{place} must have run lengths of its image's size [{hw[0]}, {hw[1]}]. Got {size}."
        )
    if isinstance(counts, str):
        return {"size": list(hw), "counts": counts.encode("ascii", errors="replace")}
    is_whole = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
    if not isinstance(counts, list) or not is_whole or sum(counts) != hw[0] * hw[1]:
        raise BadImageError(
            f"{place} must have run lengths that add up to {hw[0] * hw[1]} pixels, or text."
        )
    packed: dict[str, Any] = coco_mask.frPyObjects({"size": list(hw), "counts": counts}, *hw)
    return packed
