"""`featstore backbones` and `featstore datasets`: which names there are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cli.common import json_option, print_json
from cli.tables import table

if TYPE_CHECKING:
    from featstore.catalogue import BackboneEntry


@click.command()
@json_option
def backbones(as_json: bool) -> None:
    """List the backbones that have a short name; any timm name with its tag works too.

    stride: input pixels a cell of the last tap's grid; size: default input size in pixels.

    \b
    Example:
        featstore backbones
        featstore extract --backbone dinov2_b_reg --data folder:photos --dry-run
        featstore extract --backbone vit_small_patch14_dinov2.lvd142m --data folder:photos
    """
    from featstore.catalogue import CATALOGUE

    if as_json:
        listed = [{**asdict(e), "default_size": e.default_size} for e in CATALOGUE.values()]
        print_json({"backbones": listed})
        return
    columns = ["name", "timm name", "taps", "width", "stride", "prefix", "size", "licence", "note"]
    click.echo(table(columns, [_backbone_row(entry) for entry in CATALOGUE.values()]))


def _backbone_row(entry: BackboneEntry) -> list[Any]:
    return [
        entry.name,
        entry.timm_name,
        f"{entry.depth} {entry.unit}s",
        entry.width,
        entry.stride,
        entry.n_prefix,
        entry.default_size,
        entry.licence,
        entry.note,
    ]


@click.command()
@json_option
def datasets(as_json: bool) -> None:
    """List the data formats that `--data FORMAT:PATH` reads, with an example of each.

    \b
    Example:
        featstore datasets
        featstore extract --backbone dinov2_s --data pets=folder:/data/pets
    """
    from featstore.datasets import READERS

    listed = [{"format": name, "about": _first_line(READERS[name])} for name in READERS]
    if as_json:
        print_json({"datasets": listed})
        return
    click.echo(table(["format", "about"], [list(entry.values()) for entry in listed]))


def _first_line(factory: Any) -> str:
    return (factory.__doc__ or "").strip().partition("\n")[0].replace("``", "")
