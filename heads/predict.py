"""Predict on new images: tokens come from a callable, so that no backbone is known here."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featstore.errors import BadImageError, InvalidInputError, NotFoundError, invalid
from featstore.files import write_bytes
from featstore.images import decode
from featstore.types import Box, Placement, Progress, ProgressCallback, ignore_progress
from heads.evaluate import locate_run
from heads.gallery import paint_prediction
from heads.model import Model, load
from heads.photo_boxes import FULL, MIN_SCORE, PhotoBoxes, read_photo_boxes, scale_of
from heads.photo_poses import PhotoPoses
from heads.runs import Run
from heads.tasks.pose import PoseTask
from heads.token_choice import MEAN, OWN, choose_token, use_trained_token


class Forward(Protocol):
    """Turns images into taps by the plan of the run's feature set."""

    def __call__(
        self, images: Sequence[np.ndarray], crops: Sequence[Box | None] | None = None, /
    ) -> Sequence[tuple[Mapping[str, np.ndarray], Placement]]:
        """Give taps, "TAP" (tokens, dim) and perhaps "TAP/prefix", and how each image was drawn.

        Args:
            images: Decoded, (H, W, 3) uint8 RGB.
            crops: The region of each to show, in its pixels; None: all of it.
        """
        ...


SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictReport:
    """What `predict` wrote."""

    run_id: str
    out: str
    images: int
    files: tuple[str, ...]
    animals: int | None = None  # of a run of keypoints
    bad: dict[str, str] = field(default_factory=dict)  # image to reason

    def to_json(self) -> dict[str, Any]:
        """Give JSON values; `bad_images` counts, `bad` lists."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "bad_images": len(self.bad)}


def predict(
    run: Run | str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    forward: Forward,
    *,
    store: str | Path | None = None,
    runs: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 8,
    boxes: str | Path | None = None,
    box_scale: float | None = None,
    min_score: float = MIN_SCORE,
    token: str | Path = MEAN,
    identity: str | None = None,
    progress: ProgressCallback = ignore_progress,
) -> PredictReport:
    """Predict images and write, for each, NAME.npy and NAME.png.

    The array is what the task's `at_source` gives, upright: a map at the image's own resolution,
    such as metres (float32) or classes (int32), with NaN or -1 where a crop left a pixel out of
    the input; or a table of boxes. The picture shows image and prediction. Images that do not
    decode are left out and listed.

    Of a run of keypoints the array is (animals, K, 3), x, y and confidence in pixels of the
    image, and keypoints.json (like COCO's) and keypoints.csv list those of all images.

    Args:
        run: A run, its folder, or with `store` or `runs` its id, the start of one, or "@last".
        images: Files, or folders that are searched for images.
        out: Folder of what is written.
        forward: Runs the backbone.
        store: Where to look the run up.
        runs: Folder of the runs, where it is not the store's own.
        device: Where the head computes.
        batch_size: Images, or animals, at a time.
        boxes: Of the animals that a run of keypoints shall find keypoints of: a file of
            MegaDetector, or JSON like COCO's; "full" or None takes each image for one animal.
        box_scale: Side of the square around a box that is shown, in its longer sides; None: that
            of the images that the run has learned from.
        min_score: Boxes of a lower score are left out.
        token: Of a head with identities: a token file, or "mean".
        identity: One that was trained, whose token is taken in place of `token`.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: The run, a path or the identity is not there.
        InvalidInputError: No image can be used, the run's features were imported, or it is no run
            of keypoints and of identities and `boxes` or `token` is given.
    """
    found = locate_run(run, store=store, runs=runs)
    _check_images_can_be_read(found)
    names = _named(find_images(images))
    model = load(found, device=device)
    _choose_identity(model, found, token, identity)
    bad: dict[str, str] = {}
    place: dict[str, Any] = {"forward": forward, "out": Path(out), "names": names}
    poses: PhotoPoses | None = None
    if isinstance(model.task, PoseTask):
        read = _boxes(boxes, min_score)
        scale = None if read is None else scale_of(found.record, box_scale)
        poses = PhotoPoses(
            model=model, boxes=read, scale=scale, batch_size=batch_size, bad=bad, **place
        )
    elif boxes is not None:
        raise invalid("boxes", str(boxes), f"left out: {found.record['task']} finds no keypoints")
    files: list[str] = []
    for done, part in enumerate(_decoded(names, batch_size, bad), 1):
        if part:
            files += poses.add(part) if poses else _predict_part(model, part, **place)
        n_done = min(done * batch_size, len(names))
        progress(Progress(stage="predict", done=n_done, total=len(names)))
    if not files:
        path, reason = next(iter(bad.items()))
        raise InvalidInputError(
            f"None of {len(names)} images can be used. The first, {path}: {reason}"
        )
    return PredictReport(
        run_id=found.run_id,
        out=str(out),
        images=sum(file.endswith(".npy") for file in files),
        files=(*files, *(poses.finish() if poses else ())),
        animals=poses.n_animals if poses else None,
        bad=bad,
    )


def _boxes(boxes: str | Path | None, min_score: float) -> PhotoBoxes | None:
    """Read the boxes that are named; None: whole images."""
    if boxes is None or boxes == FULL:
        return None
    return read_photo_boxes(boxes, min_score=min_score)


def _check_images_can_be_read(run: Run) -> None:
    if run.record["plan"] is None:
        raise InvalidInputError(
            f"Run {run.run_id} learned from imported features, so no backbone is known that "
            "would give them for new images. Use `heads evaluate`, or train on extracted features."
        )


def _choose_identity(model: Model, run: Run, token: str | Path, identity: str | None) -> None:
    """Let a model answer for an identity that was trained, or with the token of a file."""
    if token == OWN:
        raise invalid("token", token, "a file or mean; of new images name --identity NAME")
    if identity is not None:
        use_trained_token(model, identity)
    elif token != MEAN:
        choose_token(model, run, token)


def find_images(images: str | Path | Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """List image files with the names, relative to what was given, that they are known by.

    Raises:
        NotFoundError: A path does not exist.
        InvalidInputError: There is no image.
    """
    given = [images] if isinstance(images, str | Path) else list(images)
    found: list[tuple[Path, Path]] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            found += [(file, file.relative_to(path)) for file in inside if file.is_file()]
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise NotFoundError(f"No image at {path}. Name a file or a folder of images.")
    if not found:
        known = ", ".join(sorted(SUFFIXES))
        text = " ".join(str(path) for path in given)
        raise InvalidInputError(f"No images in {text}. Files ending in {known} are taken.")
    return found


def _named(found: Sequence[tuple[Path, Path]]) -> dict[Path, Path]:
    """Choose where each file's results go: its name without the ending, if that is its own."""
    stems = Counter(name.with_suffix("") for _, name in found)
    named: dict[Path, Path] = {}
    taken: set[Path] = set()
    for file, name in found:
        target = name.with_suffix("") if stems[name.with_suffix("")] == 1 else name
        while target in taken:  # files of one name from several folders
            target = target.with_name(f"{target.name}_")
        taken.add(target)
        named[file] = target
    return named


def _decoded(
    files: Mapping[Path, Path], batch_size: int, bad: dict[str, str]
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Decode in threads, a batch at a time; note what does not decode in `bad`."""
    waiting = list(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(waiting), batch_size):
            paths = waiting[start : start + batch_size]
            part: list[tuple[Path, np.ndarray]] = []
            for path, pixels in zip(paths, pool.map(_decode, paths), strict=True):
                if isinstance(pixels, str):
                    bad[str(path)] = pixels
                else:
                    part.append((path, pixels))
            yield part


def _decode(path: Path) -> np.ndarray | str:
    try:
        return decode(path.read_bytes())
    except (BadImageError, OSError) as error:
        return str(error)


def _predict_part(
    model: Model,
    part: Sequence[tuple[Path, np.ndarray]],
    *,
    forward: Forward,
    names: Mapping[Path, Path],
    out: Path,
) -> list[str]:
    found = forward([pixels for _, pixels in part])
    stored = [name for name in model.array_names if name in found[0][0]]
    arrays = {name: np.stack([taps[name] for taps, _ in found]) for name in stored}
    placements = [placement for _, placement in found]
    predictions = model.predict(arrays, placements)
    files = []
    for (path, pixels), placement, prediction in zip(part, placements, predictions, strict=True):
        values = model.task.at_source(prediction, placement)
        target = out / names[path]
        sink = io.BytesIO()
        np.save(sink, values)
        write_bytes(target.with_name(f"{target.name}.npy"), sink.getbuffer())
        png = paint_prediction(model.task, path.name, pixels, values)
        write_bytes(target.with_name(f"{target.name}.png"), png)
        files += [f"{target}.npy", f"{target}.png"]
    return files
