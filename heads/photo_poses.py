"""The poses of animals in new photos: a crop an animal, keypoints in pixels of the photo."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.errors import BadImageError
from featstore.files import write_bytes
from featstore.geometry import place
from featstore.images import encode_png
from featstore.types import Box, Placement
from heads.model import Model
from heads.photo_boxes import FoundBox, PhotoBoxes, crop_of
from heads.tasks.pose import PoseTask
from heads.tasks.pose_picture import close_up, draw_box, draw_pose, moved

if TYPE_CHECKING:
    from heads.predict import Forward

JSON_FILE, CSV_FILE = "keypoints.json", "keypoints.csv"
_COLUMNS = ("image", "animal", "x0", "y0", "x1", "y1", "score", "keypoint", "x", "y", "confidence")
_SHORTEST, _LONGEST = 640, 1280  # pixels of the longer side of a picture
_SEEN = 2  # COCO's mark of a keypoint that is there


@dataclass(frozen=True, kw_only=True, slots=True)
class Animal:
    """One animal in a photo."""

    found: FoundBox | None  # None: the whole photo
    keypoints: np.ndarray  # (K, 3) float32: x, y and confidence, NaN where nobody knows


@dataclass(frozen=True, kw_only=True, slots=True)
class _Photo:
    name: str
    size_hw: tuple[int, int]
    animals: Sequence[Animal]


@dataclass(kw_only=True, slots=True)
class PhotoPoses:
    """Predicts animals photo by photo and writes them."""

    model: Model
    forward: Forward
    out: Path
    names: Mapping[Path, Path]  # photo to where its results go below `out`
    bad: dict[str, str]  # photo, or one of its boxes, to the reason why it is left out
    boxes: PhotoBoxes | None  # None: the whole photo
    scale: float | None  # side of a crop, in longer sides of the box; None with whole photos
    batch_size: int
    _photos: list[_Photo] = field(default_factory=list)

    def add(self, part: Sequence[tuple[Path, np.ndarray]]) -> list[str]:
        """Predict some decoded photos; give the files that were written."""
        task = self.model.task
        assert isinstance(task, PoseTask)
        asked: list[tuple[int, FoundBox | None, Box | None]] = []
        for number, (path, pixels) in enumerate(part):
            asked += [(number, *box) for box in self._crops(path, pixels)]
        animals: list[list[Animal]] = [[] for _ in part]
        for start in range(0, len(asked), self.batch_size):
            batch = asked[start : start + self.batch_size]
            given = [part[number][1] for number, _, _ in batch]
            found = self.forward(given, [crop for _, _, crop in batch])
            for (number, box, _), points in zip(batch, self._keypoints(found), strict=True):
                animals[number].append(Animal(found=box, keypoints=points))
        files: list[str] = []
        for (path, pixels), here in zip(part, animals, strict=True):
            if str(path) not in self.bad:
                files += self._write(path, pixels, here, task)
        return files

    def _crops(self, path: Path, pixels: np.ndarray) -> list[tuple[FoundBox | None, Box | None]]:
        """List what is asked for in a photo; a box that cannot be used is noted."""
        if self.boxes is None or self.scale is None:
            return [(None, None)]
        size_hw = (pixels.shape[0], pixels.shape[1])
        try:
            boxes = self.boxes.of(path, size_hw)
        except BadImageError as error:
            self.bad[str(path)] = str(error)
            return []
        crops: list[tuple[FoundBox | None, Box | None]] = []
        for number, found in enumerate(boxes, 1):
            try:
                crops.append((found, crop_of(found, size_hw, self.scale)))
            except BadImageError as error:
                self.bad[f"{path}, box {number}"] = str(error)
        return crops

    def _keypoints(
        self, found: Sequence[tuple[Mapping[str, np.ndarray], Placement]]
    ) -> list[np.ndarray]:
        placements = [placement for _, placement in found]
        names = [name for name in self.model.array_names if name in found[0][0]]
        arrays = {name: np.stack([taps[name] for taps, _ in found]) for name in names}
        predictions = self.model.predict(arrays, placements)
        return [
            self.model.task.at_source(prediction, placement)
            for prediction, placement in zip(predictions, placements, strict=True)
        ]

    def _write(
        self, path: Path, pixels: np.ndarray, animals: Sequence[Animal], task: PoseTask
    ) -> list[str]:
        target = self.out / self.names[path]
        name = self.names[path].with_suffix("").with_suffix(path.suffix).as_posix()
        size_hw = (pixels.shape[0], pixels.shape[1])
        self._photos.append(_Photo(name=name, size_hw=size_hw, animals=animals))
        points = [animal.keypoints for animal in animals]
        sink = io.BytesIO()
        np.save(sink, np.stack(points) if points else np.zeros((0, task.n_keypoints, 3), "f4"))
        write_bytes(target.with_name(f"{target.name}.npy"), sink.getbuffer())
        write_bytes(target.with_name(f"{target.name}.png"), paint_photo(pixels, animals, task))
        return [f"{target}.npy", f"{target}.png"]

    def finish(self) -> list[str]:
        """Write the keypoints of all photos, as JSON like COCO's and as CSV; give the files."""
        task = self.model.task
        assert isinstance(task, PoseTask)
        about = json.dumps(_as_coco(self._photos, task), allow_nan=False)
        write_bytes(self.out / JSON_FILE, about.encode())
        write_bytes(self.out / CSV_FILE, _as_csv(self._photos, task).encode())
        return [str(self.out / name) for name in (JSON_FILE, CSV_FILE)]

    @property
    def n_animals(self) -> int:
        """Count the animals that were predicted."""
        return sum(len(photo.animals) for photo in self._photos)


