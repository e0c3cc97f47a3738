"""Reads keypoints from JSON like COCO's: AP-10K, Animal-Pose, APT-36K and others."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from featstore.datasets.instances import Point
from featstore.datasets.skeletons import known_sigmas
from featstore.errors import InvalidInputError
from featstore.skeleton import Skeleton, swaps_from_names
from featstore.types import Box

CORNERS, SIZES = "corners", "sizes"
"""What the four numbers of a box are: x0, y0, x1, y1 or x, y, width, height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """One animal of one image, as the file has it."""

    file_name: str
    image_hw: tuple[int, int] | None
    identity: str
    number: str
    points: tuple[Point, ...]
    box: Box | None  # None where the file has none of a positive size
    area: float | None
    video: str | None
    more: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeypointFile:
    """What one file holds."""

    path: Path
    skeleton: Skeleton
    annotations: tuple[Annotation, ...]
    left_out: Counter[str] = field(default_factory=Counter)


def read_keypoint_file(path: Path, *, boxes: str | None = None) -> KeypointFile | None:
    """Read one file; None where it is a JSON that marks no keypoints.

    Crowds, and annotations that list no keypoints, are left out. ``num_keypoints`` is not
    looked at: the keypoints themselves tell.

    Args:
        path: The file.
        boxes: `CORNERS` or `SIZES`; None: corners where ``images`` maps ids to names, as in
            Animal-Pose, else sizes, as in COCO.

    Raises:
        InvalidInputError: The file is no JSON, or an entry in it is incomplete or contradicts
            itself.
    """
    try:
        content = json.loads(path.read_bytes(), object_hook=_without_masks)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict) or not _marks_keypoints(content):
        return None
    try:
        images = _images(content["images"])
        categories = {entry["id"]: dict(entry) for entry in content["categories"]}
        annotations = list(content["annotations"])
        names = {number: str(entry["name"]) for number, entry in categories.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{path} must hold `images`, `annotations` and `categories`, each entry with its id "
            f"and name. Got {type(error).__name__}: {error}."
        ) from error
    if boxes is None:
        boxes = CORNERS if isinstance(content["images"], Mapping) else SIZES
    skeleton = _skeleton(list(categories.values()), annotations, source=str(path))
    found: list[Annotation] = []
    left_out: Counter[str] = Counter()
    for index, entry in enumerate(annotations):
        source = f"Annotation {entry.get('id', index)} of {path}"
        if entry.get("iscrowd"):
            left_out["they are crowds"] += 1
        elif not entry.get("keypoints"):
            left_out["they list no keypoints"] += 1
        else:
            about = (images, names, categories, skeleton)
            found.append(_annotation(entry, index, about, boxes=boxes, source=source))
    return KeypointFile(path=path, skeleton=skeleton, annotations=tuple(found), left_out=left_out)


def _without_masks(node: dict[str, Any]) -> dict[str, Any]:
    """Drop polygons, which are most of a file and not used here."""
    node.pop("segmentation", None)
    return node


def _marks_keypoints(content: Mapping[str, Any]) -> bool:
    entries = [*_entries(content, "categories"), *_entries(content, "annotations")]
    return any("keypoints" in entry for entry in entries)


