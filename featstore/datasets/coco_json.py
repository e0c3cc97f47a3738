"""Reads ``instances_*.json`` of COCO, keeping its polygons small."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from featstore.errors import InvalidInputError
from featstore.types import Box

Segmentation = tuple["array[float]", ...] | Mapping[str, Any]
"""Polygons (x, y, x, y, ...) in continuous pixels, or a run-length encoding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoObject:
    """One annotation: an object, or a crowd of them that nobody told apart."""

    annotation_id: int
    class_name: str
    box: Box
    area: float | None
    is_crowd: bool
    segmentation: Segmentation


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoImage:
    """One image with its annotations in the order of the file."""

    file_name: str
    hw: tuple[int, int]
    objects: tuple[CocoObject, ...]


def read_instances(path: Path) -> list[CocoImage]:
    """Read the images and annotations of one split, images by ascending id.

    Raises:
        InvalidInputError: The file is no JSON of this kind, names an image twice, or an
            annotation in it is incomplete.
    """
    try:
        # Lists of floats take eight times the memory of arrays; so each is packed as it comes.
        content = json.loads(path.read_bytes(), object_hook=_pack)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(f"{path} cannot be read as COCO's JSON ({error}).") from error
    try:
        images = {image["id"]: image for image in content["images"]}
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        annotations = content["annotations"]
        n_files = len({image["file_name"] for image in images.values()})
    except (KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{path} must hold `images`, `annotations` and `categories`, each entry with its id "
            f"and name. Got no {error}."
        ) from error
    if not n_files == len(images) == len(content["images"]):
        raise InvalidInputError(
            f"{path} must name every image once. Got {len(content['images'])} images with "
            f"{len(images)} ids and {n_files} files."
        )
    objects: dict[Any, list[CocoObject]] = {number: [] for number in images}
    for index, annotation in enumerate(annotations):
        source = f"Annotation {index} of {path}"
        image_id, found = _read_object(annotation, names, source=source)
        if image_id not in objects:
            raise InvalidInputError(f"{source} must be of a listed image. Got image {image_id}.")
        objects[image_id].append(found)
    return [
        _read_image(images[number], tuple(objects[number]), source=f"Image {number} of {path}")
        for number in sorted(images)
    ]


def _pack(node: dict[str, Any]) -> dict[str, Any]:
    polygons = node.get("segmentation")
    if isinstance(polygons, list):
        node["segmentation"] = tuple(array("d", polygon) for polygon in polygons)
    return node


def _read_object(
    annotation: Mapping[str, Any], names: Mapping[int, str], *, source: str
) -> tuple[Any, CocoObject]:
    """Give the image id of an annotation, and what it says."""
    try:
        x, y, width, height = (float(side) for side in annotation["bbox"])
        area = annotation.get("area")
        if not all(map(math.isfinite, (x, y, width, height, area or 0))) or min(width, height) < 0:
            raise ValueError(f"bbox {annotation['bbox']}, area {area}")
        found = CocoObject(
            annotation_id=int(annotation["id"]),
            class_name=names[annotation["category_id"]],
            box=(x, y, x + width, y + height),
            area=None if area is None else float(area),
            is_crowd=bool(annotation.get("iscrowd", 0)),
            segmentation=annotation["segmentation"],
        )
        return annotation["image_id"], found
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{source} must have id, image_id, a listed category_id, bbox (x, y, width, height) "
            f"and segmentation. Got {type(error).__name__}: {error}."
        ) from error


def _read_image(
    image: Mapping[str, Any], objects: tuple[CocoObject, ...], *, source: str
) -> CocoImage:
    try:
        file_name, hw = image["file_name"], (int(image["height"]), int(image["width"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{source} must have file_name, height and width. Got {error}."
        ) from error
    place = PurePosixPath(file_name)
    if place.is_absolute() or ".." in place.parts:
        raise InvalidInputError(f"{source} leads out of its folder: {file_name!r}.")
    return CocoImage(file_name=str(place), hw=hw, objects=objects)
