"""``cityscapes:PATH``: Cityscapes with fine annotations, the 19 classes that are evaluated.

``leftImg8bit/SPLIT/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png`` with ``_gtFine_labelIds.png`` and
``_gtFine_instanceIds.png`` in ``gtFine/SPLIT/CITY/``. The official ``val`` becomes the split
"test", because what lies in ``gtFine/test`` are dummies, not labels; images of ``test`` are left
out, and heads are chosen on a part of "train". A group is a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featstore.datasets.common import (
    READERS,
    check_groups,
    check_keys,
    check_label,
    existing_path,
    list_files,
    npy_bytes,
    parse_argument,
    read_bytes,
)
from featstore.datasets.segmentation import VOID, pick_root, read_index_png, read_recoded
from featstore.errors import InvalidInputError, not_found
from featstore.images import decode_label, probe
from featstore.types import Item, Label

SPLITS = {"train": "train", "val": "test"}
FILES = {"classes": "labelIds", "instances": "instanceIds"}
CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""The evaluated classes by the number in the files; the label counts them from 0, in this order.

Source:
    https://github.com/mcordts/cityscapesScripts, helpers/labels.py, column trainId.
"""
GROUP = -1
"""In "instances": things that the annotators did not tell apart."""
_N_IDS = 34
_CODES = dict.fromkeys(range(_N_IDS), VOID) | {n: code for code, n in enumerate(CLASSES)}
_THINGS = range(24, _N_IDS)
_FIRST_INSTANCE = 1000
_IMAGE = re.compile(r"([^/]+)/((.+)_[0-9]{6})_[0-9]{6}_leftImg8bit\.png")


class CityscapesReader:
    """Lists the images when it is opened, and reads them when they are asked for."""

    format = "cityscapes.v1"
    licence = "Cityscapes licence, non-commercial; see the homepage"
    homepage = "https://www.cityscapes-dataset.com"

    def __init__(self, root: Path, *, name: str) -> None:
        self.name = name
        self.spec = f"cityscapes.v1:{root}"
        self._root = root
        self._items = [item for folder in SPLITS for item in _list_items(root, folder)]
        if not self._items:
            raise InvalidInputError(
                f"{root / 'leftImg8bit'} must hold train/ or val/ with folders of cities. Got no "
                "image there; unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip."
            )
        check_groups(self._items, source=str(root))

    def items(self) -> Sequence[Item]:
        """List the images by path, train first."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the classes (0 to 18, 255 void) or the instances.

        An instance keeps its number of the file, which is its class there times 1000 and a count:
        26001 is the second car. 0 is the background; `GROUP` (-1), no value, are things
        that were not told apart, like the many bicycles of a stand.
        """
        if kind not in item.label_kinds:
            raise not_found("label kind", kind, item.label_kinds)
        place = item.path.removeprefix("leftImg8bit/").removesuffix("leftImg8bit.png")
        path = self._root / "gtFine" / f"{place}gtFine_{FILES[kind]}.png"
        image_hw = probe(self.read_image(item))
        if kind == "classes":
            return read_recoded(path, image_hw=image_hw, codes=_CODES)
        return _read_instances(path, image_hw)

    def class_names(self) -> tuple[str, ...] | None:
        """Name the numbers of the "classes" label."""
        return tuple(CLASSES.values())


def _list_items(root: Path, folder: str) -> list[Item]:
    images = root / "leftImg8bit" / folder
    files = [file for file in list_files(images) if file.endswith("_leftImg8bit.png")]
    items = []
    for file in files:
        match = _IMAGE.fullmatch(file)
        if match is None or match[1] != match[3]:
            raise InvalidInputError(
                f"Images in {images} must be CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png, with six "
                f"digits for sequence and frame. Got {file}."
            )
        items.append(
            Item(
                path=f"leftImg8bit/{folder}/{file}",
                splits=(SPLITS[folder],),
                group=match[2],
                attributes={"city": match[1]},
                label_kinds=tuple(FILES),
            )
        )
    return items


def _read_instances(path: Path, image_hw: tuple[int, int]) -> Label:
    raw = read_index_png(path, kind="instances", image_hw=image_hw, invalid=None)
    values, _ = decode_label(raw)
    is_group = np.isin(values, list(_THINGS))
    instances = np.where(values >= _FIRST_INSTANCE, values, np.where(is_group, GROUP, 0))
    data = npy_bytes(instances.astype(np.int32))
    label = Label(kind="instances", encoding="npy", data=data, invalid=GROUP, source="instanceIds")
    return check_label(label, image_hw, source=str(path))


@READERS.register("cityscapes.v1")
def open_cityscapes(argument: str, *, name: str) -> CityscapesReader:
    """Open ``PATH`` with leftImg8bit and gtFine; the official val becomes the split test.

    Raises:
        InvalidInputError: The path is missing or not laid out like Cityscapes.
        NotFoundError: An option is given; there are none.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, (), reader="cityscapes")
    path = existing_path(parsed.path, reader="cityscapes")
    folders = ("leftImg8bit", "gtFine")
    root = pick_root(path, below=("cityscapes",), folders=folders, reader="cityscapes")
    return CityscapesReader(root, name=name)
