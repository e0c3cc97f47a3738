"""`featstore show`: stored features as colours beside their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from cli.common import json_option, print_json, resumable, store_option


@click.command()
@click.argument("feature_set", required=False, metavar="[FEATURE_SET]")
@click.option(
    "--tap",
    "taps",
    multiple=True,
    metavar="TAP",
    help="Show this dense tap; repeatable. [default: all that are stored]",
)
@click.option(
    "--images",
    "n_images",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="How many images, evenly spread.",
)
@click.option(
    "--where", default=None, metavar="SQL", help="Only rows that fulfil this, like split = 'test'."
)
@click.option(
    "--out",
    "out_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("features.html"),
    show_default=True,
    metavar="FILE",
    help="The page.",
)
@store_option
@json_option
def show(
    feature_set: str | None,
    taps: Sequence[str],
    n_images: int,
    where: str | None,
    out_path: Path,
    store_path: Path,
    as_json: bool,
) -> None:
    """Write one HTML page that shows stored features as colours beside their images.

    Each dense tap is painted by its first three principal components, fitted over all shown
    images together, so that within a tap a colour means the same in each of them. FEATURE_SET is
    a key, the start of one, or a name.

    \b
    Example:
        featstore show
        featstore show dinov2_b@224 --tap block:5 --tap block:11 --images 4 --out taps.html
        featstore show --where "split = 'test'" --json
    """
    from heads.feature_page import write_feature_page

    with resumable("Run it again."):
        report = write_feature_page(
            store_path,
            out_path,
            feature_set=feature_set,
            taps=taps,
            n_images=n_images,
            where=where,
        )
    if as_json:
        print_json(asdict(report))
    else:
        click.echo(f"Wrote {report.path}.")
