"""``ade20k:PATH``: the 150 classes of ADE20K, as in ADEChallengeData2016.

``images/training``, ``images/validation`` and the same below ``annotations/``; names from
``objectInfo150.txt``, scenes from ``sceneCategories.txt``. The files hold 0 for "other" and 1 to
150 for the classes; the label holds 0 to 149, and 255 for "other", which the benchmark leaves out
too. ``validation`` becomes the split "test", because the benchmark's test labels are not published
and validation is what is reported; heads are chosen on a part of "train".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from featstore.datasets.common import (
    READERS,
    check_keys,
    existing_path,
    list_files,
    parse_argument,
    read_bytes,
    read_lines,
)
from featstore.datasets.segmentation import VOID, pick_root, read_recoded
from featstore.errors import InvalidInputError, not_found
from featstore.images import probe
from featstore.types import Item, Label

N_CLASSES = 150
SPLITS = {"training": "train", "validation": "test"}
_CODES = {0: VOID, **{number: number - 1 for number in range(1, N_CLASSES + 1)}}


class Ade20kReader:
    """Lists the images when it is opened, and reads them when they are asked for."""

    format = "ade20k.v1"
    licence = "BSD-3-Clause for annotations, research use for images; see the homepage"
    homepage = "https://ade20k.csail.mit.edu"

    def __init__(self, root: Path, *, name: str) -> None:
        self.name = name
        self.spec = f"ade20k.v1:{root}"
        self._root = root
        self._names = _read_names(root / "objectInfo150.txt")
        scenes = _read_scenes(root / "sceneCategories.txt")
        self._items = [
            Item(
                path=f"images/{folder}/{file}",
                splits=(split,),
                label=scenes.get(PurePosixPath(file).stem),
                label_kinds=("classes",),
            )
            for folder, split in SPLITS.items()
            for file in _list_images(root, folder)
        ]
        if not self._items:
            raise InvalidInputError(
                f"{root / 'images'} must hold images in training/ or validation/. Got none; give "
                "the folder ADEChallengeData2016."
            )

    def items(self) -> Sequence[Item]:
        """List the images by path, train first."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the classes, 0 to 149, and 255 where the file has 0."""
        if kind != "classes":
            raise not_found("label kind", kind, item.label_kinds)
        relative = PurePosixPath(item.path).relative_to("images").with_suffix(".png")
        image_hw = probe(self.read_image(item))
        return read_recoded(self._root / "annotations" / relative, image_hw=image_hw, codes=_CODES)

    def class_names(self) -> tuple[str, ...] | None:
        """Name the numbers of the "classes" label; None without objectInfo150.txt."""
        return self._names


def _list_images(root: Path, folder: str) -> list[str]:
    if not (root / "images" / folder).is_dir():
        return []
    files = list_files(root / "images" / folder)
    return [file for file in files if file.lower().endswith((".jpg", ".jpeg", ".png"))]


def _read_names(path: Path) -> tuple[str, ...] | None:
    """Read the tab-separated table of the classes, whose header names its columns."""
    if not path.is_file():
        return None
    rows = [
        [cell.strip() for cell in line.split("\t")] for line in read_lines(path) if line.strip()
    ]
    header, *lines = rows or [[]]
    if "Idx" in header and "Name" in header:
        at, named = header.index("Idx"), header.index("Name")
        numbers = [line[at] if len(line) == len(header) else "" for line in lines]
        if numbers == [str(number) for number in range(1, N_CLASSES + 1)]:
            return tuple(line[named] for line in lines)
    raise InvalidInputError(
        f"{path} must be the table of ADE20K: tab-separated, with Idx and Name in its header and "
        f"the classes 1 to {N_CLASSES} in order. Got {len(lines)} lines below {header}."
    )


def _read_scenes(path: Path) -> dict[str, str]:
    """Read lines ``IMAGE SCENE``: the class of each whole image."""
    if not path.is_file():
        return {}
    scenes: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if len(words) not in (0, 2):
            raise InvalidInputError(f"Line {number} of {path} must be `image scene`. Got {line!r}.")
        if words:
            scenes[words[0]] = words[1]
    return scenes


@READERS.register("ade20k.v1")
def open_ade20k(argument: str, *, name: str) -> Ade20kReader:
    """Open ``PATH``: the folder ADEChallengeData2016; validation becomes the split test.

    Raises:
        InvalidInputError: The path is missing or not laid out like ADE20K.
        NotFoundError: An option is given; there are none.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, (), reader="ade20k")
    path = existing_path(parsed.path, reader="ade20k")
    folders = ("images", "annotations")
    root = pick_root(path, below=("ADEChallengeData2016",), folders=folders, reader="ade20k")
    return Ade20kReader(root, name=name)
