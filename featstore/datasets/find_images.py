"""Finds the images that a file of annotations names, whatever folder they were put in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featstore.errors import InvalidInputError

Rule = tuple[str, int]
"""A folder, and how many leading parts of a name do not count."""


def find_images(names: Sequence[str], root: Path, folders: Sequence[str]) -> dict[str, str]:
    """Find where images lie below `root`.

    The rule by which one was found is tried first for the next. An image that is nowhere gets the
    place where it should be by that rule, so that an extraction can list it.

    Args:
        names: As the annotations have them, with forward slashes, perhaps with more leading
            folders than there are here.
        root: Folder of the data set.
        folders: Relative to `root`, the likeliest first.

    Returns:
        Name to path, relative to `root`.

    Raises:
        InvalidInputError: None of the images is there.
    """
    found: dict[str, str] = {}
    last: Rule | None = None
    for name in names:
        rules = [(folder, cut) for cut in range(len(Path(name).parts)) for folder in folders]
        for rule in [last, *rules] if last else rules:
            if (root / _place(name, rule)).is_file():
                last, found[name] = rule, _place(name, rule)
                break
    if last is None:
        looked = ", ".join(str(root / folder) for folder in folders)
        raise InvalidInputError(
            f"None of the {len(names)} images is there: {names[0]} is not in {looked}. Name their "
            f"folder, from {root}: images=DIR."
        )
    return {name: found.get(name) or _place(name, last) for name in names}


def _place(name: str, rule: Rule) -> str:
    folder, cut = rule
    return Path(folder, *Path(name).parts[cut:]).as_posix()
