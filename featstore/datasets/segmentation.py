"""What the readers of segmentation data sets share: index PNGs and lists of class names."""

from __future__ import annotations

from pathlib import Path

from featstore.datasets.common import check_label, read_bytes, read_lines
from featstore.errors import BadImageError, InvalidInputError
from featstore.types import Label

VOID = 255.0
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
