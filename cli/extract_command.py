"""`featstore extract`: run the backbone over images and keep what its taps give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.common import (
    LEFT_OUT,
    MAX_LISTED,
    device_option,
    json_option,
    leave,
    print_json,
    resumable,
    say,
    store_option,
)
from cli.params import Part, Size, Tail
from cli.presets_command import complete_preset
from cli.progress import ProgressLine
from cli.tables import count, duration, facts, size

if TYPE_CHECKING:
    from featstore.extraction import ExtractReport

RESUME = "What was committed is safe; run the same command again to go on from there."


def _complete_backbone(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from featstore.catalogue import CATALOGUE

    return [name for name in CATALOGUE if name.startswith(incomplete)]


@click.command()
@click.option(
    "--backbone",
    default=None,
    metavar="NAME",
    shell_complete=_complete_backbone,
    help="See `featstore backbones`; any timm name with its tag works too.",
)
@click.option(
    "--for",
    "for_preset",
    default=None,
    metavar="PRESET",
    shell_complete=complete_preset,
    help="Take what is not said (backbone, size, resize, taps, dtype) as an experiment of a paper "
    "needs it, see `heads presets`.",
)
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="[NAME=]FORMAT:PATH",
    help="Images to run; repeatable. See `featstore datasets`.",
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="SPLIT",
    help="Only this split; repeatable. [default: all]",
)
@click.option(
    "--taps",
    multiple=True,
    metavar="TAP[,TAP...]",
    help="What to keep: block:8, norm, stage:2, norm.cls ... "
    "[default: four blocks and norm, or all stages]",
)
@click.option(
    "--tail",
    type=Tail(),
    default=None,
    help="Store the weights of the last N blocks and the final norm too, for heads that train "
    "copies of them; auto: the most, up to 4, that one of the taps feeds.",
)
@click.option(
    "--image-size",
    type=Size(),
    default=None,
    help="Input size in pixels. [default: about 224, or the only size the model takes]",
)
@click.option(
    "--resize",
    default="squash",
    show_default=True,
    metavar="RULE",
    help="How an image becomes the input: squash, letterbox, crop, pad, or with a basis, such as "
    "crop+via:224:nearest.",
)
@click.option(
    "--basis",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Draw N x N pixels first, by --resize, and enlarge these to the input.",
)
@click.option(
    "--upscale",
    type=click.Choice(["nearest", "bilinear", "bicubic"]),
    default=None,
    help="How the basis is enlarged. [default: the backbone's own interpolation]",
)
@click.option(
    "--views",
    "--view",
    "views",
    multiple=True,
    metavar="VIEW[,VIEW...]",
    help="Views of each image beside the plain one: hflip, crops:N[,seed=S] for N parts of it, or, "
    "of crops around boxes, jitter:N[,seed=S][,amount=0.1] for N of them moved and scaled by up to "
    "that part; repeatable. [default: none]",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "bfloat16"]),
    default="float16",
    show_default=True,
    help="How numbers are stored.",
)
@click.option(
    "--weights",
    default=None,
    metavar="FILE|random[:SEED]",
    help="Weights other than the backbone's own.",
)
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=None,
    help="Images a forward pass. [default: chosen for the device]",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Run the backbone in N processes of this machine: each has a GPU of its own, or its share "
    "of the cores. [default: in this process]",
)
@click.option(
    "--scheduler",
    default=None,
    metavar="tcp://HOST:PORT",
    help="Run the backbone on the workers of this Dask scheduler, see docs/CLUSTER.md.",
)
@click.option(
    "--shard-range",
    type=Part(),
    default=None,
    help="Do only the I-th of N parts of the shards and wait for no other, as the tasks of a job "
    "array do.",
)
@click.option("--limit", type=click.IntRange(1), default=None, help="At most this many images.")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of the order in which new images are stored.",
)
@click.option(
    "--on-bad-image",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    show_default=True,
    help="What to do with an image that does not decode.",
)
@click.option("--no-targets", is_flag=True, help="Leave labels and thumbnails at their source.")
@click.option(
    "--no-latency", is_flag=True, help="Do not time the backbone afterwards (about two seconds)."
)
@click.option(
    "--dry-run", is_flag=True, help="Tell size and time, from a short timed run; write nothing."
)
@store_option
@json_option
def extract(store_path: Path, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Run a backbone over images and keep the activations of its taps.

    Running it again continues: what is stored is not done twice, and new images, taps or views
    are added. Ctrl-C or a crash costs at most the shards in flight. Afterwards the backbone is
    timed on ten batches of eight (fewer where it is slow), for `heads figure speed`.

    Several of these may run at once on one store: they share the shards of what they all lack.

    \b
    Example:
        featstore extract --backbone dinov2_b --data nyu:/data/nyu --dry-run
        featstore extract --backbone dinov2_b --data nyu:/data/nyu
        featstore extract --backbone efficientnet_lite0 --data rooms:n=250,seed=0 --json
        featstore extract --backbone dinov2_b --data voc:/data/VOC2012 --image-size 518
            --basis 224 --upscale nearest
        featstore extract --data features:/data/dinov2_features
        featstore extract --backbone dinov2_s --data voc:/data/VOC2012 --taps block:8 --tail 3
        featstore extract --backbone dinov2_s --data voc:/data/VOC2012 --views hflip
        featstore extract --backbone dinov2_s --data voc:/data/VOC2012 --views crops:4,seed=0
        featstore extract --backbone dinov2_s --data ap10k:/data/ap-10k --views jitter:2
        featstore extract --for deap-voc --data voc:/data/VOC2012
        featstore extract --backbone dinov2_b --data voc:/data/VOC2012 --workers 4
        featstore extract --backbone dinov2_b --data voc:/data/VOC2012
            --scheduler tcp://login1:8786
        featstore extract --backbone dinov2_b --data voc:/data/VOC2012 --shard-range 3/16
    """
    for_preset = options.pop("for_preset")
    if for_preset is not None:
        from cli.preset_features import fill_from_preset

        options = fill_from_preset(for_preset, options)
    arguments = _arguments(**options)
    if dry_run:
        _estimate(arguments, as_json=as_json)
        return
    from featstore.extract import extract

    with resumable(RESUME), ProgressLine() as progress:
        report = extract(store_path, **arguments, progress=progress)
    _show_report(report, as_json=as_json)
    if report.bad or report.set_aside:
        leave(LEFT_OUT)


