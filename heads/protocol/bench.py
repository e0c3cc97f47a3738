"""A trained head on the bench: adapted to one identity after another, from features in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featstore.errors import not_found
from heads.adapt_modes import count_trained, own_lr
from heads.adaptation import Images, Recipe, Start, adapt_many
from heads.feed import Feed
from heads.identity_token import IdentityToken
from heads.interpolation import descriptors, interpolated_token
from heads.metrics.keypoints import READINGS as LISTS
from heads.metrics.keypoints import SHARE
from heads.model import Model
from heads.protocol.animals import Animals
from heads.protocol.cells import READINGS, Outcome
from heads.protocol.design import ALL, Design
from heads.protocol.plan import INITS, INTERPOLATED, MEAN, RANDOM
from heads.protocol.runner import Job
from heads.selection import Pair

_ROWS_AT_ONCE = 64


class HeadBench:
    """Adapts one trained head; the images of the identity at hand stay in memory."""

    def __init__(
        self, *, run_id: str, model: Model, feed: Feed, animals: Animals, starts: FirstTokens
    ) -> None:
        """Take a head.

        Args:
            run_id: Of the run that trained it.
            model: The head.
            feed: Gives stored rows.
            animals: All instances.
            starts: Gives the token that an adaptation begins with.
        """
        assert isinstance(model.head, IdentityToken)
        self.run_id = run_id
        self._model, self._feed, self._animals = model, feed, animals
        self._head = model.head
        self._starts = starts
        self._held: tuple[str, Images] | None = None
        self._counts: dict[str, int] = {}

    def own_lr(self, mode: str) -> float:
        """Give the learning rate of a mode that names none."""
        return own_lr(mode)

    def parameters(self, mode: str) -> int:
        """Count what a mode trains for one identity."""
        if mode not in self._counts:
            self._counts[mode] = count_trained(self._head, mode)
        return self._counts[mode]

    def adapt(self, job: Job) -> list[list[Outcome]]:
        """Adapt once a seed, side by side, and measure the test instances; see `Bench.adapt`."""
        images = self._images(job.identity)
        starts = [
            Start(
                token=self._starts(job.init, job.identity, seed),
                support=support if job.lr is not None else (),
                seed=seed,
            )
            for seed, support in enumerate(job.supports)
        ]
        recipe = Recipe(mode=job.mode, steps=max(job.steps, 1), lr=job.lr)
        asked = images.rows(torch.tensor(job.test, device=self._model.device))
        adapted = adapt_many(self._head, self._model.task, images, starts, recipe, asked=asked)
        pairs = [self._animals.pairs[job.identity][number] for number in job.test]
        return [
            self._measured(one.output, pairs, with_places=seed == 0)
            for seed, one in enumerate(adapted)
        ]

    def _images(self, identity: str) -> Images:
        """Read all instances of an identity, unless they are at hand."""
        if self._held is None or self._held[0] != identity:
            self._held = None  # before others are read
            self._held = (identity, read_images(self._model, self._feed, self._animals, identity))
        return self._held[1]

    def _measured(
        self, output: Tensor | None, pairs: Sequence[Pair], *, with_places: bool
    ) -> list[Outcome]:
        assert output is not None
        predicted = self._model.task.predict(output).float().cpu().numpy()
        return [
            self._outcome(one, pair, with_places=with_places)
            for one, pair in zip(predicted, pairs, strict=True)
        ]

    def _outcome(self, predicted: np.ndarray, pair: Pair, *, with_places: bool) -> Outcome:
        task, placement = self._model.task, self._animals.placements[pair.row]
        stats = task.measure(
            predicted,
            placement=placement,
            values_hw=self._animals.records[pair.key],
            valid_hw=np.array(True),
            dataset_format=self._animals.labels.format_of(pair.dataset),
        )
        places = task.at_source(predicted, placement) if with_places else np.empty(0)
        return outcome_of(stats, places)


def outcome_of(stats: Mapping[str, Any], places: np.ndarray) -> Outcome:
    """Sum up what `heads.metrics.keypoints.keypoint_stats` keeps of one instance.

    Args:
        stats: Of one instance.
        places: (K, 3) what `at_source` of the task gives, or nothing.
    """
    distance = np.array(stats["distance"])
    known = distance[distance >= 0]
    lists = {name: np.array(stats[LISTS[name]]) for name in READINGS}
    return Outcome(
        squares=float((known**2).sum()),
        points=len(known),
        hits={name: int(((each >= 0) & (each <= SHARE)).sum()) for name, each in lists.items()},
        counted={name: int((each >= 0).sum()) for name, each in lists.items()},
        oks=float(stats["oks"]),
        score=float(stats["score"]),
        places=tuple(map(float, places[:, :2].reshape(-1))) if places.size else (),
    )


def read_images(model: Model, feed: Feed, animals: Animals, identity: str) -> Images:
    """Read what a head needs of all instances of an identity, with their targets."""
    pairs = animals.pairs[identity]
    rows = [pair.row for pair in pairs]
    tensors = feed.tensors(rows, model.array_names)
    placements = [animals.placements[row] for row in rows]
    with torch.no_grad():
        inputs = model.tokens(tensors, placements)
    prepared = [
        model.task.prepare(
            animals.records[pair.key], np.array(True), placement, model.head.output_hw
        )
        for pair, placement in zip(pairs, placements, strict=True)
    ]
    targets = {
        name: torch.from_numpy(np.stack([each[name] for each in prepared])).to(model.device)
        for name in prepared[0]
    }
    return Images(inputs=inputs, targets=targets)


def unit_features(model: Model, feed: Feed, animals: Animals, identity: str) -> np.ndarray:
    """Describe all instances of an identity by vectors of length 1, (instances, dim) float32.

    They are class tokens, or means of patches, see `heads.interpolation.descriptors`.
    """
    pairs = animals.pairs[identity]
    found = []
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        rows = [pair.row for pair in pairs[start : start + _ROWS_AT_ONCE]]
        placements = [animals.placements[row] for row in rows]
        with torch.no_grad():
            inputs = model.tokens(feed.tensors(rows, model.array_names), placements)
            found.append(descriptors(inputs))
    return torch.cat(found).cpu().numpy()


class FirstTokens:
    """Makes the tokens that adaptations of one head begin with."""

    def __init__(
        self, head: IdentityToken, units: Mapping[str, np.ndarray], designs: Mapping[str, Design]
    ) -> None:
        """Take a head.

        Args:
            head: Trained.
            units: Of every identity, see `unit_features`.
            designs: Of the identities that are adapted to. An interpolated token looks at all
                images of the support half, whose labels it does not need, never at the test half.
        """
        self._head, self._units, self._designs = head, units, designs
        self._mixed: dict[str, Tensor] = {}

    def __call__(self, init: str, identity: str, seed: int) -> Tensor:
        """Give a token.

        Args:
            init: "mean", "random" or "interpolated".
            identity: Whom it shall stand for.
            seed: Of what is drawn.

        Raises:
            NotFoundError: There is no such way to begin.
        """
        if init == MEAN:
            return self._head.mean_token().detach()
        if init == RANDOM:
            return self._head.random_tokens(1, torch.Generator().manual_seed(seed))[0]
        if init != INTERPOLATED:
            raise not_found("init", init, INITS)
        if identity not in self._mixed:
            self._mixed[identity] = self._interpolated(identity)
        return self._mixed[identity]

    def _interpolated(self, identity: str) -> Tensor:
        assert self._head.tokens is not None
        names = self._head.options.identities
        known_nc = np.stack([self._units[name].mean(axis=0) for name in names])
        support = list(self._designs[identity].support(ALL, 0))
        new_c = self._units[identity][support].mean(axis=0)
        like = self._head.tokens
        return interpolated_token(
            like, torch.from_numpy(known_nc).to(like), torch.from_numpy(new_c).to(like), seed=0
        )
