"""Between the pixels of an original image and the backbone's input: placing, mapping, resampling.

Everything here uses the half-pixel convention of `featstore.types`: pixel ``i`` covers
``[i, i + 1)``, its centre is ``i + 0.5``. An array of any resolution ``output_hw`` that covers the
whole input frame (a token grid, a head's output) has cells of ``input / output`` input pixels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from featstore.errors import BadImageError, invalid
from featstore.plan import parse_resize
from featstore.types import Box, Placement
from featstore.views import HFLIP, check_view

_SLIVER = 1e-3  # a cell with less than this part of it on valid pixels has no value


def place(
    *,
    source_hw: tuple[int, int],
    crop: Box | None,
    input_hw: tuple[int, int],
    resize: str,
    view: str,
) -> Placement:
    """Decide which region of a source image fills which region of the input.

    ``squash`` stretches the region over the whole input; ``letterbox`` keeps the aspect and pads;
    ``crop`` keeps the aspect and drops what hangs over at two sides, the same on both; ``pad``
    keeps the scale and pads around the centre (512 in 518 leaves 3 on each side), and shrinks
    what is larger than the input as ``letterbox`` does, so that nothing is lost. A basis
    (``crop+via:224``) changes no place, only the pixels that `images.draw` gives.

    Args:
        source_hw: Height and width of the source, after EXIF orientation.
        crop: Region to use; what hangs over the image's border is cut off. None: all.
        input_hw: Height and width of the backbone's input.
        resize: One of the rules above; ``via:N`` alone is a squash.
        view: Name of the view; of a crop, `crop` is the region that it shows.

    Raises:
        InvalidInputError: The rule or view is unknown, or a size is not positive.
        BadImageError: `crop` lies outside of the image.
    """
    kind = parse_resize(resize).kind
    check_view(view)
    if min(*source_hw, *input_hw) < 1:
        raise invalid("source_hw, input_hw", (source_hw, input_hw), "positive sizes")
    box = clip_box(crop, source_hw)
    dst = (0, 0, input_hw[1], input_hw[0])
    if kind == "crop":
        box = _covering_box(box, input_hw)
    elif kind in ("letterbox", "pad"):
        dst = _fitting_dst(box, input_hw, max_scale=math.inf if kind == "letterbox" else 1.0)
    return Placement(
        source_hw=source_hw, input_hw=input_hw, box=box, dst=dst, is_flipped=view == HFLIP
    )


def clip_box(crop: Box | None, source_hw: tuple[int, int]) -> Box:
    """Cut a box at the image's border; None gives the whole image.

    Raises:
        BadImageError: Nothing of the box lies on the image.
    """
    height, width = source_hw
    if crop is None:
        return (0.0, 0.0, float(width), float(height))
    x0, y0 = max(float(crop[0]), 0.0), max(float(crop[1]), 0.0)
    x1, y1 = min(float(crop[2]), float(width)), min(float(crop[3]), float(height))
    if not (x1 > x0 and y1 > y0):
        raise BadImageError(
            f"`crop` must be a box (x0, y0, x1, y1) that overlaps the {height}x{width} image. "
            f"Got {tuple(crop)}."
        )
    return (x0, y0, x1, y1)


def _covering_box(box: Box, input_hw: tuple[int, int]) -> Box:
    """Shrink `box` around its centre to the aspect of the input."""
    x0, y0, x1, y1 = box
    scale = max(input_hw[1] / (x1 - x0), input_hw[0] / (y1 - y0))
    cut_x = max((x1 - x0) - input_hw[1] / scale, 0.0) / 2
    cut_y = max((y1 - y0) - input_hw[0] / scale, 0.0) / 2
    return (x0 + cut_x, y0 + cut_y, x1 - cut_x, y1 - cut_y)


def _fitting_dst(
    box: Box, input_hw: tuple[int, int], *, max_scale: float
) -> tuple[int, int, int, int]:
    """Fit `box` into the input with its aspect, centred, in whole pixels."""
    input_h, input_w = input_hw
    scale = min(input_w / (box[2] - box[0]), input_h / (box[3] - box[1]), max_scale)
    width = min(max(round((box[2] - box[0]) * scale), 1), input_w)
    height = min(max(round((box[3] - box[1]) * scale), 1), input_h)
    x0, y0 = (input_w - width) // 2, (input_h - height) // 2
    return (x0, y0, x0 + width, y0 + height)


def to_input(placement: Placement, points_xy: np.ndarray) -> np.ndarray:
    """Map source points to input points; points outside of the box map outside of `dst`.

    Args:
        placement: How the source was drawn into the input.
        points_xy: (n, 2), continuous source pixels.

    Returns:
        (n, 2) float64, continuous input pixels.
    """
    points = np.asarray(points_xy, dtype=np.float64).reshape(-1, 2)
    x = _axis_to_input(placement, points[:, 0], axis=0)
    y = _axis_to_input(placement, points[:, 1], axis=1)
    return np.stack([x, y], axis=1)


def to_source(placement: Placement, points_xy: np.ndarray) -> np.ndarray:
    """Map input points to source points: the inverse of `to_input`.

    Args:
        placement: How the source was drawn into the input.
        points_xy: (n, 2), continuous input pixels.

    Returns:
        (n, 2) float64, continuous source pixels.
    """
    points = np.asarray(points_xy, dtype=np.float64).reshape(-1, 2)
    x = _axis_to_source(placement, points[:, 0], axis=0)
    y = _axis_to_source(placement, points[:, 1], axis=1)
    return np.stack([x, y], axis=1)


def _axis_to_input(placement: Placement, values: np.ndarray, *, axis: int) -> np.ndarray:
    """Map source coordinates to input coordinates along x (axis 0) or y (axis 1)."""
    box0, box1 = placement.box[axis], placement.box[axis + 2]
    dst0, dst1 = placement.dst[axis], placement.dst[axis + 2]
    step = (values - box0) * ((dst1 - dst0) / (box1 - box0))
    return dst1 - step if placement.is_flipped and axis == 0 else dst0 + step


def _axis_to_source(placement: Placement, values: np.ndarray, *, axis: int) -> np.ndarray:
    """Map input coordinates to source coordinates along x (axis 0) or y (axis 1)."""
    box0, box1 = placement.box[axis], placement.box[axis + 2]
    dst0, dst1 = placement.dst[axis], placement.dst[axis + 2]
    step = dst1 - values if placement.is_flipped and axis == 0 else values - dst0
    return box0 + step * ((box1 - box0) / (dst1 - dst0))


def mirrored(placement: Placement) -> Placement:
    """Place the same pixels into the mirrored input frame.

    What a flipped placement shows is, cell by cell, the mirror image of what this shows: a target
    of a flipped view equals the flipped target of the plain view to the last bit, wherever the
    image lies in the middle of the input.
    """
    x0, y0, x1, y1 = placement.dst
    width = placement.input_hw[1]
    dst = (width - x1, y0, width - x0, y1)
    return replace(placement, dst=dst, is_flipped=not placement.is_flipped)


def unflip(output_chw: np.ndarray, placement: Placement) -> np.ndarray:
    """Bring a prediction of a flipped view to where that of the plain view lies.

    Padding may be a pixel wider at one side; what is mirrored then is moved by that pixel,
    linearly.

    Args:
        output_chw: (C, Ho, Wo), covering the whole input frame.
        placement: How the flipped view was drawn into the input.

    Returns:
        (C, Ho, Wo) of the same dtype.
    """
    flipped = _flip(output_chw)
    shift = mirrored(placement).dst[0] - placement.dst[0]
    if not shift:
        return flipped
    n_cells = output_chw.shape[2]
    at = np.arange(n_cells) + shift * n_cells / placement.input_hw[1]
    at = np.clip(at, 0, n_cells - 1)
    low = np.floor(at).astype(np.int64)
    part = (at - low).astype(output_chw.dtype)
    moved: np.ndarray = flipped[..., low] * (1 - part)
    return moved + flipped[..., np.minimum(low + 1, n_cells - 1)] * part


def _flip(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array[..., ::-1])


def sample_nearest(
    values_hw: np.ndarray, placement: Placement, output_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Show a source map in the input frame: each output cell takes the pixel under its centre.

    Args:
        values_hw: (source_h, source_w), any dtype.
        placement: How the source was drawn into the input.
        output_hw: Resolution of the result, which covers the whole input frame.

    Returns:
        (Ho, Wo) values of the same dtype, and (Ho, Wo) bool, False where the cell's centre lies on
        padding; the value there is that of the nearest pixel and means nothing.

    Raises:
        InvalidInputError: `values_hw` is not of the source's size.
    """
    _check_source_size(values_hw, placement)
    if placement.is_flipped:
        values, is_inside = sample_nearest(values_hw, mirrored(placement), output_hw)
        return _flip(values), _flip(is_inside)
    rows, has_row = _nearest_index(placement, output_hw, axis=1)
    columns, has_column = _nearest_index(placement, output_hw, axis=0)
    return values_hw[np.ix_(rows, columns)], has_row[:, None] & has_column[None, :]


