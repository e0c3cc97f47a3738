"""``nyu_hf:PATH``: NYU Depth v2 as ``sayakpaul/nyu_depth_v2`` on the Hugging Face hub has it.

``train-000000.tar`` and on, ``val-000000.tar`` and on, in PATH or in PATH's ``data/``, not
unpacked: each holds HDF5 files with ``rgb`` (3, 480, 640) and ``depth`` (480, 640) in metres.
``val`` are the 654 official test images, and become the split "test". A group is a scene's folder
within a split; the folder ``official`` of the test images is none.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from featstore.datasets.common import (
    READERS,
    check_keys,
    check_label,
    existing_path,
    npy_bytes,
    parse_argument,
)
from featstore.errors import BadImageError, InvalidInputError, not_found
from featstore.types import Item, Label

SPLITS = {"train": "train", "val": "test"}
_SHARD = re.compile(r"(train|val)-[0-9]{6}\.tar")
_NO_SCENES = frozenset({"", "official", "data", *SPLITS, *SPLITS.values()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """Where the file of one image lies in its shard."""

    shard: str
    name: str
    start: int  # first byte
    n_bytes: int


class NyuHfReader:
    """Lists the members of the shards when it is opened, and reads one by its place."""

    format = "nyu_hf.v1"
    licence = "Apache-2.0 by its page; research use for the images"
    homepage = "https://huggingface.co/datasets/sayakpaul/nyu_depth_v2"

    def __init__(self, root: Path, *, name: str) -> None:
        self.name = name
        self.spec = f"nyu_hf.v1:{root}"
        self._root = root
        self._members: dict[str, Member] = {}
        for shard in sorted(path.name for path in root.iterdir() if _SHARD.fullmatch(path.name)):
            for member in _list_members(root / shard):
                path = f"{shard}/{member.name}"
                if path in self._members:
                    raise InvalidInputError(
                        f"{root / shard} must hold every file once. Got {member.name} twice; "
                        "download it again."
                    )
                self._members[path] = member
        self._items = [_item(path, member) for path, member in self._members.items()]

    def items(self) -> Sequence[Item]:
        """List the images in the order of the shards, train first."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the bytes of an .npy file, (480, 640, 3) uint8."""
        return npy_bytes(self._read(item)[0].transpose(1, 2, 0))

    def read_label(self, item: Item, kind: str) -> Label:
        """Give the depth in metres, float32; 0 is no value."""
        if kind != "depth":
            raise not_found("label kind", kind, item.label_kinds)
        rgb, depth_hw = self._read(item)
        data = npy_bytes(depth_hw.astype(np.float32))
        label = Label(kind=kind, encoding="npy", data=data, invalid=0.0, source="depth")
        height, width = rgb.shape[1:]
        return check_label(label, (height, width), source=f"depth of {item.path}")

    def _read(self, item: Item) -> tuple[np.ndarray, np.ndarray]:
        """Read colours (3, H, W) uint8 and depth of an image."""
        from featstore.datasets.hdf5 import read_image_file  # h5py is loaded at the first image

        if item.path not in self._members:
            raise not_found("image", item.path, list(self._members)[:3])
        member = self._members[item.path]
        data = _read_member(self._root / member.shard, member)
        rgb, depth = read_image_file(data, ("rgb", "depth"), source=item.path)
        if rgb.ndim != 3 or len(rgb) != 3 or rgb.dtype != np.uint8:
            raise BadImageError(
                f"rgb of {item.path} must be uint8 of shape (3, h, w). Got {rgb.dtype} of shape "
                f"{rgb.shape}."
            )
        return rgb, depth


def _list_members(path: Path) -> Iterator[Member]:
    """Walk through the headers of a shard, passing over its content."""
    n_bytes = path.stat().st_size
    n_found = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if not (info.isreg() and info.name.endswith(".h5")):
                    continue
                if info.offset_data + info.size > n_bytes:
                    raise InvalidInputError(
                        f"{path} must hold {info.name} to its end, and is cut short at {n_bytes} "
                        "bytes; download it again."
                    )
                n_found += 1
                name = str(PurePosixPath(info.name.lstrip("/")))
                yield Member(shard=path.name, name=name, start=info.offset_data, n_bytes=info.size)
    except (OSError, tarfile.TarError) as error:
        raise InvalidInputError(
            f"{path} cannot be read as a plain tar file ({error}); download it again."
        ) from error
    if not n_found:
        raise InvalidInputError(f"{path} must hold .h5 files. Got none; download it again.")


def _read_member(path: Path, member: Member) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(member.start)
            data = file.read(member.n_bytes)
    except OSError as error:
        raise BadImageError(f"{path} cannot be read ({error.strerror or error}).") from error
    if len(data) < member.n_bytes:
        raise BadImageError(
            f"{path} must hold {member.n_bytes} bytes of {member.name}. Got {len(data)}; the file "
            "was changed, so open the data set again."
        )
    return data


def _item(path: str, member: Member) -> Item:
    split = SPLITS[member.shard.partition("-")[0]]
    scene = PurePosixPath(member.name).parent.name
    return Item(
        path=path,
        splits=(split,),
        # One video may lie in both splits; each part of it is a group then.
        group=None if scene in _NO_SCENES else f"{split}/{scene}",
        label_kinds=("depth",),
    )


@READERS.register("nyu_hf.v1")
def open_nyu_hf(argument: str, *, name: str) -> NyuHfReader:
    """Open ``PATH``: tar files of sayakpaul/nyu_depth_v2; val becomes the split test.

    Raises:
        InvalidInputError: The path is missing or holds no such tar file, or one that is damaged.
        NotFoundError: An option is given; there are none.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, (), reader="nyu_hf")
    path = existing_path(parsed.path, reader="nyu_hf")
    for root in (path, path / "data"):
        if root.is_dir() and any(_SHARD.fullmatch(file.name) for file in root.iterdir()):
            return NyuHfReader(root, name=name)
    raise InvalidInputError(
        f"{path} must hold train-000000.tar or val-000000.tar, itself or in data/. Got neither; "
        "download them from sayakpaul/nyu_depth_v2 on the Hugging Face hub."
    )
