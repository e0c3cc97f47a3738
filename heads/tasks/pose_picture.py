"""Skeletons drawn over images."""

from __future__ import annotations

import numpy as np

from featstore.skeleton import Skeleton

_LEFT, _RIGHT, _MIDDLE = (255, 138, 0), (0, 158, 255), (88, 214, 70)
_OUTLINE = (20, 20, 20)


def draw_pose(image_hwc: np.ndarray, points: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """Draw a skeleton on a copy of an image: edges below, keypoints above, both with an outline.

    Args:
        image_hwc: (H, W, 3) uint8.
        points: (K, 2) or more columns; x and y in pixels of the image, NaN where not known.
        skeleton: Whose keypoints they are.
    """
    canvas = image_hwc.astype(np.float32)
    width = max(1.5, max(image_hwc.shape[:2]) / 110)
    colours = keypoint_colours(skeleton)
    known = np.isfinite(points[:, :2]).all(axis=1)
    edges = [(a, b) for a, b in skeleton.edges if known[a] and known[b]]
    for a, b in edges:
        _draw_line(canvas, points[a, :2], points[b, :2], width + 1.5, _OUTLINE)
    for a, b in edges:
        sided = a if tuple(colours[a]) != _MIDDLE else b
        _draw_line(canvas, points[a, :2], points[b, :2], width, colours[sided])
    for number in np.flatnonzero(known):
        place = points[number, :2]
        _draw_line(canvas, place, place, 2 * width + 1.5, _OUTLINE)
        _draw_line(canvas, place, place, 2 * width, colours[number])
    return np.rint(canvas).astype(np.uint8)


def keypoint_colours(skeleton: Skeleton) -> np.ndarray:
    """Give (K, 3) uint8: the animal's left orange, its right blue, the middle green."""
    colours = np.full((len(skeleton.names), 3), _MIDDLE, dtype=np.uint8)
    for one, other in skeleton.swaps or ():
        colours[[one, other]] = (_LEFT, _RIGHT)
    return colours


def _draw_line(
    canvas: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    width: float,
    colour: tuple[int, int, int] | np.ndarray,
) -> None:
    """Draw a line with round, smooth ends into a float canvas; a dot where it has no length."""
    reach = width / 2 + 1
    low = np.floor(np.minimum(start, end) - reach).astype(int)
    high = np.ceil(np.maximum(start, end) + reach).astype(int)
    x0, y0 = np.maximum(low, 0)
    x1, y1 = np.minimum(high, canvas.shape[1::-1])
    if x0 >= x1 or y0 >= y1:
        return
    centres = np.stack(np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5), axis=-1)
    along = end - start
    share = np.clip((centres - start) @ along / max(float(along @ along), 1e-12), 0, 1)
    distance = np.linalg.norm(centres - start - share[..., None] * along, axis=-1)
    cover = np.clip(width / 2 - distance + 0.5, 0, 1)[..., None]
    part = canvas[y0:y1, x0:x1]
    part += cover * (np.asarray(colour, dtype=np.float32) - part)
