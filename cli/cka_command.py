"""`featstore cka`: how alike the layers of a backbone are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.common import json_option, print_json, resumable, store_option
from cli.learning_options import compared_taps_option
from cli.progress import ProgressLine
from cli.tables import count, table

if TYPE_CHECKING:
    from heads.boundary import Proposal
    from heads.cka import LayerCka


@click.command()
@click.argument("feature_set", required=False, metavar="[FEATURE_SET]")
@compared_taps_option
@click.option(
    "--samples",
    type=click.Choice(["images", "tokens"]),
    default="images",
    show_default=True,
    help="What is compared: the mean token of each image, or 16 tokens of each.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(8),
    default=256,
    show_default=True,
    help="Samples of a mini-batch; more than there are gives the exact number.",
)
@click.option(
    "--tap-norm",
    type=click.Choice(["none", "final"]),
    default="none",
    show_default=True,
    help="Compare block outputs as stored, or after the backbone's final norm.",
)
@click.option(
    "--where", default=None, metavar="SQL", help="Only rows that fulfil this, like split = 'train'."
)
@click.option(
    "--kp", type=click.IntRange(2), default=4, show_default=True, help="How many taps to propose."
)
@click.option(
    "--out",
    "out_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    metavar="FILE",
    help="Draw the table as a heat map, a PNG file.",
)
@store_option
@json_option
def cka(
    feature_set: str | None,
    taps: Sequence[str],
    samples: str,
    batch_size: int,
    tap_norm: str,
    where: str | None,
    kp: int,
    out_path: Path | None,
    store_path: Path,
    as_json: bool,
) -> None:
    """Measure how alike the stored layers are (CKA), and propose which to read.

    Linear CKA of every two dense taps: 1 for features that differ by a rotation and a scale, near
    0 for unrelated ones. It is estimated without bias from mini-batches, in memory that does not
    depend on the number of images. Where the layers part best into two groups of alike ones, the
    first is taken for the extractor and the second for the adapter (ViT-Split). FEATURE_SET is a
    key, the start of one, or a name.

    \b
    Example:
        featstore cka
        featstore cka dinov2_b@224 --samples tokens --where "split = 'train'" --out cka.png
        featstore cka --tap block:2 --tap block:5 --tap block:8 --json
    """
    from heads.cka import layer_cka

    with resumable("Run it again."), ProgressLine() as progress:
        found = layer_cka(
            store_path,
            feature_set=feature_set,
            taps=taps,
            samples=samples,
            batch_size=batch_size,
            tap_norm=tap_norm,
            where=where,
            kp=kp,
            progress=progress,
        )
    if out_path is not None:
        _draw(found, out_path)
    if as_json:
        print_json({**found.to_json(), "path": None if out_path is None else str(out_path)})
        return
    rows = [
        [tap, *(f"{value:.2f}" for value in line)]
        for tap, line in zip(found.taps, found.matrix, strict=True)
    ]
    click.echo(table(["CKA", *found.taps], rows))
    click.echo(f"\n{found.name}, {_measured(found)}")
    if found.proposal is not None:
        click.echo(_proposed(found.proposal))
    if out_path is not None:
        click.echo(f"Wrote {out_path}.")


def _draw(found: LayerCka, path: Path) -> None:
    from featstore.files import write_bytes
    from heads.charts import heatmap_png

    png = heatmap_png(
        found.matrix,
        found.taps,
        title=f"CKA of the layers of {found.name}",
        note=_measured(found),
        cut=0 if found.proposal is None else len(found.proposal.extractor),
    )
    write_bytes(path, png)


def _measured(found: LayerCka) -> str:
    how = "mean token of each image" if found.samples == "images" else "tokens"
    norm = "as stored" if found.tap_norm == "none" else "blocks after the final norm"
    return (
        f"{count(found.n_images, 'image')}, {how}, {norm}: "
        f"{count(found.n_samples, 'sample')} in {_batches(found.n_batches)}."
    )


def _batches(n: int) -> str:
    return "1 mini-batch" if n == 1 else f"{n:,} mini-batches"


def _proposed(proposal: Proposal) -> str:
    extractor, adapter = (_span(part) for part in (proposal.extractor, proposal.adapter))
    kt = "" if proposal.kt is None else f"; a task head behind the extractor has Kt = {proposal.kt}"
    return (
        f"Extractor: {extractor}. Adapter: {adapter}. Mean CKA {proposal.within:.2f} within the "
        f"two, {proposal.between:.2f} between them.\n"
        f"Taps to read: {' '.join(f'--tap {tap}' for tap in proposal.taps)}{kt}."
    )


def _span(taps: Sequence[str]) -> str:
    return taps[0] if len(taps) == 1 else f"{taps[0]} to {taps[-1]}"
