"""`heads train`: train one head from a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    LEFT_OUT,
    MAX_LISTED,
    device_option,
    json_option,
    leave,
    print_json,
    resumable,
    runs_option,
    say,
    store_option,
)
from cli.params import KeyValue
from cli.progress import ProgressLine
from cli.tables import count, duration, facts, metrics

if TYPE_CHECKING:
    from heads.train import RunReport

RESUME = "The last checkpoint is kept; go on with `heads train --resume @last` and the same store."


@click.command()
@click.option("--task", default=None, metavar="TASK", help="What to learn, such as depth.")
@click.option("--head", default="deap", show_default=True, metavar="HEAD", help="Which head.")
@click.option(
    "--feature-set",
    default=None,
    metavar="KEY|NAME",
    help="Which features, where the store has several: a key, the start of one, or a name.",
)
@click.option(
    "--backbone", default=None, metavar="NAME", help="Choose the feature set by its backbone."
)
@click.option(
    "--tap",
    "taps",
    multiple=True,
    metavar="TAP",
    help="What the head reads; repeatable. [default: the head's choice]",
)
@click.option(
    "--tap-norm",
    type=click.Choice(["final", "none"]),
    default="final",
    show_default=True,
    help="Apply the backbone's final norm to raw block outputs, or nothing.",
)
@click.option("--split", default="train", show_default=True, help="Split to learn from.")
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Part of it that is held out, whole groups at a time, to stop early.",
)
@click.option("--steps", type=click.IntRange(1), default=None, help="Optimizer steps.")
@click.option("--epochs", type=click.IntRange(1), default=None, help="Passes instead of steps.")
@click.option("--batch-size", type=click.IntRange(1), default=None, help="Images a step.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=None, help="Learning rate.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@device_option
@click.option("--resume", default=None, metavar="RUN", help="Go on with an interrupted run.")
@click.option(
    "--data",
    default=None,
    metavar="[NAME=]FORMAT:PATH",
    help="Take labels from here, joined to stored rows by the image.",
)
@click.option(
    "--set",
    "settings",
    type=KeyValue(),
    multiple=True,
    help="An option of the head, the task or the training loop; repeatable.",
)
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
        heads train --resume @last
    """
    from heads.train import train as run_training

    with resumable(RESUME), ProgressLine() as progress:
        report = run_training(
            store_path,
            runs=runs_path,
            options=dict(options.pop("settings")),
            progress=progress,
            **options,
        )
    for path, reason in list(report.left_out.items())[:MAX_LISTED]:
        say(f"Left out {path}: {reason}")
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
    if report.left_out:
        leave(LEFT_OUT)


def _show(report: RunReport) -> None:
    shown = {
        "run": report.run_id,
        "head": f"{report.head} on {', '.join(report.taps)} ({report.parameters:,} parameters)",
        "steps": f"{report.steps:,}, the best at {report.best_step:,}",
        "time": duration(report.seconds),
    }
    click.echo(facts(shown))
    if report.metrics:
        click.echo(f"\n{count(report.images, 'image')} of {report.split}")
        click.echo(metrics(report.metrics, report.intervals))
        click.echo(report.note)
    if report.pictures:
        click.echo(f"\nPictures: {Path(report.pictures[0]).parent}")
