"""Solids of made-up pictures: which bone is in front at each pixel, and how light falls on it.

As in `featstore.datasets.shading`, only operations that give the same bits on every machine are
used: no sine, power or exponential, no sums whose order is the library's choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from featstore.datasets.creature_view import Balls
from featstore.datasets.scenes import Vector
from featstore.types import Box

_FADE = 0.7  # pixels over which an outline fades
_FAR = np.float32(-1e9)
F = np.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Canvas:
    """What stands in front at each pixel, arrays (H, W) float32 but for `cover`."""

    depth: np.ndarray
    normal_x: np.ndarray
    normal_y: np.ndarray  # down
    along: np.ndarray  # distance along the bone in pixels
    alpha: np.ndarray  # how much of the pixel is covered
    cover: np.ndarray  # uint8


class Grain:
    """Random bytes that are the same with every version of NumPy."""

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))

    def bytes(self, *shape: int) -> np.ndarray:
        """Give uint8 noise."""
        count = math.prod(shape)
        raw = self._bits.random_raw(count // 8 + 1)
        return raw.astype("<u8", copy=False).view(np.uint8)[:count].reshape(shape)

    def speckle(self, hw: tuple[int, int], cell: tuple[int, int]) -> np.ndarray:
        """Give noise in [0, 1] whose cells (rows, columns of pixels) have hard edges."""
        knots = self.bytes(hw[0] // cell[0] + 1, hw[1] // cell[1] + 1) * F(1 / 255)
        tall = knots if cell[0] == 1 else np.repeat(knots, cell[0], axis=0)
        return np.repeat(tall, cell[1], axis=1)[: hw[0], : hw[1]]

    def field(self, hw: tuple[int, int], cells: tuple[float, float]) -> np.ndarray:
        """Give smooth noise in [0, 1], `cells` (rows, columns) being a cell's size in pixels."""
        rows, row_part = _lattice(hw[0], cells[0])
        columns, column_part = _lattice(hw[1], cells[1])
        knots = self.bytes(int(rows[-1]) + 2, int(columns[-1]) + 2).astype(np.float32) * F(1 / 255)
        wide = knots[:, columns] + (knots[:, columns + 1] - knots[:, columns]) * column_part
        smooth = wide[rows]
        rise = (wide[1:] - wide[:-1])[rows]
        rise *= row_part[:, None]
        smooth += rise
        return smooth


def _lattice(length: int, cell: float) -> tuple[np.ndarray, np.ndarray]:
    at = np.arange(length) / max(cell, 1.0)
    low = at.astype(np.int64)
    part = (at - low).astype(np.float32)
    return low, part * part * (3 - 2 * part)


def window_of(box: Box, hw: tuple[int, int]) -> tuple[slice, slice]:
    """Give the rows and columns that a box touches, and a pixel more."""
    top, bottom = max(int(box[1]) - 1, 0), min(int(box[3]) + 2, hw[0])
    left, right = max(int(box[0]) - 1, 0), min(int(box[2]) + 2, hw[1])
    return slice(top, max(bottom, top)), slice(left, max(right, left))


def model(balls: Balls, window: tuple[slice, slice]) -> Canvas:
    """Find which bone is in front at each pixel of a window, and its surface there."""
    shape = (window[0].stop - window[0].start, window[1].stop - window[1].start)
    lines = _lines(balls, window)
    depth, rim = np.full(shape, _FAR), np.full(shape, F(-1))
    front = np.zeros(shape, np.uint8)
    areas = _areas(balls, window)
    surface, edge = _surfaces(lines, areas)
    at = 0
    for number, (x0, y0, x1, y1) in enumerate(areas.tolist()):
        area, here = (slice(y0, y1), slice(x0, x1)), slice(at, at + (y1 - y0) * (x1 - x0))
        mine, at = surface[here].reshape(y1 - y0, x1 - x0), here.stop
        is_front = mine > depth[area]
        np.maximum(depth[area], mine, out=depth[area])
        # The last bone has the highest number.
        np.maximum(front[area], is_front.view(np.uint8) * np.uint8(number), out=front[area])
        np.maximum(rim[area], edge[here].reshape(mine.shape), out=rim[area])
    x = np.arange(shape[1], dtype=np.float32) + F(0.5)
    y = np.arange(shape[0], dtype=np.float32)[:, None] + F(0.5)
    part, across, down, radius = _nearest(lines[:, front], x, y)
    alpha = ramp(rim)
    inverse = (rim > 0) / radius
    return Canvas(
        depth=depth,
        normal_x=across * inverse,
        normal_y=down * inverse,
        along=part * lines[_LENGTH][front],
        alpha=alpha,
        cover=np.array(balls.covers, np.uint8)[front],
    )


