"""`heads evaluate`, `heads ls` and `heads rm`: what to do with trained runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    LEFT_OUT,
    chosen_store,
    device_option,
    json_option,
    leave,
    print_json,
    resumable,
    runs_option,
    say_left_out,
    store_option,
)
from cli.learning_options import queries_option, token_option
from cli.progress import ProgressLine
from cli.tables import count, interval, metrics, table

if TYPE_CHECKING:
    from heads.evaluate import EvaluationReport
    from heads.runs import Run

run_argument = click.argument("run", metavar="RUN")


@click.command()
@run_argument
@click.option("--split", default="test", show_default=True, help="Split to measure on.")
@click.option(
    "--data",
    default=None,
    metavar="[NAME=]FORMAT:PATH",
    help="Take labels from here, joined to stored rows by the image.",
)
@queries_option
@click.option(
    "--against",
    "baseline",
    type=click.Choice(["knn", "ridge"]),
    default=None,
    help="Measure this in place of the head, fitted to the run's training images.",
)
@click.option(
    "--feature-set",
    default=None,
    metavar="KEY|NAME",
    help="Measure on other features of the same backbone, such as those of larger images. "
    "[default: those it learned from]",
)
@click.option(
    "--view",
    default=None,
    metavar="VIEW",
    help="Measure in this stored view, such as jitter:0:0, worse boxes. [default: plain]",
)
@click.option(
    "--tta",
    type=click.Choice(["hflip"]),
    default=None,
    help="Average each prediction with that of the stored mirror image, turned back.",
)
@token_option
@click.option(
    "--identity",
    default=None,
    metavar="NAME",
    help="Measure on images of this label alone, from the store's split, held out or not. "
    "[default: that of the token file, else all]",
)
@click.option(
    "--with-support",
    is_flag=True,
    default=None,
    help="Measure on images too that the token of --token FILE has learned from.",
)
@device_option
@store_option
@runs_option
@json_option
def evaluate(
    run: str,
    baseline: str | None,
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the best head of a run again. RUN is an id, the start of one, or @last.

    Metrics are computed at the labels' own resolution; intervals are 95 % and resample whole
    groups (scenes, videos, individuals). train, val and test mean the parts that the run used.

    --against knn and --against ridge tell what the same stored tokens give without training, for
    classification, depth, distance and segmentation: the vote of the nearest training tokens by
    cosine, or a linear map solved in closed form.

    \b
    Example:
        heads evaluate @last
        heads evaluate @last --split val --json
        heads evaluate @last --queries 112
        heads evaluate @last --against ridge
        heads evaluate @last --feature-set dinov2_b@480x640
        heads evaluate @last --tta hflip
        heads evaluate @last --view jitter:0:0
        heads evaluate @last --split all --token fox.safetensors
        heads evaluate @last --split all --token mean --identity fox
    """
    store = chosen_store(store_path, runs_path)
    with resumable("Nothing was changed."), ProgressLine() as progress:
        place: dict[str, Any] = {"store": store, "runs": runs_path, "progress": progress}
        report = _measure(run, baseline, {**place, **options})
    say_left_out(report.left_out)
    if as_json:
        print_json(report.to_json())
    else:
        answers = "" if baseline is None else f"{baseline} in place of the head of "
        whom = f" of {report.identity}" if report.identity else ""
        token = "" if report.token == "own" else f", token {report.token}"
        averaged = f", averaged over {report.tta}" if report.tta else ""
        view = "" if report.view == "plain" else f", view {report.view}"
        images = f"{count(report.images, 'image')}{whom} of {report.split}{token}{view}{averaged}"
        click.echo(f"{answers}{report.run_id}, {images}\n")
        if report.support:
            n_support = count(report.support, "image")
            click.echo(f"Left out: {n_support} that the token has learned from.\n")
        click.echo(metrics(report.metrics, report.intervals))
        click.echo(report.note)
    if report.left_out:
        leave(LEFT_OUT)


def _measure(run: str, baseline: str | None, options: dict[str, Any]) -> EvaluationReport:
    if baseline is None:
        from heads.evaluate import evaluate as measure

        return measure(run, **{name: v for name, v in options.items() if v is not None})
    for name in ("queries", "feature_set", "view", "tta", "token", "identity", "with_support"):
        if options.pop(name) is not None:
            raise click.UsageError(
                f"--{name.replace('_', '-')} asks a head; leave it out with --against."
            )
    options.pop("device")  # a baseline computes on the processor
    from heads.reference import evaluate_baseline

    return evaluate_baseline(run, baseline, **options)


@click.command()
@store_option
@runs_option
@json_option
def ls(store_path: Path, runs_path: Path | None, as_json: bool) -> None:
    """List the runs of a store, oldest first.

    \b
    Example:
        heads ls
        heads ls --store features.zarr --json
    """
    from heads.runs import list_runs

    found = list_runs(store_path, runs=runs_path)
    if as_json:
        print_json({"runs": [{**run.record, "status": run.status} for run in found]})
        return
    columns = ["run", "status", "features", "taps", "steps", "measured"]
    click.echo(table(columns, [_run_row(run) for run in found]))


@click.command()
@run_argument
@store_option
@runs_option
@json_option
def rm(run: str, store_path: Path, runs_path: Path | None, as_json: bool) -> None:
    """Delete a run. RUN is an id, the start of one, or @last.

    \b
    Example:
        heads rm @last
        heads rm deap-depth-20260101-120000-0a1b
    """
    from heads.runs import remove_run

    run_id = remove_run(store_path, run, runs=runs_path)
    if as_json:
        print_json({"removed": run_id})
    else:
        click.echo(f"Removed {run_id}.")


def _run_row(run: Run) -> list[Any]:
    record = run.record
    measured = record.get("measured")  # absent until the run is done
    return [
        run.run_id,
        run.status,
        ", ".join(record["feature_set_names"]),
        ", ".join(record["taps"]),
        record.get("steps"),
        None if measured is None else _measured_text(measured),
    ]


def _measured_text(measured: Mapping[str, Any]) -> str:
    name = measured["primary_metric"]
    low, high = measured["intervals"][name] or (None, None)
    return f"{measured['split']} {name} {interval(measured['metrics'][name], low, high)}"
