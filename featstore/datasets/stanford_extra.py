"""StanfordExtra's list of dogs in the words of COCO: breeds are the categories."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import InvalidInputError
from featstore.npy import load_npy

SPLITS = ("train", "val", "test")
_LEG = ("paw", "middle", "top")
NAMES = (
    *(
        f"{side}_{end}_{part}"
        for side in ("left", "right")
        for end in ("front", "rear")
        for part in _LEG
    ),
    *("tail_base", "tail_end", "left_ear_base", "right_ear_base", "nose", "chin"),
    *("left_ear_tip", "right_ear_tip", "left_eye", "right_eye", "withers", "throat"),
)
"""The 24 keypoints in the order of ``joints``."""


def is_stanford_extra(content: Any) -> bool:
    """Tell whether a JSON value is such a list."""
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, Mapping) and {"img_path", "joints"} <= first.keys()


def as_coco(content: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Any]:
    """Write the list as COCO would; image `split` comes from the ``.npy`` files beside it.

    Raises:
        InvalidInputError: An entry is incomplete, or an .npy file does not fit.
    """
    splits = _read_splits(path, len(content))
    images, animals, breeds = [], [], dict[str, int]()
    try:
        for index, entry in enumerate(content):
            place = str(entry["img_path"])
            # "n02085620-Chihuahua/n02085620_10074.jpg": the folder is WordNet's number and breed.
            breed = re.sub(r"^n[0-9]+-", "", place.split("/")[0])
            number = breeds.setdefault(breed, len(breeds))
            size = {"height": entry.get("img_height"), "width": entry.get("img_width")}
            images.append({"id": index, "file_name": place, **size, "split": splits.get(index)})
            animal = {"id": index, "image_id": index, "category_id": number}
            animals.append(animal | {"keypoints": entry["joints"], "bbox": entry.get("img_bbox")})
    except (KeyError, TypeError) as error:
        raise InvalidInputError(
            f"Entry {index} of {path} must have img_path and joints, as StanfordExtra has. Got "
            f"{type(error).__name__}: {error}."
        ) from error
    kinds = [{"id": number, "name": breed, "keypoints": NAMES} for breed, number in breeds.items()]
    return {"images": images, "annotations": animals, "categories": kinds}


def _read_splits(path: Path, n_entries: int) -> dict[int, str]:
    """Read which entries each split lists; none where there are no such files."""
    found: dict[int, str] = {}
    for split in SPLITS:
        for place in sorted(path.parent.glob(f"{split}_stanford_*.npy")):
            try:
                numbers = load_npy(place)
            except (OSError, ValueError) as error:
                raise InvalidInputError(f"{place} cannot be read as .npy ({error}).") from error
            if not np.issubdtype(numbers.dtype, np.integer) or not _fits(numbers, n_entries):
                raise InvalidInputError(
                    f"{place} must list entries of {path.name}, from 0 to {n_entries - 1}. Got "
                    f"{numbers.dtype} from {numbers.min(initial=0)} to {numbers.max(initial=0)}."
                )
            found |= dict.fromkeys(numbers.ravel().tolist(), split)
    return found


def _fits(numbers: np.ndarray, n_entries: int) -> bool:
    return bool(((numbers >= 0) & (numbers < n_entries)).all())
