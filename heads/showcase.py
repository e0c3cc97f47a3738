"""The images of a run that are worth looking at: its best, its median and its worst, drawn."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featstore import open as open_store
from featstore.errors import FormatError, InvalidInputError, NotFoundError
from heads.evaluate import store_of
from heads.feed import Feed
from heads.gallery import draw_pictures
from heads.measured_pairs import pairs_to_measure
from heads.model import load
from heads.runs import PER_IMAGE, PICTURES, Run
from heads.selection import Pair
from heads.tasks import Task

GROUPS = ("best", "median", "worst")
_PAIR_COLUMNS = ("split", "row", "item", "dataset", "path", "group")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One measured image with its primary metric."""

    key: tuple[int, str]  # row and item
    path: str
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One drawn image."""

    png: bytes
    path: str
    score: float | None  # None where nobody knows which image it is


@dataclass(frozen=True, kw_only=True, slots=True)
class Showcase:
    """Pictures by group, and what a reader has to know about them."""

    pictures: Mapping[str, Sequence[Picture]]
    note: str


def read_scores(run: Run, task: Task) -> list[Scored]:
    """Score each measured image of a finished run; images that cannot be scored alone are left out.

    Raises:
        FormatError: The file of the measured images is missing or damaged.
    """
    path = run.path / PER_IMAGE
    try:
        lines = pq.read_table(path).to_pylist()
        scores = image_scores(task, lines)
        pairs = zip(lines, scores, strict=True)
        return [
            Scored(key=(line["row"], line["item"]), path=line["path"], score=score)
            for line, score in pairs
            if score is not None
        ]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise FormatError(
            f"{path} must hold the measured images of a finished run. It is missing or damaged "
            f"({type(error).__name__}); train the run again."
        ) from error


def image_scores(task: Task, per_image: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Give the primary metric of each image alone, from the sums that its measurement kept.

    Args:
        task: Task.
        per_image: Lines of a run's ``per_image.parquet``.

    Returns:
        One number an image; None where the metric says nothing of one image.
    """
    return [_score(task, line) for line in per_image]


def _score(task: Task, line: Mapping[str, Any]) -> float | None:
    sums = {name: value for name, value in line.items() if name not in _PAIR_COLUMNS}
    try:
        metrics = task.summarise([sums], [None])
    except InvalidInputError:  # not one pixel to measure
        return None
    found = {metric.name: metric.value for metric in metrics}
    value = found.get(task.primary_metric)
    return value if value is not None and math.isfinite(value) else None


def choose(
    scored: Sequence[Scored], *, is_lower_better: bool, count: int
) -> dict[str, list[Scored]]:
    """Choose the best, the median and the worst images, none of them twice.

    Args:
        scored: Images.
        is_lower_better: Which way the score goes.
        count: Images a group, at most; few images are shared out evenly.

    Returns:
        "best" (best first), "median" and "worst" (worst first); none of them empty.
    """
    ordered = sorted(scored, key=lambda one: (one.score, one.path), reverse=not is_lower_better)
    each = min(count, max(1, len(ordered) // 3))
    start = (len(ordered) - each) // 2
    chosen = {
        "best": ordered[:each],
        "worst": ordered[::-1][:each],
        "median": ordered[start : start + each],
    }
    seen: set[tuple[int, str]] = set()
    kept: dict[str, list[Scored]] = {}
    for name, group in chosen.items():
        kept[name] = [one for one in group if one.key not in seen]
        seen |= {one.key for one in group}
    return {name: kept[name] for name in GROUPS if kept[name]}


def draw_showcase(
    run: Run, chosen: Mapping[str, Sequence[Scored]], *, store: Path | None, device: str
) -> Showcase:
    """Predict chosen images anew from the store and draw them; else take the run's own pictures.

    Args:
        run: A finished run.
        chosen: What `choose` gave.
        store: The store; None: the one the run was trained from.
        device: Where to compute.

    Returns:
        The pictures; where the store or its features are gone, those that were drawn when the
        run ended, with a note that says so.
    """
    try:
        drawn = _draw(run, [one for group in chosen.values() for one in group], store, device)
    except NotFoundError as error:
        return _stored(run, str(error))
    groups = {
        name: [
            Picture(png=drawn[one.key], path=one.path, score=one.score)
            for one in group
            if one.key in drawn
        ]
        for name, group in chosen.items()
    }
    return Showcase(pictures={name: group for name, group in groups.items() if group}, note="")


def _draw(
    run: Run, chosen: Sequence[Scored], store: Path | None, device: str
) -> dict[tuple[int, str], bytes]:
    """Draw images of the run's measured split: PNG files by row and item."""
    features = open_store(store_of(run, store)).feature_set(run.record["feature_sets"][0])
    model = load(run, device=device)
    split = run.record["measured"]["split"]
    found, labels = pairs_to_measure(run, features, model.task, split, None)
    wanted = {one.key for one in chosen}
    pairs: list[Pair] = [pair for pair in found if pair.key in wanted]
    feed = Feed(features, model.array_names, model.device)
    with tempfile.TemporaryDirectory() as folder:
        files = draw_pictures(Path(folder), model, feed, pairs, labels)
        # A file's name begins with the place of its pair.
        return {pairs[_number(name)].key: (Path(folder) / name).read_bytes() for name in files}


def _number(file: str) -> int:
    return int(Path(file).name.partition("_")[0])


def _stored(run: Run, reason: str) -> Showcase:
    files = sorted((run.path / PICTURES).glob("*.png"))
    pictures = [Picture(png=file.read_bytes(), path=file.stem, score=None) for file in files]
    note = (
        f"The images could not be predicted again: {reason} "
        "These are the pictures that were drawn when the run ended, evenly spread over the split."
    )
    return Showcase(pictures={"drawn at the end": pictures} if pictures else {}, note=note)