def _estimate(arguments: Mapping[str, Any], *, as_json: bool) -> None:
    from featstore.estimate import estimate

    with resumable("Nothing was written."):
        guess = estimate(**arguments)
    if as_json:
        print_json(guess.to_json())
        return
    shown = {
        "feature set": guess.feature_set,
        "images": f"{guess.images:,}",
        "a tap": [f"{tap} {size(n_bytes)}" for tap, n_bytes in guess.taps.items()],
        "an image": size(guess.bytes_per_image),
        "tail": f"{count(guess.tail, 'block')}, {size(guess.tail_bytes)}" if guess.tail else "none",
        "total": size(guess.bytes),
        "time": f"{duration(guess.seconds)} ({guess.images_per_second:.3g} images/s)",
    }
    click.echo(facts(shown))


def _arguments(**options: Any) -> dict[str, Any]:
    """Sort the options into the library's arguments and its `RunOptions`."""
    from featstore.plan import RunOptions, compose_resize

    basis, upscale = options.pop("basis"), options.pop("upscale")
    options["resize"] = compose_resize(options["resize"], basis=basis, upscale=upscale)
    names = "splits views device batch_size limit seed on_bad_image workers scheduler shard_range"
    run_options = {name: options.pop(name) for name in names.split()}
    taps = [tap for text in options.pop("taps") for tap in text.split(",")]
    targets, latency = not options.pop("no_targets"), not options.pop("no_latency")
    return {
        **options,
        "taps": taps or None,
        "options": RunOptions(**run_options, targets=targets, latency=latency),
    }


def _show_report(report: ExtractReport, *, as_json: bool) -> None:
    for bad in report.bad[:MAX_LISTED]:
        say(f"Left out {bad.dataset}/{bad.path}: {bad.reason}")
    if len(report.bad) > MAX_LISTED:
        say(f"... and {len(report.bad) - MAX_LISTED:,} more; --json lists them all.")
    for shard in report.set_aside:
        images = ", ".join(shard.images[:MAX_LISTED])
        more = f" and {len(shard.images) - MAX_LISTED:,} more" * (len(shard.images) > MAX_LISTED)
        say(f"Set shard {shard.shard} aside: {shard.reason} It holds {images}{more}.")
    if as_json:
        print_json(report.to_json())
        return
    rate = f" ({report.images_per_second:.3g} images/s)" if report.new_rows else ""
    shown = {
        "store": report.store,
        "feature set": f"{report.name} ({report.feature_set})",
        "taps": report.taps,
        "rows": f"{report.rows:,} ({report.new_rows:,} new, {report.reused_rows:,} reused)",
        "size": size(report.bytes),
        "time": duration(report.seconds) + rate,
    }
    if report.tail:
        shown["tail"] = f"{count(report.tail, 'block')} and the final norm"
    if report.latency is not None:
        found = report.latency
        timed = f"median of {found.batches} x {found.batch_size}, {found.device_name}"
        shown["latency"] = f"{found.ms_per_image:.3g} ms an image ({timed})"
    if report.bad:
        shown["left out"] = f"{count(len(report.bad), 'image')}; a rerun tries them again"
    if report.set_aside:
        shown["set aside"] = f"{count(len(report.set_aside), 'shard')}; a rerun tries them again"
    if report.remaining_rows:
        shown["remaining"] = f"{report.remaining_rows:,} rows, in the other parts"
    click.echo(facts(shown))
