"""Measure a head at the resolution of the labels, with intervals over groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from featstore import open as open_store
from featstore.errors import InvalidInputError, NotFoundError, invalid
from featstore.store import locate
from featstore.types import Label, Progress, ProgressCallback, ignore_progress
from featstore.views import HFLIP, PLAIN, check_view
from heads.facts import measured_facts
from heads.feed import Feed
from heads.labels import LabelSource
from heads.measured_pairs import pairs_to_measure, without_support
from heads.measuring import measure_window
from heads.metrics import Metric
from heads.model import Model, load
from heads.other_features import check_same_backbone
from heads.other_views import in_view
from heads.predictions import Predict, flip_average, predict_pairs
from heads.runs import RECORD, Run, find_run, read_run
from heads.selection import TEST, Pair
from heads.token_choice import OWN, OWN_TOKEN, ChosenToken, choose_token

if TYPE_CHECKING:
    from featstore.api import FeatureSet

_WINDOW = 32  # images measured at a time, at most: their predictions are in memory
_WINDOW_NUMBERS = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What measuring some pairs gave."""

    metrics: Sequence[Metric]
    per_image: pa.Table
    left_out: Mapping[str, str]  # path to reason
    sources: tuple[str, ...]  # of the labels
    n_groups: int

    def values(self) -> dict[str, float]:
        """Give the metrics by name."""
        return {metric.name: metric.value for metric in self.metrics}

    def intervals(self) -> dict[str, list[float] | None]:
        """Give the bounds of each metric by name; None where there is one group only."""
        return {
            metric.name: None
            if metric.low is None or metric.high is None
            else [metric.low, metric.high]
            for metric in self.metrics
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """What `evaluate` measured."""

    run_id: str
    answers: str  # "head", or the baseline in its place
    split: str
    data: str | None
    view: str  # of the images, in which they were measured
    tta: str | None  # "hflip": averaged with mirror images
    token: str  # "own", "mean" or a token file: what stood for whom the images show
    identity: str | None  # label that was measured alone
    support: int  # images left out, as the token has learned from them
    output_hw: tuple[int, int]
    images: int
    groups: int
    metrics: dict[str, float]
    intervals: dict[str, list[float] | None]
    note: str  # how the intervals were made
    left_out: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def evaluate(
    run: Run | str | Path,
    *,
    store: str | Path | None = None,
    runs: str | Path | None = None,
    split: str = TEST,
    data: str | None = None,
    queries: int | None = None,
    feature_set: str | None = None,
    view: str = PLAIN,
    tta: str | None = None,
    token: str | Path = OWN,
    identity: str | None = None,
    with_support: bool = False,
    device: str = "auto",
    progress: ProgressCallback = ignore_progress,
) -> EvaluationReport:
    """Measure the best head of a run again, from its weights and the store.

    The splits "train", "val" and "test" are the parts that the run itself used; any other is
    looked up in the store, and so is every split of `data`. On another feature set of the same
    backbone, such as one of larger images, they are the same items.

    Args:
        run: A run, its folder, or with `store` or `runs` its id, the start of one, or "@last".
        store: The store; None: the one the run was trained from.
        runs: Folder of the runs, where it is not the store's own.
        split: What to measure on.
        data: Data set ``FORMAT:PATH`` whose labels are joined to stored rows by image.
        queries: Side of another grid of queries than the head was trained on, for another
            resolution of the output; None: the same.
        feature_set: Key or name of other features of the same backbone; None: the run's own.
        view: Stored view of the images, such as "jitter:0:0", a worse box around each animal.
        tta: "hflip" averages each prediction with that of the stored mirror image, turned back;
            None: the plain view alone.
        token: Of a head with identities: "own" answers for images of an identity that was
            trained with its own token, for others with the mean; "mean" for all with the mean; a
            token file for all with its token.
        identity: Measure on images of this label alone, which the split is looked up in the
            store for; None: with a token file the identity that it is of, else all labels.
        with_support: Measure on the images too that the token of a file has learned from.
        device: Where to compute.
        progress: Called with reports of progress.

    Raises:
        NotFoundError: The run, its store or its features are not there, or the view, with `tta` a
            mirror image, or the identity or token file.
        InvalidInputError: Nothing in the split can be measured, `view` or `tta` is something else
            or both are asked for, or the token is of another run or the head takes none.
    """
    check_view(view)
    if tta not in (None, HFLIP):
        raise invalid("tta", tta, f"{HFLIP} or None")
    if tta is not None and view != PLAIN:
        raise invalid("view", view, f"{PLAIN} with tta, for its mirror image alone is stored")
    found = locate_run(run, store=store, runs=runs)
    model = load(found, device=device)
    if queries is not None:
        model.head.ask_on(queries)
    opened = open_store(store_of(found, store))
    features = opened.feature_set(feature_set or found.record["feature_sets"][0])
    if features.key != found.record["feature_sets"][0]:
        check_same_backbone(found, features)
        model.read_from(features.taps)
    answer = choose_token(model, found, token)
    if with_support:
        answer = replace(answer, support=frozenset())
    return measure_run(
        found,
        model,
        features,
        split=split,
        data=data,
        view=view,
        tta=tta,
        token=answer,
        identity=answer.identity if identity is None else identity,
        progress=progress,
    )


def measure_run(
    run: Run,
    model: Model,
    features: FeatureSet,
    *,
    split: str,
    data: str | None,
    progress: ProgressCallback,
    view: str = PLAIN,
    tta: str | None = None,
    token: ChosenToken = OWN_TOKEN,
    identity: str | None = None,
    answers: str = "head",
) -> EvaluationReport:
    """Measure a model on what a run is measured on: its own head, or what stands in its place.

    Args:
        run: Run.
        model: What answers, for the run's task and taps.
        features: The run's feature set.
        split: See `evaluate`.
        data: See `evaluate`.
        progress: Called with reports of progress.
        view: See `evaluate`.
        tta: See `evaluate`.
        token: What stands for whom the images show.
        identity: See `evaluate`.
        answers: Name of what answers, for the report.

    Raises:
        InvalidInputError: Nothing in the split can be measured.
    """
    pairs, labels = pairs_to_measure(run, features, model.task, split, data, identity=identity)
    model.task.check(measured_facts(pairs, labels))
    asked, pairs = pairs, without_support(pairs, token.support, token=token.name)
    if view != PLAIN:
        pairs = in_view(features, pairs, model.tap_names, view)
    feed = Feed(features, model.array_names, model.device)
    predict = token.predict
    if tta is not None:
        predict = flip_average(features, pairs, model.tap_names, predict)
    result = measure_pairs(model, feed, pairs, labels, predict=predict, progress=progress)
    return EvaluationReport(
        run_id=run.run_id,
        answers=answers,
        split=split,
        data=data,
        view=view,
        tta=tta,
        token=token.name,
        identity=identity,
        support=len({pair.image_key for pair in asked} - {pair.image_key for pair in pairs}),
        output_hw=model.head.output_hw,
        images=result.per_image.num_rows,
        groups=result.n_groups,
        metrics=result.values(),
        intervals=result.intervals(),
        note=result.metrics[0].note,
        left_out=dict(result.left_out),
    )


def locate_run(run: Run | str | Path, *, store: str | Path | None, runs: str | Path | None) -> Run:
    """Take a run, the folder of one, or a name to be found in a store or a folder of runs.

    Raises:
        NotFoundError: There is no such run.
        InvalidInputError: It is a protocol, which has no head of its own.
    """
    if isinstance(run, Run):
        return run
    if store is None and runs is None:
        if not (Path(run) / RECORD).is_file():
            raise NotFoundError(f"No run folder at {run}. To look a run up by id, name its store.")
        found = read_run(Path(run))
    else:
        found = find_run(store if store is not None else "", str(run), runs=runs)
    if found.is_protocol:
        raise InvalidInputError(
            f"{found.run_id} is an {found.record['kind']}, which has no head of its own: look at "
            f"{found.path / 'page.html'}, or name one of its heads."
        )
    return found


def store_of(run: Run, store: str | Path | None) -> Path:
    """Give the store of a run: the named one, the one it lies in, or the one it was trained from.

    Raises:
        NotFoundError: The store it was trained from is gone.
    """
    if store is not None:
        return locate(store)
    around = run.path.parent.parent
    if run.path.parent.name == "runs" and (around / "feature_sets").is_dir():
        return around
    recorded = locate(run.record["store"])
    if not recorded.is_dir():
        raise NotFoundError(
            f"The store of {run.run_id}, {recorded}, is not there. Name it with --store DIR."
        )
    return recorded


def measure_pairs(
    model: Model,
    feed: Feed,
    pairs: Sequence[Pair],
    labels: LabelSource,
    *,
    predict: Predict = predict_pairs,
    progress: ProgressCallback = ignore_progress,
) -> Evaluation:
    """Predict each pair, bring it to the label's resolution and measure it there.

    Raises:
        InvalidInputError: No label can be used, or the task's protocol does not fit them.
    """
    lines: list[dict[str, Any]] = []
    left_out = {pair.key: f"Its {labels.kind} label cannot be read." for pair in pairs}
    sources: set[str] = set()
    n_numbers = model.task.n_outputs * math.prod(model.head.output_hw)
    size = max(1, min(_WINDOW, _WINDOW_NUMBERS // n_numbers))
    for done, window in enumerate(_windows(pairs, labels, size)):
        predictions = predict(model, feed, [pair for pair, _ in window])
        found = measure_window(model.task, feed, window, labels, predictions)
        for (pair, label), result in zip(window, found, strict=True):
            if isinstance(result, str):
                left_out[pair.key] = result
                continue
            del left_out[pair.key]
            sources.add(label.source)
            lines.append({**_pair_columns(pair), **result})
        n_done = min((done + 1) * size, len(pairs))
        progress(Progress(stage="evaluate", done=n_done, total=len(pairs)))
    if not lines:
        reason = next(iter(left_out.values()), "there is none")
        raise InvalidInputError(f"No {labels.kind} label can be measured: {reason}")
    # The order of labels on the disk must not decide the last bits of a sum.
    lines.sort(key=lambda line: (line["row"], line["item"]))
    names = [name for name in lines[0] if name not in _PAIR_COLUMNS]
    stats = [{name: line[name] for name in names} for line in lines]
    groups = [line["group"] for line in lines]
    paths = {pair.key: pair.path for pair in pairs}
    return Evaluation(
        metrics=model.task.summarise(stats, groups),
        per_image=pa.Table.from_pylist(lines),
        left_out={paths[key]: reason for key, reason in sorted(left_out.items())},
        sources=tuple(sorted(sources)),
        n_groups=len(set(groups)),
    )


_PAIR_COLUMNS = ("row", "item", "dataset", "path", "group")


def _pair_columns(pair: Pair) -> dict[str, Any]:
    return {name: getattr(pair, name) for name in _PAIR_COLUMNS}


def labelled(pairs: Sequence[Pair], labels: LabelSource) -> Iterator[tuple[Pair, Label]]:
    """Go through pairs with their labels, in the order in which the labels come."""
    by_item: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        by_item.setdefault((pair.dataset, pair.item), []).append(pair)
    for dataset in sorted({pair.dataset for pair in pairs}):
        items = [item for name, item in by_item if name == dataset]
        for item, label in labels.iterate(dataset, items):
            yield from ((pair, label) for pair in by_item[dataset, item])


def _windows(
    pairs: Sequence[Pair], labels: LabelSource, size: int
) -> Iterator[list[tuple[Pair, Label]]]:
    source = labelled(pairs, labels)
    while window := list(islice(source, size)):
        yield window