def _areas(balls: Balls, window: tuple[slice, slice]) -> np.ndarray:
    """Give the pixels around each bone in a window, (bones, 4) int: x0, y0, x1, y1."""
    corner = np.array([window[1].start, window[0].start])
    limit = np.array([window[1].stop, window[0].stop]) - corner
    reach = balls.widths[..., None] + 1
    low = (balls.ends[..., :2] - reach).min(axis=1) - corner
    high = (balls.ends[..., :2] + reach).max(axis=1) - corner + 1
    low = np.minimum(np.maximum(low, 0), limit)
    high = np.minimum(np.maximum(high, low), limit)
    return np.concatenate([low.astype(np.int64), high.astype(np.int64)], axis=1)


def _surfaces(lines: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each bone's surface in its area, far away beside it, and how far its outline is.

    Returns:
        Two flat arrays, bone after bone, row after row: depth; 0 on the outline, growing inwards.
    """
    sizes = areas[:, 2:] - areas[:, :2]
    widths, heights = sizes.T
    # Each row of each area: its bone, its number and how long it is.
    bone = np.repeat(np.arange(len(areas)), heights)
    row = np.arange(len(bone)) - np.repeat(np.cumsum(heights) - heights, heights) + areas[bone, 1]
    length = widths[bone]
    start = np.cumsum(length) - length
    n_pixels = int(length.sum())
    column = np.arange(n_pixels) - np.repeat(start - areas[bone, 0], length)
    line = lines[:, np.repeat(bone, length)]
    y = np.repeat(row.astype(np.float32) + F(0.5), length)
    part, across, down, radius = _nearest(line, column.astype(np.float32) + F(0.5), y)
    height = radius * radius - across * across - down * down
    surface = line[_Z] + part * line[_RISE] + np.sqrt(np.maximum(height, F(0)))
    return np.where(height > 0, surface, _FAR), height * line[_EDGE]


_X, _Y, _Z, _AX, _AY, _RISE, _KX, _KY, _WIDTH, _WIDEN, _LENGTH, _EDGE = range(12)


def _lines(balls: Balls, window: tuple[slice, slice]) -> np.ndarray:
    """Give what is needed of each bone, (12, bones) float32, in the order of the names above."""
    start, along = balls.ends[:, 0], balls.ends[:, 1] - balls.ends[:, 0]
    square = along[:, 0] * along[:, 0] + along[:, 1] * along[:, 1] + 1e-6
    width = balls.widths[:, 0]
    return np.stack(
        [
            start[:, 0] - window[1].start,
            start[:, 1] - window[0].start,
            start[:, 2],
            *along.T,
            along[:, 0] / square,
            along[:, 1] / square,
            width,
            balls.widths[:, 1] - width,
            np.sqrt(square),
            0.5 / (balls.widths.max(axis=1) * _FADE),
        ]
    ).astype(np.float32)


def _nearest(
    line: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Give which part of a bone is nearest, how far it is across and down, and its radius."""
    across, down = x - line[_X], y - line[_Y]
    part = across * line[_KX] + down * line[_KY]
    np.minimum(np.maximum(part, F(0), out=part), F(1), out=part)
    across -= part * line[_AX]
    down -= part * line[_AY]
    return part, across, down, line[_WIDTH] + part * line[_WIDEN]


def ramp(values: np.ndarray) -> np.ndarray:
    """Turn -0.5 and less into 0, 0.5 and more into 1."""
    return np.minimum(np.maximum(values + F(0.5), F(0)), F(1))


def compose(
    planes: np.ndarray,
    window: tuple[slice, slice],
    canvas: Canvas,
    colours: list[np.ndarray],
    light: Vector,
) -> None:
    """Light what was modelled and lay it over the picture."""
    x, y = _smooth(canvas.normal_x), _smooth(canvas.normal_y)  # skin over the joints
    facing = np.sqrt(np.maximum(F(1) - x * x - y * y, F(0)))
    diffuse = np.maximum(x * F(light[0]) + y * F(light[1]) + facing * F(light[2]), F(0))
    shade = F(0.42) - F(0.1) * y + F(0.62) * diffuse
    nearest = canvas.depth.max()
    shade -= np.minimum((nearest - canvas.depth) * F(0.8 / max(canvas.depth.shape)), F(0.22))
    for channel, plane in enumerate(colours):
        part = planes[channel][window]
        part += canvas.alpha * (plane * shade - part)


def _smooth(plane: np.ndarray) -> np.ndarray:
    """Blur by 1-2-1 along both axes, two pixels apart, but for the border."""
    soft = plane.copy()
    soft[2:-2] = (plane[:-4] + plane[4:]) * F(0.25) + plane[2:-2] * F(0.5)
    plane, soft = soft, soft.copy()
    soft[:, 2:-2] = (plane[:, :-4] + plane[:, 4:]) * F(0.25) + plane[:, 2:-2] * F(0.5)
    return soft
