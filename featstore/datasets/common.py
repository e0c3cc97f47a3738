"""What readers share: arguments, paths, reading, and the checks of labels and groups."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from featstore.errors import BadImageError, InvalidInputError, invalid, not_found
from featstore.images import decode_label
from featstore.registry import Registry
from featstore.types import Item, Label, Reader


class ReaderFactory(Protocol):
    """Opens what stands behind ``FORMAT:``."""

    def __call__(self, argument: str, *, name: str) -> Reader:
        """Open a data set under a name."""
        ...


READERS: Registry[ReaderFactory] = Registry("data format", group="featstore.readers")

IMAGE_SUFFIXES = frozenset(
    {
        ".bmp",
        ".gif",
        ".jpeg",
        ".jpg",
        ".jp2",
        ".npy",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)
_OPTION = re.compile(r"[a-z_]+=")


@dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """What stands behind ``FORMAT:``: a path, then ``key=value`` pairs, separated by commas."""

    path: str
    options: dict[str, str] = field(default_factory=dict)


def parse_argument(text: str) -> Argument:
    """Split ``PATH[,key=value...]``; a comma that no ``key=`` follows belongs to what it is in.

    Raises:
        InvalidInputError: A key is given twice.
    """
    parts = re.split(r",(?=[a-z_]+=)", text)
    path = "" if _OPTION.match(parts[0]) else parts.pop(0)
    options: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key in options:
            raise invalid(key, part, "given once")
        options[key] = value
    return Argument(path=path, options=options)


def check_keys(argument: Argument, known: Collection[str], *, reader: str) -> None:
    """Check that all options are known.

    Raises:
        NotFoundError: One is not; the message offers the nearest.
    """
    for key in argument.options:
        if key not in known:
            raise not_found(f"option of {reader!r}", key, known)


def parse_whole(text: str, *, name: str, least: int) -> int:
    """Parse a whole number that is at least `least`.

    Raises:
        InvalidInputError: It is not one.
    """
    if not text.isdecimal() or int(text) < least:
        raise invalid(name, text, f"a whole number, at least {least}")
    return int(text)


def parse_size(text: str, *, name: str) -> tuple[int, int]:
    """Parse ``N`` or ``HxW``.

    Raises:
        InvalidInputError: It is neither.
    """
    height, sign, width = text.partition("x")
    if not height.isdecimal() or (sign and not width.isdecimal()):
        raise invalid(name, text, "N or HxW, whole numbers")
    return (int(height), int(width or height))


def existing_path(text: str, *, reader: str) -> Path:
    """Give the absolute path of a file or folder that exists.

    Raises:
        InvalidInputError: No path is given or nothing is there.
    """
    if not text:
        raise InvalidInputError(f"{reader!r} needs a path: --data {reader}:PATH.")
    path = Path(text).expanduser().absolute()
    if not path.exists():
        nearest = next(parent for parent in path.parents if parent.exists())
        raise InvalidInputError(
            f"There is no file or folder {path} for {reader!r}. {nearest} exists; check the rest."
        )
    return path


def read_bytes(path: Path) -> bytes:
    """Read a whole file that belongs to one item.

    Raises:
        BadImageError: It is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImageError(f"{path} cannot be read ({error.strerror or error}).") from error


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without a byte order mark.

    Raises:
        InvalidInputError: The file cannot be read or is no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} cannot be read as UTF-8 text ({error}).") from error


def npy_bytes(array: np.ndarray) -> bytes:
    """Encode an array as the bytes of an .npy file."""
    sink = io.BytesIO()
    np.save(sink, np.ascontiguousarray(array), allow_pickle=False)
    return sink.getvalue()


def list_files(folder: Path) -> list[str]:
    """List the files below a folder, hidden ones left out, relative, sorted by their parts."""
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts) and path.is_file():
            found.append(relative)
    return [path.as_posix() for path in sorted(found, key=lambda path: path.parts)]


def check_label(
    label: Label,
    image_hw: tuple[int, int] | None,
    *,
    source: str,
    n_classes: int | None = None,
) -> Label:
    """Check that a dense label is of its image's size and holds at least one value.

    Args:
        label: What to check.
        image_hw: Height and width of the image, None where they are not known.
        source: File and place that the label comes from, for the message.
        n_classes: Its values must lie below this; None where that is not known.

    Returns:
        The same label.

    Raises:
        BadImageError: It does not decode, is of another size, has no value at all or a class
            beyond `n_classes`.
    """
    try:
        values, valid = decode_label(label)
    except BadImageError as error:
        raise BadImageError(f"{source}: {error}") from error
    if image_hw is not None and values.shape != image_hw:
        raise BadImageError(
            f"{source} is {values.shape[0]}x{values.shape[1]} but its image is "
            f"{image_hw[0]}x{image_hw[1]}; a {label.kind} label must be of its image's size."
        )
    if not valid.any():
        raise BadImageError(f"{source} has no valid {label.kind} value in any pixel.")
    if n_classes is not None and (highest := values[valid].max()) >= n_classes:
        raise BadImageError(
            f"{source} must hold classes below {n_classes}, for there are {n_classes} class names. "
            f"Got {highest:g}; give the names that belong to it."
        )
    return label


def check_groups(items: Iterable[Item], *, source: str) -> None:
    """Check that no group is cut by the splits.

    Raises:
        InvalidInputError: A group has images in several splits.
    """
    splits: dict[str, tuple[str, ...]] = {}
    for item in items:
        if item.group is None:
            continue
        first = splits.setdefault(item.group, item.splits)
        if set(first) != set(item.splits):
            both = " and ".join(sorted({*first, *item.splits}))
            raise InvalidInputError(
                f"{source}: group {item.group!r} is in the splits {both} ({item.path}). Images of "
                "one group look alike, so a group must lie in one split; change either column."
            )
