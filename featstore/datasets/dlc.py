"""``dlc:PATH``: a project of DeepLabCut, of one animal or several.

PATH is the project's folder (or its ``config.yaml``) with ``labeled-data/VIDEO/``, each with
images and ``CollectedData_SCORER.csv``, or ``.h5`` where there is no CSV. ``config.yaml``, where
it is there, gives the order of the body parts, the lines between them and the scorer. Body parts
that are no animal's (the individual "single") are left out.

DeepLabCut counts pixels from the middle of the first one, so half a pixel is added. A marked
point has v = 2. There are no boxes: the smallest one around an animal's points is taken. The
label is NAME of ``identity=NAME``, else the name of the data set; ``identity=individual`` takes
the individuals' names. The group is the video.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from featstore.datasets.common import (
    READERS,
    check_keys,
    existing_path,
    parse_argument,
    read_bytes,
)
from featstore.datasets.dlc_tables import SINGLE, LabelTable, Marks, read_label_table
from featstore.datasets.instances import (
    INDIVIDUAL,
    UNMARKED,
    Instance,
    Point,
    box_text,
    frame_instances,
    image_size,
    left_out_notes,
    parse_box,
)
from featstore.errors import InvalidInputError, not_found
from featstore.skeleton import Skeleton, swaps_from_names
from featstore.types import Item, Label

_HALF = 0.5
_FOLDER = "labeled-data"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What of ``config.yaml`` is used; nothing where there is none."""

    scorer: str | None = None
    bodyparts: tuple[str, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()


class DlcReader:
    """Reads all tables when it is opened, and the sizes of their images."""

    format = "dlc.v1"
    licence = ""
    homepage = "https://www.deeplabcut.org"

    def __init__(self, root: Path, *, name: str, scale: float | None, identity: str | None) -> None:
        self.name = name
        named = "" if identity is None else f",identity={identity}"
        self.spec = f"dlc.v1:{root},box={box_text(scale)}{named}"
        self._root = root
        config = _read_config(root / "config.yaml")
        tables = [read_label_table(path) for path in _table_paths(root, config.scorer)]
        self._skeleton = _skeleton(tables, config)
        instances = [
            instance
            for table in tables
            for instance in _instances(table, root, self._skeleton, identity or name)
        ]
        framed = frame_instances(instances, scale=scale)
        left_out = framed.left_out + _landmarks(tables)
        self._notes = left_out_notes(left_out)
        self._items = framed.items
        if not self._items:
            raise InvalidInputError(f"{root} must have a marked animal. {' '.join(self._notes)}")

    def items(self) -> Sequence[Item]:
        """List the animals by video and image."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Refuse: keypoints are no dense labels and stand among the attributes."""
        raise not_found("label kind", kind, item.label_kinds)

    def skeleton(self) -> Skeleton:
        """Name the body parts."""
        return self._skeleton

    def notes(self) -> Sequence[str]:
        """Say how many annotations were left out, and why."""
        return self._notes


def _table_paths(root: Path, scorer: str | None) -> list[Path]:
    """Find one table a video: the scorer's, else the only one; a CSV before an HDF5 file."""
    folders = sorted(path for path in (root / _FOLDER).glob("*") if path.is_dir())
    found = [path for folder in folders if (path := _table_path(folder, scorer)) is not None]
    if not found:
        raise InvalidInputError(
            f"{root} must be a project of DeepLabCut, with {_FOLDER}/VIDEO/CollectedData_*.csv "
            f"or .h5. Got {len(folders)} folders of videos; label some images, or check the path."
        )
    return found


def _table_path(folder: Path, scorer: str | None) -> Path | None:
    paths = [
        *sorted(folder.glob("CollectedData_*.csv")),
        *sorted(folder.glob("CollectedData_*.h5")),
    ]
    stems = list(dict.fromkeys(path.stem for path in paths))
    wanted = f"CollectedData_{scorer}"
    if len(stems) > 1 and wanted not in stems:
        raise InvalidInputError(
            f"{folder} must have the labels of one person, or config.yaml must name the scorer. "
            f"Got {', '.join(stems)}."
        )
    stem = wanted if wanted in stems else "".join(stems)
    return next((path for path in paths if path.stem == stem), None)


def _read_config(path: Path) -> Config:
    if not path.is_file():
        return Config()
    import yaml  # needed for this one file alone

    try:
        content = yaml.safe_load(path.read_bytes())
        listed = content.get("multianimalbodyparts") or content.get("bodyparts") or ()
        # A project of several animals has "MULTI!" there.
        bodyparts = () if isinstance(listed, str) else tuple(map(str, listed))
        chains = [list(map(str, chain)) for chain in content.get("skeleton") or ()]
        scorer = content.get("scorer")
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise InvalidInputError(f"{path} cannot be read as DeepLabCut's ({error}).") from error
    lines = [pair for chain in chains for pair in pairwise(chain)]
    return Config(
        scorer=None if scorer is None else str(scorer), bodyparts=bodyparts, lines=tuple(lines)
    )


def _skeleton(tables: Sequence[LabelTable], config: Config) -> Skeleton:
    """Take the order of the config, else of the first table, for body parts that all must have."""
    names = config.bodyparts or next(iter(_parts(tables[0])), ())
    for table in tables:
        for parts in _parts(table):
            foreign = sorted(set(parts) - set(names))
            if foreign or (not config.bodyparts and set(parts) != set(names)):
                other = "config.yaml" if config.bodyparts else tables[0].path
                raise InvalidInputError(
                    f"{table.path} must have the body parts of {other}, which are "
                    f"{', '.join(names)}. Got {', '.join(parts)}."
                )
    numbers = {name: number for number, name in enumerate(names)}
    # The example lines of a fresh project name parts that it does not have.
    edges = [(numbers[a], numbers[b]) for a, b in config.lines if {a, b} <= numbers.keys()]
    return Skeleton(names=tuple(names), edges=tuple(edges), swaps=swaps_from_names(names))


def _parts(table: LabelTable) -> Iterator[tuple[str, ...]]:
    for individual in table.individuals:
        if individual != SINGLE:
            yield table.bodyparts[individual]


def _landmarks(tables: Sequence[LabelTable]) -> Counter[str]:
    count = sum(SINGLE in marks for table in tables for marks in table.rows.values())
    return Counter({"they are of no animal but the scene's": count})


def _instances(
    table: LabelTable, root: Path, skeleton: Skeleton, identity: str
) -> Iterator[Instance]:
    video = f"{_FOLDER}/{table.path.parent.name}"
    for file_name in sorted(table.rows):
        marks = table.rows[file_name]
        path = f"{video}/{file_name}"
        image_hw = image_size(root / path) if marks else None
        for individual in table.individuals:
            if individual in marks and individual != SINGLE:
                more: dict[str, Any] = {INDIVIDUAL: individual} if individual else {}
                yield Instance(
                    path=path,
                    image_hw=image_hw,
                    points=_points(marks, individual, skeleton),
                    number=individual or "1",
                    identity=(individual or None) if identity == INDIVIDUAL else identity,
                    group=video,
                    more=more,
                )


def _points(marks: Marks, individual: str, skeleton: Skeleton) -> tuple[Point, ...]:
    places: Mapping[str, tuple[float, float]] = marks[individual]
    return tuple(
        (places[name][0] + _HALF, places[name][1] + _HALF, 2) if name in places else UNMARKED
        for name in skeleton.names
    )


@READERS.register("dlc.v1")
def open_dlc(argument: str, *, name: str) -> DlcReader:
    """Open ``PATH[,box=1.25|image][,identity=NAME]``: a project of DeepLabCut, with keypoints.

    Raises:
        InvalidInputError: The path is missing, or no project with labels.
        NotFoundError: An option is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, ("box", "identity"), reader="dlc")
    path = existing_path(parsed.path, reader="dlc")
    return DlcReader(
        path if path.is_dir() else path.parent,
        name=name,
        scale=parse_box(parsed.options.get("box")),
        identity=parsed.options.get("identity"),
    )
