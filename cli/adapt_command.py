"""`heads adapt`: a token for one more identity, from a few of its stored images."""

from __future__ import annotations

import statistics
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
from cli.learning_options import data_option
from cli.progress import ProgressLine
from cli.tables import count, duration, facts, number, size, table

if TYPE_CHECKING:
    from heads.adapt import AdaptReport

ALL = "all"


class Shots(click.ParamType[int | str]):
    """``N``, positive, or ``all``."""

    name = "N|all"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """Give the number, or "all"."""
        if value == ALL or isinstance(value, int):
            return value
        if not value.isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is no number of images. Give it as 5, or all.", param, ctx)
        return int(value)


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--identity", required=True, metavar="NAME", help="The species or individual.")
@click.option(
    "--shots",
    type=Shots(),
    default=ALL,
    show_default=True,
    help="Labelled images to learn from, none of the test split; all instances in them count.",
)
@click.option(
    "--mode",
    default="token",
    show_default=True,
    metavar="MODE",
    help="What is trained: token, token+norms, token+queries, token+output, decoder, or a method "
    "such as lora, lora:rank=4, bitfit, ia3, adaptformer, prompts, alone or after token+; "
    "lora:where=tail (or both) reaches into the backbone's last blocks that a head trained with "
    "--set tail_blocks=N reads through.",
)
@click.option(
    "--init",
    type=click.Choice(["mean", "random", "interpolated"]),
    default="mean",
    show_default=True,
    help="The first token: the mean of the trained ones, random numbers, or a learned mixture of "
    "those whose identities look alike.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="Optimizer steps of each adaptation.",
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=None, help="By default the mode's own."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Instances a step; all where there are fewer.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Adaptations side by side, each with images of its own and a file of its own.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The first.")
@click.option(
    "--token-dtype",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="Of the file; int8 takes a quarter.",
)
@click.option(
    "--out",
    "out_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    metavar="FILE",
    help="The token file, replaced if it is there. [default: NAME.safetensors, with the mode where "
    "that is not token]",
)
@data_option
@device_option
@store_option
@runs_option
@json_option
def adapt(
    run: str,
    identity: str,
    shots: int | str,
    data: str | None,
    device: str,
    out_path: Path | None,
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Adapt a head with identity tokens to one more identity. RUN is an id, its start, or @last.

    The new token is saved as a tiny file for `heads evaluate --token` and `heads predict --token`,
    and measured on the test split beside the mean of the trained tokens. The run stays as it is.

    \b
    Example:
        heads adapt @last --identity fox --shots 5
        heads adapt @last --identity fox --shots 5 --mode token+norms --seeds 10 --json
        heads adapt @last --identity fox --token-dtype int8 --out fox.safetensors
    """
    from heads.adapt import AdaptChoices
    from heads.adapt import adapt as run_adaptation
    from heads.adaptation import Recipe

    chosen = {name: options.pop(name) for name in ("seeds", "seed", "init", "token_dtype")}
    choices = AdaptChoices(identity=identity, shots=None if shots == ALL else int(shots), **chosen)
    recipe = Recipe(**options)
    with resumable("Nothing was saved; start it again."), ProgressLine() as progress:
        report = run_adaptation(
            run,
            choices,
            recipe,
            out=out_path,
            store=chosen_store(store_path, runs_path),
            runs=runs_path,
            data=data,
            device=device,
            progress=progress,
        )
    say_left_out(report.left_out)
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
    if report.left_out:
        leave(LEFT_OUT)


def _show(report: AdaptReport) -> None:
    first = report.tokens[0]
    shown = {
        "run": report.run_id,
        "identity": report.identity + (" (trained on already)" if report.was_trained else ""),
        "learned from": count(report.shots, "image"),
        "trained": f"{report.parameters:,} parameters ({report.mode}), {report.steps:,} steps",
        "time": duration(report.seconds),
        "file": f"{first.path} ({size(first.file_bytes)})",
    }
    if len(report.tokens) > 1:
        shown["files"] = f"{len(report.tokens)}, to {report.tokens[-1].path}"
    click.echo(facts(shown))
    columns = ["seed", "first token", "trained", "as stored"]
    lines = [
        [str(seed), one.loss_before, one.loss, one.loss_stored]
        for seed, one in enumerate(report.tokens, report.seed)
    ]
    click.echo(f"\nloss of the images that were learned from\n{table(columns, lines)}")
    if report.mean_token:
        click.echo(f"\n{count(report.test_images, 'instance')} of the test split")
        compared = _compared(report)
        click.echo(table(["metric", "mean token", "adapted"], compared))
        n_more = len(report.mean_token) - len(compared)
        click.echo(f"{count(n_more, 'more metric')} of single keypoints: --json lists all.")


def _compared(report: AdaptReport) -> list[list[Any]]:
    lines: list[list[Any]] = []
    for name, before in report.mean_token.items():
        if "/" in name:  # of one keypoint
            continue
        after = [one.metrics[name] for one in report.tokens]
        text = number(statistics.fmean(after))
        if len(after) > 1:
            text += f" ± {number(statistics.stdev(after))} over seeds"
        lines.append([name, before, text])
    return lines
