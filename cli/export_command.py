"""`heads export`: a trained head as one graph for other programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from cli.common import (
    chosen_store,
    json_option,
    print_json,
    resumable,
    runs_option,
    say,
    store_option,
)
from cli.learning_options import queries_option


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "form",
    type=click.Choice(["torch", "onnx"]),
    default="torch",
    show_default=True,
    help="torch: a torch.export program (.pt2); onnx needs the extra `export`.",
)
@queries_option
@click.option(
    "--out",
    "out_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    metavar="FILE",
    help="The file. [default: RUN.pt2 or RUN.onnx in the current folder]",
)
@store_option
@runs_option
@json_option
def export(
    run: str,
    form: str,
    queries: int | None,
    out_path: Path | None,
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
) -> None:
    """Write the head of a run as one graph. RUN is an id, the start of one, or @last.

    The graph takes the taps as float32 tokens, for any number of images, and gives what `heads
    evaluate` measures; the final norm of block taps is in it. It needs nothing of this project.
    FILE.json, also inside of FILE, tells task, classes, taps, image size, normalisation and
    backbone. Nothing is written unless the graph gives the run's own numbers.

    \b
    Example:
        heads export @last
        heads export @last --format onnx --out depth.onnx
        heads export @last --queries 56
    """
    from heads.export import export as write

    store = chosen_store(store_path, runs_path)
    with resumable("Nothing was written."):
        report = write(run, out_path, form=form, queries=queries, store=store, runs=runs_path)
    if report.note:
        say(f"Note: {report.note}.")
    if as_json:
        print_json(asdict(report))
    else:
        click.echo(f"Wrote {report.path} and {report.metadata_path}.")
        click.echo(
            f"Reads {', '.join(report.inputs)}. "
            f"Off by {report.difference:.2g} from the run at most, on random tokens."
        )
