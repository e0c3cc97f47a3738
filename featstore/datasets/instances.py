"""Animals with keypoints: from what a reader found out about each to items with their crops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featstore.crops import BOX_SCALE, square_crop
from featstore.datasets.common import parse_argument, read_bytes
from featstore.errors import BadImageError, invalid
from featstore.images import probe
from featstore.types import Box, Item

Point = tuple[float, float, int]
"""x and y in continuous pixels of the image, and v: 0 not marked, 1 hidden, 2 seen."""

UNMARKED: Point = (0.0, 0.0, 0)
INDIVIDUAL = "individual"
"""The attribute that names an individual, and the option that makes it the label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One animal in one image."""

    path: str  # of the image, relative to the data set's root
    image_hw: tuple[int, int] | None  # None: not known before the image is read
    points: tuple[Point, ...]  # in the order of the skeleton
    number: str  # tells it from the others in the image
    box: Box | None = None  # of a positive size
    area: float | None = None  # in square pixels
    identity: str | None = None  # species or individual
    splits: tuple[str, ...] = ()
    group: str | None = None  # None: the image
    more: Mapping[str, Any] = field(default_factory=dict)  # further attributes


@dataclass(frozen=True, kw_only=True, slots=True)
class Framed:
    """Items of instances, and how many instances gave none, by reason."""

    items: list[Item]
    left_out: Counter[str]


def parse_box(text: str | None) -> float | None:
    """Read the option ``box``: a scale, or None for "image", the whole image.

    Raises:
        InvalidInputError: It is neither.
    """
    if text == "image":
        return None
    try:
        scale = BOX_SCALE if text is None else float(text)
    except ValueError:
        scale = math.nan
    if not 1 <= scale <= 100:  # also false for NaN
        raise invalid("box", text, "image, or a scale of the box from 1 to 100, like 1.25")
    return scale


def box_text(scale: float | None) -> str:
    """Invert `parse_box`."""
    return "image" if scale is None else f"{scale:.12g}"


def box_of_spec(spec: str) -> str | None:
    """Give the option ``box`` of a recorded data set; None: it has no such option."""
    return parse_argument(spec.partition(":")[2]).options.get("box")


def frame_instances(instances: Iterable[Instance], *, scale: float | None) -> Framed:
    """Make an item of each instance with a marked keypoint: a crop, or the whole image.

    An instance without a box takes the smallest box around its marked keypoints.

    Args:
        instances: In the order that the items shall have.
        scale: Side of the square crop in longer sides of the box; None: the whole image.
    """
    framed = Framed(items=[], left_out=Counter())
    taken: set[tuple[Any, ...]] = set()
    for instance in instances:
        box = instance.box or marked_box(instance.points)
        if not any(point[2] for point in instance.points):
            framed.left_out["none of their keypoints is marked"] += 1
        elif box is None and scale is not None:
            framed.left_out["they have no box, and their keypoints span none"] += 1
        else:
            framed.items.append(_distinct(_item(instance, box, scale), instance, taken))
    return framed


def image_size(path: Path) -> tuple[int, int] | None:
    """Read height and width from an image's file; None where that fails, as the extraction says."""
    try:
        return probe(read_bytes(path))
    except BadImageError:
        return None


def marked_box(points: Iterable[Point]) -> Box | None:
    """Give the smallest box around the marked keypoints; None where it has no area."""
    marked = [(x, y) for x, y, v in points if v]
    if not marked:
        return None
    xs, ys = zip(*marked, strict=True)
    x0, y0, x1, y1 = min(xs), min(ys), max(xs), max(ys)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _item(instance: Instance, box: Box | None, scale: float | None) -> Item:
    crop = None
    if scale is not None:
        assert box is not None
        crop = square_crop(box, scale=scale, image_hw=instance.image_hw)
    points = [list(point if point[2] else UNMARKED) for point in instance.points]
    return Item(
        path=instance.path,
        splits=instance.splits,
        label=instance.identity,
        group=instance.path if instance.group is None else instance.group,
        crop=crop,
        attributes={
            **instance.more,
            "keypoints": points,
            "box": None if box is None else list(box),
            "area": instance.area,
            "annotation": instance.number,
        },
        # Two animals of one image show the same where no crop tells them apart.
        instance=None if crop else instance.number,
    )


def _distinct(item: Item, instance: Instance, taken: set[tuple[Any, ...]]) -> Item:
    """Give an item a name of its own where another shows the same."""
    name, count = item.instance, 1
    while (item.path, item.crop, name) in taken:
        name = instance.number if count == 1 else f"{instance.number}#{count}"
        count += 1
    taken.add((item.path, item.crop, name))
    return item if name == item.instance else replace(item, instance=name)


def left_out_notes(left_out: Mapping[str, int]) -> tuple[str, ...]:
    """Say in sentences how many animals were left out, and why."""
    return tuple(
        f"{count} annotation{'' if count == 1 else 's'} left out: {reason}."
        for reason, count in sorted(left_out.items())
        if count
    )
