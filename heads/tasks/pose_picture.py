"""Skeletons drawn over images."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from featstore.geometry import to_input, to_source
from featstore.images import draw
from featstore.skeleton import Skeleton, side_of
from featstore.types import Placement
from heads.tasks.colours import dimmed

SIDES = {"left": (255, 140, 0), "right": (0, 160, 255), None: (98, 214, 72)}
"""Colours of the animal's left, its right, and what lies in the middle or has no side."""

_OUTLINE, _TRUTH, _ERROR = (24, 24, 24), (255, 255, 255), (255, 64, 64)
_CLOSE_SIDE = 572  # pixels of a close-up: two for each that is seen in a panel
_FAINTEST = 0.4  # opacity of a keypoint of no confidence


def draw_pose(
    image_hwc: np.ndarray,
    points: np.ndarray,
    skeleton: Skeleton,
    *,
    is_hidden: np.ndarray | None = None,
) -> np.ndarray:
    """Draw a skeleton on a copy of an image: edges below, keypoints above, both with an outline.

    Args:
        image_hwc: (H, W, 3) uint8.
        points: (K, 2) x and y in pixels of the image, NaN where not known; or (K, 3) with a
            confidence from 0 to 1 (NaN: not known), by which it is faint or strong.
        skeleton: Whose keypoints they are.
        is_hidden: (K,) bool: keypoints to draw as rings.
    """
    canvas = image_hwc.astype(np.float32)
    places = points[:, :2].astype(np.float64)
    sure = np.nan_to_num(points[:, 2], nan=1.0) if points.shape[1] > 2 else np.ones(len(points))
    opacity = _FAINTEST + (1 - _FAINTEST) * np.clip(sure, 0, 1)
    known: np.ndarray = np.isfinite(places).all(axis=1)
    width = _line_width(image_hwc, places[known])
    colours = [SIDES[side_of(name)] for name in skeleton.names]
    edges = [(a, b) for a, b in skeleton.edges if known[a] and known[b]]
    for a, b in edges:
        one, shown = (places[a], places[b]), min(opacity[a], opacity[b])
        _draw_line(canvas, *one, width + 2, _OUTLINE, 0.6 * shown)
        sided = b if side_of(skeleton.names[a]) is None else a
        _draw_line(canvas, *one, width, colours[sided], shown)
    hidden = np.zeros(len(places), bool) if is_hidden is None else is_hidden
    for number in np.flatnonzero(known):
        inner = _OUTLINE if hidden[number] else colours[number]
        _draw_dot(canvas, places[number], width, colours[number], inner, opacity[number])
    return np.rint(canvas).astype(np.uint8)


def draw_errors(image_hwc: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Draw, on a dark copy of an image, a line from each true keypoint, white, to the found one.

    Args:
        image_hwc: (H, W, 3) uint8.
        found: (K, 2) or more columns, x and y in pixels of the image.
        truth: (K, 2), NaN where not marked.
    """
    canvas = dimmed(image_hwc).astype(np.float32)
    known = np.isfinite(truth).all(axis=1) & np.isfinite(found[:, :2]).all(axis=1)
    width = _line_width(image_hwc, truth[known])
    for start, end in zip(truth[known], found[known, :2].astype(np.float64), strict=True):
        _draw_line(canvas, start, end, width, _ERROR, 1.0)
        _draw_dot(canvas, start, 0.7 * width, _TRUTH, _TRUTH, 1.0)
    return np.rint(canvas).astype(np.uint8)


def draw_box(image_hwc: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Draw a box on a copy of an image: (2, 2) x and y of two opposite corners, in its pixels."""
    canvas = image_hwc.astype(np.float32)
    (x0, y0), (x1, y1) = corners
    ends = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]], dtype=np.float64)
    width = max(1.0, max(image_hwc.shape[:2]) / 400)
    for colour, size in ((_OUTLINE, width + 2), (_TRUTH, width)):
        for start, end in pairwise(ends):
            _draw_line(canvas, start, end, size, colour, 0.8)
    return np.rint(canvas).astype(np.uint8)


