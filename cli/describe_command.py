"""`heads describe`: what a head is and costs, before any data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from cli.common import json_option, print_json
from cli.params import Counts, KeyValue, Size
from cli.tables import facts, size, table


@click.command()
@click.argument("head", default="deap", required=False)
@click.option(
    "--width", type=click.IntRange(1), default=768, show_default=True, help="Channels of the tap."
)
@click.option(
    "--grid", type=Size(), default="16x16", show_default=True, help="Rows and columns of the tap."
)
@click.option(
    "--outputs",
    type=Counts(),
    default="1",
    show_default=True,
    help="Output channels; 1,2 are two heads side by side, as detection has.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "bfloat16"]),
    default="float16",
    show_default=True,
    help="How the features are stored; it decides the bytes read.",
)
@click.option(
    "--set", "settings", type=KeyValue(), multiple=True, help="An option of the head; repeatable."
)
@json_option
def describe(
    head: str,
    width: int,
    grid: tuple[int, int],
    outputs: tuple[int, ...],
    dtype: str,
    settings: Sequence[tuple[str, str]],
    as_json: bool,
) -> None:
    """Tell the parameters, options, output and cost of a HEAD, without any data.

    \b
    Example:
        heads describe deap --width 768 --grid 16x16 --outputs 1
        heads describe deap --width 768 --outputs 1,2
        heads describe deap --width 384 --set mask_form=paper --json
    """
    from heads.describe import describe_head

    found = describe_head(
        head, width=width, grid=grid, n_outputs=outputs, dtype=dtype, options=dict(settings)
    )
    if as_json:
        print_json(found)
    else:
        click.echo(_text(found))


def _text(found: Mapping[str, Any]) -> str:
    live, dead = found["live_parameters"], found["dead_parameters"]
    shown = {
        "head": found["head"],
        "parameters": f"{found['parameters']:,} ({live:,} live, {dead:,} dead)",
        "output": "x".join(map(str, found["output_shape"])),
        "forward": _flops(found["forward_flops"]),
        "training step": _flops(found["step_flops"]),
        "read": f"{size(found['bytes_per_image'])} an image ({found['dtype']})",
        "options": ", ".join(f"{name}={value}" for name, value in found["options"].items()),
    }
    parts = [[part, f"{n:,}"] for part, n in found["parameters_by_part"].items()]
    return f"{facts(shown)}\n\n{table(['part', 'parameters'], parts)}"


def _flops(flops: float) -> str:
    return f"{flops / 1e6:,.1f} MFLOP an image"
