"""`heads protocol`: experiments of many small trainings, with their statistics and one page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    device_option,
    is_said,
    json_option,
    print_json,
    resumable,
    runs_option,
    say,
    store_option,
)
from cli.learning_options import (
    backbone_option,
    batch_size_option,
    cache_option,
    data_option,
    feature_set_option,
    lr_option,
    set_option,
    split_option,
    tap_norm_option,
    val_fraction_option,
)
from cli.params import Numbers, Words
from cli.progress import ProgressLine

if TYPE_CHECKING:
    from heads.protocol.identity import ProtocolReport

_TRAINING = {  # options of this command to arguments of `heads.train`
    "feature_set": "feature_set",
    "backbone": "backbone",
    "taps": "taps",
    "tap_norm": "tap_norm",
    "split": "split",
    "val_fraction": "val_fraction",
    "train_steps": "steps",
    "batch_size": "batch_size",
    "lr": "lr",
    "train_seed": "seed",
    "data": "data",
}
_PLAN = (
    "shots", "modes", "inits", "n_seeds", "steps", "lr_factors", "n_tuning_seeds", "validation",
    "seed",
)  # fmt: skip
_METHODS = ("lora", "bitfit", "ia3", "adaptformer", "prompts")
MODES = ",".join(["token,token+norms,token+queries,token+output,decoder", *_METHODS])
_TAIL_MODES = tuple(f"{method}:where=tail" for method in _METHODS)


class Modes(Words):
    """``MODE,MODE,...``; the options of a method may be parted by commas too."""

    name = "MODE[,MODE...]"
    separator = re.compile(r",(?!\s*\w+=)")


@click.command()
@click.argument("kind", metavar="PROTOCOL", type=click.Choice(["identity"]))
@click.option(
    "--holdout",
    "folds",
    type=Words(),
    multiple=True,
    metavar="NAME,NAME...",
    help="Identities (labels of items, such as species) that heads never see; repeatable, each "
    "time with heads of its own.",
)
@click.option(
    "--shots",
    type=Words(),
    default="0,1,5,10,20,all",
    show_default=True,
    help="How many images are learned from; all: the whole support half.",
)
@click.option(
    "--modes",
    type=Modes(),
    default=MODES,
    show_default=True,
    help="What is trained: as `heads adapt --mode` takes it. With --set tail_blocks=N the methods "
    "in the tail come to the default ones.",
)
@click.option(
    "--inits",
    type=Words(),
    default="mean,random,interpolated",
    show_default=True,
    help="Where the token begins.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="Another head to compare with: film, film_queries, no_margin, token_proj, deep, or one "
    "with options of your own; repeatable.",
)
@click.option(
    "--seeds",
    "n_seeds",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Draws of the supports.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=300, show_default=True, help="Of each adaptation."
)
@click.option(
    "--lr-factors",
    type=Numbers(),
    default="0.1,0.3,1,3",
    show_default=True,
    help="Learning rates that are tried on the validation identity, times the mode's own.",
)
@click.option(
    "--tuning-seeds",
    "n_tuning_seeds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Seeds of which each is tried.",
)
@click.option(
    "--validation",
    default=None,
    metavar="NAME",
    help="Identity that chooses learning rates, and is held out too. [default: a small one]",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of halves and supports."
)
@click.option("--resume", default=None, metavar="RUN", help="Go on with an interrupted protocol.")
@feature_set_option
@backbone_option
@click.option(
    "--tap",
    "taps",
    multiple=True,
    metavar="TAP",
    help="What the heads read; repeatable. [default: the head's choice]",
)
@tap_norm_option
@split_option
@val_fraction_option("to stop early")
@click.option(
    "--train-steps", type=click.IntRange(1), default=None, help="Of the heads' own training."
)
@batch_size_option
@lr_option
@click.option("--train-seed", type=int, default=0, show_default=True, help="Of that training.")
@data_option
@set_option("the head, the task or the training loop")
@cache_option
@device_option
@store_option
@runs_option
@json_option
def protocol(
    kind: str,
    folds: Sequence[tuple[str, ...]],
    variants: Sequence[str],
    settings: Sequence[tuple[str, str]],
    resume: str | None,
    store_path: Path,
    runs_path: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run an experiment of many small trainings: resumable, with its statistics and one page.

    identity: adapt pose heads to identities they never saw, in many ways, and compare these. Each
    identity has a fixed test half and nested supports that all ways share. Learning rates
    are chosen on another identity, equally many for each way. Intervals resample seeds and images.

    \b
    Example:
        heads protocol identity --holdout fox,rabbit,panther
        heads protocol identity --holdout dog --holdout human --seeds 3 --modes token,decoder
            --variant film --variant no_margin
        heads protocol identity --resume identity_protocol-pose-20261121-2057
    """
    from heads.protocol.identity import resume_identity_protocol, run_identity_protocol
    from heads.protocol.plan import Plan, parse_variant

    common = {name: options.pop(name) for name in ("device", "cache")}
    with resumable("No protocol was begun yet; start it again."), ProgressLine() as progress:
        if resume is not None:
            _refuse_changes(options, folds, variants, settings)
            found = resume_identity_protocol(
                store_path, resume, runs=runs_path, progress=progress, **common
            )
        else:
            from heads.protocol.design import parse_shots

            chosen = {name: options[name] for name in _PLAN}
            if not is_said("modes") and dict(settings).get("tail_blocks", "0") != "0":
                chosen["modes"] += _TAIL_MODES
            plan = Plan(
                **{**chosen, "shots": parse_shots(chosen["shots"])},
                folds=tuple(folds),
                variants=dict(map(parse_variant, variants)),
            )
            asked = {to: options[name] for name, to in _TRAINING.items() if is_said(name)}
            if settings:
                asked["options"] = dict(settings)
            found = run_identity_protocol(
                store_path, plan, asked=asked, runs=runs_path, progress=progress, **common
            )
    _tell(found, as_json=as_json)


def _refuse_changes(options: dict[str, Any], *several: Sequence[Any]) -> None:
    """A resumed protocol keeps what it was begun with."""
    said = [name for name in options if is_said(name)]
    if said or any(several):
        names = ", ".join(said) or "--holdout, --variant and --set"
        raise click.UsageError(f"A resumed protocol keeps its plan: leave out {names}.")


def _tell(found: ProtocolReport, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        for text in found.statements:
            click.echo(text)
        click.echo(f"\nPage: {found.page}")
    for message in found.messages:
        say(message)
