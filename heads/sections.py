"""The parts of a run's page, as HTML: each is a function of what the run recorded."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from featstore.registry import short_name
from heads.showcase import Scored, Showcase
from heads.svg import Mark, Series, histogram, line_chart, smooth
from heads.tasks import Task

Record = Mapping[str, Any]
_ARROWS = {True: "↓", False: "↑"}
_ARROW_WORDS = {True: "lower is better", False: "higher is better"}
_DEFAULT_COMMAND = {"head": "deap", "tap_norm": "final", "split": "train", "val_fraction": 0.1}
_LEFT_OUT_NAMED = 10
_METRICS_SHOWN = 16  # the rest, such as one a class, is folded away


def title(record: Record) -> str:
    """Name the page."""
    return escape(f"{record['run_id']}: {short_name(record['head'])} on {_backbone(record)}")


def over(record: Record) -> str:
    """Give the small line above the heading: task and day."""
    day = record.get("created")
    when = "" if day is None else f" · {datetime.fromisoformat(day):%d %B %Y}".replace(" 0", " ")
    return escape(f"{record['task']}{when}")


def heading(record: Record) -> str:
    """Give the heading: head and backbone."""
    return f"{escape(short_name(record['head']))} on {escape(_backbone(record))}"


def lead(record: Record) -> str:
    """Say which taps were read and what was learned from and measured."""
    images, measured = record["images"], record["measured"]
    text = f"Reads {_taps(record)}. Learned from {images['train']:,} images"
    held_out = f", {images['val']:,} held out" if images["val"] else ""
    if measured is None:
        return escape(f"{text}{held_out}; not measured.")
    groups = (
        f" in {measured['groups']:,} groups" if measured["groups"] != measured["images"] else ""
    )
    where = f"{measured['images']:,} of the {measured['split']} split{groups}"
    return escape(f"{text}{held_out}; measured on {where}.")


def score(record: Record, task: Task) -> str:
    """Give the primary metric with its interval, in large."""
    measured = record["measured"]
    if measured is None:
        return ""
    name = measured["primary_metric"]
    words = _ARROW_WORDS[task.is_lower_better]
    bounds = _bounds(measured["intervals"].get(name))
    return (
        f'<div class="score"><span>{escape(name)}, {words}</span>'
        f"<b>{_number(measured['metrics'][name])}</b><span>{bounds or 'no interval'}</span></div>"
    )


def facts(record: Record) -> str:
    """Give the numbers one looks for first."""
    stopped = ", stopped early" if record["is_stopped_early"] else ""
    found = {
        "Parameters of the head": f"{record['parameters']:,}",
        "Input": _size(record),
        "Steps": f"{record['steps']:,}{stopped}",
        "Best step": f"{record['best_step']:,}",
        "Trained for": f"{record['seconds']:.0f} s on {record['device']}",
        "Seed": str(record["seed"]),
    }
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in found.items()
        if value
    )


def metrics(record: Record, task: Task, scored: Sequence[Scored]) -> str:
    """Give all metrics with their intervals, and how the images spread."""
    measured = record["measured"]
    if measured is None:
        return ""
    primary = measured["primary_metric"]
    names = sorted(measured["metrics"], key=lambda each: each != primary)
    table = _metric_table(measured, names[:_METRICS_SHOWN], task)
    if names[_METRICS_SHOWN:]:
        more = _metric_table(measured, names[_METRICS_SHOWN:], task)
        n_more = len(names) - _METRICS_SHOWN
        table += f"<details><summary>{n_more} more</summary>{more}</details>"
    note = f'<p class="note">{escape(measured["note"])}</p>'
    spread = f"<div>{_spread(primary, scored)}</div>" if len(scored) > 1 else ""
    return f'<h2>Metrics</h2><div class="pair"><div>{table}{note}</div>{spread}</div>'


def _metric_table(measured: Mapping[str, Any], names: Sequence[str], task: Task) -> str:
    rows = []
    for name in names:
        is_primary = name == measured["primary_metric"]
        arrow = f" {_ARROWS[task.is_lower_better]}" if is_primary else ""
        cells = (
            f"<td>{escape(name)}{arrow}</td>",
            f'<td class="number">{_number(measured["metrics"][name])}</td>',
            f'<td class="number">{_bounds(measured["intervals"].get(name), words=False)}</td>',
        )
        mark = ' class="first"' if is_primary else ""
        rows.append(f"<tr{mark}>{''.join(cells)}</tr>")
    titles = (
        "<th>metric</th>",
        *(f'<th class="number">{t}</th>' for t in ("value", "95 % interval")),
    )
    return f"<table><tr>{''.join(titles)}</tr>{''.join(rows)}</table>"


def curves(record: Record, lines: Sequence[Mapping[str, Any]]) -> str:
    """Draw loss and metric over the steps of the training."""
    found: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for line in lines:
        steps, values = found.setdefault((line["split"], line["name"]), ([], []))
        steps.append(line["step"])
        values.append(line["value"])
    marks = (
        [Mark(x=record["best_step"], name="best step")] if record["best_loss"] is not None else []
    )
    charts = [_loss_chart(found, marks)]
    for (split, name), (steps, values) in found.items():
        if split == "val" and name != "loss":
            one = Series(name=name, x=steps, y=values, style="held-out")
            chart = line_chart([one], title=f"{name} over steps", marks=marks)
            legend = _legend({"held-out": f"on {_some(record)} held-out images"})
            charts.append(f"<div><h3>{escape(name)}, held out</h3>{chart}{legend}</div>")
    return f'<h2>Training</h2><div class="pair">{"".join(charts)}</div>'


def gallery(task: Task, showcase: Showcase) -> str:
    """Show pictures, group by group, with the score of each."""
    note = f'<p class="note">{escape(showcase.note)}</p>' if showcase.note else ""
    parts = []
    for name, pictures in showcase.pictures.items():
        shown = []
        for one in pictures:
            data = base64.b64encode(one.png).decode()
            number = (
                ""
                if one.score is None
                else (f"<b>{escape(task.primary_metric)} {_number(one.score)}</b> · ")
            )
            shown.append(
                f'<figure><div class="plate"><img alt="{escape(one.path)}" '
                f'src="data:image/png;base64,{data}"></div>'
                f"<figcaption>{number}{escape(one.path)}</figcaption></figure>"
            )
        parts.append(
            f'<h3>{escape(name.capitalize())}</h3><div class="pictures">{"".join(shown)}</div>'
        )
    return f"<h2>Images</h2>{note}{''.join(parts)}" if parts or note else ""


def configuration(record: Record) -> str:
    """List the options of head and task, and the recipe."""
    options, training = record["options"], record["training"]
    recipe = {**{n: v for n, v in training.items() if n != "loop"}, **training["loop"]}
    left = _keys({f"Head {record['head']}": None, **options["head"]})
    task = _keys({f"Task {record['task']}": None, **options["task"], **record.get("protocol", {})})
    right = _keys({"Recipe": None, **recipe, "held out": _held_out(record["validation"])})
    columns = f"<div>{left}<br>{task}</div><div>{right}</div>"
    return f'<h2>Configuration</h2><div class="pair">{columns}</div>'


def provenance(record: Record) -> str:
    """Say what all of it came from: command, features, weights, versions, what was left out."""
    features = {
        "Features": None,
        "feature set": f"{record['feature_set_names'][0]} ({record['feature_sets'][0]})",
        "weights sha256": record["weights_sha256"],
        "labels": record["labels"]["data"] or "of the store",
        "store": record["store"],
        **(record["plan"] or {"plan": "imported features have none"}),
    }
    features.pop("weights_sha256", None)
    versions = {"Run": None, "id": record["run_id"], "created": record.get("created")}
    versions |= record["versions"]
    left_out = list(record["left_out"].items())
    versions["images left out"] = len(left_out)
    named = "".join(
        f"<li>{escape(path)}: {escape(reason)}</li>" for path, reason in left_out[:_LEFT_OUT_NAMED]
    )
    more = f'<h3>Left out</h3><ul class="note">{named}</ul>' if named else ""
    return (
        f"<h2>Provenance</h2><pre>{escape(command_line(record))}</pre>"
        f'<div class="pair"><div>{_keys(features)}</div><div>{_keys(versions)}{more}</div></div>'
    )


def command_line(record: Record) -> str:
    """Write the command that trains such a run; what equals a default is left out."""
    asked = record["command"]
    # A preset's values take the place of the defaults, so that all of them are written.
    defaults = _DEFAULT_COMMAND if asked.get("preset") is None else {}
    words = ["heads", "train"]
    # What a reader looks for first; a record's own order is that of the alphabet.
    for name in sorted(asked, key=lambda each: (each != "task", each != "head", each)):
        value = asked[name]
        if name in ("taps", "options", "holdout") or value is None or value == defaults.get(name):
            continue
        if name == "seed" and value == 0:
            continue
        words += [f"--{name.replace('_', '-')}", str(value)]
    if asked.get("holdout"):
        words += ["--holdout-species", ",".join(asked["holdout"])]
    for tap in asked["taps"]:
        words += ["--tap", tap]
    for name, value in asked["options"].items():
        words += ["--set", f"{name}={value}"]
    return shlex.join(words)


def _loss_chart(
    found: Mapping[tuple[str, str], tuple[list[int], list[float]]], marks: Sequence[Mark]
) -> str:
    series, names = [], {}
    steps, values = found.get(("train", "loss"), ([], []))
    if steps:
        series.append(Series(name="each step", x=steps, y=values, style="faint"))
        window = max(1, len(steps) // 25)
        mean = smooth(values, window)
        series.append(Series(name="train", x=steps, y=mean, style="train"))
        names["train"] = "learned from" + (f" (mean of {window} steps)" if window > 1 else "")
    steps, values = found.get(("val", "loss"), ([], []))
    if steps:
        series.append(Series(name="held out", x=steps, y=values, style="held-out"))
        names["held-out"] = "held out"
    if not series:
        return ""
    chart = line_chart(series, title="loss over steps", marks=marks)
    return f"<div><h3>loss</h3>{chart}{_legend(names)}</div>"


def _legend(names: Mapping[str, str]) -> str:
    shown = "".join(
        f'<span><i class="{style}"></i>{escape(text)}</span>' for style, text in names.items()
    )
    return f'<div class="legend">{shown}</div>'


def _spread(primary: str, scored: Sequence[Scored]) -> str:
    values = [one.score for one in scored]
    middle = sorted(values)[len(values) // 2]
    chart = histogram(
        values,
        title=f"{primary} of single images",
        marks=[Mark(x=middle, name=f"median {_number(middle)}")],
    )
    return f"<h3>{escape(primary)} of single images</h3>{chart}"


def _keys(values: Mapping[str, Any]) -> str:
    """Write names and values in two columns; a value of None makes its name the first's title."""
    (name, _), *rest = values.items()
    rows = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{escape(_text(value))}</td></tr>"
        for key, value in rest
    )
    return f'<h3>{escape(name)}</h3><table class="keys">{rows}</table>'


def _held_out(validation: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in validation.items())


def _some(record: Record) -> int:
    return int(min(record["options"]["loop"]["metric_images"], record["images"]["val"]))


def _bounds(bounds: Sequence[float] | None, *, words: bool = True) -> str:
    if bounds is None or any(each is None or not math.isfinite(each) for each in bounds):
        return "" if words else "-"
    text = f"{_number(bounds[0])} to {_number(bounds[1])}"
    return f"95 % interval {text}" if words else text


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(_text(each) for each in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _backbone(record: Record) -> str:
    backbone = record["backbone"]
    name = backbone.get("name") or record["feature_set_names"][0]
    tag = str(backbone.get("tag", ""))
    return f"{name}, {tag} weights" if tag.startswith("random") else str(name)


def _size(record: Record) -> str:
    plan = record["plan"]
    if plan is None:
        return ""
    return f"{plan['image_size'][0]} × {plan['image_size'][1]} px, {plan['resize']}"


def _taps(record: Record) -> str:
    shapes = record["tap_shapes"]
    shown = [f"{s['tap']} ({s['grid'][0]} × {s['grid'][1]} tokens of {s['dim']})" for s in shapes]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if shown[1:] else shown)
