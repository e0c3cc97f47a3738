"""``voc:PATH``: the layout of PASCAL VOC, for VOC itself and for others that took it over.

``JPEGImages/``; ``SegmentationClass/`` and ``SegmentationObject/`` (palette PNGs, 255 is void);
boxes in ``Annotations/*.xml``; and the splits as lists in ``ImageSets/Segmentation/``, else in
``ImageSets/Main/``, else in ``ImageSets/``. PATH may also hold all this in ``VOC2012/`` or
``VOCdevkit/VOC2012/``.

A list of ``ImageSets/Main`` has few images with segmentation, so an image has a label where it has
a file. In the other lists a missing file is an error of that image, unless not one image of the
list has one (the labels of VOC's test images are not published).

In VOC itself, where no test image has a label or boxes, ``val`` is the split "test", as everybody
measures on it, and the images of the test list are the split "unlabelled".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Any

from featstore.datasets.common import (
    IMAGE_SUFFIXES,
    READERS,
    check_keys,
    existing_path,
    list_files,
    parse_argument,
    read_bytes,
    read_lines,
)
from featstore.datasets.segmentation import read_class_names, read_index_png
from featstore.datasets.voc_boxes import read_boxes
from featstore.errors import InvalidInputError, not_found
from featstore.images import probe
from featstore.types import Item, Label

SPLITS = ("train", "val", "trainval", "test")
FOLDERS = {"classes": "SegmentationClass", "instances": "SegmentationObject"}
CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()
_LISTS = ("ImageSets/Segmentation", "ImageSets/Main", "ImageSets")
_YEAR = re.compile(r"VOC20\d\d")


class VocReader:
    """Reads lists and boxes when it is opened, images and labels when they are asked for."""

    format = "voc.v1"

    def __init__(self, root: Path, *, name: str, classes_path: Path | None) -> None:
        self.name = name
        self.spec = f"voc.v1:{root}" + (f",classes={classes_path}" if classes_path else "")
        self._root = root
        folder, lists = _read_lists(root)
        listed = list(dict.fromkeys(entry for names in lists.values() for entry in names))
        images = _stems(root / "JPEGImages", IMAGE_SUFFIXES - {".npy"})
        kinds = _label_kinds(root, lists, is_main=folder.name == "Main")
        boxes = {entry: read_boxes(root / "Annotations" / f"{entry}.xml") for entry in listed}
        self._entries = {f"JPEGImages/{images.get(n, f'{n}.jpg')}": n for n in listed}
        is_voc = _is_voc(root, boxes)
        labelled = {n for n in listed if kinds[n] or boxes[n] is not None}
        split_of = _split_names(lists, labelled, is_voc=is_voc)
        self._items = [
            Item(
                path=path,
                splits=tuple(split_of[split] for split, names in lists.items() if entry in names),
                attributes=_attributes(boxes[entry]),
                label_kinds=kinds[entry],
            )
            for path, entry in self._entries.items()
        ]
        # Another data set in VOC's layout has a licence of its own, which the files do not tell.
        self.licence = "Flickr terms of use; see the homepage" if is_voc else ""
        self.homepage = "http://host.robots.ox.ac.uk/pascal/VOC/" if is_voc else ""
        self._names = _class_names(root, classes_path, is_voc=is_voc)

    def items(self) -> Sequence[Item]:
        """List the images in the order of the lists: train, val, trainval, test."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the PNG's bytes, untouched; in both kinds 255 is void and 0 the background."""
        if item.path not in self._entries:
            raise not_found("image", item.path, list(self._entries)[:3])
        if kind not in item.label_kinds:
            raise not_found("label kind", kind, item.label_kinds)
        path = self._root / FOLDERS[kind] / f"{self._entries[item.path]}.png"
        n_classes = len(self._names) if self._names and kind == "classes" else None
        image_hw = probe(self.read_image(item))
        return read_index_png(path, kind=kind, image_hw=image_hw, n_classes=n_classes)

    def class_names(self) -> tuple[str, ...] | None:
        """Name the numbers of the "classes" label, where they are known."""
        return self._names


def _read_lists(root: Path) -> tuple[Path, dict[str, dict[str, None]]]:
    """Give the folder of the lists and, a split each, their entries in order."""
    for folder in [root / place for place in _LISTS]:
        paths = {split: folder / f"{split}.txt" for split in SPLITS}
        lists = {split: _read_list(path) for split, path in paths.items() if path.is_file()}
        if lists:
            return folder, lists
    raise InvalidInputError(
        f"{root / _LISTS[0]} must hold train.txt, val.txt, trainval.txt or test.txt with the name "
        "of one image a line, without its ending. Got none of them, there or in "
        f"{' or '.join(_LISTS[1:])}."
    )


