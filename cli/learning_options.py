"""Options of commands that learn from stored features: which features, which rows, which recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cli.params import KeyValue, Names

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

feature_set_option = click.option(
    "--feature-set",
    default=None,
    metavar="KEY|NAME",
    help="Which features, where the store has several: a key, the start of one, or a name.",
)
backbone_option = click.option(
    "--backbone", default=None, metavar="NAME", help="Choose the feature set by its backbone."
)
tap_norm_option = click.option(
    "--tap-norm",
    type=click.Choice(["final", "none"]),
    default="final",
    show_default=True,
    help="Apply the backbone's final norm to raw block outputs, or nothing.",
)
split_option = click.option(
    "--split", default="train", show_default=True, help="Split to learn from."
)
steps_option = click.option(
    "--steps", type=click.IntRange(1), default=None, help="Optimizer steps."
)
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(1), default=None, help="Images a step."
)
lr_option = click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Learning rate; by default the head's own, else the task's.",
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Of everything random."
)
data_option = click.option(
    "--data",
    default=None,
    metavar="[NAME=]FORMAT:PATH",
    help="Take labels from here, joined to stored rows by the image.",
)
holdout_option = click.option(
    "--holdout-species",
    "holdout",
    type=Names(),
    default=(),
    metavar="NAME[,NAME...]",
    help="Leave out every image that shows one of these labels (species, individuals).",
)
cache_option = click.option(
    "--cache",
    type=click.Choice(["auto", "ram", "gpu", "none"]),
    default="auto",
    show_default=True,
    help="Where activations stay once they were read; auto takes what fits.",
)
queries_option = click.option(
    "--queries",
    type=click.IntRange(2),
    default=None,
    metavar="N",
    help="Ask N x N queries, for an output of 8 N pixels a side. [default: as trained]",
)
token_option = click.option(
    "--token",
    default=None,
    metavar="FILE|mean|own",
    help="Of a head with identities: answer with the token of a file that `heads adapt` made, or "
    "with the mean of the trained ones; own takes that of each stored image's identity where it "
    "was trained. [default: own of stored images, mean of new ones]",
)
compared_taps_option = click.option(
    "--tap",
    "taps",
    multiple=True,
    metavar="TAP",
    help="Compare this dense tap; repeatable. [default: all that are stored]",
)


def val_fraction_option(purpose: str) -> Decorator:
    """Add ``--val-fraction``, and say what the held-out part is for."""
    return click.option(
        "--val-fraction",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.1,
        show_default=True,
        help=f"Part of it that is held out, whole groups at a time, {purpose}.",
    )


def set_option(owners: str) -> Decorator:
    """Add ``--set``, and say whose options it takes."""
    return click.option(
        "--set",
        "settings",
        type=KeyValue(),
        multiple=True,
        help=f"An option of {owners}; repeatable.",
    )
