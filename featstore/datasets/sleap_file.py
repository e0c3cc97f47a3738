"""Reads ``.slp`` and ``.pkg.slp``, the HDF5 files of SLEAP: labels, skeleton, videos, frames."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featstore.datasets.common import npy_bytes
from featstore.datasets.hdf5 import array_names, read_arrays, read_attributes, read_entry
from featstore.datasets.instances import UNMARKED, Point
from featstore.errors import BadImageError, InvalidInputError, not_found
from featstore.images import decode
from featstore.skeleton import Skeleton, swaps_from_names

NEWEST = 3.0
"""The first format that may lay labels out in another way."""

_MIDPIXEL = 1.1  # from here on, (0, 0) is the middle of the first pixel and not its corner
_CHANNELS = 1.4  # from here on, files say in which order they hold colours
_HALF = 0.5
_BY_USER = 0
_EDGE, _SYMMETRY = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SleapVideo:
    """Where the frames of one video are."""

    name: str
    files: tuple[str, ...] = ()  # of a sequence of images, in order
    dataset: str | None = None  # of frames in the file itself


@dataclass(frozen=True, kw_only=True, slots=True)
class SleapInstance:
    """One animal that somebody marked."""

    video: int
    frame: int
    points: tuple[Point, ...]
    track: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SleapFile:
    """What one file holds of labels that people made."""

    skeleton: Skeleton
    videos: tuple[SleapVideo, ...]
    instances: tuple[SleapInstance, ...]
    n_predicted: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedFrames:
    """Frames inside of the file: which there are, how they are encoded."""

    dataset: str
    rows: Mapping[int, int]  # frame number to row
    hw: tuple[int, int] | None
    encoding: str  # "png", "jpg" or "hdf5" (plain arrays)
    is_bgr: bool


def read_sleap_file(path: Path) -> SleapFile:
    """Read labels that people made, in the order of the file's frames.

    Raises:
        InvalidInputError: The file is none of SLEAP's, is of a newer format, or has labels that
            cannot be told (several skeletons, frames that are cut out).
    """
    about = read_attributes(path, "metadata")
    try:
        content, version = json.loads(about["json"]), float(about.get("format_id", 0))
        arrays = read_arrays(path, "/")
        frames, instances = arrays["frames"], arrays["instances"]
        tracks = [str(json.loads(entry)[1]) for entry in arrays.get("tracks_json", ())]
        videos = [_video(json.loads(entry)) for entry in arrays["videos_json"]]
        points = arrays["points"]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InvalidInputError(
            f"{path} must be a .slp file of SLEAP ({type(error).__name__}: {error})."
        ) from error
    if version >= NEWEST:
        raise InvalidInputError(
            f"{path} has format {version:g} of SLEAP; formats below {NEWEST:g} are read. Save it "
            "in an older one."
        )
    if "video_crops" in arrays:
        raise InvalidInputError(
            f"{path} has virtually cropped videos, whose points lie in another frame. Save the "
            "crops as videos of their own."
        )
    by_user = instances["instance_type"] == _BY_USER
    found = _instances(
        frames, instances, points, tracks, shift=_HALF if version >= _MIDPIXEL else 0
    )
    return SleapFile(
        skeleton=_skeleton(content, set(instances["skeleton"][by_user].tolist()), path),
        videos=tuple(videos),
        instances=found,
        n_predicted=len(instances) - len(found),
    )


def _instances(
    frames: np.ndarray,
    instances: np.ndarray,
    points: np.ndarray,
    tracks: Sequence[str],
    *,
    shift: float,
) -> tuple[SleapInstance, ...]:
    found = []
    for frame in np.sort(frames, order=("video", "frame_idx")):
        for entry in instances[int(frame["instance_id_start"]) : int(frame["instance_id_end"])]:
            if entry["instance_type"] != _BY_USER:
                continue
            marked = points[int(entry["point_id_start"]) : int(entry["point_id_end"])]
            track = int(entry["track"])
            found.append(
                SleapInstance(
                    video=int(frame["video"]),
                    frame=int(frame["frame_idx"]),
                    points=tuple(_point(point, shift) for point in marked),
                    track=tracks[track] if 0 <= track < len(tracks) else None,
                )
            )
    return tuple(found)


def _point(point: np.void, shift: float) -> Point:
    """Give a point; what SLEAP calls not visible is not there, wherever it was put."""
    x, y = float(point["x"]) + shift, float(point["y"]) + shift
    return (x, y, 2) if point["visible"] and np.isfinite(x) and np.isfinite(y) else UNMARKED


def _skeleton(content: Mapping[str, Any], used: set[int], path: Path) -> Skeleton:
    if len(used) > 1:
        raise InvalidInputError(
            f"{path} must mark one skeleton. Got {len(used)}; save a file for each."
        )
    try:
        graph = content["skeletons"][used.pop() if used else 0]
        order = [node["id"] for node in graph["nodes"]]
        names = tuple(str(content["nodes"][number]["name"]) for number in order)
        pairs: dict[int, list[tuple[int, int]]] = {_EDGE: [], _SYMMETRY: []}
        for kind, link in zip(_link_kinds(graph["links"]), graph["links"], strict=True):
            pairs[kind].append((order.index(link["source"]), order.index(link["target"])))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InvalidInputError(
            f"{path} must describe its skeleton ({type(error).__name__}: {error})."
        ) from error
    sides = sorted({(min(pair), max(pair)) for pair in pairs[_SYMMETRY]})
    return Skeleton(
        names=names,
        edges=tuple(pairs[_EDGE]),
        swaps=tuple(sides) or swaps_from_names(names),
    )


def _link_kinds(links: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tell lines from symmetries: the first of a kind says which, later ones refer to that one."""
    told: list[int] = []
    kinds = []
    for link in links:
        kind = link["type"]
        if "py/reduce" in kind:
            told.append(int(kind["py/reduce"][1]["py/tuple"][0]))
        kinds.append(told[-1] if "py/reduce" in kind else told[kind["py/id"] - 1])
    return kinds


