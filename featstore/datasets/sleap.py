"""``sleap:FILE.slp``: labels of SLEAP, with their frames in the file or as images beside it.

``.pkg.slp`` (a package, which holds the labelled frames) and ``.slp`` of sequences of images are
read; frames of a video file are not, so save a package of those. Labels that people made count,
predicted ones do not, and a point that SLEAP shows as not visible is not marked.

Points are moved to where (0, 0) is the corner of the first pixel: SLEAP counts from its middle.
A marked point has v = 2. There are no boxes: the smallest one around an animal's points is taken.
The label is NAME of ``identity=NAME``, else the name of the data set; ``identity=individual``
takes the names of the tracks. The group is the video.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from featstore.datasets.common import (
    READERS,
    check_keys,
    existing_path,
    parse_argument,
    read_bytes,
)
from featstore.datasets.find_images import find_images
from featstore.datasets.instances import (
    INDIVIDUAL,
    Instance,
    box_text,
    frame_instances,
    image_size,
    left_out_notes,
    parse_box,
)
from featstore.datasets.sleap_file import (
    EmbeddedFrames,
    SleapFile,
    SleapInstance,
    read_embedded,
    read_frame,
    read_sleap_file,
)
from featstore.errors import InvalidInputError, not_found
from featstore.skeleton import Skeleton
from featstore.types import Item, Label


class SleapReader:
    """Reads the labels when it is opened, and a frame when it is asked for."""

    format = "sleap.v1"
    licence = ""
    homepage = "https://sleap.ai"

    def __init__(self, path: Path, *, name: str, scale: float | None, identity: str | None) -> None:
        self.name = name
        named = "" if identity is None else f",identity={identity}"
        self.spec = f"sleap.v1:{path},box={box_text(scale)}{named}"
        self._path = path
        content = read_sleap_file(path)
        self._skeleton = content.skeleton
        self._embedded = _embedded(path, content)
        self._frames: dict[str, tuple[EmbeddedFrames, int]] = {}
        self._left_out = Counter({"they are predicted": content.n_predicted})
        instances = list(self._instances(content, identity or name))
        framed = frame_instances(instances, scale=scale)
        self._notes = left_out_notes(self._left_out + framed.left_out)
        self._items = framed.items
        if not self._items:
            raise InvalidInputError(
                f"{path} must have an animal that somebody marked, in a frame that is there. "
                f"{' '.join(self._notes)}"
            )

    def items(self) -> Sequence[Item]:
        """List the animals by video and frame."""
        return self._items

    def read_image(self, item: Item) -> bytes:
        """Give the encoded image, or the bytes of an .npy file of a frame."""
        if item.path in self._frames:
            frames, number = self._frames[item.path]
            return read_frame(self._path, frames, number)
        return read_bytes(self._path.parent / item.path)

    def read_label(self, item: Item, kind: str) -> Label:
        """Refuse: keypoints are no dense labels and stand among the attributes."""
        raise not_found("label kind", kind, item.label_kinds)

    def skeleton(self) -> Skeleton:
        """Name the nodes."""
        return self._skeleton

    def notes(self) -> Sequence[str]:
        """Say how many annotations were left out, and why."""
        return self._notes

    def _instances(self, content: SleapFile, identity: str) -> Iterator[Instance]:
        places = _image_places(self._path, content)
        counts: Counter[str] = Counter()
        for entry in content.instances:
            found = self._place(content, entry, places)
            if found is None:
                self._left_out["their video is not in the file; save a package, .pkg.slp"] += 1
                continue
            path, image_hw = found
            counts[path] += 1
            more: dict[str, Any] = {INDIVIDUAL: entry.track} if entry.track else {}
            yield Instance(
                path=path,
                image_hw=image_hw,
                points=entry.points,
                number=str(counts[path]),
                identity=entry.track if identity == INDIVIDUAL else identity,
                group=f"video{entry.video}",
                more=more,
            )

    def _place(
        self, content: SleapFile, entry: SleapInstance, places: dict[str, str]
    ) -> tuple[str, tuple[int, int] | None] | None:
        """Find the frame of an animal: its path and size, or None where it cannot be read."""
        frames = self._embedded.get(entry.video)
        if frames is not None:
            path = f"{frames.dataset.rpartition('/')[0]}/{entry.frame:06d}"
            self._frames[path] = (frames, entry.frame)
            return path, frames.hw
        files = content.videos[entry.video].files
        if entry.frame >= len(files):
            return None
        path = places[_plain(files[entry.frame])]
        return path, image_size(self._path.parent / path)


def _embedded(path: Path, content: SleapFile) -> dict[int, EmbeddedFrames]:
    return {
        number: read_embedded(path, video.dataset)
        for number, video in enumerate(content.videos)
        if video.dataset is not None
    }


def _image_places(path: Path, content: SleapFile) -> dict[str, str]:
    """Find the images of sequences below the folder of the file, by the ends of their paths."""
    used = {(entry.video, entry.frame) for entry in content.instances}
    names = dict.fromkeys(
        _plain(content.videos[video].files[frame])
        for video, frame in sorted(used)
        if frame < len(content.videos[video].files)
    )
    return find_images(list(names), path.parent, ["."]) if names else {}


def _plain(text: str) -> str:
    """Give a path with forward slashes and without drive or leading slash."""
    return text.replace("\\", "/").rpartition(":")[2].lstrip("/")


@READERS.register("sleap.v1")
def open_sleap(argument: str, *, name: str) -> SleapReader:
    """Open ``FILE.slp[,box=1.25|image][,identity=NAME]``: labels of SLEAP, with keypoints.

    Raises:
        InvalidInputError: The file is missing, or none of SLEAP's with labels.
        NotFoundError: An option is unknown.
    """
    parsed = parse_argument(argument)
    check_keys(parsed, ("box", "identity"), reader="sleap")
    path = existing_path(parsed.path, reader="sleap")
    if path.is_dir():
        raise InvalidInputError(f"`sleap` needs a .slp file, and {path} is a folder.")
    return SleapReader(
        path,
        name=name,
        scale=parse_box(parsed.options.get("box")),
        identity=parsed.options.get("identity"),
    )
