"""`heads train`: train one head from a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    FAILED,
    LEFT_OUT,
    device_option,
    is_said,
    json_option,
    leave,
    print_json,
    resumable,
    runs_option,
    say,
    say_left_out,
    store_option,
)
from cli.learning_options import (
    backbone_option,
    batch_size_option,
    cache_option,
    data_option,
    feature_set_option,
    holdout_option,
    lr_option,
    seed_option,
    set_option,
    split_option,
    steps_option,
    tap_norm_option,
    val_fraction_option,
)
from cli.params import KeyValues
from cli.presets_command import complete_preset
from cli.progress import ProgressLine
from cli.tables import count, duration, facts, interval, metrics, table

if TYPE_CHECKING:
    from heads.report import RunReport
    from heads.train import SweepReport

RESUME = "No run was begun yet; start it again."  # later on, the library says how to resume


@click.command()
@click.option(
    "--preset",
    default=None,
    metavar="NAME",
    shell_complete=complete_preset,
    help="Repeat an experiment of a paper, see `heads presets`; options that are given win.",
)
@click.option("--task", default=None, metavar="TASK", help="What to learn, such as depth.")
@click.option("--head", default="deap", show_default=True, metavar="HEAD", help="Which head.")
@feature_set_option
@backbone_option
@click.option(
    "--tap",
    "taps",
    multiple=True,
    metavar="TAP",
    help="What the head reads; repeatable. [default: the head's choice]",
)
@tap_norm_option
@split_option
@val_fraction_option("to stop early")
@steps_option
@click.option("--epochs", type=click.IntRange(1), default=None, help="Passes instead of steps.")
@batch_size_option
@lr_option
@click.option(
    "--weight-decay",
    type=click.FloatRange(0),
    default=None,
    help="Of AdamW; by default the task's.",
)
@seed_option
@device_option
@click.option("--resume", default=None, metavar="RUN", help="Go on with an interrupted run.")
@data_option
@holdout_option
@set_option("the head, the task or the training loop")
@click.option(
    "--sweep",
    type=KeyValues(),
    multiple=True,
    help="Train one head for each value, side by side; repeatable, for every combination. Takes "
    "what --set takes, and lr, tap, head, seed and the like.",
)
@cache_option
@store_option
@runs_option
@json_option
def train(store_path: Path, runs_path: Path | None, as_json: bool, **options: Any) -> None:
    """Train a head on stored activations and measure it on the test split.

    The best checkpoint on the held-out part is kept. A run folder holds the head, its metrics
    with 95 % intervals, curves and pictures.

    \b
    Example:
        heads train --task depth
        heads train --task depth --tap block:8 --steps 600 --batch-size 16 --seed 1
        heads train --task depth --head deap --set mask_form=paper --json
        heads train --task depth --sweep lr=1e-3,3e-4 --sweep mask_form=code,paper
        heads train --task pose --head identity_token --holdout-species fox,rabbit
        heads train --preset deap-voc
        heads train --preset deap-nyu@paper --lr 5e-4 --seed 1
        heads train --resume @last
    """
    sweep = options.pop("sweep")
    settings = options.pop("settings")
    # What was not said is left to the preset, else to the library, whose defaults the help shows.
    options = {name: value for name, value in options.items() if is_said(name)}
    options["options"] = dict(settings)
    place: dict[str, Any] = {"runs": runs_path}
    place |= {name: options.pop(name) for name in ("device", "cache") if name in options}
    if sweep:
        _sweep(store_path, sweep, options, place, as_json=as_json)
        return
    from heads.train import train as run_training

    with resumable(RESUME), ProgressLine() as progress:
        report = run_training(store_path, progress=progress, **place, **options)
    say_left_out(report.left_out)
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
    if report.left_out:
        leave(LEFT_OUT)


def _sweep(
    store_path: Path,
    sweep: Sequence[tuple[str, Sequence[str]]],
    options: dict[str, Any],
    place: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Train every combination and show them, the best on the held-out part marked."""
    from heads.sweep import expand_sweep
    from heads.train import train_many

    if options.pop("resume", None) is not None:
        raise click.UsageError("--resume goes on with one run; leave out --sweep.")
    configs = expand_sweep(options, sweep)
    with resumable(RESUME), ProgressLine() as progress:
        report = train_many(
            store_path, [config for _, config in configs], progress=progress, **place
        )
    swept = [values for values, _ in configs]
    if as_json:
        runs = [
            {"swept": values, "error": error, **(run.to_json() if run else {})}
            for values, run, error in zip(swept, report.runs, report.errors, strict=True)
        ]
        best = None if report.best is None else report.runs[report.best]
        print_json({"runs": runs, "best": best.run_id if best else None, "passes": report.n_passes})
    else:
        _show_sweep(swept, report)
    for values, error in zip(swept, report.errors, strict=True):
        if error is not None:
            say(f"{', '.join(f'{name}={value}' for name, value in values.items())}: {error}")
    if any(report.errors):
        leave(FAILED)
    if any(run.left_out for run in report.runs if run is not None):
        leave(LEFT_OUT)


def _show_sweep(swept: Sequence[dict[str, str]], report: SweepReport) -> None:
    done = next((run for run in report.runs if run is not None), None)
    name = next(iter(done.metrics), "") if done else ""
    lines: list[list[Any]] = []
    for number, (values, run) in enumerate(zip(swept, report.runs, strict=True)):
        if run is None:
            lines.append(["failed", *values.values(), None, None, ""])
            continue
        low, high = run.intervals.get(name) or (None, None)
        measured = interval(run.metrics[name], low, high) if run.metrics else None
        mark = "best" if number == report.best else ""
        lines.append([run.run_id, *values.values(), run.best_loss, measured, mark])
    split = done.split if done else ""
    click.echo(table(["run", *swept[0], "held-out loss", f"{split} {name}".strip(), ""], lines))
    if report.best is not None:
        click.echo("best: the lowest loss on the held-out part; the test split does not choose.")


def _show(report: RunReport) -> None:
    shown = {
        "run": report.run_id,
        "head": f"{report.head} on {', '.join(report.taps)} ({report.parameters:,} parameters)",
        "steps": f"{report.steps:,}, the best at {report.best_step:,}",
        "time": duration(report.seconds),
    }
    click.echo(facts(shown))
    gate = report.learned.get("gate")
    if gate:
        maps = [f"map {number}" for number in range(len(next(iter(gate.values()))))]
        click.echo(f"\n{table(['tap', *maps], [[tap, *values] for tap, values in gate.items()])}")
    if report.metrics:
        click.echo(f"\n{count(report.images, 'image')} of {report.split}")
        click.echo(metrics(report.metrics, report.intervals))
        click.echo(report.note)
    if report.pictures:
        click.echo(f"\nPictures: {Path(report.pictures[0]).parent}")
