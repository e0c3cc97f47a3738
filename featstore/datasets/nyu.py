"""``nyu:PATH``: indoor RGB-D in the two forms NYU Depth v2 travels in.

* A folder with ``train.txt`` and ``test.txt``, lines ``rgb depth focal``, paths relative to
  ``train/`` and ``test/`` or to the folder itself; depth is a 16-bit PNG in millimetres, 0 being no
  value. A group is a scene's folder within a split.
* ``nyu_depth_v2_labeled.mat`` with ``splits.mat`` beside it; ``depth=rawDepths`` takes the depth as
  it was measured, with holes, instead of ``depths``, whose holes are filled. A group is a scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from featstore.datasets.common import (
    READERS,
    check_keys,
    check_label,
    existing_path,
    parse_argument,
    read_bytes,
    read_lines,
)
from featstore.errors import BadImageError, InvalidInputError, invalid, not_found
from featstore.images import probe
from featstore.types import Item, Label, Reader

HOMEPAGE = "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
LICENCE = "research use; see the homepage"
SPLITS = ("train", "test")
_PNG = b"\x89PNG\r\n\x1a\n"
_MILLIMETRE = 0.001


@READERS.register("nyu.v1")
def open_nyu(argument: str, *, name: str) -> Reader:
    """Open a folder or the official .mat file.

    Raises:
        InvalidInputError: The path is missing or holds neither form.
        NotFoundError: An option is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, ("depth",), reader="nyu")
    path = existing_path(parsed.path, reader="nyu")
    if path.is_file():
        from featstore.datasets.hdf5 import NyuMatReader  # h5py is loaded only for the .mat file

        return NyuMatReader(path, name=name, depth=parsed.options.get("depth", "depths"))
    if "depth" in parsed.options:
        expected = "left out for a folder, whose lists name the depth files"
        raise invalid("depth", parsed.options["depth"], expected)
    return NyuFolderReader(path, name=name)


class NyuFolderReader:
    """The folder form. The lists are read when it is opened, images when they are asked for."""

    format = "nyu.v1"
    licence = LICENCE
    homepage = HOMEPAGE

    def __init__(self, root: Path, *, name: str) -> None:
        self.name = name
        self.spec = f"nyu.v1:{root}"
        self._root = root
        self._items: dict[str, Item] = {}
        self._depths: dict[str, str] = {}
        lists = [split for split in SPLITS if (root / f"{split}.txt").is_file()]
        if not lists:
            raise InvalidInputError(
                f"{root} holds neither train.txt nor test.txt. Give the folder that has these "
                "lists (lines: rgb depth focal), or the path of nyu_depth_v2_labeled.mat."
            )
        for split in lists:
            self._read_list(split)

    def items(self) -> Sequence[Item]:
        """List the images in the order of the lists, train first."""
        return list(self._items.values())

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the depth file's bytes, untouched; values are millimetres."""
        if kind != "depth" or item.path not in self._depths:
            raise not_found("label kind", kind, item.label_kinds)
        path = self._root / self._depths[item.path]
        data = read_bytes(path)
        # Bit depth 16 and colour type grey, from the header that every PNG begins with.
        if not (data.startswith(_PNG) and data[24:26] == b"\x10\x00"):
            raise BadImageError(f"{path} must be a 16-bit grey PNG of millimetres.")
        label = Label(
            kind="depth", encoding="png", data=data, scale=_MILLIMETRE, invalid=0.0, source="depths"
        )
        return check_label(label, probe(self.read_image(item)), source=str(path))

    def _read_list(self, split: str) -> None:
        path = self._root / f"{split}.txt"
        lines = [(n, line.split()) for n, line in enumerate(read_lines(path), 1) if line.strip()]
        if not lines:
            raise InvalidInputError(
                f"{path} lists no image. Fill it with lines `rgb depth focal`, or remove it."
            )
        for number, parts in lines:
            if len(parts) not in (2, 3):
                raise InvalidInputError(
                    f"Line {number} of {path} must be `rgb depth focal`. Got {' '.join(parts)!r}."
                )
            focal = _parse_focal(parts[2], place=f"line {number} of {path}") if parts[2:] else None
            self._add(split, parts[0], parts[1], focal)

    def _add(self, split: str, image: str, depth: str, focal: float | None) -> None:
        path = self._find(split, image)
        if path in self._items:
            known = self._items[path]
            splits = tuple(dict.fromkeys([*known.splits, split]))
            self._items[path] = replace(known, splits=splits)
            return
        folders = PurePosixPath(path).parent.parts
        scene = "/".join(folders[1:] if folders[:1] == (split,) else folders)
        self._items[path] = Item(
            path=path,
            splits=(split,),
            # One video may lie in both splits; each part of it is a group then.
            group=f"{split}/{scene}" if scene else None,
            attributes={} if focal is None else {"focal": focal},
            label_kinds=() if depth == "None" else ("depth",),
        )
        self._depths[path] = self._find(split, depth)

    def _find(self, split: str, listed: str) -> str:
        """Give a listed path relative to the root, whichever folder the list meant."""
        relative = PurePosixPath(listed.lstrip("/"))
        if ".." in relative.parts:
            raise InvalidInputError(f"{split}.txt of {self._root} leads out of it: {listed!r}.")
        nested = PurePosixPath(split) / relative
        inside = not (self._root / relative).exists() and (self._root / split).is_dir()
        return str(nested if (self._root / nested).exists() or inside else relative)


def _parse_focal(text: str, *, place: str) -> float:
    try:
        focal = float(text)
    except ValueError:
        focal = math.nan
    if not (math.isfinite(focal) and focal > 0):
        raise InvalidInputError(f"The focal length in {place} must be a number. Got {text!r}.")
    return focal
