"""``bsds:PATH``: BSDS500, photos that several people have cut into regions.

``images/SPLIT/*.jpg`` and ``groundTruth/SPLIT/*.mat``, SPLIT being train, val or test; PATH may
also be the unpacked archive around them. Each image has several annotators; ``annotator=N`` takes
the regions of one, counting from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from featstore.datasets.common import (
    READERS,
    check_keys,
    check_label,
    existing_path,
    list_files,
    npy_bytes,
    parse_argument,
    parse_whole,
    read_bytes,
)
from featstore.datasets.segmentation import pick_root
from featstore.errors import BadImageError, InvalidInputError, not_found
from featstore.images import probe
from featstore.types import Item, Label

SPLITS = ("train", "val", "test")


class BsdsReader:
    """Lists the images when it is opened, and reads them when they are asked for."""

    format = "bsds.v1"
    licence = "non-commercial research and education; see the homepage"
    homepage = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/resources.html"

    def __init__(self, root: Path, *, name: str, annotator: int) -> None:
        self.name = name
        self.spec = f"bsds.v1:{root},annotator={annotator}"
        self._root = root
        self._annotator = annotator
        self._items = [
            Item(path=f"images/{split}/{file}", splits=(split,), label_kinds=("instances",))
            for split in SPLITS
            if (root / "images" / split).is_dir()
            for file in list_files(root / "images" / split)
            if file.lower().endswith(".jpg")
        ]
        if not self._items:
            raise InvalidInputError(
                f"{root / 'images'} must hold .jpg images in train/, val/ or test/. Got none; "
                "unpack BSR_bsds500.tgz."
            )

    def items(self) -> Sequence[Item]:
        """List the images by path: train, val, test."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image."""
        return read_bytes(self._root / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the annotator's regions, numbered from 1: every pixel is in one."""
        if kind != "instances":
            raise not_found("label kind", kind, item.label_kinds)
        relative = PurePosixPath(item.path).relative_to("images").with_suffix(".mat")
        path = self._root / "groundTruth" / relative
        regions = _read_regions(path, self._annotator)
        label = Label(
            kind=kind,
            encoding="npy",
            data=npy_bytes(regions),
            source=f"annotator {self._annotator}",
        )
        return check_label(label, probe(self.read_image(item)), source=str(path))


def _read_regions(path: Path, annotator: int) -> np.ndarray:
    """Read one annotator's map, (H, W) int32."""
    from scipy.io import loadmat  # heavy, and needed for this format alone
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise BadImageError(f"{path} must hold the regions of its image. Got no such file.")
    try:
        cells = loadmat(path)["groundTruth"].ravel()
        found = [np.asarray(cell["Segmentation"][0, 0]) for cell in cells]
    except (OSError, MatReadError, KeyError, IndexError, TypeError, ValueError) as error:
        raise BadImageError(
            f"{path} must be a Matlab file with a cell `groundTruth` of structs that have a "
            f"Segmentation ({type(error).__name__}: {error})."
        ) from error
    if annotator >= len(found):
        raise BadImageError(
            f"{path} has {len(found)} annotators, from 0. Got annotator={annotator}; take one "
            "that every image has, like 0."
        )
    regions = found[annotator]
    if regions.ndim != 2 or regions.dtype.kind not in "ui" or not regions.size or regions.min() < 1:
        raise BadImageError(
            f"The Segmentation of annotator {annotator} in {path} must be regions numbered from "
            f"1. Got {regions.dtype} of shape {regions.shape}, from {regions.min(initial=1)}."
        )
    return regions.astype(np.int32)


@READERS.register("bsds.v1")
def open_bsds(argument: str, *, name: str) -> BsdsReader:
    """Open ``PATH[,annotator=0]``: BSDS500 with the regions of one annotator.

    Raises:
        InvalidInputError: The path is missing or not laid out like BSDS500, or `annotator` is no
            number.
        NotFoundError: An option is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, ("annotator",), reader="bsds")
    path = existing_path(parsed.path, reader="bsds")
    root = pick_root(
        path,
        below=("data", "BSDS500/data", "BSR/BSDS500/data"),
        folders=("images", "groundTruth"),
        reader="bsds",
    )
    annotator = parse_whole(parsed.options.get("annotator", "0"), name="annotator", least=0)
    return BsdsReader(root, name=name, annotator=annotator)