def _split_names(
    lists: Mapping[str, Mapping[str, None]],
    labelled: Set[str],
    *,
    is_voc: bool,
) -> dict[str, str]:
    """Name the split of each list, given the images that have a label or boxes."""
    names = {split: split for split in lists}
    has_test_labels = not labelled.isdisjoint(lists.get("test", ()))
    if is_voc and "val" in lists and not has_test_labels:
        names |= {"val": "test"} | ({"test": "unlabelled"} if "test" in lists else {})
    return names


def _read_list(path: Path) -> dict[str, None]:
    entries: dict[str, None] = {}
    for number, line in enumerate(read_lines(path), 1):
        entry = PurePosixPath(line.strip())
        is_one_word = len(line.split()) == 1
        if is_one_word and (entry.is_absolute() or ".." in entry.parts):
            raise InvalidInputError(f"Line {number} of {path} leads out of it: {line!r}.")
        if line.strip() and not is_one_word:
            raise InvalidInputError(
                f"Line {number} of {path} must be the name of one image, without its ending. "
                f"Got {line!r}."
            )
        if is_one_word:
            entries[str(entry)] = None
    if not entries:
        raise InvalidInputError(
            f"{path} lists no image. Fill it with one name a line, or remove it."
        )
    return entries


def _stems(folder: Path, suffixes: frozenset[str]) -> dict[str, str]:
    """Give the files of a folder by their names without the ending."""
    found: dict[str, str] = {}
    for file in list_files(folder):
        path = PurePosixPath(file)
        if path.suffix.lower() not in suffixes:
            continue
        first = found.setdefault(str(path.with_suffix("")), file)
        if first != file:
            raise InvalidInputError(
                f"{folder} must hold one file a name. Got {first} and {file}; remove one of them."
            )
    return found


def _label_kinds(
    root: Path, lists: Mapping[str, Mapping[str, None]], *, is_main: bool
) -> dict[str, tuple[str, ...]]:
    """Give the kinds of label that each listed image has, or ought to have."""
    kinds: dict[str, tuple[str, ...]] = {}
    for kind, folder in FOLDERS.items():
        files = _stems(root / folder, frozenset({".png"})) if (root / folder).is_dir() else {}
        for entries in lists.values():
            is_labelled = not is_main and any(entry in files for entry in entries)
            for entry in entries:
                known = kinds.setdefault(entry, ())
                if kind not in known and (is_labelled or entry in files):
                    kinds[entry] = (*known, kind)
    return kinds


def _attributes(boxes: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {} if boxes is None else {"boxes": boxes}


def _is_voc(root: Path, boxes: Mapping[str, list[dict[str, Any]] | None]) -> bool:
    """Tell VOC from others in its layout, by the folder's name or the classes of the boxes."""
    used = {box["class"] for entry in boxes.values() for box in entry or ()}
    has_its_classes = bool(used) and used <= set(CLASSES[1:])
    return _YEAR.fullmatch(root.name) is not None or has_its_classes


def _class_names(root: Path, path: Path | None, *, is_voc: bool) -> tuple[str, ...] | None:
    """Take the names from the file named, from classes.txt, or from VOC where it is VOC."""
    if path is None and (root / "classes.txt").is_file():
        path = root / "classes.txt"
    if path is not None:
        return read_class_names(path)
    return tuple(CLASSES) if is_voc else None


def _find_root(path: Path) -> Path:
    """Find the folder with JPEGImages/ and ImageSets/: `path` itself, or the one year below it."""
    below = [*sorted(path.glob("VOC20[0-9][0-9]")), *sorted(path.glob("VOCdevkit/VOC20[0-9][0-9]"))]
    is_root = [
        root
        for root in [path, *below]
        if (root / "JPEGImages").is_dir() and (root / "ImageSets").is_dir()
    ]
    if not is_root:
        raise InvalidInputError(
            f"{path} must hold JPEGImages/ and ImageSets/, or VOCdevkit/VOC2012 with both. Give "
            "the folder that has them."
        )
    if is_root[0] != path and len(is_root) > 1:
        raise InvalidInputError(
            f"{path} must hold one year of VOC. Got {', '.join(root.name for root in is_root)}; "
            f"give one of them, like {is_root[-1]}."
        )
    return is_root[0]


@READERS.register("voc.v1")
def open_voc(argument: str, *, name: str) -> VocReader:
    """Open ``PATH[,classes=FILE]``: the layout of PASCAL VOC; FILE names a class a line.

    Raises:
        InvalidInputError: The path is missing or not laid out like VOC, or a list or an XML file
            does not parse.
        NotFoundError: An option is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, ("classes",), reader="voc")
    root = _find_root(existing_path(parsed.path, reader="voc"))
    classes = parsed.options.get("classes")
    return VocReader(
        root,
        name=name,
        classes_path=None if classes is None else existing_path(classes, reader="voc"),
    )
