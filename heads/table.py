"""The board of finished runs: which may be ranked together, and in which order.

Runs are ranked only where their numbers mean the same: one task with one set of options, measured
by one protocol on the same images with the same labels, of which the backbone saw the same part.
All others stand on a board of their own, with the reason. Runs that differ in nothing but the seed
are one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from featstore.errors import NotFoundError, not_found
from featstore.hashing import short_key
from heads.build import HEADS
from heads.loop import NONE
from heads.options import option_defaults
from heads.tasks import TASKS

BOOTSTRAP, SEEDS, NO_INTERVAL = "95 % interval", "min-max over seeds", "none"
_WHOLE_IMAGE = ("squash", "letterbox", "pad")  # resize rules that leave no part of an image out
_LOOK_ONLY = ("pictures", "metric_images")  # loop options that decide no number
_STORED = "those of the store"
_NAMED = 4  # values named in a reason, at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A finished run as the board needs it."""

    run_id: str
    record: Mapping[str, Any]
    datasets: tuple[str, ...]  # of the measured images
    measured_images: str  # names the set of images that was measured
    trained_images: str  # counts and names those trained on, what was held out included


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A metric: of one run with its interval, or the mean over seeds with their extremes."""

    value: float
    low: float | None
    high: float | None
    kind: str  # "95 % interval", "min-max over seeds" or "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a board: a run, or several that differ in nothing but the seed."""

    rank: int | None  # None: the primary metric is not a number
    backbone: str
    input_hw: tuple[int, int] | None
    taps: tuple[tuple[str, tuple[int, int]], ...]  # name and grid
    backbone_parameters: int | None
    parameters: int
    head: str
    options: Mapping[str, Any]  # of the head, those that are not its defaults
    recipe: Mapping[str, Any]  # what else differs on this board
    seeds: tuple[int, ...]
    steps: tuple[int, int]  # done: the fewest and the most over the seeds
    values: Mapping[str, Value]
    run_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """Lines that may be ranked, best first."""

    task: str
    primary_metric: str
    is_lower_better: bool
    heading: str  # what was measured on what
    facts: Mapping[str, Any]  # what is the same for all of them
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All boards, why they are several, and the runs that stand on none."""

    boards: tuple[Board, ...]
    reasons: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)  # run id to reason


def make_table(entries: Sequence[Entry], *, task: str | None = None) -> Table:
    """Sort runs into boards and rank each.

    Args:
        entries: Finished and measured runs, oldest first.
        task: Only runs of this task; with or without its version.

    Raises:
        NotFoundError: `task` is not known.
    """
    wanted = None if task is None else TASKS.full_name(task)
    groups: dict[str, list[Entry]] = {}
    left_out: dict[str, str] = {}
    for entry in entries:
        name = entry.record["task"]
        if wanted is not None and name != wanted:
            continue
        if name not in TASKS:
            left_out[entry.run_id] = f"Its task {name} is not installed here."
            continue
        groups.setdefault(short_key(_plain(_facts(entry))), []).append(entry)
    boards = []
    for group in groups.values():
        board, repeated = _make_board(group)
        boards.append(board)
        left_out |= repeated
    boards.sort(key=lambda board: (board.task, -len(board.lines)))
    return Table(boards=tuple(boards), reasons=_reasons(boards), left_out=left_out)


def check_metrics(table: Table, names: Iterable[str]) -> None:
    """Refuse a metric that no run of the table has.

    Raises:
        NotFoundError: There is none of that name.
    """
    known = {name for board in table.boards for line in board.lines for name in line.values}
    for name in names:
        if name not in known:
            raise not_found("metric", name, known)


def _facts(entry: Entry) -> dict[str, Any]:
    """Give what must be the same for two runs to be ranked together, in the words of a reason."""
    record = entry.record
    measured, plan = record["measured"], record["plan"] or {}
    protocol = {name: each for name, each in record["protocol"].items() if name != "loss"}
    # A protocol may repeat an option, which a reason should name once.
    options = {n: v for n, v in record["options"]["task"].items() if protocol.get(n) != v}
    resize = plan.get("resize", "not recorded")
    # Where a rule cuts, the input's shape decides which part of each image is measured.
    cut = {} if resize in _WHOLE_IMAGE or not plan else {"cut to": plan["image_size"]}
    return {
        "task": record["task"],
        **{f"option {name}": value for name, value in options.items()},
        "data sets": list(entry.datasets),
        "split": measured["split"],
        "images": measured["images"],
        "set of images": entry.measured_images,
        "labels": record["labels"]["data"] or _STORED,
        "primary metric": measured["primary_metric"],
        "resize": resize,
        **cut,
        **protocol,
    }


def _heading(entry: Entry) -> str:
    """Say in one line what was measured on what."""
    facts, task = _facts(entry), entry.record["task"]
    n_images = f"{facts['images']:,} image{'' if facts['images'] == 1 else 's'}"
    parts = [f"{task} on {', '.join(facts['data sets'])}, {facts['split']} split, {n_images}"]
    chosen = entry.record["options"]["task"]
    parts += [
        f"{n} {_text(v)}"
        for n, v in _other_than(option_defaults(TASKS[task].OPTIONS), chosen).items()
    ]
    parts.append(f"resize {facts['resize']}")
    if facts["labels"] != _STORED:
        parts.append(f"labels {facts['labels']}")
    return "; ".join(parts)


def _recipe(entry: Entry) -> dict[str, Any]:
    """Give what two runs share that differ in nothing but the seed."""
    record, options = entry.record, entry.record["options"]
    train = {name: value for name, value in options["train"].items() if name != "seed"}
    said = {"balance": NONE, **options["loop"]}  # runs of before there was a choice have none
    loop = {name: value for name, value in said.items() if name not in _LOOK_ONLY}
    return {
        **train,
        **loop,
        "optimizer": record["training"]["optimizer"],
        "trained on": entry.trained_images,
    }


def _recipe_key(entry: Entry) -> str:
    record = entry.record
    chosen = (record["head"], record["options"]["head"], record["feature_sets"], record["taps"])
    return short_key(_plain([*chosen, record["normed_taps"], _recipe(entry)]))


def _make_board(entries: Sequence[Entry]) -> tuple[Board, dict[str, str]]:
    """Rank the runs of one board; those repeated with the same seed are given with a reason."""
    first = entries[0].record
    lower = TASKS[first["task"]].is_lower_better
    primary = first["measured"]["primary_metric"]
    groups: dict[str, dict[int, Entry]] = {}
    repeated: dict[str, str] = {}
    for entry in entries:
        of_seed = groups.setdefault(_recipe_key(entry), {})
        seed = entry.record["seed"]
        if seed in of_seed:
            repeated[of_seed[seed].run_id] = f"{entry.run_id} repeats it and is newer."
        of_seed[seed] = entry
    shown = _varying([_recipe(next(iter(group.values()))) for group in groups.values()])
    names = _backbone_names(entries)
    unsorted = [
        _make_line([group[seed] for seed in sorted(group)], names, recipe)
        for group, recipe in zip(groups.values(), shown, strict=True)
    ]
    lines = _ranked(unsorted, primary, is_lower_better=lower)
    board = Board(
        task=first["task"],
        primary_metric=primary,
        is_lower_better=lower,
        heading=_heading(entries[0]),
        facts=_facts(entries[0]),
        lines=lines,
    )
    return board, repeated


def _make_line(
    entries: Sequence[Entry], names: Mapping[str, str], recipe: Mapping[str, Any]
) -> Line:
    """Make one line of the runs of one recipe, in the order of their seeds."""
    record = entries[0].record
    steps = [entry.record["steps"] for entry in entries]
    plan = record["plan"]
    return Line(
        rank=None,
        backbone=names[record["feature_sets"][0]],
        input_hw=None if plan is None else (plan["image_size"][0], plan["image_size"][1]),
        taps=tuple((s["tap"], (s["grid"][0], s["grid"][1])) for s in record["tap_shapes"]),
        backbone_parameters=record["backbone"].get("n_parameters"),
        parameters=record["parameters"],
        head=record["head"],
        options=_head_options(record),
        recipe=recipe,
        seeds=tuple(entry.record["seed"] for entry in entries),
        steps=(min(steps), max(steps)),
        values={
            name: _value([entry.record["measured"] for entry in entries], name)
            for name in record["measured"]["metrics"]
        },
        run_ids=tuple(entry.run_id for entry in entries),
    )


def _value(measured: Sequence[Mapping[str, Any]], name: str) -> Value:
    """Give one run's metric with its interval, or the mean over seeds with their extremes."""
    values = [_number(each["metrics"].get(name)) for each in measured]
    if len(values) > 1:
        low, high = min(values), max(values)
        return Value(value=sum(values) / len(values), low=low, high=high, kind=SEEDS)
    bounds = measured[0]["intervals"].get(name)
    if bounds is None:
        return Value(value=values[0], low=None, high=None, kind=NO_INTERVAL)
    return Value(value=values[0], low=bounds[0], high=bounds[1], kind=BOOTSTRAP)


