"""What a protocol leaves behind: metrics that SQL sees, a line a cell, and the page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from featstore.files import write_bytes, write_parquet
from heads.page import PAGE
from heads.protocol.distances import Distance, identity_distances
from heads.protocol.findings import Findings
from heads.protocol.gathering import Gathered
from heads.protocol.page import page_html
from heads.protocol.plan import MAIN, Plan
from heads.protocol.poses import draw_poses
from heads.protocol.results import Line, Summary, analyse, summarise
from heads.protocol.statistics import Estimate
from heads.report import METRICS_SCHEMA
from heads.runs import METRICS

LINES = "lines.parquet"
OVER_ALL = "all identities"
"""The split under which the metrics stand that are averages over identities."""


def find(gathered: Gathered, about: Mapping[str, Any], *, n_resamples: int) -> Findings:
    """Compare everything that was measured.

    Args:
        gathered: What was measured.
        about: Features and labels, for the page.
        n_resamples: Draws of the bootstrap.
    """
    plan = gathered.plan
    lines, notes = analyse(gathered.cells, n_resamples=n_resamples, seed=plan.seed)
    return Findings(
        plan=plan,
        lines=tuple(lines),
        summaries=tuple(summarise(lines)),
        distances=tuple(_distances(gathered)),
        heads=gathered.heads,
        notes=tuple(notes),
        messages=gathered.messages,
        about=about,
        jitters=gathered.jitters,
        add_jitters=gathered.add_jitters,
    )


def _distances(gathered: Gathered) -> Iterator[Distance]:
    for head in gathered.heads:
        if head.variant == MAIN:
            fold = gathered.plan.folds[head.fold]
            yield from identity_distances(gathered.means, fold, head.training)


def write_reports(
    path: Path, findings: Findings, gathered: Gathered, record: Mapping[str, Any]
) -> Path:
    """Write metrics, lines and page into the folder of a protocol; give the page's path."""
    metrics = [*_line_metrics(findings), *_summary_metrics(findings)]
    write_parquet(path / METRICS, pa.Table.from_pylist(metrics, schema=METRICS_SCHEMA))
    write_parquet(path / LINES, pa.Table.from_pylist([_flat(line) for line in findings.lines]))
    pictures = draw_poses(
        gathered.cells,
        gathered.animals,
        dict(gathered.designs),
        gathered.skeleton,
        findings.headline,
    )
    text = page_html(
        findings,
        run_id=path.name,
        day=f"{datetime.fromisoformat(record['created']):%d %B %Y}".removeprefix("0"),
        command=command_line(findings.plan, record["asked"]),
        pictures=pictures,
    )
    write_bytes(path / PAGE, text.encode())
    return path / PAGE


def command_line(plan: Plan, asked: Mapping[str, Any]) -> str:
    """Write the command that makes such a protocol; what equals a default is left out."""
    defaults = Plan(folds=plan.folds)
    words = ["heads", "protocol", "identity"]
    for fold in plan.folds:
        words += ["--holdout", ",".join(fold)]
    for name, option in _OPTIONS.items():
        value = getattr(plan, name)
        if value != getattr(defaults, name):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [option, text]
    for variant, options in plan.variants.items():
        pairs = ",".join(f"{name}={value}" for name, value in options.items())
        words += ["--variant", f"{variant}:{pairs}"]
    for name, value in asked.items():
        if name == "taps":
            words += [word for tap in value for word in ("--tap", tap)]
        elif name == "options":
            words += [word for key, each in value.items() for word in ("--set", f"{key}={each}")]
        else:
            words += [_ASKED.get(name, f"--{name.replace('_', '-')}"), str(value)]
    return shlex.join(words)


