"""What a training needs before its first step, made and checked from what the user asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import pyarrow.parquet as pq
import torch

from featstore.errors import InvalidInputError, invalid
from featstore.registry import short_name
from featstore.tail import TailSpec
from featstore.types import ProgressCallback, TapShape
from featstore.views import PLAIN
from heads.base import HEADS, Head
from heads.build import build_head
from heads.facts import training_facts
from heads.labels import LabelSource, open_stored_labels
from heads.loop import LoopOptions, Recipe
from heads.model import Model, norm_tensors
from heads.options import split_options
from heads.record import versions, what_is_read, what_is_trained
from heads.runs import PAIRS
from heads.selection import (
    TEST,
    TRAIN,
    VAL,
    Pair,
    Selection,
    evenly,
    labelled_pairs,
    pairs_from_table,
    select,
)
from heads.stages import POOLED
from heads.tap_choice import choose_taps
from heads.targets import TargetJob, Targets, prepare_targets
from heads.tasks import TASKS, Task
from heads.view_choice import choices_of, settle_views

if TYPE_CHECKING:
    from featstore.api import FeatureSet, Store

TAP_NORMS = ("final", "none")
_STARTED_WITH = 256  # training images, at most, whose mean a head begins with


class Choices(TypedDict, total=False):
    """Keyword arguments of `heads.train` that become fields of a `Request`."""

    head: str  # default "deap"
    feature_set: str | None  # key, prefix of one, or name
    backbone: str | None  # chooses the feature set by its backbone
    tap_norm: str  # "final" (default): the backbone's final norm on block outputs; or "none"
    split: str  # to train on, default "train"
    val_fraction: float  # of it to hold out, default 0.1
    steps: int | None  # default: the task's
    epochs: int | None  # instead of steps
    batch_size: int | None  # default: the task's
    lr: float | None  # default: the head's, else the task's
    weight_decay: float | None  # default: the task's
    seed: int  # of first weights, order and held-out groups, default 0
    data: str | None  # FORMAT:PATH of labels to join to stored rows by image
    holdout: tuple[str, ...]  # labels (species, individuals) whose images are in no part
    preset: str | None  # fills in what is not said, see heads.presets


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user asked for: recorded with the run, and enough to resume it."""

    task: str
    head: str = "deap"
    feature_set: str | None = None
    backbone: str | None = None
    taps: tuple[str, ...] = ()
    tap_norm: str = "final"
    split: str = TRAIN
    val_fraction: float = 0.1
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    seed: int = 0
    data: str | None = None
    holdout: tuple[str, ...] = ()
    preset: str | None = None  # full name of the one that filled this in
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tap_norm not in TAP_NORMS:
            raise invalid("tap_norm", self.tap_norm, f"one of {', '.join(TAP_NORMS)}")
        if self.steps is not None and self.epochs is not None:
            given = f"{self.steps} steps and {self.epochs} epochs"
            raise invalid("steps, epochs", given, "one of the two")
        if self.seed < 0:
            raise invalid("seed", self.seed, "0 or more")
        for name in ("steps", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise invalid(name, value, "at least 1")

    def to_json(self) -> dict[str, Any]:
        """Give JSON values; `request_from_json` inverts it."""
        several = {"taps": list(self.taps), "holdout": list(self.holdout)}
        return {**asdict(self), **several, "options": dict(self.options)}


def request_from_json(value: Mapping[str, Any]) -> Request:
    """Rebuild a request from `Request.to_json`."""
    # Runs of before labels could be held out have none.
    several = {name: tuple(value.get(name, ())) for name in ("taps", "holdout")}
    return Request(**{**value, **several})


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Everything that a training works with."""

    store: Store
    features: FeatureSet
    model: Model
    selection: Selection
    labels: LabelSource
    targets: Targets
    recipe: Recipe
    record: dict[str, Any]  # what run.json says of all this
    left_out: dict[str, str]  # path, and view, to the reason why its label cannot be used
    messages: tuple[str, ...]


def make_setup(
    store: Store,
    request: Request,
    *,
    device: torch.device,
    targets_path: Path,
    progress: ProgressCallback,
    resumed_path: Path | None = None,
) -> Setup:
    """Choose features, rows and recipe, build the head, prepare the targets.

    Torch's random numbers decide the first weights: seed them before.

    Args:
        store: Store.
        request: What is asked for.
        device: Where the head computes.
        targets_path: Folder of prepared targets.
        progress: Called with reports of progress.
        resumed_path: Folder of the run that goes on: its pairs are used, whatever the store has
            gained since.

    Raises:
        InvalidInputError: Something asked for cannot be done; nothing was written but targets.
        NotFoundError: A name is not known.
    """
    head_name, task_name = HEADS.full_name(request.head), TASKS.full_name(request.task)
    options = _options(head_name, task_name, request.options)
    features = store.feature_set(request.feature_set, backbone=request.backbone)
    chosen = choose_taps(features, HEADS[head_name], request.taps, options["head"])
    shapes = chosen.shapes
    kind = TASKS[task_name].label_kind_for(options["task"])
    _check_fits(head_name, task_name)
    selection, labels = _select(features, shapes, kind, request, resumed_path)
    views, selection, told = settle_views(options["loop"]["views"], selection, features)
    options["loop"]["views"] = views
    facts = training_facts(selection, labels)
    options["task"] = TASKS[task_name].completed(options["task"], facts)
    task = TASKS[task_name](**options["task"])
    head, tail = _make_head(head_name, task, shapes, features, options["head"])
    options["head"] = asdict(head.options)
    model = Model(head=head.to(device), task=task, taps=shapes, norm=None)
    messages = [*selection.messages, *told, *_apply_norm(model, features, request.tap_norm, device)]
    job = _target_job(
        task_name, options["task"], head, features, selection=selection, labels=labels
    )
    targets = prepare_targets(targets_path, job, task, progress=progress)
    task.fit_to(targets)
    if task.criterion is not None:
        task.criterion.to(device)
    names_of = {pair.key: _shown_name(pair) for pair in job.pairs}
    selection = _without_bad_labels(selection, targets)
    _start(head, task, targets, selection)
    recipe = _recipe(request, model, selection, LoopOptions(**options["loop"]))
    record = {
        "head": head_name,
        "task": task_name,
        **what_is_read(store, features, model, selection.train),
        "named_taps": list(chosen.named),
        "tail": None if tail is None else tail.to_json(),
        **what_is_trained(selection, labels, recipe, head),
        "tap_norm": request.tap_norm,
        "options": {**options, "train": _train_options(request, recipe)},
        "device": str(device),
        "command": request.to_json(),
        "versions": versions(),
    }
    return Setup(
        store=store,
        features=features,
        model=model,
        selection=selection,
        labels=labels,
        targets=targets,
        recipe=recipe,
        record=record,
        left_out={names_of[key]: reason for key, reason in sorted(targets.left_out.items())},
        messages=tuple(messages),
    )


def _target_job(
    task_name: str,
    settings: Mapping[str, Any],
    head: Head,
    features: FeatureSet,
    *,
    selection: Selection,
    labels: LabelSource,
) -> TargetJob:
    pairs = (*selection.train, *selection.val)
    return TargetJob(
        task=task_name,
        settings=settings,
        output_hw=head.output_hw,
        feature_set=features.key,
        pairs=pairs,
        placements=features.placements(sorted({pair.row for pair in pairs})),
        labels=labels,
    )


def _options(head: str, task: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort options to head, task and loop, and fill in every default, which is recorded."""
    owners = {"head": HEADS[head].OPTIONS, "task": TASKS[task].OPTIONS, "loop": LoopOptions}
    chosen = split_options(given, owners)
    options = {owner: asdict(owners[owner](**chosen[owner])) for owner in owners}
    options["head"] = HEADS[head].completed(options["head"], stage=TASKS[task].stage)
    return options


def _make_head(
    name: str,
    task: Task,
    shapes: Sequence[TapShape],
    features: FeatureSet,
    options: Mapping[str, Any],
) -> tuple[Head, TailSpec | None]:
    """Build a head where the task begins; give the backbone's blocks that it holds copies of."""
    options = HEADS[name].with_identities(options, task.identities, numbers=task.numbers)
    n_blocks = HEADS[name].n_tail_blocks(options)
    tail = features.tail(n_blocks) if n_blocks else None
    spec = None if tail is None else tail.spec
    head = build_head(name, taps=shapes, n_outputs=task.readouts, options=options, tail=spec)
    if tail is not None:
        head.fill_tail(tail)
    task.start(head)
    return head, spec


def _apply_norm(
    model: Model, features: FeatureSet, tap_norm: str, device: torch.device
) -> list[str]:
    """Give the model the final norm, where it is asked for and a block tap needs it."""
    raw = model.head.raw_inputs
    read = [shape.tap for number, shape in enumerate(model.taps) if number not in raw]
    blocks = list(dict.fromkeys(name for name in read if name.startswith("block:")))
    if tap_norm == "none" or not blocks:
        return []
    norm = features.final_norm()
    if norm is None:
        return [f"This feature set has no final norm, so {', '.join(blocks)} is read as stored."]
    widths = {shape.dim for shape in model.taps if shape.tap in blocks}
    if widths != {len(norm.weight)}:
        hint = "Use --tap-norm none."
        raise invalid("final norm", len(norm.weight), f"of the taps' width {widths}", hint=hint)
    model.norm = norm_tensors(norm, device)
    return []


def _select(
    features: FeatureSet,
    shapes: Sequence[TapShape],
    kind: str,
    request: Request,
    resumed_path: Path | None,
) -> tuple[Selection, LabelSource]:
    store, taps = features.store, list(dict.fromkeys(shape.tap for shape in shapes))
    if resumed_path is None:
        return select(
            store,
            features,
            taps=taps,
            kind=kind,
            split=request.split,
            val_fraction=request.val_fraction,
            seed=request.seed,
            data=request.data,
            holdout=request.holdout,
        )
    table = pq.read_table(resumed_path / PAIRS)
    train, val, test = (pairs_from_table(table, part) for part in (TRAIN, VAL, TEST))
    labels: LabelSource = open_stored_labels(store, kind)
    if request.data is not None:
        labels, _ = labelled_pairs(store, features, taps=taps, kind=kind, data=request.data)
    return Selection(train=train, val=val, test=test, validation={}), labels


def _check_fits(head: str, task: str) -> None:
    if HEADS[head].is_pooled in (None, TASKS[task].stage == POOLED):
        return
    gives = "one answer an image" if HEADS[head].is_pooled else "a map"
    fitting = [name for name, kind in HEADS.items() if kind.is_pooled is not HEADS[head].is_pooled]
    names = ", ".join(short_name(name) for name in fitting)
    expected = f"another head for {task}, as this one gives {gives}"
    raise invalid("head", head, expected, hint=f"Use one of {names}.")


def _without_bad_labels(selection: Selection, targets: Targets) -> Selection:
    kept = selection.without(targets.left_out)
    if not kept.train:
        raise InvalidInputError("No training image has a label that can be used.")
    # The loop needs what is held out; to lose all of it must not pass in silence.
    if selection.val and not kept.val:
        raise InvalidInputError("No held-out image has a label that can be used.")
    return kept


def _start(head: Head, task: Task, targets: Targets, selection: Selection) -> None:
    """Begin where training images are on average, where task and head know of such an answer."""
    shown = evenly(selection.train, _STARTED_WITH)
    middle = task.middle(targets.batch([pair.key for pair in shown]))
    if middle is not None:
        head.start_at(torch.from_numpy(middle))


def _shown_name(pair: Pair) -> str:
    return pair.path if pair.view == PLAIN else f"{pair.path} ({pair.view})"


def _recipe(request: Request, model: Model, selection: Selection, loop: LoopOptions) -> Recipe:
    settings = model.task.settings
    head_lr = settings.head_lrs.get(HEADS.full_name(request.head), model.head.LR)
    n_shown = len(choices_of(selection.train, loop.views))  # in an epoch
    batch_size = min(request.batch_size or settings.batch_size, n_shown)
    steps = request.steps or settings.steps
    if request.epochs is not None:
        steps = request.epochs * max(1, n_shown // batch_size)
    return Recipe(
        steps=steps,
        batch_size=batch_size,
        lr=(head_lr or settings.lr) if request.lr is None else request.lr,
        weight_decay=settings.weight_decay
        if request.weight_decay is None
        else request.weight_decay,
        seed=request.seed,
        loop=loop,
    )


def _train_options(request: Request, recipe: Recipe) -> dict[str, Any]:
    """Give what sweeps compare, one level deep: the index lists it as params train.NAME."""
    return {
        "lr": recipe.lr,
        "batch_size": recipe.batch_size,
        "weight_decay": recipe.weight_decay,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "split": request.split,
        "val_fraction": request.val_fraction,
        "tap_norm": request.tap_norm,
        **({"holdout": ",".join(request.holdout)} if request.holdout else {}),
    }
