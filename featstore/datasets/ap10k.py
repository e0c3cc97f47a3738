"""``ap10k:PATH``: animals with keypoints, in the JSON of AP-10K or any other like COCO's.

PATH is a folder with ``annotations/*.json`` (or JSON files right inside) and the images in
``data/``, ``images/`` or beside, or one JSON file. Files of all splits are read, an animal that
stands in several is one item, and its splits come from the files' names: ``ap10k-train-split1``
is "train" for ``split=1``. Categories are identities, written as the items' labels, so that whole
species can be held out. An item is one animal: a square around its box, 1.25 times its longer
side (``box=1.5`` names another scale, ``box=image`` shows the whole image).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featstore.datasets.common import (
    READERS,
    check_groups,
    check_keys,
    existing_path,
    parse_argument,
    parse_whole,
    read_bytes,
)
from featstore.datasets.find_images import find_images
from featstore.datasets.instances import (
    Instance,
    box_text,
    frame_instances,
    left_out_notes,
    parse_box,
)
from featstore.datasets.keypoint_json import (
    CORNERS,
    SIZES,
    Annotation,
    KeypointFile,
    read_keypoint_file,
)
from featstore.errors import BadImageError, InvalidInputError, invalid, not_found
from featstore.images import probe
from featstore.skeleton import Skeleton
from featstore.types import Item, Label

IMAGE_FOLDERS = ("data", "images", "Images", ".")
GROUPS = ("image", "video")
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|valid|validation|test)(?:[0-9]{4})?(?=[-_.]|$)")
_NUMBER = re.compile(r"split[-_]?([0-9]+)")
_SAME = {"valid": "val", "validation": "val"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the annotations are read."""

    split: int | None
    scale: float | None  # None: the whole image
    images: str | None
    boxes: str | None
    group: str


class Ap10kReader:
    """Reads all annotations when it is opened."""

    format = "ap10k.v1"
    licence = "CC BY 4.0 for AP-10K; of other data sets see their own pages"
    homepage = "https://github.com/AlexTheBad/AP-10K"

    def __init__(self, path: Path, *, name: str, options: Options) -> None:
        self.name = name
        self._root = _root_of(path)
        files = _read_files(path, options)
        self._skeleton = _shared_skeleton(files)
        number = _split_number(files, options.split)
        self.spec = f"ap10k.v1:{path}{_spec_options(options, number)}"
        left_out = sum((file.left_out for file in files), Counter[str]())
        instances = _instances(files, self._root, number, options)
        framed = frame_instances(instances, scale=options.scale)
        self._notes = left_out_notes(left_out + framed.left_out)
        self._items = framed.items
        self._sizes = {entry.path: entry.image_hw for entry in instances}
        if not self._items:
            raise InvalidInputError(
                f"{path} must mark a keypoint of an animal. {' '.join(self._notes)}"
            )
        check_groups(self._items, source=str(path))

    def items(self) -> Sequence[Item]:
        """List the animals by image, in the order of the files."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image, whose size must be the one that the annotations are for."""
        data = read_bytes(self._root / item.path)
        told = self._sizes.get(item.path)
        if told is not None and (found := probe(data)) != told:
            raise BadImageError(
                f"{item.path} must be {told[0]}x{told[1]}, as its annotation says, or the "
                f"keypoints miss. Got {found[0]}x{found[1]}."
            )
        return data

    def read_label(self, item: Item, kind: str) -> Label:
        """Refuse: keypoints are no dense labels and stand among the attributes."""
        raise not_found("label kind", kind, item.label_kinds)

    def skeleton(self) -> Skeleton:
        """Name the keypoints."""
        return self._skeleton

    def notes(self) -> Sequence[str]:
        """Say how many annotations were left out, and why."""
        return self._notes


def _root_of(path: Path) -> Path:
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def _read_files(path: Path, options: Options) -> list[KeypointFile]:
    if path.is_file():
        paths = [path]
    else:
        folder = path / "annotations"
        paths = sorted((folder if folder.is_dir() else path).glob("*.json"))
    read = [read_keypoint_file(place, boxes=options.boxes) for place in paths]
    files = [file for file in read if file is not None]
    if not files:
        looked = ", ".join(place.name for place in paths[:3]) or "no JSON file"
        raise InvalidInputError(
            f"{path} must hold keypoints in JSON files like COCO's, in annotations/ or right "
            f"inside. Got {looked}."
        )
    return files


