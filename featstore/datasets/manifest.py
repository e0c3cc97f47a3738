"""``manifest:FILE``: a CSV or Parquet table that lists images, splits and labels.

Columns: ``path``; optional ``split`` (several as ``train|val``), ``label``, ``group``,
``timestamp``, ``crop`` ("x0,y0,x1,y1") or ``x0``, ``y0``, ``x1``, ``y1``; files of dense labels,
PNG or npy, in ``depth``, ``classes``, ``instances`` or ``label:KIND``; all other columns become
attributes. Paths are relative to the table's folder, or to ``root=DIR``. A group lies in one
split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from featstore.datasets.common import (
    READERS,
    check_groups,
    check_keys,
    check_label,
    existing_path,
    parse_argument,
    read_bytes,
)
from featstore.datasets.tables import check_unique, dense_labels, item_of, read_table
from featstore.errors import BadImageError, InvalidInputError, invalid, not_found
from featstore.images import probe
from featstore.types import Box, Item, Label

_MILLIMETRE = 0.001
_VOID_CLASS = 255.0


class ManifestReader:
    """Reads the table when it is opened, images and labels when they are asked for.

    A ``depth`` PNG holds millimetres and 0 for no value, another unit being named with
    ``depth_scale=METRES``; a ``depth`` npy holds metres, and 0 or NaN for no value. In ``classes``
    255 is no value.
    """

    format = "manifest.v1"
    licence = ""
    homepage = ""

    def __init__(self, path: Path, *, name: str, root: Path, depth_scale: float | None) -> None:
        self.name = name
        scale = "" if depth_scale is None else f",depth_scale={depth_scale:g}"
        self.spec = f"manifest.v1:{path},root={root}{scale}"
        self._root = root
        self._depth_scale = depth_scale
        rows = read_table(path)
        self._items = [item_of(row, root) for row in rows]
        check_unique(self._items, rows)
        check_groups(self._items, source=str(path))
        self._labels = {
            _key(item): dense_labels(row) for item, row in zip(self._items, rows, strict=True)
        }

    def items(self) -> Sequence[Item]:
        """List the images in the order of the table."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the label file's bytes, untouched."""
        files = self._labels.get(_key(item), {})
        if kind not in files:
            raise not_found("label kind", kind, files)
        image_hw = probe(self.read_image(item))
        return read_dense(self._root / files[kind], kind, image_hw, depth_scale=self._depth_scale)


def _key(item: Item) -> tuple[str, Box | None]:
    return (item.path, item.crop)


def read_dense(
    path: Path, kind: str, image_hw: tuple[int, int] | None, *, depth_scale: float | None
) -> Label:
    """Read a dense label file, PNG or npy, with the conventions of its kind.

    Args:
        path: The file.
        kind: "depth", "classes", "instances" or another.
        image_hw: Size of its image, which it must have; None where that is not known.
        depth_scale: Metres a step of a depth file; None: 0.001 for PNG, 1 for npy.

    Raises:
        BadImageError: The file is missing, of another kind or size, or holds no value.
    """
    encoding = path.suffix.lower().removeprefix(".")
    if encoding not in ("png", "npy"):
        raise BadImageError(f"{path} must be a .png or .npy file to be a {kind} label.")
    scale = 1.0
    if kind == "depth":
        scale = depth_scale or (_MILLIMETRE if encoding == "png" else 1.0)
    void: Mapping[str, float] = {"depth": 0.0, "classes": _VOID_CLASS}
    label = Label(
        kind=kind,
        encoding=encoding,
        data=read_bytes(path),
        scale=scale,
        invalid=void.get(kind),
        source=kind,
    )
    return check_label(label, image_hw, source=str(path))


def parse_scale(options: Mapping[str, str]) -> float | None:
    """Parse ``depth_scale``.

    Raises:
        InvalidInputError: It is no positive number.
    """
    text = options.get("depth_scale")
    if text is None:
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (math.isfinite(scale) and scale > 0):
        raise invalid("depth_scale", text, "a positive number of metres, like 0.001")
    return scale


@READERS.register("manifest.v1")
def open_manifest(argument: str, *, name: str) -> ManifestReader:
    """Open ``FILE[,root=DIR][,depth_scale=METRES]``: a CSV or Parquet table of images and labels.

    Raises:
        InvalidInputError: The file is missing or a cell of it is not acceptable; the message names
            line and column.
        NotFoundError: An option is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, ("root", "depth_scale"), reader="manifest")
    path = existing_path(parsed.path, reader="manifest")
    if path.is_dir():
        raise InvalidInputError(
            f"`manifest` needs a .csv or .parquet file, and {path} is a folder."
        )
    root = parsed.options.get("root")
    return ManifestReader(
        path,
        name=name,
        root=path.parent if root is None else existing_path(root, reader="manifest"),
        depth_scale=parse_scale(parsed.options),
    )
