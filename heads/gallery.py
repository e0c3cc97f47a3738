"""Pictures of a head on a few images, so that a run can be looked at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featstore.errors import BadImageError, InvalidInputError
from featstore.files import write_bytes
from featstore.images import decode
from featstore.types import Label, Placement
from heads.evaluate import labelled
from heads.feed import Feed
from heads.keypoint_labels import KEYPOINTS
from heads.labels import LabelSource
from heads.model import Model
from heads.pictures import comparison_png, panels_png, prediction_png
from heads.predictions import predict_pairs
from heads.runs import PICTURES
from heads.selection import Pair
from heads.targets import checked_label
from heads.tasks import Task
from heads.tasks.pose_picture import close_up, moved


def draw_pictures(
    path: Path, model: Model, feed: Feed, pairs: Sequence[Pair], labels: LabelSource
) -> list[str]:
    """Draw pairs into the run folder `path`.

    Returns:
        The files, relative to `path`.
    """
    if not pairs:
        return []
    predictions = predict_pairs(model, feed, pairs)
    placements = feed.placements([pair.row for pair in pairs])
    places = {pair.key: index for index, pair in enumerate(pairs)}
    files = []
    for pair, label in labelled(pairs, labels):
        index = places[pair.key]
        try:
            png = _draw(
                model.task, pair, label, predictions[index], placements[pair.row], labels=labels
            )
        except InvalidInputError:  # a bad label, which the evaluation has listed
            continue
        name = f"{PICTURES}/{index:02d}_{_file_name(pair.path)}.png"
        write_bytes(path / name, png)
        files.append(name)
    return sorted(files)


def paint_prediction(
    task: Task, title: str, image_hwc: np.ndarray, prediction: np.ndarray
) -> bytes:
    """Draw what `Task.at_source` gave beside its image: a PNG file."""
    if task.unit is not None:
        return prediction_png(
            title=title, image_hwc=image_hwc, prediction_hw=prediction, unit=task.unit
        )
    caption = task.caption(prediction, None)
    if caption:
        return panels_png(title=f"{title}\n{caption}", panels={"input": image_hwc})
    painted = {"input": image_hwc, "prediction": task.render(prediction, image_hwc)}
    return panels_png(title=title, panels=painted, legend=task.legend(prediction))


def _draw(
    task: Task,
    pair: Pair,
    label: Label,
    prediction_chw: np.ndarray,
    placement: Placement,
    *,
    labels: LabelSource,
) -> bytes:
    values, valid = checked_label(label, placement)
    image = _image(pair, labels)
    if label.kind == KEYPOINTS:
        image, values, placement = _close_up(image, values, placement)
    prediction = task.at_source(prediction_chw, placement)
    title = f"{pair.dataset}: {pair.path}"
    if task.unit is not None:
        return comparison_png(
            title=title,
            image_hwc=image,
            prediction_hw=prediction,
            truth_hw=task.truth_map(values, valid),
            unit=task.unit,
        )
    canvas = _at_size(image, placement.source_hw)
    caption = task.caption(prediction, values)
    if caption:
        return panels_png(title=f"{title}\n{caption}", panels={"input": canvas})
    painted = task.render_with_truth(prediction, values, valid, canvas)
    legend = task.legend(values if label.kind == KEYPOINTS else np.where(valid, values, -1))
    return panels_png(title=title, panels={"input": image, **painted}, legend=legend)


def _close_up(
    image_hwc: np.ndarray | None, record: np.ndarray, placement: Placement
) -> tuple[np.ndarray, np.ndarray, Placement]:
    """Show the animal that keypoints are of, enlarged: picture, keypoints in it, placement."""
    picture, close = close_up(_at_size(image_hwc, placement.source_hw), placement)
    moved_record = record.copy()
    keypoints = moved_record[KEYPOINTS]
    keypoints[:, :2] = moved(record[KEYPOINTS][:, :2], placement, close)
    return picture, moved_record, close


def _at_size(image_hwc: np.ndarray | None, size_hw: tuple[int, int]) -> np.ndarray:
    """Bring a thumbnail to its image's size by the nearest pixel; grey where there is none."""
    if image_hwc is None:
        return np.full((*size_hw, 3), 128, dtype=np.uint8)
    rows, columns = (
        (np.arange(size_hw[axis]) + 0.5) * image_hwc.shape[axis] / size_hw[axis] for axis in (0, 1)
    )
    return image_hwc[np.ix_(rows.astype(int), columns.astype(int))]


def _image(pair: Pair, labels: LabelSource) -> np.ndarray | None:
    try:
        data = labels.image(pair.dataset, pair.item)
        return None if data is None else decode(data)
    except (BadImageError, OSError):
        return None


def _file_name(path: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9]+", "_", path.rpartition(".")[0] or path).strip("_")
    return stem[-60:] or "image"