def _ranked(lines: Sequence[Line], primary: str, *, is_lower_better: bool) -> tuple[Line, ...]:
    """Sort best first; what is not a number stands last, without a rank."""
    sign = 1 if is_lower_better else -1

    def order(line: Line) -> tuple[bool, float, int]:
        value = line.values[primary].value
        if not math.isfinite(value):
            return True, 0.0, line.parameters
        return False, sign * value, line.parameters  # of equals the smaller head first

    ordered = sorted(lines, key=order)
    return tuple(
        replace(line, rank=number if math.isfinite(line.values[primary].value) else None)
        for number, line in enumerate(ordered, start=1)
    )


def _head_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the options that neither the head nor its task fills in; all where it is not here."""
    options = record["options"]["head"]
    try:
        kind, stage = HEADS[record["head"]], TASKS[record["task"]].stage
    except NotFoundError:
        return dict(options)
    return _other_than(kind.completed(option_defaults(kind.OPTIONS), stage=stage), options)


def _other_than(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in options.items() if n not in defaults or defaults[n] != v}


def _backbone_names(entries: Sequence[Entry]) -> dict[str, str]:
    """Name each feature set by its backbone, by more than that where two would look alike."""
    looks: dict[str, tuple[str, Any]] = {}
    for entry in entries:
        record = entry.record
        backbone, plan = record["backbone"], record["plan"] or {}
        name = backbone.get("name") or record["feature_set_names"][0]
        tag = str(backbone.get("tag", ""))
        label = f"{name} ({tag})" if tag.startswith("random") else name
        looks[record["feature_sets"][0]] = (label, plan.get("image_size"))
    alike = [look for look in looks.values() if list(looks.values()).count(look) > 1]
    return {
        key: f"{label} [{key[:6]}]" if (label, size) in alike else label
        for key, (label, size) in looks.items()
    }


def _varying(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keep of each recipe what is not the same in all of them."""
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    differing = [
        name for name in names if len({short_key(_plain(each.get(name))) for each in recipes}) > 1
    ]
    return [{name: recipe.get(name) for name in differing} for recipe in recipes]


