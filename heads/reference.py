"""What a run has to beat: predicting the train mean, scored exactly as the run was scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from featstore import open as open_store
from featstore.errors import InvalidInputError
from featstore.types import Placement
from heads.base import TapTokens
from heads.baselines import fit_mean_map
from heads.evaluate import labelled, locate_run, store_of
from heads.labels import StoredLabels
from heads.metrics import Metric
from heads.model import load
from heads.runs import PAIRS
from heads.selection import TEST, TRAIN, Pair, pairs_from_table, plain_pairs
from heads.targets import checked_label
from heads.tasks import Task


def measure_train_mean(
    run: str | Path, *, store: str | Path | None = None, runs: str | Path | None = None
) -> list[Metric]:
    """Score the mean of the targets at each pixel of the frame, over a run's own training images.

    The same test images, resolution, metrics and resampled groups as the run's.

    Args:
        run: The run's folder, or with `store` or `runs` its id, the start of one, or "@last".
        store: The store; None: the one the run was trained from.
        runs: Folder of the runs, where it is not the store's own.

    Raises:
        NotFoundError: The run or its store is not there.
        InvalidInputError: The run took its labels from elsewhere than the store.
    """
    found = locate_run(run, store=store, runs=runs)
    if found.record["labels"]["data"] is not None:
        raise InvalidInputError(f"{found.run_id} took its labels from outside of its store.")
    model = load(found)
    opened = open_store(store_of(found, store))
    features = opened.feature_set(found.record["feature_sets"][0])
    labels = StoredLabels(opened, model.task.label_kind)
    table = pq.read_table(found.path / PAIRS)
    train, test = (plain_pairs(pairs_from_table(table, part)) for part in (TRAIN, TEST))
    placements = features.placements([pair.row for pair in (*train, *test)])
    output_hw = model.head.output_hw
    mean = fit_mean_map(_targets(model.task, train, labels, placements, output_hw))
    prediction_chw = mean.depth_yx[None].numpy()
    per_image = []
    groups = []
    for pair, label in labelled(test, labels):
        values, valid = checked_label(label, placements[pair.row])
        per_image.append(
            model.task.measure(
                prediction_chw,
                placement=placements[pair.row],
                values_hw=values,
                valid_hw=valid,
                dataset_format=labels.format_of(pair.dataset),
            )
        )
        groups.append(pair.group)
    return model.task.summarise(per_image, groups)


def _targets(
    task: Task,
    pairs: tuple[Pair, ...],
    labels: StoredLabels,
    placements: Mapping[int, Placement],
    output_hw: tuple[int, int],
) -> Iterator[tuple[TapTokens, Mapping[str, Tensor]]]:
    no_tokens = TapTokens(patch=torch.zeros(1, 1, 1), grid=(1, 1))
    for pair, label in labelled(pairs, labels):
        values, valid = checked_label(label, placements[pair.row])
        prepared = task.prepare(values, valid, placements[pair.row], output_hw)
        yield no_tokens, {name: torch.from_numpy(array)[None] for name, array in prepared.items()}
