"""What a training loop is fed with: epochs of the training part, looks at the held-out part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from featstore.errors import InvalidInputError
from heads.evaluate import labelled, predict_rows
from heads.feed import Batch
from heads.selection import Pair, evenly
from heads.setup import Setup
from heads.targets import checked_label


class Supply:
    """Batches for one training; implements `heads.loop.Data`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._pairs_by_row: dict[int, list[Pair]] = {}
        for pair in setup.selection.train:
            self._pairs_by_row.setdefault(pair.row, []).append(pair)
        options = setup.recipe.loop
        self._held_out = evenly(setup.selection.val, options.val_images)
        self._measured = evenly(self._held_out, options.metric_images)
        self._truth: list[tuple[Pair, np.ndarray, np.ndarray]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self._pairs_by_row) // self._setup.recipe.batch_size

    def epoch(self, number: int, start: int) -> Iterator[Batch]:
        """Give the batches of an epoch from `start` on."""
        return self._setup.feed.shuffled(
            self._pairs_by_row,
            self._setup.targets,
            batch_size=self._setup.recipe.batch_size,
            seed=self._setup.recipe.seed,
            epoch=number,
            start=start,
        )

    def held_out(self) -> Iterator[Batch]:
        """Give the held-out batches."""
        size = self._setup.recipe.batch_size
        return self._setup.feed.fixed(self._held_out, self._setup.targets, size)

    def held_out_metric(self) -> tuple[str, float] | None:
        """Measure the task's main metric on a few held-out images, at label resolution."""
        truth = self._decoded()
        if not truth:
            return None
        setup, task = self._setup, self._setup.model.task
        rows = [pair.row for pair, _, _ in truth]
        predictions = predict_rows(setup.model, setup.feed, rows)
        placements = setup.feed.placements(rows)
        stats = [
            task.measure(
                prediction,
                placement=placements[pair.row],
                values_hw=values,
                valid_hw=valid,
                dataset_format=setup.labels.format_of(pair.dataset),
            )
            for prediction, (pair, values, valid) in zip(predictions, truth, strict=True)
        ]
        found = task.summarise(stats, [pair.group for pair, _, _ in truth])
        name = task.primary_metric
        return name, next(metric.value for metric in found if metric.name == name)

    def _decoded(self) -> list[tuple[Pair, np.ndarray, np.ndarray]]:
        """Decode the labels of the measured images once; they are few and looked at often."""
        if self._truth is None:
            setup = self._setup
            found = list(labelled(self._measured, setup.labels))
            placements = setup.feed.placements([pair.row for pair in self._measured])
            self._truth = [
                (pair, *checked_label(label, placements[pair.row])) for pair, label in found
            ]
        return self._truth


def check_protocol(setup: Setup) -> None:
    """Measure one image with an untrained prediction, so that a misfit shows before training.

    Raises:
        InvalidInputError: The task's protocol does not fit the labels.
    """
    task, output_hw = setup.model.task, setup.model.head.output_hw
    blank = task.predict(torch.zeros(1, task.n_outputs, *output_hw))[0].numpy()
    for pair, label in labelled((setup.selection.test or setup.selection.val)[:8], setup.labels):
        placement = setup.feed.placements([pair.row])[pair.row]
        try:
            values, valid = checked_label(label, placement)
        except InvalidInputError:  # left out and listed when it is measured
            continue
        task.measure(
            blank,
            placement=placement,
            values_hw=values,
            valid_hw=valid,
            dataset_format=setup.labels.format_of(pair.dataset),
        )
        return
