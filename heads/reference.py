"""What a run has to beat, scored exactly as the run was: the train mean, ridge, neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from featstore import open as open_store
from featstore.errors import InvalidInputError, invalid
from featstore.types import Placement, ProgressCallback, ignore_progress
from heads.base import Head, TapTokens
from heads.baselines import fit_mean_map
from heads.evaluate import (
    EvaluationReport,
    labelled,
    locate_run,
    measure_run,
    store_of,
)
from heads.feed import Feed
from heads.joining import join
from heads.labels import LabelSource, StoredLabels
from heads.measured_pairs import pairs_to_measure
from heads.metrics import Metric
from heads.model import Model, load
from heads.nearest import fit_nearest
from heads.ridge import fit_ridge
from heads.runs import PAIRS
from heads.selection import TEST, TRAIN, VAL, Pair, pairs_from_table, plain_pairs
from heads.targets import checked_label
from heads.tasks import Task
from heads.token_targets import token_reading

if TYPE_CHECKING:
    from featstore.api import FeatureSet


class Fitted(Protocol):
    """What a fit gives."""

    def predict(self, tokens: TapTokens) -> Tensor:
        """Give (batch, n_outputs, Ho, Wo) as a head does."""
        ...


BASELINES: Mapping[str, Callable[..., Fitted]] = {"knn": fit_nearest, "ridge": fit_ridge}


class FittedHead(nn.Module):
    """Lets a fitted baseline stand where a head stands, so that it is measured alike."""

    def __init__(self, fitted: Fitted, head: Head) -> None:
        super().__init__()
        self.fitted = fitted
        self.output_hw = head.output_hw
        self.on_cpu = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, inputs: Sequence[TapTokens]) -> Tensor:
        """Predict from the taps, laid over one another."""
        return self.fitted.predict(join(inputs, torch.float32))


def evaluate_baseline(
    run: str | Path,
    baseline: str,
    *,
    store: str | Path | None = None,
    runs: str | Path | None = None,
    split: str = TEST,
    data: str | None = None,
    progress: ProgressCallback = ignore_progress,
) -> EvaluationReport:
    """Fit a baseline to a run's own training images and taps, and measure it as the run was.

    Its one number, lambda or k, is chosen on the run's held-out part. It computes on the
    processor. Tasks: classification, depth, distance, segmentation.

    Args:
        run: See `heads.evaluate`.
        baseline: "ridge" or "knn".
        store: See `heads.evaluate`.
        runs: See `heads.evaluate`.
        split: See `heads.evaluate`.
        data: See `heads.evaluate`: of what is measured; it is fitted to what the run learned.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: The run, its store or its features are not there.
        InvalidInputError: The baseline is not known or does not know the task, or the run held
            nothing out to choose on.
    """
    if baseline not in BASELINES:
        raise invalid("baseline", baseline, f"one of {', '.join(BASELINES)}")
    found = locate_run(run, store=store, runs=runs)
    model = load(found)
    token_reading(model.task)
    features = open_store(store_of(found, store)).feature_set(found.record["feature_sets"][0])
    train, val = (
        TapBatches(model, features, *pairs_to_measure(found, features, model.task, part, None))
        for part in (TRAIN, VAL)
    )
    fitted = BASELINES[baseline](model.task, train, val, output_hw=model.head.output_hw)
    stand_in: Any = FittedHead(fitted, model.head)
    as_model = Model(head=stand_in, task=model.task, taps=model.taps, norm=model.norm)
    return measure_run(
        found, as_model, features, split=split, data=data, progress=progress, answers=baseline
    )


class TapBatches:
    """Tokens of a model's taps, laid over one another, with targets: one image a batch."""

    def __init__(
        self, model: Model, features: FeatureSet, pairs: Sequence[Pair], labels: LabelSource
    ) -> None:
        self._model, self._features = model, features
        self._pairs, self._labels = pairs, labels

    def __iter__(self) -> Iterator[tuple[TapTokens, Mapping[str, Tensor]]]:
        """Read the images again, in the order in which their labels come."""
        model = self._model
        feed = Feed(self._features, model.array_names, model.device)
        placements = self._features.placements([pair.row for pair in self._pairs])
        for pair, label in labelled(self._pairs, self._labels):
            placement = placements[pair.row]
            values, valid = checked_label(label, placement)
            prepared = model.task.prepare(values, valid, placement, model.head.output_hw)
            targets = {name: torch.from_numpy(np.asarray(a))[None] for name, a in prepared.items()}
            tokens = model.tokens(feed.tensors([pair.row]), [placement])
            yield join(tokens, torch.float32), targets


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