def side_colours(skeleton: Skeleton) -> dict[str, tuple[int, int, int]]:
    """Name the colours that keypoints of a skeleton have: a legend."""
    there = {side_of(name) for name in skeleton.names}
    return {side or "middle": colour for side, colour in SIDES.items() if side in there}


def close_up(
    image_hwc: np.ndarray, placement: Placement, *, side: int = _CLOSE_SIDE
) -> tuple[np.ndarray, Placement]:
    """Cut out what the input showed of an image, and enlarge it.

    Args:
        image_hwc: (h, w, 3) uint8, of any resolution.
        placement: How the image was drawn into the input.
        side: Longer side of the picture, in pixels.

    Returns:
        The picture, and how it, in place of the image, was drawn into the input.
    """
    x0, y0, x1, y1 = placement.box
    shrink = side / max(x1 - x0, y1 - y0)
    size_hw = (max(1, round((y1 - y0) * shrink)), max(1, round((x1 - x0) * shrink)))
    rows, columns = (image_hwc.shape[axis] / placement.source_hw[axis] for axis in (0, 1))
    whole = (0, 0, size_hw[1], size_hw[0])
    cut = Placement(
        source_hw=(image_hwc.shape[0], image_hwc.shape[1]),
        input_hw=size_hw,
        box=(x0 * columns, y0 * rows, x1 * columns, y1 * rows),
        dst=whole,
    )
    picture = draw(image_hwc, cut, interpolation="bicubic", fill_rgb=(128, 128, 128))
    box = (0.0, 0.0, float(size_hw[1]), float(size_hw[0]))
    return picture, replace(placement, source_hw=size_hw, box=box)


def moved(points_xy: np.ndarray, old: Placement, new: Placement) -> np.ndarray:
    """Bring points from the pixels of one source to those of another, by the input they share."""
    return to_source(new, to_input(old, points_xy))


def _line_width(image_hwc: np.ndarray, places: np.ndarray) -> float:
    """Choose a width that the animal and the picture bear."""
    side = max(image_hwc.shape[:2])
    extent = float(np.ptp(places, axis=0).max()) if len(places) else 0.0
    return float(np.clip(extent / 40, max(1.2, side / 320), max(1.5, side / 100)))


def _draw_dot(
    canvas: np.ndarray,
    place: np.ndarray,
    width: float,
    colour: tuple[int, int, int],
    inner: tuple[int, int, int],
    opacity: float,
) -> None:
    size = 2.5 * width
    _draw_line(canvas, place, place, size + 2, _OUTLINE, 0.8 * opacity)
    _draw_line(canvas, place, place, size, colour, opacity)
    if inner != colour:
        _draw_line(canvas, place, place, 0.5 * size, inner, opacity)


def _draw_line(
    canvas: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    width: float,
    colour: tuple[int, int, int],
    opacity: float,
) -> None:
    """Draw a line with round, smooth ends into a float canvas; a dot where it has no length."""
    reach = width / 2 + 1
    low = np.floor(np.minimum(start, end) - reach)
    high = np.ceil(np.maximum(start, end) + reach)
    x0, y0 = np.clip(low, 0, canvas.shape[1::-1]).astype(int)
    x1, y1 = np.clip(high, 0, canvas.shape[1::-1]).astype(int)
    if x0 >= x1 or y0 >= y1:
        return
    centres = np.stack(np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5), axis=-1)
    along = end - start
    share = np.clip((centres - start) @ along / max(float(along @ along), 1e-12), 0, 1)
    distance = np.linalg.norm(centres - start - share[..., None] * along, axis=-1)
    cover = opacity * np.clip(width / 2 - distance + 0.5, 0, 1)[..., None]
    part = canvas[y0:y1, x0:x1]
    part += cover * (np.asarray(colour, dtype=np.float32) - part)
