"""Instance maps in the input frame, and what follows from them: boundaries, distances, boxes.

An instance map numbers things from 1 and says 0 for what belongs to none; here -1 stands for
pixels that are void or lie on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from featstore.errors import BadImageError
from featstore.geometry import sample_nearest, to_input
from featstore.types import Placement
from heads.box_labels import COUNTED

VOID = -1


def ids_in_frame(
    values_hw: np.ndarray, valid_hw: np.ndarray, placement: Placement, output_hw: tuple[int, int]
) -> np.ndarray:
    """Show an instance map in the input frame by the pixel under each cell's centre.

    Returns:
        (Ho, Wo) int32, -1 where void or padding.

    Raises:
        BadImageError: An id is negative, or nothing of the frame is known.
    """
    if (values_hw[valid_hw] < 0).any():
        lowest = int(values_hw[valid_hw].min())
        raise BadImageError(f"The instances of its label must be 0 or more, or void. Got {lowest}.")
    known = np.where(valid_hw, values_hw, VOID)
    ids, is_inside = sample_nearest(known, placement, output_hw)
    found = np.where(is_inside, ids, VOID).astype(np.int32)
    if (found == VOID).all():
        raise BadImageError("Its label knows nothing about any pixel of the input frame.")
    return found


def find_boundaries(ids_yx: np.ndarray) -> np.ndarray:
    """Mark the pixels that touch another id at one of their four sides, on both sides: bool.

    The border of a void region is no boundary.

    Source:
        `find_boundaries` (mode "thick") of scikit-image, as the release uses it, HEADS.md 1.5.
    """
    marked = np.zeros(ids_yx.shape, dtype=bool)
    for one, other in (
        (np.s_[1:, :], np.s_[:-1, :]),
        (np.s_[:, 1:], np.s_[:, :-1]),
    ):
        a, b = ids_yx[one], ids_yx[other]
        differs = (a != b) & (a != VOID) & (b != VOID)
        marked[one] |= differs
        marked[other] |= differs
    return marked


def distance_inside(ids_yx: np.ndarray) -> np.ndarray:
    """Give each pixel of an instance its distance to the instance's border, over the largest one.

    1 at the innermost pixel of each instance, falling to its border; 0 on background. Where the
    frame cuts an instance, the cut is no border.

    Returns:
        (Ho, Wo) float32.
    """
    distance = np.zeros(ids_yx.shape, dtype=np.float32)
    for number, place in enumerate(ndimage.find_objects(np.maximum(ids_yx, 0)), 1):
        if place is None:
            continue
        wider = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in place)
        is_inside = ids_yx[wider] == number
        if is_inside.all():  # it fills the frame: nowhere is nearer to a border
            distance[wider] = 1.0
            continue
        found = ndimage.distance_transform_edt(is_inside)
        distance[wider][is_inside] = (found / found.max())[is_inside]
    return distance


@dataclass(frozen=True, kw_only=True, slots=True)
class Boxes:
    """The boxes of one image, those of which the input shows something."""

    source: np.ndarray  # (n, 4) x0, y0, x1, y1 in source pixels
    frame: np.ndarray  # (n, 4), shares of the input frame, cut at its border
    area: np.ndarray  # (n,) source pixels
    frame_area: np.ndarray  # (n,), likewise, as a share of the input frame
    kind: np.ndarray  # (n,) `COUNTED`, `CROWD` or `DIFFICULT` of `heads.box_labels`

    def of_kind(self, *kinds: int) -> Boxes:
        """Give the boxes of some kinds."""
        chosen = np.isin(self.kind, kinds)
        return Boxes(
            source=self.source[chosen],
            frame=self.frame[chosen],
            area=self.area[chosen],
            frame_area=self.frame_area[chosen],
            kind=self.kind[chosen],
        )


def boxes_of(values_hw: np.ndarray, valid_hw: np.ndarray, placement: Placement) -> Boxes:
    """Box the instances of a map, tightly; the areas are those of the visible pixels."""
    ids = np.where(valid_hw, values_hw, 0)
    found = [
        (n, place) for n, place in enumerate(ndimage.find_objects(ids), 1) if place is not None
    ]
    corners = [(columns.start, rows.start, columns.stop, rows.stop) for _, (rows, columns) in found]
    source = np.array(corners, dtype=np.float64).reshape(-1, 4)
    counts = np.bincount(ids.reshape(-1), minlength=1)
    area = np.array([counts[n] for n, _ in found], dtype=np.float64)
    return place_boxes(source, area, np.full(len(area), COUNTED), placement)


def place_boxes(
    source_n4: np.ndarray, area_n: np.ndarray, kind_n: np.ndarray, placement: Placement
) -> Boxes:
    """Bring boxes to the input frame and leave out those of which it shows nothing."""
    frame, scale = to_frame(source_n4, placement)
    size = np.clip(frame[:, 2:] - frame[:, :2], 0, None)
    shown = size.prod(axis=1) > 0
    boxed = np.maximum((source_n4[:, 2:] - source_n4[:, :2]).prod(axis=1) * scale, 1e-12)
    share = area_n * scale * np.minimum(size.prod(axis=1) / boxed, 1)
    return Boxes(
        source=source_n4[shown],
        frame=frame[shown],
        area=area_n[shown],
        frame_area=share[shown],
        kind=kind_n[shown],
    )


def void_shares(valid_hw: np.ndarray, boxes_n4: np.ndarray) -> np.ndarray:
    """Give the share of each box that lies on pixels without a label: (n,), from 0 to 1."""
    above = np.zeros((valid_hw.shape[0] + 1, valid_hw.shape[1] + 1))
    above[1:, 1:] = (~valid_hw).cumsum(axis=0).cumsum(axis=1)
    x0, y0, x1, y1 = boxes_n4.T
    places = np.array([[y1, y0, y1, y0], [x1, x1, x0, x0]])
    sums = ndimage.map_coordinates(above, places.reshape(2, -1), order=1, mode="nearest").reshape(
        4, -1
    )
    area = np.maximum((x1 - x0) * (y1 - y0), 1e-12)
    return np.clip((sums[0] - sums[1] - sums[2] + sums[3]) / area, 0, 1)


def to_frame(boxes_n4: np.ndarray, placement: Placement) -> tuple[np.ndarray, float]:
    """Map source boxes to shares of the input frame, cut at its border.

    Returns:
        (n, 4), and how much of the frame a source pixel covers.
    """
    height, width = placement.input_hw
    points = to_input(placement, boxes_n4.reshape(-1, 2)).reshape(-1, 2, 2)
    points = np.sort(points, axis=1) / np.array([width, height])
    x0, y0, x1, y1 = placement.box
    dst_x0, dst_y0, dst_x1, dst_y1 = placement.dst
    scale = (dst_x1 - dst_x0) * (dst_y1 - dst_y0) / ((x1 - x0) * (y1 - y0)) / (width * height)
    return np.clip(points, 0, 1).reshape(-1, 4), scale


def relabel(ids_yx: np.ndarray) -> np.ndarray:
    """Number the instances that are there 1, 2, ... without gaps; 0 and -1 stay: int16."""
    found = np.unique(ids_yx[ids_yx > 0])
    number = np.zeros(int(ids_yx.max(initial=0)) + 2, dtype=np.int16)
    number[found] = np.arange(1, len(found) + 1)
    number[-1] = VOID  # the place that -1 looks up
    return number[ids_yx]