def _shared_skeleton(files: Sequence[KeypointFile]) -> Skeleton:
    first = files[0]
    for file in files:
        if file.skeleton.names != first.skeleton.names:
            raise InvalidInputError(
                f"{first.path} and {file.path} must name the same keypoints in the same order. "
                f"Got {len(first.skeleton.names)} and {len(file.skeleton.names)}; give them one "
                "by one."
            )
    return first.skeleton


def _split_number(files: Sequence[KeypointFile], wanted: int | None) -> int | None:
    """Choose among numbered splits; None where the files' names have no number."""
    numbers = sorted({found for file in files if (found := _number_of(file)) is not None})
    if wanted is not None and wanted not in numbers:
        known = f"files of split {', '.join(map(str, numbers))}" if numbers else "no numbered split"
        raise invalid("split", wanted, f"one that is there, and there are {known}")
    return wanted if wanted is not None or not numbers else numbers[0]


def _number_of(file: KeypointFile) -> int | None:
    match = _NUMBER.search(file.path.stem.lower())
    return None if match is None else int(match[1])


def _split_of(file: KeypointFile, number: int | None) -> str | None:
    """Tell which split a file lists: None for none, or for one of another numbering."""
    if _number_of(file) != number:
        return None
    names = {_SAME.get(name, name) for name in _SPLIT.findall(file.path.stem.lower())}
    return names.pop() if len(names) == 1 else None


def _spec_options(options: Options, number: int | None) -> str:
    named = {
        "split": None if number is None else str(number),
        "box": box_text(options.scale),
        "images": options.images,
        "bbox": options.boxes,
        "group": options.group,
    }
    return "".join(f",{key}={value}" for key, value in named.items() if value is not None)


def _instances(
    files: Sequence[KeypointFile], root: Path, number: int | None, options: Options
) -> list[Instance]:
    """Join the files: what two of them say of one image in the same words is one animal."""
    found: dict[tuple[Any, ...], Instance] = {}
    places = _places(files, root, options.images)
    for file in files:
        split = _split_of(file, number)
        for entry in file.annotations:
            path = places[entry.file_name]
            key = (path, entry.identity, entry.box, entry.points)
            known = found.get(key)
            splits = () if split is None else (split,)
            if known is None:
                found[key] = _instance(entry, path, root, splits, options)
            elif split is not None and split not in known.splits:
                found[key] = replace(known, splits=(*known.splits, split))
    by_image: dict[str, list[Instance]] = {}
    for instance in found.values():
        by_image.setdefault(instance.path, []).append(instance)
    return [instance for path in sorted(by_image) for instance in by_image[path]]


def _instance(
    entry: Annotation, path: str, root: Path, splits: tuple[str, ...], options: Options
) -> Instance:
    return Instance(
        path=path,
        image_hw=entry.image_hw or _probed(root / path),
        points=entry.points,
        number=entry.number,
        box=entry.box,
        area=entry.area,
        identity=entry.identity,
        splits=splits,
        group=entry.video if options.group == "video" else None,
        more=entry.more,
    )


def _probed(path: Path) -> tuple[int, int] | None:
    try:
        return probe(read_bytes(path))
    except BadImageError:
        return None  # the extraction says so of each image


def _places(files: Sequence[KeypointFile], root: Path, folder: str | None) -> dict[str, str]:
    names = dict.fromkeys(entry.file_name for file in files for entry in file.annotations)
    beside = files[0].path.parent.relative_to(root).as_posix()
    folders = [folder] if folder else list(dict.fromkeys([*IMAGE_FOLDERS, beside]))
    return find_images(list(names), root, folders) if names else {}


def _parse_choice(options: Mapping[str, str], key: str, known: Sequence[str]) -> str | None:
    chosen = options.get(key)
    if chosen is not None and chosen not in known:
        raise invalid(key, chosen, " or ".join(known))
    return chosen


@READERS.register("ap10k.v1")
def open_ap10k(argument: str, *, name: str) -> Ap10kReader:
    """Open ``PATH[,split=1][,box=1.25|image][,images=DIR]``: animals with keypoints.

    Raises:
        InvalidInputError: The path is missing, or its JSON is not as it must be.
        NotFoundError: An option is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, ("split", "box", "images", "bbox", "group"), reader="ap10k")
    split = parsed.options.get("split")
    options = Options(
        split=None if split is None else parse_whole(split, name="split", least=1),
        scale=parse_box(parsed.options.get("box")),
        images=parsed.options.get("images"),
        boxes=_parse_choice(parsed.options, "bbox", (SIZES, CORNERS)),
        group=_parse_choice(parsed.options, "group", GROUPS) or "image",
    )
    return Ap10kReader(existing_path(parsed.path, reader="ap10k"), name=name, options=options)