def _entries(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = content.get(key)
    return [e for e in found if isinstance(e, Mapping)] if isinstance(found, list) else []


def _images(listed: Any) -> dict[Any, Mapping[str, Any]]:
    """Give the images by id; Animal-Pose maps ids, written as text, to names of files."""
    if isinstance(listed, Mapping):
        return {int(number): {"file_name": name} for number, name in listed.items()}
    return {entry["id"]: entry for entry in listed}


def _skeleton(
    categories: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    *,
    source: str,
) -> Skeleton:
    """Take the keypoints that all categories must share, or number them where none names any."""
    named = [entry for entry in categories if entry.get("keypoints")]
    if not named:
        counts = {len(_flat(e["keypoints"])) // 3 for e in annotations if e.get("keypoints")}
        return Skeleton(names=tuple(f"point_{n}" for n in range(1, max(counts, default=1) + 1)))
    names = tuple(map(str, named[0]["keypoints"]))
    for entry in named:
        if tuple(map(str, entry["keypoints"])) != names:
            raise InvalidInputError(
                f"{source}: the categories {named[0]['name']!r} and {entry['name']!r} must have "
                "the same keypoints in the same order, for one head learns them all. Split the "
                "file by its kinds of keypoints."
            )
    edges = next((entry["skeleton"] for entry in named if entry.get("skeleton")), ())
    sigmas = named[0].get("sigmas")
    return Skeleton(
        names=names,
        edges=_edges(edges, len(names)),
        swaps=swaps_from_names(names),
        sigmas=known_sigmas(names) if sigmas is None else tuple(map(float, sigmas)),
    )


def _edges(pairs: Sequence[Sequence[int]], n_names: int) -> tuple[tuple[int, int], ...]:
    """Count from 0: COCO counts the ends of its lines from 1, some others from 0."""
    first = 0 if any(0 in pair for pair in pairs) else 1
    edges = [(int(one) - first, int(other) - first) for one, other in pairs]
    return tuple(edge for edge in edges if max(edge) < n_names)


def _flat(keypoints: Any) -> list[Any]:
    """Give x, y, v, x, y, v, ... of a list that may be nested."""
    if keypoints and isinstance(keypoints[0], list):
        return [number for point in keypoints for number in point]
    return list(keypoints)


def _annotation(
    entry: Mapping[str, Any],
    index: int,
    about: tuple[Mapping[Any, Mapping[str, Any]], Mapping[Any, str], Mapping[Any, Any], Skeleton],
    *,
    boxes: str,
    source: str,
) -> Annotation:
    images, names, categories, skeleton = about
    try:
        image, identity = images[entry["image_id"]], names[entry["category_id"]]
        category = categories[entry["category_id"]]
        box, area = _box(entry.get("bbox"), boxes), _area(entry.get("area"))
        video = image.get("video_id", entry.get("video_id"))
        return Annotation(
            file_name=_file_name(image["file_name"]),
            image_hw=_image_hw(image),
            identity=identity,
            number=str(entry.get("id", index)),
            points=_points(_flat(entry["keypoints"]), len(skeleton.names)),
            box=box,
            area=area,
            video=None if video is None else str(video),
            more=_more(entry, image, category),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{source} must have a listed image_id and category_id, a bbox of four numbers if "
            f"any, and x, y, v for each of the {len(skeleton.names)} keypoints, v being 0, 1 or "
            f"2. Got {type(error).__name__}: {error}."
        ) from error


def _file_name(text: Any) -> str:
    """Give the path of an image with forward slashes and without a drive."""
    name = str(text)
    windows = PureWindowsPath(name)
    if windows.drive or "\\" in name:
        name = windows.relative_to(windows.anchor).as_posix()
    place = PurePosixPath(name)
    if ".." in place.parts:
        raise ValueError(f"the file name {text!r} leads out of its folder")
    return place.as_posix().lstrip("/")


def _image_hw(image: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (int(height), int(width)) if height and width else None


def _points(numbers: Sequence[Any], n_names: int) -> tuple[Point, ...]:
    if len(numbers) != 3 * n_names:
        raise ValueError(f"{len(numbers)} numbers for {n_names} keypoints")
    return tuple(_point(*numbers[start : start + 3]) for start in range(0, 3 * n_names, 3))


def _point(x: Any, y: Any, v: Any) -> Point:
    if v not in (0, 1, 2):
        raise ValueError(f"v is {v!r}")
    if not v:
        return (0.0, 0.0, 0)
    place = (float(x), float(y))
    if not all(map(math.isfinite, place)):
        raise ValueError(f"a marked keypoint lies at {place}")
    return (*place, int(v))


def _box(numbers: Any, boxes: str) -> Box | None:
    """Read a box; None where there is none or where it has no area, as some have."""
    if numbers is None or len(numbers) == 0:
        return None
    x0, y0, x1, y1 = map(float, numbers)
    if boxes == SIZES:
        x1, y1 = x0 + x1, y0 + y1
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ValueError(f"bbox {numbers}")
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _area(number: Any) -> float | None:
    """Read an area; None where it is missing or none, so that the box's counts."""
    area = 0.0 if number is None else float(number)
    if not math.isfinite(area):
        raise ValueError(f"area {number}")
    return area if area > 0 else None


def _more(
    entry: Mapping[str, Any], image: Mapping[str, Any], category: Mapping[str, Any]
) -> dict[str, Any]:
    found = {
        "family": category.get("supercategory"),
        "background": image.get("background"),
        "track": entry.get("track_id"),
    }
    return {name: value for name, value in found.items() if value is not None}