def _reasons(boards: Sequence[Board]) -> tuple[str, ...]:
    """Say of each board after the first why it is not ranked with the nearest one before it."""
    found = []
    for number in range(1, len(boards)):
        differences = [_differences(other.facts, boards[number].facts) for other in boards[:number]]
        nearest = min(range(number), key=lambda index: len(differences[index]))
        found.append(
            f"Board {number + 1} is not ranked with board {nearest + 1}: they differ in "
            f"{'; '.join(differences[nearest])}."
        )
    return tuple(found)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    if one["task"] != other["task"]:
        return [f"task ({one['task']}, {other['task']})"]
    names = dict.fromkeys((*one, *other))
    differing = [name for name in names if one.get(name) != other.get(name)]
    # Its digest tells nothing to a reader where the data sets or the count say it already.
    if {"data sets", "split", "images"} & set(differing):
        differing = [name for name in differing if name != "set of images"]
    return [_difference(name, one, other) for name in differing]


def _difference(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if name == "set of images":
        return "which images (as many)"
    return f"{name} ({_text(one.get(name))}, {_text(other.get(name))})"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        texts = [_text(each) for each in value]
        more = [] if len(texts) <= _NAMED else [f"{len(texts) - _NAMED} more"]
        return " + ".join([*texts[:_NAMED], *more])
    return "none" if value is None else str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    """Make values of a record fit for `short_key`, which refuses NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
