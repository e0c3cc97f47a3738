"""`heads presets`: the published experiments that `heads train --preset` repeats."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from cli.common import json_option, print_json
from cli.tables import facts, table

if TYPE_CHECKING:
    from heads.presets import Preset

_WIDTH = 100


def complete_preset(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Give the names of presets that begin like what was typed, for the shell."""
    from heads.presets import PRESETS

    names = {name for preset in PRESETS.values() for name in (preset.base, preset.name)}
    return sorted(name for name in names if name.startswith(incomplete))


@click.command()
@click.argument("name", default=None, required=False, shell_complete=complete_preset)
@json_option
def presets(name: str | None, as_json: bool) -> None:
    """List the experiments of papers that can be repeated, or show the one of a NAME.

    A name without @paper or @release means the release's reading for DeAP, and the paper's for
    MAXA; one without @s, @b, @l or @g means the size of the backbone that is used. One preset is
    shown with notes: where paper and release disagree, and what is inferred.

    \b
    Example:
        heads presets
        heads presets deap-voc
        heads presets deap-voc@paper --json
        featstore extract --for deap-voc --data voc:/data/VOC2012
        featstore extract --for vit-split-nyu --data nyu_hf:/data/nyu
        heads train --preset deap-voc
    """
    from heads.presets import PRESETS, find_preset

    if name is not None:
        preset = find_preset(name)
        if as_json:
            print_json(preset.to_json())
        else:
            click.echo(_text(preset))
        return
    if as_json:
        print_json({"presets": [preset.to_json() for preset in PRESETS.values()]})
        return
    columns = "name task data resize queries steps batch lr parameters".split()
    click.echo(table(columns, [_row(preset) for preset in PRESETS.values()]))


def _row(preset: Preset) -> list[Any]:
    return [
        preset.name,
        preset.task,
        preset.data,
        preset.needs.resize,
        preset.head_options.get("queries"),
        f"{preset.steps:,}",
        preset.batch_size,
        f"{preset.lr:g}",
        f"{preset.parameters:,}",
    ]


def _text(preset: Preset) -> str:
    """Show one preset, its notes below."""
    needs = preset.needs
    n_train = "" if preset.train_images is None else f" ({preset.train_images:,} images)"
    options = {
        "head": preset.head_options,
        "task": {**preset.task_options, **preset.data_options},
        "loop": preset.loop_options,
    }
    shown = {
        "preset": preset.name,
        "paper": preset.paper,
        "task": preset.task,
        "head": f"{preset.head} ({preset.parameters:,} parameters)",
        **{f"{owner} options": _settings(values) for owner, values in options.items() if values},
        "training": f"{preset.steps:,} steps of {preset.batch_size} images, AdamW, lr "
        f"{preset.lr:g}, weight decay {preset.weight_decay:g}",
        "held out": f"{preset.val_fraction:g} of the split {preset.split}",
        "features": f"{needs.backbone}, {_size(needs.image_size)} px, {needs.resize}, "
        f"{', '.join(needs.taps)}, {needs.dtype}"
        + (f", the last {needs.tail} blocks" if needs.tail else ""),
        "data": f"{' or '.join(preset.data)}: {preset.train_data}{n_train}",
        "test": preset.test_data,
    }
    notes = [
        textwrap.fill(note, _WIDTH, initial_indent="* ", subsequent_indent="  ")
        for note in preset.notes
    ]
    return "\n".join([facts(shown), "", *notes])


def _size(image_size: tuple[int, int]) -> str:
    height, width = image_size
    return str(height) if height == width else f"{height} x {width}"


def _settings(values: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