_OPTIONS = {
    "shots": "--shots",
    "modes": "--modes",
    "inits": "--inits",
    "n_seeds": "--seeds",
    "steps": "--steps",
    "lr_factors": "--lr-factors",
    "n_tuning_seeds": "--tuning-seeds",
    "validation": "--validation",
    "seed": "--seed",
}
_ASKED = {"steps": "--train-steps", "seed": "--train-seed"}
"""Options of the training whose names the protocol's own take."""


def _line_metrics(findings: Findings) -> Iterator[dict[str, Any]]:
    for line in findings.lines:
        for name, value in _values(line).items():
            yield {"split": line.identity, "name": f"{_key(line)}/{name}", **value}


def _summary_metrics(findings: Findings) -> Iterator[dict[str, Any]]:
    for one in findings.summaries:
        values = {
            "rmse": one.rmse,
            **one.pck,
            "oks_ap": one.oks_ap,
            **_jittered(one),
            "rmse_reduction_share": one.relative,
            "better": one.n_better,
            "worse": one.n_worse,
            "better_than_nearest": one.n_better_nearest,
            "worse_than_nearest": one.n_worse_nearest,
            "ties": one.n_ties,
            "rmse_ratio": one.ratio,
            "pck_recovery": one.pck_recovery,
            "recovery": one.recovery,
            "identities": len(one.identities),
            "parameters": one.parameters,
        }
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                yield {"split": OVER_ALL, "name": f"{_key(one)}/{name}", "value": float(value)}


def _key(one: Line | Summary) -> str:
    """Name a way as ``variant/mode/init/shots``, for SQL's ``split_part``."""
    way = one.way
    return f"{way.variant}/{way.mode}/{way.init}/{way.shots}"


def _values(line: Line) -> dict[str, dict[str, float | None]]:
    """Give the numbers of a line that are known, with their bounds."""
    if line.error is not None:
        return {}
    single = {"rmse": line.rmse, **(line.pck or {}), "oks_ap": line.oks_ap, **_jittered(line)}
    single["pck_recovery"] = line.pck_recovery
    found = {name: Estimate(value=value, low=None, high=None) for name, value in single.items()
             if value is not None}  # fmt: skip
    if line.against_base is not None:
        found["rmse_reduction"] = line.against_base.reduction
        found["rmse_reduction_share"] = line.against_base.relative
        found["mean_reduction"] = line.against_base.mean_reduction
    if line.against_nearest is not None:
        found["nearest_reduction"] = line.against_nearest.reduction
    if line.pck_gain is not None:
        found["pck_gain"] = line.pck_gain
    if line.against_decoder is not None:
        found["rmse_ratio"] = line.against_decoder.ratio
    if line.recovery is not None:
        found["recovery"] = line.recovery
    return {
        name: {"value": each.value, "low": each.low, "high": each.high}
        for name, each in found.items()
        if math.isfinite(each.value)
    }


def _jittered(one: Line | Summary) -> dict[str, float]:
    return {f"jittered_{name}": value for name, value in (one.jittered or {}).items()}


def _flat(line: Line) -> dict[str, Any]:
    """Give a line as columns."""
    about: dict[str, Any] = {
        "identity": line.identity,
        "variant": line.way.variant,
        "mode": line.way.mode,
        "init": line.way.init,
        "shots": str(line.way.shots),
        "parameters": line.parameters,
        "lr": line.lr,
        "seeds": line.n_seeds,
        "seconds": line.seconds,
        "error": line.error,
    }
    found = _values(line)
    for name in _COLUMNS:
        value = found.get(name, {})
        about[name] = value.get("value")
        about[f"{name}_low"], about[f"{name}_high"] = value.get("low"), value.get("high")
    return about


_COLUMNS = (
    "rmse", "pck@0.05", "pck@0.05u", "pck@0.05box", "oks_ap", "jittered_rmse",
    "jittered_pck@0.05", "rmse_reduction", "rmse_reduction_share", "mean_reduction",
    "nearest_reduction", "pck_gain", "rmse_ratio", "pck_recovery", "recovery",
)  # fmt: skip
