"""Boxes of animals in photos, as MegaDetector or a JSON like COCO's lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from featstore.crops import BOX_SCALE, square_crop
from featstore.errors import BadImageError, InvalidInputError, NotFoundError, invalid
from featstore.types import Box

FULL = "full"
"""In place of a file: the whole photo is one animal's."""

MIN_SCORE = 0.2
"""Score from which a detection is an animal, as MegaDetector's own tools have it."""

_EXPECTED = (
    'MegaDetector\'s JSON ("images" with "file" and "detections") or one like COCO\'s '
    '("images" with "file_name", and "annotations")'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundBox:
    """One box in a photo."""

    box: Box  # continuous pixels
    score: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One photo as a file lists it."""

    name: PurePosixPath
    boxes: tuple[tuple[Box, float | None], ...]  # of MegaDetector in shares of the photo
    is_share: bool
    size_hw: tuple[int, int] | None  # that the boxes are of, where the file tells


class PhotoBoxes:
    """The boxes of a file, found by the photo's name."""

    def __init__(self, path: Path, entries: Sequence[_Entry]) -> None:
        self._path = path
        self._entries: dict[str, list[_Entry]] = {}
        for entry in entries:
            self._entries.setdefault(entry.name.name, []).append(entry)

    def of(self, photo: Path, photo_hw: tuple[int, int]) -> list[FoundBox]:
        """Give the boxes of a photo; none where the file lists it without any.

        A photo is the entry of its file name that shares most folders with it, from the last on.

        Raises:
            BadImageError: The file does not list it, or lists several that it may be, or boxes of
                a photo of another size.
        """
        entry = self._entry(photo)
        height, width = photo_hw
        if entry.size_hw not in (None, photo_hw):
            raise BadImageError(f"{self._path} has boxes of a photo of {entry.size_hw}.")
        scale = (width, height) * 2 if entry.is_share else (1, 1, 1, 1)
        return [
            FoundBox(
                box=(box[0] * scale[0], box[1] * scale[1], box[2] * scale[2], box[3] * scale[3]),
                score=score,
            )
            for box, score in entry.boxes
        ]

    def _entry(self, photo: Path) -> _Entry:
        same_name = self._entries.get(photo.name, [])
        shared = [_shared_parts(entry.name.parts, photo.absolute().parts) for entry in same_name]
        best = [e for e, n in zip(same_name, shared, strict=True) if n == max(shared)]
        if len(best) != 1:
            raise BadImageError(f"{self._path} lists {len(best)} photos that it may be.")
        return best[0]


def _shared_parts(one: Sequence[str], other: Sequence[str]) -> int:
    """Count the last parts of two paths that are equal."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def read_photo_boxes(path: str | Path, *, min_score: float = MIN_SCORE) -> PhotoBoxes:
    """Read a file of boxes.

    Args:
        path: File. Of MegaDetector's categories those called "animal" count, where it names any.
        min_score: Boxes of a lower score are left out; one without a score stays.

    Raises:
        NotFoundError: There is no file.
        InvalidInputError: It is of another form.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"No boxes at {path}. Name a JSON file, or full for whole photos.")
    try:
        content = json.loads(path.read_bytes())
        images = content["images"]
        if "annotations" in content:
            entries = _coco_entries(images, content["annotations"], min_score)
        else:
            entries = _detector_entries(images, content.get("detection_categories"), min_score)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise invalid("boxes", str(path), f"{_EXPECTED} ({type(error).__name__})") from error
    if not entries:
        raise InvalidInputError(f"{path} lists no photo. It must be {_EXPECTED}.")
    return PhotoBoxes(path, entries)


def _coco_entries(
    images: Sequence[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], least: float
) -> list[_Entry]:
    by_image: dict[Any, list[tuple[Box, float | None]]] = {line["id"]: [] for line in images}
    for line in annotations:
        if line.get("score", least) >= least:
            found = (_corners(line["bbox"]), line.get("score"))
            by_image[line["image_id"]].append(found)
    return [
        _Entry(
            name=_name(line["file_name"]),
            boxes=tuple(by_image[line["id"]]),
            is_share=False,
            size_hw=(line["height"], line["width"]) if "height" in line else None,
        )
        for line in images
    ]


def _detector_entries(
    images: Sequence[Mapping[str, Any]], categories: Mapping[str, str] | None, least: float
) -> list[_Entry]:
    animals = {number for number, name in (categories or {}).items() if name == "animal"}
    return [
        _Entry(
            name=_name(line["file"]),
            boxes=tuple(
                (_corners(found["bbox"]), float(found["conf"]))
                for found in line["detections"] or ()
                if found["conf"] >= least and (not animals or found["category"] in animals)
            ),
            is_share=True,
            size_hw=None,
        )
        for line in images
        if line.get("failure") is None
    ]


def _name(text: str) -> PurePosixPath:
    return PurePosixPath(text.replace("\\", "/"))


def _corners(xywh: Sequence[float]) -> Box:
    x, y, width, height = (float(value) for value in xywh)
    return (x, y, x + width, y + height)


def scale_of(record: Mapping[str, Any], asked: float | None) -> float:
    """Give the side of a crop in longer sides of its box: that of the images learned from.

    Args:
        record: What ``run.json`` says.
        asked: Overrides it.

    Raises:
        InvalidInputError: They showed whole images, or were cropped by several scales.
    """
    shown = record.get("boxes_shown", ())
    if asked is not None:
        return asked
    if "image" in shown or len(shown) > 1:
        learned = "whole images" if list(shown) == ["image"] else f"box={' and box='.join(shown)}"
        raise InvalidInputError(
            f"{record['run_id']} learned from {learned}, so that no one scale of the boxes is its "
            "own. Name one with --box-scale, or leave out --boxes to show whole photos."
        )
    return float(shown[0]) if shown else BOX_SCALE


def crop_of(found: FoundBox, photo_hw: tuple[int, int], scale: float) -> Box:
    """Give the square around a box that is shown to the backbone.

    Raises:
        BadImageError: The box has no size, or lies outside of the photo.
    """
    x0, y0, x1, y1 = found.box
    height, width = photo_hw
    if not (x0 < x1 and y0 < y1):  # also false for NaN
        raise BadImageError(f"Its box {_text(found.box)} has no size.")
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise BadImageError(
            f"Its box {_text(found.box)} lies outside of the photo of {width} x {height} pixels."
        )
    return square_crop(found.box, scale=scale, image_hw=photo_hw)


def _text(box: Box) -> str:
    return "(" + ", ".join(f"{side:g}" for side in box) + ")"
