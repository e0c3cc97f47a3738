"""`heads predict`: run a trained head on new images."""

from __future__ import annotations

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
    say,
    say_left_out,
    store_option,
)
from cli.learning_options import token_option
from cli.progress import ProgressLine
from cli.tables import count

if TYPE_CHECKING:
    from heads.predict import Forward
    from heads.runs import Run


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--images",
    "images_paths",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    metavar="PATH",
    help="An image, or a folder of images; repeatable.",
)
@click.option(
    "--out",
    "out_path",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="Where the results go.",
)
@click.option(
    "--weights",
    default=None,
    metavar="FILE|random[:SEED]",
    help="The backbone's weights, where extraction was given some. [default: what it was given]",
)
@click.option(
    "--boxes",
    default=None,
    metavar="FILE|full",
    help="Of keypoints: boxes of the animals, MegaDetector's JSON or one like COCO's; a crop "
    "each. [default: full, an animal a photo]",
)
@click.option(
    "--box-scale",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Side of a crop, in longer sides of the box. [default: that of the images learned from]",
)
@click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="Leave out boxes of a lower score.",
)
@token_option
@click.option(
    "--identity",
    default=None,
    metavar="NAME",
    help="Take the token of one that was trained, in place of --token.",
)
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Images, or animals, at a time.",
)
@store_option
@runs_option
@json_option
def predict(
    run: str,
    images_paths: tuple[Path, ...],
    out_path: Path,
    weights: str | None,
    device: str,
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a trained head on new images. RUN is an id, the start of one, or @last.

    Writes NAME.npy (float32, at the image's own size, in metres for depth) and NAME.png for each
    image. The backbone is loaded once more, by the plan of the run; its weights must be the same.

    Of keypoints, NAME.npy holds x, y and confidence of each animal's, in pixels of the photo, and
    keypoints.json (like COCO's) and keypoints.csv those of all photos.

    \b
    Example:
        heads predict @last --images photos/ --out predictions/
        heads predict @last --images photo.jpg --out out --weights dinov2_b.safetensors
        heads predict @last --images photos/ --out poses/ --boxes megadetector.json
        heads predict @last --images photos/ --out poses/ --token fox.safetensors
    """
    from heads.evaluate import locate_run
    from heads.predict import predict as run_prediction

    store = chosen_store(store_path, runs_path)
    token = options.pop("token")
    said = {**options, **({} if token is None else {"token": token})}
    found = locate_run(run, store=store, runs=runs_path)
    with resumable("Run it again."), ProgressLine() as progress:
        report = run_prediction(
            found,
            images_paths,
            out_path,
            _forward(found, store, weights, device),
            device=device,
            progress=progress,
            **said,
        )
    say_left_out(report.bad)
    if as_json:
        print_json(report.to_json())
    else:
        animals = "" if report.animals is None else f" of {count(report.animals, 'animal')}"
        click.echo(f"Wrote {count(len(report.files), 'file')}{animals} to {report.out}.")
    if report.bad:
        leave(LEFT_OUT)


def _forward(run: Run, store: Path | None, weights: str | None, device: str) -> Forward:
    """Load the run's backbone, with the weights it was extracted with where none are named."""
    from cli.forward import make_forward
    from featstore import open as open_store
    from featstore.errors import NotFoundError
    from heads.evaluate import store_of

    if weights is None:
        try:
            features = open_store(store_of(run, store)).feature_set(run.record["feature_sets"][0])
        except NotFoundError:
            say("The run's store is not there, so the backbone's own weights are tried.")
        else:
            weights = features.provenance.get("weights")
    return make_forward(run.record, weights=weights, device=device)
