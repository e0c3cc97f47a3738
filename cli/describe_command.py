"""`heads describe`: what a head is and costs, before any data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from cli.common import is_said, json_option, print_json
from cli.params import Counts, KeyValue, Size
from cli.presets_command import complete_preset
from cli.tables import facts, size, table


@click.command()
@click.argument("head", default="deap", required=False)
@click.option(
    "--preset",
    default=None,
    metavar="NAME",
    shell_complete=complete_preset,
    help="With the taps, outputs and options of an experiment of a paper, see `heads presets`.",
)
@click.option(
    "--backbone",
    default=None,
    metavar="NAME",
    help="On taps of this backbone, such as dinov2_s, in place of --width; no weights are needed.",
)
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
    help="Output channels (of identity_token: keypoints); 1,2 are two heads side by side, as "
    "detection has.",
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
    preset: str | None,
    backbone: str | None,
    settings: Sequence[tuple[str, str]],
    as_json: bool,
    **shape: Any,
) -> None:
    """Tell the parameters, options, output and cost of a HEAD, without any data.

    \b
    Example:
        heads describe deap --width 768 --grid 16x16 --outputs 1
        heads describe deap --width 768 --outputs 1,2
        heads describe deap --width 384 --set mask_form=paper --json
        heads describe identity_token --width 768 --grid 16x16 --outputs 17
        heads describe vit_split --backbone dinov2_b --grid 37x37 --outputs 150
        heads describe vit_split --preset vit-split-ade20k --backbone dinov2_s --json
    """
    if preset is None:
        found = _found(head, backbone, dict(settings), shape)
    else:
        found = _found_with_preset(head, preset, backbone, dict(settings))
    if as_json:
        print_json(found)
    else:
        click.echo(_text(found))


def _found(
    head: str, backbone: str | None, options: Mapping[str, str], shape: Mapping[str, Any]
) -> dict[str, Any]:
    from heads.describe import describe_head

    if backbone is not None and is_said("width"):
        raise click.UsageError("--backbone has a width of its own; leave out --width.")
    return describe_head(
        head,
        width=shape["width"] if backbone is None else None,
        backbone=backbone,
        grid=shape["grid"],
        n_outputs=shape["outputs"],
        dtype=shape["dtype"],
        options=options,
    )


def _found_with_preset(
    head: str, preset: str, backbone: str | None, options: Mapping[str, str]
) -> dict[str, Any]:
    from heads.describe import describe_with_preset
    from heads.presets import find_preset

    said = [name for name in ("width", "grid", "outputs", "dtype") if is_said(name)]
    if said:
        names = " and ".join(f"--{name}" for name in said)
        raise click.UsageError(f"A preset has a width, grid, outputs and dtype; leave out {names}.")
    found = find_preset(preset, backbone=backbone)
    name = head if is_said("head") else found.head
    return describe_with_preset(found, name, backbone=backbone, options=options)


def _text(found: Mapping[str, Any]) -> str:
    live, dead = found["live_parameters"], found["dead_parameters"]
    frozen = found["frozen_parameters"]
    shown = {
        "head": found["head"],
        **{name: found[name] for name in ("preset", "backbone") if found.get(name)},
        "taps": ", ".join(found["taps"]),
        "parameters": f"{found['parameters']:,} ({live:,} live, {dead:,} dead)",
        **({"frozen": f"{frozen:,} of the backbone, held beside these"} if frozen else {}),
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
