"""Small data sets of animals with keypoints, in the layouts that are found in the wild."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.datasets import save_image

NAMES = ("left_eye", "right_eye", "nose")
HW = (60, 80)


def category(number: int, name: str, **more: Any) -> dict[str, Any]:
    skeleton = [[1, 2], [1, 3], [2, 3]]
    fixed = {"id": number, "name": name, "supercategory": "Canidae", "keypoints": list(NAMES)}
    return {**fixed, "skeleton": skeleton, **more}


def animal(number: int, image_id: int, category_id: int = 1, **more: Any) -> dict[str, Any]:
    """Make one annotation: two points seen, one hidden, in a box of 20x10 pixels."""
    x, y = 10.5 + number, 20.25
    points = [x, y, 2, x + 12, y + 1, 2, x + 6, y + 5, 1]
    fixed = {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
    box = [x - 4, y - 3, 20, 10]
    fixed |= {"bbox": box, "area": 150, "num_keypoints": 3, "keypoints": points}
    return {**fixed, **more}


def image(number: int, **more: Any) -> dict[str, Any]:
    fixed = {"id": number, "file_name": f"{number:012d}.jpg", "height": HW[0], "width": HW[1]}
    return {**fixed, "license": 1, "background": 5, **more}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def keypoint_json(
    images: list[dict[str, Any]], animals: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    categories = [category(1, "dog"), category(2, "fox")]
    fixed = {"info": {"year": 2021}, "licenses": [], "categories": categories}
    return {**fixed, "images": images, "annotations": animals, **more}


def write_ap10k(root: Path, parts: dict[str, list[int]]) -> None:
    """Write images and files as AP-10K has them; odd images have a dog, the others two foxes."""
    for part, numbers in parts.items():
        animals = []
        for number in numbers:
            path = root / "data" / f"{number:012d}.jpg"
            if not path.exists():
                save_image(path, seed=number, hw=HW)
            animals.append(animal(10 * number, number, 2 - number % 2))
            if number % 2 == 0:
                animals.append(animal(10 * number + 1, number, 2))
        content = keypoint_json([image(number) for number in numbers], animals)
        write_json(root / "annotations" / f"ap10k-{part}.json", content)


def make_ap10k(root: Path) -> str:
    splits = {"train-split1": [1, 2], "val-split1": [3], "test-split1": [4]}
    write_ap10k(root, splits | {"train-split2": [3, 4], "val-split2": [1], "test-split2": [2]})
    return f"ap10k:{root}"


ANIMAL_MAKERS: dict[str, Callable[[Path], str]] = {"ap10k.v1": make_ap10k}
