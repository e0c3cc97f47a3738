"""`heads train`: train one head from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.common import (
    device_option,
    json_option,
    print_json,
    resumable,
    runs_option,
    store_option,
)
from cli.params import KeyValue
from cli.progress import ProgressLine
from cli.tables import count, duration

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
    help="An option of the head; repeatable. `heads describe HEAD` lists them.",
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
        heads train --task depth --head deap --set mask=paper --json
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
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
    if report.left_out:
        leave(LEFT_OUT)
