"""A token for one more identity, from a few of its stored images, saved and measured."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featstore import open as open_store
from featstore.errors import invalid
from featstore.types import ProgressCallback, ignore_progress
from heads.adapt_modes import TOKEN, count_trained
from heads.adaptation import Adapted, Images, Recipe, Start, adapt_many
from heads.evaluate import locate_run, store_of
from heads.feed import Feed
from heads.identity_images import (
    INITS,
    MEAN,
    FirstTokens,
    Instances,
    draw_support,
    find_instances,
    read_images,
)
from heads.identity_token import IdentityToken
from heads.model import Model, load
from heads.runs import Run
from heads.token_file import (
    DTYPES,
    TokenFile,
    note_support,
    read_token,
    support_of,
    use_token,
    weights_hash,
    write_token,
)

_ROWS_AT_ONCE = 64
ENDING = ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptChoices:
    """What is asked of an adaptation beside its recipe."""

    identity: str
    shots: int | None = None  # labelled images; None: all that are not in the test split
    seeds: int = 1  # adaptations, each from other images where there are more than `shots`
    seed: int = 0  # of the first of them
    init: str = MEAN
    token_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise invalid(name, getattr(self, name), f"{least} or more")
        if self.shots is not None and self.shots < 1:
            raise invalid("shots", self.shots, "1 or more, or None for all images")
        for name, known in (("init", INITS), ("token_dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise invalid(name, getattr(self, name), f"one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OneToken:
    """One adaptation, as its file gives it back."""

    path: str
    file_bytes: int
    support: tuple[str, ...]  # paths of the images that were learned from
    loss_before: float  # on these images, with the first token
    loss: float  # after
    loss_stored: float  # with the token as it is read back: its dtype may have rounded it
    metrics: dict[str, float]  # of the test split, with the token as it is read back


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptReport:
    """What `adapt` did."""

    run_id: str
    identity: str
    was_trained: bool  # whether the run has learned from the identity already
    mode: str
    init: str
    steps: int
    lr: float
    shots: int  # images that were learned from
    parameters: int  # that were trained
    seed: int  # of the first token
    seconds: float  # of training, all seeds together
    test_images: int
    mean_token: dict[str, float]  # metrics of the test split without adaptation
    tokens: tuple[OneToken, ...]  # one a seed
    left_out: dict[str, str] = field(default_factory=dict)  # path to reason

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        tokens = [{name: getattr(one, name) for name in one.__slots__} for one in self.tokens]
        return {**values, "tokens": tokens}


def adapt(
    run: Run | str | Path,
    choices: AdaptChoices,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    store: str | Path | None = None,
    runs: str | Path | None = None,
    data: str | None = None,
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
) -> AdaptReport:
    """Adapt the head of a run to one identity, save the tokens and measure them.

    It learns from stored images of the identity that are not in the test split, and is measured
    on those that are. The run stays as it is, but for a note of what each token has learned from.

    Args:
        run: A run, its folder, or with `store` or `runs` its id, the start of one, or "@last".
        choices: Whom to adapt to, and from what.
        recipe: How it is trained; None: the token alone.
        out: File of the token, whose name gets a number where there are several seeds; None: the
            identity's name, and the mode where that is more than the token, in the current folder.
            One that is there is replaced.
        store: The store; None: the one the run was trained from.
        runs: Folder of the runs, where it is not the store's own.
        data: Data set whose labels are joined to stored rows; None: the labels that the run used.
        device: Where to compute.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: The run, its store or the identity is not there.
        InvalidInputError: The head takes no token, there are fewer labelled images than shots,
            none of them has a visible keypoint, or a loss is not finite.
    """
    recipe = recipe or Recipe()
    found = locate_run(run, store=store, runs=runs)
    model = load(found, device=device)
    if not isinstance(model.head, IdentityToken):
        name = found.record["head"]
        raise invalid("run", name, "one of the head identity_token", hint="Train one first.")
    features = open_store(store_of(found, store)).feature_set(found.record["feature_sets"][0])
    source = data or found.record["labels"]["data"]
    instances = find_instances(model, features, choices.identity, data=source)
    feed = Feed(features, model.array_names, model.device)
    job = _Job(found, model, instances, choices, recipe)
    job.prepare(feed)
    began = time.perf_counter()
    adapted = adapt_many(model.head, model.task, job.images, job.starts, recipe, progress=progress)
    seconds = time.perf_counter() - began
    return job.report(adapted, seconds, out)


class _Job:
    """One call: whom it is about, what it learns from, and what came of it."""

    def __init__(
        self,
        run: Run,
        model: Model,
        instances: Instances,
        choices: AdaptChoices,
        recipe: Recipe,
    ) -> None:
        self._run, self._model, self._instances = run, model, instances
        self._choices, self._recipe = choices, recipe
        self.images: Images
        self.starts: list[Start] = []
        self._test: Images | None = None

    def prepare(self, feed: Feed) -> None:
        """Draw the images, read them, and make the first tokens."""
        choices, pool = self._choices, self._instances.pool
        seeds = range(choices.seed, choices.seed + choices.seeds)
        supports = [
            draw_support(pool, identity=choices.identity, shots=choices.shots, seed=seed)
            for seed in seeds
        ]
        if not supports[0]:
            hint = f"Extract some of {choices.identity} in another split."
            raise invalid("images", "none beside the test split", "one or more", hint=hint)
        self.images = read_images(self._model, feed, pool)
        if self._instances.test:
            self._test = read_images(self._model, feed, self._instances.test)
        first = FirstTokens(self._run, self._model, feed)
        for support, seed in zip(supports, seeds, strict=True):
            seen = self.images.rows(torch.tensor(support))
            token = first(choices.init, seen, seed=seed)
            self.starts.append(Start(token=token, support=support, seed=seed))

    def report(
        self, adapted: Sequence[Adapted], seconds: float, out: str | Path | None
    ) -> AdaptReport:
        """Save and measure, and tell of it."""
        choices, recipe, head = self._choices, self._recipe, self._head
        paths = _paths(out, choices, recipe.mode)
        pool = self._instances.pool
        return AdaptReport(
            run_id=self._run.run_id,
            identity=choices.identity,
            was_trained=choices.identity in head.options.identities,
            mode=recipe.mode,
            init=choices.init,
            steps=recipe.steps,
            lr=recipe.rate,
            shots=len({pool[n].pair.image_key for n in self.starts[0].support}),
            parameters=count_trained(head, recipe.mode),
            seed=choices.seed,
            seconds=round(seconds, 3),
            test_images=len(self._instances.test),
            mean_token=self._measured(self._model),
            tokens=tuple(
                self._saved(one, start, path)
                for one, start, path in zip(adapted, self.starts, paths, strict=True)
            ),
            left_out=dict(self._instances.left_out),
        )

    @property
    def _head(self) -> IdentityToken:
        assert isinstance(self._model.head, IdentityToken)
        return self._model.head

    def _saved(self, one: Adapted, start: Start, path: Path) -> OneToken:
        """Save an adaptation, and measure what the file gives back."""
        saved = TokenFile(
            run_id=self._run.run_id,
            weights_hash=weights_hash(self._run),
            identity=self._choices.identity,
            token=one.token,
            mode=self._recipe.mode,
            weights=one.weights,
        )
        n_bytes = write_token(path, saved, dtype=self._choices.token_dtype)
        names = support_of(self._instances.pool[n].pair.image_key for n in start.support)
        if not note_support(self._run, path, names):
            saved = replace(saved, support=names)
            n_bytes = write_token(path, saved, dtype=self._choices.token_dtype)
        back = self._with(read_token(path))
        support = self.images.rows(torch.tensor(start.support))
        paths = dict.fromkeys(self._instances.pool[n].pair.path for n in start.support)
        return OneToken(
            path=str(path),
            file_bytes=n_bytes,
            support=tuple(paths),
            loss_before=_loss(self._model, support, start),
            loss=_loss(self._with(saved), support),
            loss_stored=_loss(back, support),
            metrics=self._measured(back),
        )

    def _with(self, saved: TokenFile) -> Model:
        """Give a copy of the model that answers with a token file."""
        model = copy.copy(self._model)
        model.head = copy.deepcopy(self._model.head)
        use_token(model, self._run, saved)
        return model

    def _measured(self, model: Model) -> dict[str, float]:
        """Measure the test split; nothing where there is none."""
        if self._test is None:
            return {}
        outputs = _answers(model, self._test)
        predicted = model.task.predict(outputs).float().cpu().numpy()
        stats = [
            model.task.measure(
                one,
                placement=instance.placement,
                values_hw=instance.record,
                valid_hw=np.array(True),
                dataset_format=instance.dataset_format,
            )
            for one, instance in zip(predicted, self._instances.test, strict=True)
        ]
        # All of one group: intervals over seeds are what tells here.
        found = model.task.summarise(stats, [self._choices.identity] * len(stats))
        return {metric.name: metric.value for metric in found}


@torch.no_grad()
def _answers(model: Model, images: Images) -> Tensor:
    parts = torch.split(torch.arange(len(images)), _ROWS_AT_ONCE)
    return torch.cat([model.head(images.rows(index).inputs) for index in parts])


def _loss(model: Model, images: Images, start: Start | None = None) -> float:
    """Give the mean loss of some images, with the first token where `start` is given."""
    head = model.head
    assert isinstance(head, IdentityToken)
    if start is not None:
        head.set_token(start.token)
    found = float(model.task.losses(_answers(model, images), images.targets).mean())
    if start is not None:
        head.set_token(None)
    return found


def _paths(out: str | Path | None, choices: AdaptChoices, mode: str) -> list[Path]:
    """Name the file of each seed."""
    said = choices.identity if mode == TOKEN else f"{choices.identity}-{mode}"
    plain = re.sub(r"[^\w.-]+", "_", said)
    path = Path(f"{plain}{ENDING}") if out is None else Path(out)
    if choices.seeds == 1:
        return [path]
    seeds = range(choices.seed, choices.seed + choices.seeds)
    return [path.with_name(f"{path.stem}-{seed}{path.suffix}") for seed in seeds]