def _video(entry: Mapping[str, Any]) -> SleapVideo:
    backend = entry["backend"]
    files = backend.get("filenames") or ()
    name = str(backend.get("filename") or (files[0] if files else ""))
    dataset = backend.get("dataset")
    return SleapVideo(
        name=name,
        files=tuple(map(str, files)),
        dataset=str(dataset) if dataset and name == "." else None,
    )


def read_embedded(path: Path, dataset: str) -> EmbeddedFrames:
    """Find the frames of one video that lie in the file itself.

    Raises:
        NotFoundError: They are not there.
    """
    group = dataset.rpartition("/")[0]
    names = array_names(path)
    if dataset not in names:
        raise not_found(f"frames in {path.name}", dataset, names)
    about = read_attributes(path, dataset)
    version = float(read_attributes(path, "metadata").get("format_id", 0))
    order = about.get("channel_order", "RGB" if version >= _CHANNELS else "BGR")
    encoding = str(about.get("format", "hdf5"))
    has_numbers = f"{group}/frame_numbers" in names
    numbers = read_entry(path, f"{group}/frame_numbers", None) if has_numbers else ()
    height, width = int(about.get("height", 0)), int(about.get("width", 0))
    return EmbeddedFrames(
        dataset=dataset,
        rows={int(number): row for row, number in enumerate(numbers)},
        hw=(height, width) if height and width else None,
        encoding=encoding,
        is_bgr=str(order) == "BGR" and encoding != "hdf5",
    )


def read_frame(path: Path, frames: EmbeddedFrames, frame: int) -> bytes:
    """Give a frame as an encoded image that every reader of images reads right.

    Raises:
        BadImageError: It is not in the file, or damaged.
    """
    if frame not in frames.rows:
        raise BadImageError(f"{path} must hold frame {frame} in {frames.dataset}. Got none.")
    stored = read_entry(path, frames.dataset, frames.rows[frame])
    if frames.encoding == "hdf5":
        return npy_bytes(stored[..., 0] if stored.shape[-1] == 1 else stored)
    data = stored.tobytes()
    # OpenCV wrote red where blue belongs; SLEAP puts it right when it reads.
    return npy_bytes(decode(data)[..., ::-1]) if frames.is_bgr else data
