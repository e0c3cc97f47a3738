"""``folder:PATH``: a folder of images, flat or with a folder a class, with splits or without.

Folders named train, val, valid, validation or test right inside are splits. What a split (or the
folder, where it has no splits) holds in a subfolder has that subfolder's name as label. Hidden
files and files that are no images are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from featstore.datasets.common import (
    IMAGE_SUFFIXES,
    READERS,
    check_keys,
    existing_path,
    list_files,
    parse_argument,
    read_bytes,
)
from featstore.errors import InvalidInputError, not_found
from featstore.types import Item, Label

SPLITS = ("train", "val", "valid", "validation", "test")


class FolderReader:
    """Lists the images once, when it is opened."""

    format = "folder.v1"
    licence = ""
    homepage = ""

    def __init__(self, root: Path, *, name: str) -> None:
        self.name = name
        self.spec = f"folder.v1:{root}"
        self._root = root
        self._items = _list_items(root)

    def items(self) -> Sequence[Item]:
        """List the images, sorted by path."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Refuse: a folder of images has no dense labels."""
        raise not_found("label kind", kind, item.label_kinds)


def _list_items(root: Path) -> list[Item]:
    if not root.is_dir():
        raise InvalidInputError(f"`folder` needs a folder, and {root} is a file.")
    # An .npy file may be an image, but in a folder of images it mostly is something else.
    paths = [
        PurePosixPath(path)
        for path in list_files(root)
        if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES - {".npy"}
    ]
    if not paths:
        endings = " ".join(sorted(IMAGE_SUFFIXES - {".npy"}))
        raise InvalidInputError(f"{root} holds no image. Images end in {endings}.")
    splits = [name for name in SPLITS if (root / name).is_dir()]
    if splits:
        _check_splits(root, paths, splits)
    return [_item(path, has_splits=bool(splits)) for path in paths]


def _check_splits(root: Path, paths: Sequence[PurePosixPath], splits: Sequence[str]) -> None:
    used = {path.parts[0] for path in paths}
    for name in splits:
        if name not in used:
            raise InvalidInputError(
                f"The split {root / name} holds no image. Fill it or remove the folder."
            )
    outside = [path for path in paths if path.parts[0] not in splits]
    if outside:
        raise InvalidInputError(
            f"{root} has the splits {', '.join(splits)}, and {outside[0]} lies in none of them. "
            "Move it, or give the folder of one split."
        )


def _item(path: PurePosixPath, *, has_splits: bool) -> Item:
    inner = path.parts[1:] if has_splits else path.parts
    return Item(
        path=str(path),
        splits=(path.parts[0],) if has_splits else (),
        label=inner[0] if len(inner) > 1 else None,
    )


@READERS.register("folder.v1")
def open_folder(argument: str, *, name: str) -> FolderReader:
    """Open ``PATH``: images in class folders or flat; train, val and test folders are splits.

    Raises:
        InvalidInputError: The path is missing, or holds no image in some split.
        NotFoundError: An option is given; there are none.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, (), reader="folder")
    return FolderReader(existing_path(parsed.path, reader="folder"), name=name)
