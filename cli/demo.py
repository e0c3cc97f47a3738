"""`featstore demo`: the whole way in one command, on a data set that is made on the spot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.common import json_option, print_json, resumable, say
from cli.progress import ProgressLine
from cli.tables import duration, interval, table

if TYPE_CHECKING:
    from featstore.types import Reader
    from heads.report import RunReport

DATA = "rooms:n=500,seed=0"
BACKBONE = "efficientnet_lite0"
STEPS = 250
BATCH_SIZE = 16
LR = 3e-3
SCHEDULE = "cosine"
RESUME = "Run it again: what was extracted is kept."


@click.command()
@click.option(
    "--out",
    "out_path",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Where the store, the runs and the pictures go.",
)
@click.option("--data", default=DATA, show_default=True, help="Images with depth.")
@click.option(
    "--steps", type=click.IntRange(1), default=STEPS, show_default=True, help="Steps a head."
)
@json_option
def demo(out_path: Path, data: str, steps: int, as_json: bool) -> None:
    """Extract, train and compare, to see whether a pretrained backbone is worth it.

    Ray-casts rooms with exact depth, extracts features with an EfficientNet-Lite0 that is
    pretrained and with one that is not, trains the depth head on each, and prints the test error
    of both beside that of predicting the train mean. A few minutes on two cores; no network.

    \b
    Example:
        featstore demo
        featstore demo --out /tmp/demo --data rooms:n=50,seed=3 --steps 100 --json
    """
    start = time.monotonic()
    store_path = out_path / "features.zarr"
    with resumable(RESUME):
        from featstore.datasets import open_dataset

        reader = open_dataset(data)  # one for both, so that no picture is made twice
        runs = {
            "random weights": _train(store_path, reader, steps, weights="random"),
            "pretrained weights": _train(store_path, reader, steps, weights=None),
        }
        results = {"train mean": _train_mean(store_path, runs["pretrained weights"])}
    results |= {name: _rmse_of(run) for name, run in runs.items()}
    seconds = time.monotonic() - start
    pictures = out_path / "features.zarr" / "runs" / runs["pretrained weights"].run_id / "pictures"
    if as_json:
        run_ids = {name: run.run_id for name, run in runs.items()}
        print_json({"rmse": results, "runs": run_ids, "pictures": pictures, "seconds": seconds})
        return
    lines = [[name, interval(*found, unit="m")] for name, found in results.items()]
    click.echo(table(["depth from", "test RMSE [95 % interval]"], lines))
    click.echo(f"\nDone in {duration(seconds)}. Pictures: {pictures}")


def _train(store_path: Path, reader: Reader, steps: int, *, weights: str | None) -> RunReport:
    """Extract with the given weights (None: the pretrained ones) and train the depth head."""
    from featstore.extract import extract
    from heads.train import train

    say(f"Features of {reader.spec} from {BACKBONE}, {weights or 'pretrained'} weights")
    with ProgressLine() as progress:
        report = extract(
            store_path, backbone=BACKBONE, data=[reader], weights=weights, progress=progress
        )
        say(
            f"Depth head on these features, up to {steps} steps (it stops when rooms that it does "
            "not learn from stop getting better)"
        )
        return train(
            store_path,
            task="depth",
            feature_set=report.feature_set,
            steps=steps,
            batch_size=BATCH_SIZE,
            lr=LR,
            options={"schedule": SCHEDULE},
            seed=0,
            progress=progress,
        )


def _train_mean(store_path: Path, run: RunReport) -> tuple[float, float | None, float | None]:
    from heads.reference import measure_train_mean

    metrics = measure_train_mean(run.run_id, store=store_path)
    rmse = next(metric for metric in metrics if metric.name == "rmse")
    return rmse.value, rmse.low, rmse.high


def _rmse_of(run: RunReport) -> tuple[float, float | None, float | None]:
    low, high = run.intervals["rmse"] or (None, None)
    return run.metrics["rmse"], low, high
