"""What trainings are fed with: one pass over the training part and looks at the held-out part.

Trainings that want the same rows in the same order share a pass: what it reads, they all learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from featstore.errors import BadImageError, InvalidInputError
from heads.evaluate import labelled
from heads.feed import Feed, Rows
from heads.loop import IDENTITY, Batch
from heads.predictions import predict_pairs
from heads.selection import Pair, evenly
from heads.setup import Setup
from heads.targets import checked_label
from heads.view_choice import balanced, choices_of, labels_of_choices, rows_of_epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """One batch as it was read, for every training of a pass."""

    pairs: Sequence[Pair]
    stored: Rows


def held_out_pairs(setup: Setup) -> list[Pair]:
    """Choose the held-out pairs that a training looks at."""
    return evenly(setup.selection.val, setup.recipe.loop.val_images)


class Pass:
    """Goes through the rows that some trainings share; their setups agree on `pass_key`."""

    def __init__(self, setups: Sequence[Setup], *, cache: str) -> None:
        """Open a pass.

        Args:
            setups: Of the trainings.
            cache: Where rows stay once they were read; see `residency.choose_place`.

        Raises:
            InvalidInputError: They cannot be kept where `cache` says.
        """
        first = setups[0]
        self._recipe = first.recipe
        self._pairs_by_row: dict[int, list[Pair]] = {}
        for pair in first.selection.train:
            self._pairs_by_row.setdefault(pair.row, []).append(pair)
        self._choices = choices_of(first.selection.train, first.recipe.loop.views)
        self._labels = labels_of_choices(self._choices, first.selection.train)
        self._held_out = held_out_pairs(first)
        self.feed = Feed(
            first.features,
            list(dict.fromkeys(name for setup in setups for name in setup.model.array_names)),
            first.model.device,
            cache=cache,
            kept_rows=[*sorted(self._pairs_by_row), *(pair.row for pair in self._held_out)],
        )

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self._choices) // self._recipe.batch_size

    def rest_of_epoch(self, step: int) -> Iterator[Shared]:
        """Give what follows after `step` steps, to the end of that epoch.

        A row with several items (equal images) shows them in turn, one an epoch.
        """
        epoch, start = divmod(step, self.batches_per_epoch)
        seed = self._recipe.seed
        batches = self.feed.shuffled(
            rows_of_epoch(self._choices_of_epoch(epoch), seed=seed, epoch=epoch),
            batch_size=self._recipe.batch_size,
            seed=seed,
            epoch=epoch,
            start=start,
        )
        for stored in batches:
            by_row = [self._pairs_by_row[row] for row in stored.rows]
            pairs = [choices[epoch % len(choices)] for choices in by_row]
            yield Shared(pairs=pairs, stored=stored)

    def _choices_of_epoch(self, epoch: int) -> list[tuple[int, ...]]:
        if self._recipe.loop.balance != IDENTITY:
            return self._choices
        drawn = balanced(self._labels, seed=self._recipe.seed, epoch=epoch)
        return [self._choices[number] for number in drawn]

    def held_out(self) -> Iterator[Shared]:
        """Give the held-out batches, always the same; none where nothing is held out."""
        size = self._recipe.batch_size
        for start in range(0, len(self._held_out), size):
            pairs = self._held_out[start : start + size]
            rows = [pair.row for pair in pairs]
            yield Shared(pairs=pairs, stored=Rows(rows=rows, tensors=self.feed.tensors(rows)))


def pass_key(setup: Setup) -> tuple[object, ...]:
    """Give what trainings must have in common to share a pass."""
    return (
        setup.features.key,
        setup.recipe.batch_size,
        setup.recipe.seed,
        setup.recipe.loop.views,
        setup.recipe.loop.balance,
        tuple(pair.key for pair in setup.selection.train),
        tuple(pair.key for pair in held_out_pairs(setup)),
    )


class Supply:
    """Makes what one training learns from what a pass reads."""

    def __init__(self, setup: Setup, feed: Feed) -> None:
        self._setup = setup
        self._feed = feed
        self._measured = evenly(held_out_pairs(setup), setup.recipe.loop.metric_images)
        self._truth: list[tuple[Pair, np.ndarray, np.ndarray]] | None = None

    def batch(self, shared: Shared) -> Batch:
        """Make the head's input and the supervision of a batch."""
        model = self._setup.model
        placements = self._feed.placements(shared.stored.rows)
        targets = self._setup.targets.batch([pair.key for pair in shared.pairs])
        return Batch(
            pairs=shared.pairs,
            inputs=model.tokens(
                shared.stored.tensors, [placements[row] for row in shared.stored.rows]
            ),
            targets={
                name: torch.from_numpy(array).to(model.device) for name, array in targets.items()
            },
        )

    def held_out_metric(self) -> tuple[str, float] | None:
        """Measure the task's main metric on a few held-out images, at label resolution."""
        truth = self._decoded() if self._setup.model.task.is_measured_in_training else []
        if not truth:
            return None
        setup, task = self._setup, self._setup.model.task
        rows = [pair.row for pair, _, _ in truth]
        predictions = predict_pairs(setup.model, self._feed, [pair for pair, _, _ in truth])
        placements = self._feed.placements(rows)
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
        # All of one group: a curve needs no intervals, whose resampling takes longest.
        found = task.summarise(stats, ["held out"] * len(stats))
        name = task.primary_metric
        return name, next(metric.value for metric in found if metric.name == name)

    def _decoded(self) -> list[tuple[Pair, np.ndarray, np.ndarray]]:
        """Decode the labels of the measured images once; they are few and looked at often."""
        if self._truth is None:
            setup = self._setup
            found = list(labelled(self._measured, setup.labels))
            placements = self._feed.placements([pair.row for pair in self._measured])
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
        placement = setup.features.placements([pair.row])[pair.row]
        try:
            values, valid = checked_label(label, placement)
        except InvalidInputError:  # left out and listed when it is measured
            continue
        try:
            task.measure(
                blank,
                placement=placement,
                values_hw=values,
                valid_hw=valid,
                dataset_format=setup.labels.format_of(pair.dataset),
            )
        except BadImageError:  # likewise
            continue
        return
