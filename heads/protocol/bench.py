"""A trained head on the bench: adapted to one identity after another, from features in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heads.adapt_modes import TOKEN, count_trained, own_lr
from heads.adaptation import Images, Recipe, Start, adapt_many
from heads.feed import Feed
from heads.identity_images import MEAN, RANDOM, FirstTokens, Instance, read_images
from heads.identity_token import IdentityToken
from heads.interpolation import descriptors
from heads.metrics.keypoints import READINGS as LISTS
from heads.metrics.keypoints import SHARE
from heads.model import Model
from heads.protocol.cells import READINGS, Jittered, Outcome
from heads.protocol.design import ALL, Design
from heads.protocol.plan import BEST, NEAREST, SHARED
from heads.protocol.runner import Job
from heads.runs import Run
from heads.selection import evenly

_ROWS_AT_ONCE = 64
_SHARED_IMAGES = 256  # of all trained identities, that one token is fitted to, at most
_SHARED_BATCH = 64
_SHARED_FACTORS = (0.1, 0.3, 1.0, 3.0)  # of the token's own learning rate


class HeadBench:
    """Adapts one trained head; the images of the identity at hand stay in memory."""

    def __init__(
        self,
        *,
        run: Run,
        model: Model,
        feed: Feed,
        instances: Mapping[str, Sequence[Instance]],
        designs: Mapping[str, Design],
        validation: str,
        jittered: Mapping[str, Sequence[Instance]],
    ) -> None:
        """Take a head.

        Args:
            run: That trained it.
            model: The head.
            feed: Gives stored rows.
            instances: Of all identities.
            designs: Of the identities that are adapted to. A token that begins interpolated looks
                at all images of the support half, whose labels it does not need, and never at the
                test half.
            validation: Identity on which the best of the trained tokens is chosen.
            jittered: Of some identities the instances of the test half, in their order, in crops
                around worse boxes: view after view.
        """
        assert isinstance(model.head, IdentityToken)
        self.run_id = run.run_id
        self._model, self._feed, self._head = model, feed, model.head
        self._instances, self._designs, self._jittered = instances, designs, jittered
        self._first = FirstTokens(run, model, feed)
        self._held: tuple[str, Images] | None = None
        self._validation = validation
        self._made: dict[tuple[str, str], Tensor] = {}
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
                token=self._token(job, images, seed),
                support=support if job.lr is not None else (),
                seed=seed,
            )
            for seed, support in enumerate(job.supports)
        ]
        recipe = Recipe(mode=job.mode, steps=max(job.steps, 1), lr=job.lr)
        own, jittered = self._instances[job.identity], self._jittered.get(job.identity, ())
        index = [*job.test, *range(len(own), len(own) + len(jittered))]
        asked = images.rows(torch.tensor(index, device=self._model.device))
        adapted = adapt_many(self._head, self._model.task, images, starts, recipe, asked=asked)
        tested = [*(own[number] for number in job.test), *jittered]
        return [
            self._measured(one.output, tested, len(job.test), with_places=seed == 0)
            for seed, one in enumerate(adapted)
        ]

    def _images(self, identity: str) -> Images:
        """Read all instances of an identity, then the jittered ones, unless they are at hand."""
        if self._held is None or self._held[0] != identity:
            self._held = None  # before others are read
            every = [*self._instances[identity], *self._jittered.get(identity, ())]
            images = read_images(self._model, self._feed, every)
            self._held = (identity, images)
        return self._held[1]

    def _token(self, job: Job, images: Images, seed: int) -> Tensor:
        """Make the first token; those that are not drawn are the same for all seeds."""
        if job.init in (MEAN, RANDOM):
            return self._first(job.init, images, seed=seed)
        is_general = job.init in (BEST, SHARED)
        key = ("" if is_general else job.identity, job.init)
        if key not in self._made:
            self._made[key] = (
                self._general_token(job.init) if is_general else self._token_by_looks(job, images)
            )
        return self._made[key]

    def _general_token(self, init: str) -> Tensor:
        """Make a token that is the same for all identities."""
        if init == SHARED:
            return self._best_on_validation(self._fitted_to_trained())
        assert self._head.tokens is not None
        return self._best_on_validation(self._head.tokens.detach())

    def _token_by_looks(self, job: Job, images: Images) -> Tensor:
        """Make a token by the images of an identity's support half, not by their labels."""
        half = torch.tensor(self._designs[job.identity].support(ALL, 0))
        seen = images.rows(half.to(self._model.device))
        if job.init == NEAREST:
            return self._first.nearest(seen)
        return self._first(job.init, seen, seed=0)

    def _fitted_to_trained(self) -> list[Tensor]:
        """Fit one token to images of all trained identities, with several learning rates.

        It is the best answer of a head that is not told the identity. The mean of the tokens is
        not: no image was ever shown with it, and a margin teaches the head to do worse with it.
        """
        names = self._head.options.identities
        each = max(_SHARED_IMAGES // len(names), 1)
        chosen = [one for name in names for one in evenly(self._instances[name], each)]
        images = read_images(self._model, self._feed, chosen)
        start = Start(token=self._head.mean_token().detach(), support=tuple(range(len(chosen))))
        rates = (own_lr(TOKEN) * factor for factor in _SHARED_FACTORS)
        return [
            adapt_many(self._head, self._model.task, images, [start], recipe)[0].token
            for recipe in (Recipe(lr=rate, batch_size=_SHARED_BATCH) for rate in rates)
        ]

    def _best_on_validation(self, tokens: Iterable[Tensor]) -> Tensor:
        """Give the token with the lowest RMSE on the validation identity's test half."""
        own, design = self._instances[self._validation], self._designs[self._validation]
        tested = [own[number] for number in design.test]
        images = read_images(self._model, self._feed, tested)
        starts = [Start(token=token, support=()) for token in tokens]
        task, rmses = self._model.task, []
        for one in adapt_many(self._head, task, images, starts, Recipe(), asked=images):
            found = self._measured(one.output, tested, len(tested), with_places=False)
            rmses.append(sum(each.squares for each in found) / sum(each.points for each in found))
        return starts[int(np.argmin(rmses))].token

    def _measured(
        self,
        output: Tensor | None,
        tested: Sequence[Instance],
        n_plain: int,
        *,
        with_places: bool,
    ) -> list[Outcome]:
        """Measure instances of which the first are plain, and the others those again, jittered."""
        assert output is not None
        predicted = self._model.task.predict(output).float().cpu().numpy()
        found = [
            self._outcome(one, instance, with_places=with_places and number < n_plain)
            for number, (one, instance) in enumerate(zip(predicted, tested, strict=True))
        ]
        if len(found) == n_plain:
            return found
        return [
            replace(one, jittered=_together(found[n_plain + number :: n_plain]))
            for number, one in enumerate(found[:n_plain])
        ]

    def _outcome(self, predicted: np.ndarray, instance: Instance, *, with_places: bool) -> Outcome:
        task = self._model.task
        stats = task.measure(
            predicted,
            placement=instance.placement,
            values_hw=instance.record,
            valid_hw=np.array(True),
            dataset_format=instance.dataset_format,
        )
        places = task.at_source(predicted, instance.placement) if with_places else np.empty(0)
        return outcome_of(stats, places)


def _together(outcomes: Sequence[Outcome]) -> Jittered:
    """Sum up one instance in several crops."""
    reading = READINGS[0]
    return Jittered(
        squares=sum(one.squares for one in outcomes),
        points=sum(one.points for one in outcomes),
        hits=sum(one.hits[reading] for one in outcomes),
        counted=sum(one.counted[reading] for one in outcomes),
    )


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


def mean_feature(model: Model, feed: Feed, instances: Sequence[Instance]) -> np.ndarray:
    """Average what `heads.interpolation.descriptors` says of some instances: (dim,) float64."""
    total: Any = 0.0
    for start in range(0, len(instances), _ROWS_AT_ONCE):
        part = instances[start : start + _ROWS_AT_ONCE]
        tensors = feed.tensors([one.pair.row for one in part], model.array_names)
        with torch.no_grad():
            described = descriptors(model.tokens(tensors, [one.placement for one in part]))
        total = total + described.double().sum(dim=0).cpu().numpy()
    mean: np.ndarray = total / len(instances)
    return mean
