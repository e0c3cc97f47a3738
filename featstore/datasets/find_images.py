"""Finds the images that a file of annotations names, whatever folder they were put in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featstore.errors import InvalidInputError


def find_images(names: Sequence[str], root: Path, folders: Sequence[str]) -> dict[str, str]:
    """Find where images lie below `root`.

    Annotations may name folders of the machine that they were made on. As few leading folders as
    can be are dropped, and of all names equally many: else an image that is missing could be
    taken for one of the same name in another folder.

    Args:
        names: As the annotations have them, with forward slashes.
        root: Folder of the data set.
        folders: Relative to `root`, the likeliest first.

    Returns:
        Name to path, relative to `root`. An image that is nowhere gets a path in the first
        folder that has others, so that an extraction can list it.

    Raises:
        InvalidInputError: None of the images is there, or two names lead to one image.
    """
    deepest = max((len(Path(name).parts) for name in names), default=0)
    for cut in range(deepest):
        found = {name: path for name in names if (path := _find(name, cut, root, folders))}
        if found:
            home = next(iter(found.values())).removesuffix(_short(next(iter(found)), cut))
            _check_distinct(found)
            return {name: found.get(name, f"{home}{_short(name, cut)}") for name in names}
    looked = ", ".join(str(root / folder) for folder in folders)
    raise InvalidInputError(
        f"None of the {len(names)} images is there: {names[0]} is not in {looked}. Name their "
        f"folder, from {root}: images=DIR."
    )


def _short(name: str, cut: int) -> str:
    parts = Path(name).parts
    return Path(*parts[min(cut, len(parts) - 1) :]).as_posix()


def _find(name: str, cut: int, root: Path, folders: Sequence[str]) -> str | None:
    places = (Path(folder, _short(name, cut)) for folder in folders)
    return next((place.as_posix() for place in places if (root / place).is_file()), None)


def _check_distinct(found: dict[str, str]) -> None:
    names: dict[str, str] = {}
    for name, path in found.items():
        first = names.setdefault(path, name)
        if first != name:
            raise InvalidInputError(
                f"{first} and {name} must be two images, and only {path} is there. Put the images "
                "into the folders that their names have."
            )
