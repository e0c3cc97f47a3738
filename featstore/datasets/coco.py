"""``coco:PATH``: COCO with instances, and with maps of classes where they are.

``train2017/``, ``val2017/`` (or both in ``images/``) and ``annotations/instances_*.json``;
``year=`` names another year. ``val2017`` becomes the split "test", because COCO's own test labels
are not published and everybody reports val2017; heads are chosen on a part of "train".

Classes come from one of two places, with different numbers:

* ``stuffthingmaps/train2017/*.png``: COCO-Stuff, a class being its category id less 1, 255 void;
* ``semantic_train2017/*.png``: category ids of COCO panoptic as they are, 0 void.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from featstore.datasets.coco_json import CocoImage, CocoObject, read_instances
from featstore.datasets.coco_names import COCO_PANOPTIC, COCO_STUFF
from featstore.datasets.common import (
    READERS,
    check_keys,
    check_label,
    existing_path,
    npy_bytes,
    parse_argument,
    parse_whole,
    read_bytes,
)
from featstore.datasets.segmentation import VOID, read_index_png
from featstore.errors import InvalidInputError, not_found
from featstore.images import probe
from featstore.types import Item, Label

SPLITS = {"train": "train", "val": "test"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMaps:
    """Where maps of classes lie, and what their numbers mean."""

    folder: str  # with {part} for train2017 or val2017
    void: float
    names: tuple[str, ...]


MAPS = (
    ClassMaps(folder="stuffthingmaps/{part}", void=VOID, names=COCO_STUFF),
    ClassMaps(folder="semantic_{part}", void=0.0, names=COCO_PANOPTIC),
)


class CocoReader:
    """Reads the annotations when it is opened, and paints a map when it is asked for."""

    format = "coco.v1"
    licence = "CC BY 4.0 for annotations, Flickr terms of use for images"
    homepage = "https://cocodataset.org"

    def __init__(self, root: Path, *, name: str, year: int) -> None:
        self.name = name
        self.spec = f"coco.v1:{root},year={year}"
        self._root = root
        self._maps = _find_maps(root, [f"{split}{year}" for split in SPLITS])
        self._items: list[Item] = []
        self._images: dict[str, CocoImage] = {}
        self._map_paths: dict[str, Path] = {}
        parts = {f"{split}{year}": target for split, target in SPLITS.items()}
        folders = {part: folder for part in parts if (folder := _image_folder(root, part))}
        if not folders:
            raise InvalidInputError(
                f"{root} must hold {' or '.join(parts)} with images. Give the folder that has "
                "them and annotations/, or name the year: year=2014."
            )
        for part, folder in folders.items():
            self._add_part(part, folder, parts[part])

    def items(self) -> Sequence[Item]:
        """List the images by ascending id, train first."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the map of classes as it is, or the instances (0 background, -1 a crowd)."""
        if item.path not in self._images:
            raise not_found("image", item.path, list(self._images)[:3])
        if kind not in item.label_kinds:
            raise not_found("label kind", kind, item.label_kinds)
        image_hw = probe(self.read_image(item))
        if kind == "instances":
            return self._paint(item, image_hw)
        assert self._maps is not None
        return read_index_png(
            self._map_paths[item.path],
            kind=kind,
            image_hw=image_hw,
            invalid=self._maps.void,
            n_classes=len(self._maps.names),
        )

    def class_names(self) -> tuple[str, ...] | None:
        """Name the numbers of the "classes" label; None without such labels."""
        return None if self._maps is None else self._maps.names

    def _paint(self, item: Item, image_hw: tuple[int, int]) -> Label:
        from featstore.datasets.coco_masks import CROWD, instance_map

        image = self._images[item.path]
        label = Label(
            kind="instances",
            encoding="npy",
            data=npy_bytes(instance_map(image.objects, image.hw, source=item.path)),
            invalid=CROWD,
            source="instances",
        )
        return check_label(label, image_hw, source=f"The annotation of {item.path}")

    def _add_part(self, part: str, folder: str, split: str) -> None:
        path = self._root / "annotations" / f"instances_{part}.json"
        if not path.is_file():
            raise InvalidInputError(
                f"{path} must hold the annotations of {folder}/. Got no such file; put it there, "
                "or take the images away."
            )
        maps = None if self._maps is None else self._root / self._maps.folder.format(part=part)
        kinds = ("classes", "instances") if maps and maps.is_dir() else ("instances",)
        images = read_instances(path)
        if not images:
            raise InvalidInputError(f"{path} must list images. Got none.")
        for image in images:
            place = f"{folder}/{image.file_name}"
            self._images[place] = image
            if maps is not None:
                self._map_paths[place] = maps / PurePosixPath(image.file_name).with_suffix(".png")
            attributes = {"boxes": _boxes(image.objects)}
            self._items.append(
                Item(path=place, splits=(split,), attributes=attributes, label_kinds=kinds)
            )


def _boxes(objects: Sequence[CocoObject]) -> list[dict[str, Any]]:
    """Give the objects as JSON values; "instance" is the object's number in the map."""
    boxes: list[dict[str, Any]] = []
    n_single = 0
    for entry in objects:
        n_single += not entry.is_crowd
        boxes.append(
            {
                "class": entry.class_name,
                "box": list(entry.box),
                "area": entry.area,
                "iscrowd": entry.is_crowd,
                "instance": None if entry.is_crowd else n_single,
            }
        )
    return boxes


def _image_folder(root: Path, part: str) -> str | None:
    found = [folder for folder in (part, f"images/{part}") if (root / folder).is_dir()]
    return found[0] if found else None


def _find_maps(root: Path, parts: Sequence[str]) -> ClassMaps | None:
    found = [
        maps for maps in MAPS if any((root / maps.folder.format(part=p)).is_dir() for p in parts)
    ]
    if len(found) > 1:
        places = " and ".join(maps.folder.format(part=parts[0]) for maps in found)
        raise InvalidInputError(
            f"{root} must hold one kind of class maps, for their numbers differ. Got {places}; "
            "move one of them away."
        )
    return found[0] if found else None


@READERS.register("coco.v1")
def open_coco(argument: str, *, name: str) -> CocoReader:
    """Open ``PATH[,year=2017]``: COCO; val2017 becomes the split test.

    Raises:
        InvalidInputError: The path is missing or not laid out like COCO, or its JSON does not
            parse.
        NotFoundError: An option is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, ("year",), reader="coco")
    root = existing_path(parsed.path, reader="coco")
    year = parse_whole(parsed.options.get("year", "2017"), name="year", least=2000)
    return CocoReader(root, name=name, year=year)