def _nearest_index(
    placement: Placement, output_hw: tuple[int, int], *, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    n_input, n_output = placement.input_hw[1 - axis], output_hw[1 - axis]
    centres = (np.arange(n_output) + 0.5) * (n_input / n_output)
    has_value = (centres >= placement.dst[axis]) & (centres < placement.dst[axis + 2])
    index = np.floor(_axis_to_source(placement, centres, axis=axis)).astype(np.int64)
    return np.clip(index, 0, placement.source_hw[1 - axis] - 1), has_value


def resize_masked(
    values_hw: np.ndarray,
    valid_hw: np.ndarray,
    placement: Placement,
    output_hw: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Show a source map in the input frame: each output cell takes the mean over its area.

    Only valid source pixels count, weighted by their overlap with the cell, so that a missing
    value never bleeds into a good one, and a cell with any valid pixel has a value.

    Args:
        values_hw: (source_h, source_w), numbers; anything (NaN too) where not valid.
        valid_hw: (source_h, source_w), bool.
        placement: How the source was drawn into the input.
        output_hw: Resolution of the result, which covers the whole input frame.

    Returns:
        (Ho, Wo) float32 values, 0 where not valid, and (Ho, Wo) bool. A cell is valid if at least
        a thousandth of it lies on valid pixels.

    Raises:
        InvalidInputError: `values_hw` or `valid_hw` is not of the source's size.
    """
    _check_source_size(values_hw, placement)
    _check_source_size(valid_hw, placement)
    if placement.is_flipped:
        means, valid = resize_masked(values_hw, valid_hw, mirrored(placement), output_hw)
        return _flip(means), _flip(valid)
    edges_x = _cell_edges(placement, output_hw, axis=0)
    edges_y = _cell_edges(placement, output_hw, axis=1)
    cleaned = np.where(valid_hw, values_hw, 0).astype(np.float64)
    total = _cell_sums(_cell_sums(cleaned, edges_y).T, edges_x).T
    area = _cell_sums(_cell_sums(valid_hw.astype(np.float64), edges_y).T, edges_x).T
    valid = area > _SLIVER * _cell_area(placement, output_hw)
    means = np.divide(total, area, out=np.zeros_like(total), where=valid)
    return means.astype(np.float32), valid


def _cell_area(placement: Placement, output_hw: tuple[int, int]) -> float:
    """Give the area of one whole output cell in source pixels."""
    area = 1.0
    for axis in (0, 1):
        box_size = placement.box[axis + 2] - placement.box[axis]
        dst_size = placement.dst[axis + 2] - placement.dst[axis]
        area *= box_size / dst_size * placement.input_hw[1 - axis] / output_hw[1 - axis]
    return area


def _cell_edges(placement: Placement, output_hw: tuple[int, int], *, axis: int) -> np.ndarray:
    """Give the (n, 2) source intervals of the cells along one axis; empty ones on padding."""
    n_input, n_output = placement.input_hw[1 - axis], output_hw[1 - axis]
    edges = np.arange(n_output + 1) * (n_input / n_output)
    edges = np.clip(edges, placement.dst[axis], placement.dst[axis + 2])
    edges = _axis_to_source(placement, edges, axis=axis)
    intervals = np.stack([edges[:-1], edges[1:]], axis=1)
    clipped: np.ndarray = np.clip(np.sort(intervals, axis=1), 0, placement.source_hw[1 - axis])
    return clipped


def _cell_sums(array: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Integrate the first axis over intervals, each entry being constant on ``[i, i + 1)``."""
    integral = np.zeros((len(array) + 1, *array.shape[1:]))
    np.cumsum(array, axis=0, out=integral[1:])
    whole = np.minimum(np.floor(intervals).astype(np.int64), len(array) - 1)
    part = (intervals - whole)[..., None]
    at_edges = integral[whole] + part * array[whole]
    return np.asarray(at_edges[:, 1] - at_edges[:, 0])


def to_source_map(
    output_chw: np.ndarray, placement: Placement, *, mode: str = "bilinear"
) -> tuple[np.ndarray, np.ndarray]:
    """Bring a prediction from the input frame back to the source's own resolution.

    Cells whose centre lies on padding never contribute: near the image's border the outermost
    cell of the image is continued.

    Args:
        output_chw: (C, Ho, Wo), floating point, covering the whole input frame.
        placement: How the source was drawn into the input.
        mode: "bilinear" or "nearest".

    Returns:
        (C, source_h, source_w) of the same dtype, NaN where the source was not in the input
        (outside of a crop), and (source_h, source_w) bool, True where it was.

    Raises:
        InvalidInputError: `mode` is unknown, or `output_chw` is not a floating (C, H, W) array.
    """
    if mode not in ("bilinear", "nearest"):
        raise invalid("mode", mode, "bilinear or nearest")
    if output_chw.ndim != 3 or not np.issubdtype(output_chw.dtype, np.floating):
        got = (output_chw.dtype.name, output_chw.shape)
        raise invalid("output_chw", got, "a floating point array (C, H, W)")
    if placement.is_flipped:
        return to_source_map(_flip(output_chw), mirrored(placement), mode=mode)
    output_hw = (output_chw.shape[1], output_chw.shape[2])
    low_y, high_y, part_y, has_row = _linear_index(placement, output_hw, axis=1)
    low_x, high_x, part_x, has_column = _linear_index(placement, output_hw, axis=0)
    if mode == "nearest":
        part_y, part_x = np.floor(part_y + 0.5), np.floor(part_x + 0.5)
    weight_y = part_y.astype(output_chw.dtype)[None, :, None]
    weight_x = part_x.astype(output_chw.dtype)[None, None, :]
    rows = output_chw[:, low_y] * (1 - weight_y) + output_chw[:, high_y] * weight_y
    values = rows[:, :, low_x] * (1 - weight_x) + rows[:, :, high_x] * weight_x
    covered = has_row[:, None] & has_column[None, :]
    values[:, ~covered] = np.nan
    return values, covered


def _linear_index(
    placement: Placement, output_hw: tuple[int, int], *, axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find, for each source pixel, the two cells around it, its place between them, its cover."""
    n_source, n_input = placement.source_hw[1 - axis], placement.input_hw[1 - axis]
    n_output = output_hw[1 - axis]
    centres = np.arange(n_source) + 0.5
    covered = (centres >= placement.box[axis]) & (centres < placement.box[axis + 2])
    cells = _axis_to_input(placement, centres, axis=axis) * (n_output / n_input) - 0.5
    first, last = _image_cells(placement, n_output, axis=axis)
    cells = np.clip(cells, first, last)
    low = np.floor(cells).astype(np.int64)
    return low, np.minimum(low + 1, last), cells - low, covered


def _image_cells(placement: Placement, n_output: int, *, axis: int) -> tuple[int, int]:
    """Find the first and last cell whose centre lies on the image, at least one."""
    ratio = n_output / placement.input_hw[1 - axis]
    start, stop = placement.dst[axis] * ratio, placement.dst[axis + 2] * ratio
    first, last = math.ceil(start - 0.5), math.ceil(stop - 0.5) - 1
    if first > last:  # the image is thinner than a cell
        first = last = min(int((start + stop) / 2), n_output - 1)
    return first, last


def _check_source_size(values_hw: np.ndarray, placement: Placement) -> None:
    if values_hw.shape != placement.source_hw:
        raise invalid("values_hw", values_hw.shape, f"of the image's size {placement.source_hw}")
