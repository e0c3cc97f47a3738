"""The one door to HDF5: the official NYU file, files of one image, and arrays of features.

A file is opened for each read: HDF5 handles survive neither a fork nor a pickle, and opening costs
little beside reading an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featstore.datasets.common import check_label, npy_bytes
from featstore.errors import BadImageError, InvalidInputError, invalid, not_found
from featstore.types import Item, Label

DEPTHS = ("depths", "rawDepths")


class NyuMatReader:
    """``nyu_depth_v2_labeled.mat``: 1,449 images of 640x480 with depth in metres."""

    format = "nyu.v1"
    licence = "research use; see the homepage"
    homepage = "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"

    def __init__(self, path: Path, *, name: str, depth: str) -> None:
        if depth not in DEPTHS:
            raise invalid("depth", depth, f"one of {', '.join(DEPTHS)}")
        self.name = name
        self.spec = f"nyu.v1:{path},depth={depth}"
        self._path = path
        self._depth = depth
        shape = array_shape(path, "images")
        depth_shape = array_shape(path, depth)
        if len(shape) != 4 or shape[1] != 3 or depth_shape != (shape[0], *shape[2:]):
            raise InvalidInputError(
                f"{path} must hold `images` (n, 3, w, h) and `{depth}` (n, w, h). Got {shape} and "
                f"{depth_shape}."
            )
        self._items = self._list_items(shape[0])
        self._numbers = {item.path: number for number, item in enumerate(self._items)}

    def items(self) -> Sequence[Item]:
        """List the images in the order of the file."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the bytes of an .npy file, (480, 640, 3) uint8."""
        return npy_bytes(read_entry(self._path, "images", self._number(item)).transpose(2, 1, 0))

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the depth in metres, float32; 0 is no value."""
        if kind != "depth":
            raise not_found("label kind", kind, item.label_kinds)
        number = self._number(item)
        depth_hw = read_entry(self._path, self._depth, number).T.astype(np.float32)
        label = Label(
            kind="depth",
            encoding="npy",
            data=npy_bytes(depth_hw),
            invalid=0.0,
            source=self._depth,
        )
        source = f"{self._depth} of image {number} in {self._path}"
        return check_label(label, depth_hw.shape, source=source)

    def _number(self, item: Item) -> int:
        if item.path not in self._numbers:
            raise not_found("image", item.path, list(self._numbers)[:3])
        return self._numbers[item.path]

    def _list_items(self, n_images: int) -> list[Item]:
        split_of = _read_splits(self._path.parent / "splits.mat", n_images)
        scenes = _read_scenes(self._path, n_images)
        return [
            Item(
                path=f"images/{number:04d}",
                splits=(split_of[number],),
                group=scenes[number],
                label_kinds=("depth",),
            )
            for number in sorted(split_of)
        ]


def _read_splits(path: Path, n_images: int) -> dict[int, str]:
    """Read the official split: 0-based image number -> "train" or "test"."""
    if not path.is_file():
        raise InvalidInputError(
            f"{path} is missing. It holds the official split (795 train, 654 test): get splits.mat "
            "from the data set's homepage and put it beside the .mat file."
        )
    from scipy.io import loadmat  # heavy, and needed for this old format alone
    from scipy.io.matlab import MatReadError

    try:
        arrays = loadmat(path)
        numbers = {
            split: arrays[f"{split}Ndxs"].ravel().astype(np.int64) for split in ("train", "test")
        }
    except (MatReadError, ValueError, TypeError, NotImplementedError, KeyError) as error:
        raise InvalidInputError(
            f"{path} must be a Matlab file with trainNdxs and testNdxs ({error})."
        ) from error
    split_of: dict[int, str] = {}
    for split, one_based in numbers.items():
        for number in one_based.tolist():
            if not 1 <= number <= n_images or number - 1 in split_of:
                raise InvalidInputError(
                    f"{split}Ndxs in {path} must name images from 1 to {n_images}, each once in "
                    f"all. Got {number}."
                )
            split_of[number - 1] = split
    return split_of


def _read_scenes(path: Path, n_images: int) -> list[str | None]:
    """Read the scene of each image, where the file tells."""
    with _open(path) as file:
        if "scenes" not in file:
            return [None] * n_images
        references = file["scenes"][()].ravel()
        if len(references) != n_images:
            raise InvalidInputError(
                f"`scenes` in {path} must have {n_images} entries. Got {len(references)}."
            )
        return ["".join(map(chr, file[reference][()].ravel())) for reference in references]


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InvalidInputError(f"{path} is no readable HDF5 file ({error}).") from error


def array_names(path: Path) -> list[str]:
    """List the arrays of an HDF5 file."""
    names: list[str] = []
    with _open(path) as file:
        file.visititems(
            lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None
        )
    return sorted(names)


def array_shape(path: Path, name: str) -> tuple[int, ...]:
    """Give the shape of an array.

    Raises:
        InvalidInputError: The file is no HDF5 file.
        NotFoundError: It has no array of that name.
    """
    with _open(path) as file:
        if not isinstance(file.get(name), h5py.Dataset):
            raise not_found(f"array in {path.name}", name, array_names(path))
        return tuple(file[name].shape)


def read_image_file(data: bytes, names: Sequence[str], *, source: str) -> list[np.ndarray]:
    """Read arrays of an HDF5 file that is in memory and belongs to one image.

    Args:
        data: The whole file.
        names: Arrays to read.
        source: What to call the file in messages.

    Raises:
        BadImageError: The bytes are no HDF5 file, are damaged or lack an array.
    """
    try:
        # h5py can read from a Python file object too, and then calls Python under its own lock.
        with h5py.File(h5py.h5f.open_file_image(data)) as file:
            return [np.asarray(file[name][()]) for name in names]
    except (OSError, KeyError, ValueError) as error:
        raise BadImageError(
            f"{source} must be an HDF5 file with {' and '.join(names)} ({error})."
        ) from error


def read_entry(path: Path, name: str, number: int | None) -> np.ndarray:
    """Read one entry of an array along its first axis, or the whole of it.

    Raises:
        BadImageError: The stored bytes are damaged.
    """
    try:
        with _open(path) as file:
            return np.asarray(file[name][() if number is None else number])
    except OSError as error:
        place = name if number is None else f"{name}[{number}]"
        raise BadImageError(f"{place} in {path} cannot be read ({error}).") from error


def read_arrays(path: Path, group: str) -> dict[str, np.ndarray]:
    """Read all arrays that lie right in a group, "/" for the file itself, by name.

    Raises:
        InvalidInputError: The file is no HDF5 file or is damaged.
    """
    with _open(path) as file:
        try:
            nodes = file[group].items() if group in file else ()
            return {k: np.asarray(n[()]) for k, n in nodes if isinstance(n, h5py.Dataset)}
        except OSError as error:
            raise InvalidInputError(f"{group} in {path} cannot be read ({error}).") from error


def read_attributes(path: Path, name: str) -> dict[str, Any]:
    """Read the attributes of a group or array, bytes as text; none where there is no such node.

    Raises:
        InvalidInputError: The file is no HDF5 file.
    """
    with _open(path) as file:
        found = dict(file[name].attrs) if name in file else {}
    return {
        key: value.decode(errors="replace") if isinstance(value, bytes) else value
        for key, value in found.items()
    }
