"""What the readers of segmentation data sets share: index PNGs and lists of class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from featstore.datasets.common import check_label, npy_bytes, read_bytes, read_lines
from featstore.errors import BadImageError, InvalidInputError
from featstore.images import decode_label
from featstore.types import Label

VOID = 255
"""The value of "classes" that is no class, in every reader that may choose one."""

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3


def read_index_png(
    path: Path,
    *,
    kind: str,
    image_hw: tuple[int, int],
    invalid: float | None = VOID,
    n_classes: int | None = None,
) -> Label:
    """Read a PNG whose pixels are numbers of classes or objects; its bytes are left untouched.

    A palette only colours the numbers for people, and is not applied. Grey pixels of fewer than 8
    bits are refused, because decoders stretch them to 0 to 255.

    Args:
        path: The file.
        kind: "classes" or "instances".
        image_hw: Size of its image, which it must have.
        invalid: The number that is no value.
        n_classes: Its other numbers must lie below this; None where that is not known.

    Raises:
        BadImageError: The file is missing, no such PNG, of another size or without any value.
    """
    data = read_bytes(path)
    check_index_png(data, source=str(path))
    label = Label(kind=kind, encoding="png", data=data, invalid=invalid, source=kind)
    return check_label(label, image_hw, source=str(path), n_classes=n_classes)


def read_recoded(path: Path, *, image_hw: tuple[int, int], codes: Mapping[int, int]) -> Label:
    """Read an index PNG of classes whose numbers are not those we give.

    Args:
        path: The file.
        image_hw: Size of its image, which it must have.
        codes: Class for each number that the file may hold; `VOID` for no class.

    Returns:
        The classes as an .npy array of uint8.

    Raises:
        BadImageError: The file is missing, no such PNG, of another size, without any class or
            with a number that `codes` lacks.
    """
    raw = read_index_png(path, kind="classes", image_hw=image_hw, invalid=None)
    values, _ = decode_label(raw)
    table = np.full(max(codes) + 1, -1, dtype=np.int16)
    table[list(codes)] = list(codes.values())
    is_known = (values >= 0) & (values < len(table))
    recoded = np.where(is_known, table[np.where(is_known, values, 0)], -1)
    if (recoded < 0).any():
        raise BadImageError(
            f"{path} must hold the numbers of its data set's classes, {min(codes)} to "
            f"{max(codes)}. Got {values[recoded < 0][0]}; give the original files."
        )
    data = npy_bytes(recoded.astype(np.uint8))
    label = Label(kind="classes", encoding="npy", data=data, invalid=VOID, source="classes")
    return check_label(label, image_hw, source=str(path))


def pick_root(path: Path, *, below: Sequence[str], folders: Sequence[str], reader: str) -> Path:
    """Find the folder that has `folders`: `path` itself, or one of `below` in it.

    Raises:
        InvalidInputError: None has them.
    """
    for root in (path, *(path / place for place in below)):
        if all((root / folder).is_dir() for folder in folders):
            return root
    wanted = " and ".join(f"{folder}/" for folder in folders)
    raise InvalidInputError(
        f"{path} must hold {wanted} for {reader!r}, itself or in {' or '.join(below)}/. Give the "
        "folder that has them."
    )


def check_index_png(data: bytes, *, source: str) -> None:
    """Check that a PNG holds one whole number a pixel, by the header that every PNG begins with.

    Raises:
        BadImageError: It is no PNG, a colour image, or grey with fewer than 8 bits.
    """
    if not data.startswith(_PNG) or len(data) < 26:
        raise BadImageError(f"{source} must be a PNG of one number a pixel, and is no PNG.")
    depth, colour = data[24], data[25]
    if colour not in (_GREY, _PALETTE) or (colour == _GREY and depth < 8):
        raise BadImageError(
            f"{source} must be a palette PNG or a grey PNG of 8 or 16 bits. Got {depth} bits and "
            f"PNG colour type {colour}; save the numbers of the classes, not their colours."
        )


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names, one a line; the first line names class 0.

    Raises:
        InvalidInputError: The file cannot be read, has no name, an empty line or a name twice.
    """
    names = tuple(line.strip() for line in read_lines(path))
    while names and not names[-1]:
        names = names[:-1]
    if not names or "" in names or len(set(names)) < len(names):
        raise InvalidInputError(
            f"{path} must hold one class name a line, the first of class 0, without empty lines or "
            f"repeats. Got {len(names)} lines, {len(set(names) - {''})} of them different names."
        )
    return names