def paint_photo(pixels: np.ndarray, animals: Sequence[Animal], task: PoseTask) -> bytes:
    """Draw all animals of a photo with their boxes: a PNG file."""
    size_hw = (pixels.shape[0], pixels.shape[1])
    whole = place(source_hw=size_hw, crop=None, input_hw=size_hw, resize="squash", view="plain")
    side = min(max(*size_hw, _SHORTEST), _LONGEST)
    picture, close = close_up(pixels, whole, side=side)
    for animal in animals:
        if animal.found is not None:
            corners = moved(np.array(animal.found.box).reshape(2, 2), whole, close)
            picture = draw_box(picture, corners)
    for animal in animals:
        points = animal.keypoints.astype(np.float64)
        points[:, :2] = moved(points[:, :2], whole, close)
        picture = draw_pose(picture, points, task.skeleton)
    return encode_png(picture)


def _as_coco(photos: Sequence[_Photo], task: PoseTask) -> dict[str, Any]:
    skeleton = task.skeleton
    category = {
        "id": 1,
        "name": "animal",
        "keypoints": list(skeleton.names),
        "skeleton": [[one + 1, other + 1] for one, other in skeleton.edges],
    }
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, photo in enumerate(photos, 1):
        height, width = photo.size_hw
        images.append({"id": number, "file_name": photo.name, "height": height, "width": width})
        for animal in photo.animals:
            x0, y0, x1, y1 = _box_of(photo, animal)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": [_short(value) for value in (x0, y0, x1 - x0, y1 - y0)],
                    "area": _short((x1 - x0) * (y1 - y0)),
                    "score": None if animal.found is None else animal.found.score,
                    "num_keypoints": len(animal.keypoints),
                    "keypoints": [
                        value
                        for x, y, _ in animal.keypoints
                        for value in (_short(x), _short(y), _SEEN)
                    ],
                    "confidence": [_short(value, 4) for value in animal.keypoints[:, 2]],
                }
            )
    return {"images": images, "annotations": annotations, "categories": [category]}


def _as_csv(photos: Sequence[_Photo], task: PoseTask) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for photo in photos:
        for number, animal in enumerate(photo.animals, 1):
            score = None if animal.found is None else animal.found.score
            about = [photo.name, number, *map(_short, _box_of(photo, animal)), score]
            for name, (x, y, confidence) in zip(task.skeleton.names, animal.keypoints, strict=True):
                writer.writerow([*about, name, _short(x), _short(y), _short(confidence, 4)])
    return sink.getvalue()


def _box_of(photo: _Photo, animal: Animal) -> Box:
    if animal.found is not None:
        return animal.found.box
    return (0.0, 0.0, float(photo.size_hw[1]), float(photo.size_hw[0]))


def _short(value: float, digits: int = 2) -> float | None:
    return round(float(value), digits) if math.isfinite(value) else None
