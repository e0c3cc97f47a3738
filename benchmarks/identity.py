"""Does one token adapt a pose head to an identity that only a token can tell? A planted control.

    python benchmarks/identity.py
    python benchmarks/identity.py --images 1200 --train-steps 600 --seeds 3 --worlds planted
    python benchmarks/identity.py --backbone dinov2_s --tap block:10 --tail 1 --image-size 112 \
        --modes token decoder lora lora:where=tail bitfit:where=tail --variants --worlds planted

Extracts `creatures` once: identities that look alike and differ in where they mark keypoints. Runs
the identity protocol on these conventions ("planted"), on the same pictures with conventions dealt
to pictures at random ("shuffled": a token can tell nothing), and on joints ("none"). Prints a JSON
line a world, head and way to adapt, and one of how long an adaptation takes. Goals: planted, the
token recovers 0.8 of what fine-tuning the decoder gains; shuffled, 0.9 of the intervals hold zero
over the token of the trained identity most alike ("over_nearest"): identities of one body share
looks, which a token may learn without any label, and the mean token does not know them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow.parquet as pq

import featstore
from featstore.types import Progress
from heads.adaptation import Recipe
from heads.protocol.identity import run_identity_protocol
from heads.protocol.plan import Plan, parse_variant

Lines = list[dict[str, Any]]


def spec(args: argparse.Namespace, world: str) -> str:
    """Name the data set of a world; all worlds have the same pictures."""
    return (
        f"{world}=creatures:n={args.images},identities={args.identities},seed={args.seed},"
        f"size={args.picture},offsets={world}"
    )


def extract(store: Path, args: argparse.Namespace) -> float:
    """Extract the pictures, and give how many a second."""
    report = featstore.extract(
        store,
        backbone=args.backbone,
        weights=args.weights,
        image_size=(args.image_size, args.image_size),
        taps=[args.tap],
        tail=args.tail or None,
        data=[spec(args, "planted")],
        progress=tell,
    )
    return report.images_per_second


def plan_of(args: argparse.Namespace, world: str) -> Plan:
    """Hold out the last identities; the one before them chooses learning rates."""
    first = args.identities - args.held_out
    names = [f"creature_{number:03d}" for number in range(first - 1, args.identities)]
    variants = args.variants if world == "planted" else []
    return Plan(
        folds=(tuple(names[1:]),),
        validation=names[0],
        shots=tuple(args.shots),
        modes=tuple(args.modes),
        inits=tuple(args.inits),
        variants=dict(map(parse_variant, variants)),
        n_seeds=args.seeds,
        n_tuning_seeds=args.tuning_seeds,
        lr_factors=tuple(args.lr_factors),
        steps=args.steps,
    )


def asked_of(args: argparse.Namespace, world: str) -> dict[str, Any]:
    """Say how the heads are trained."""
    options = {"metric_images": 0, "checks": 5, "patience": 0, "schedule": "cosine"}
    options |= dict(pair.split("=", 1) for pair in args.set)
    if args.tail:
        options["tail_blocks"] = args.tail
    return {
        "taps": [] if args.tail else [args.tap],
        # The stored labels are planted; others are joined to the same pictures.
        "data": None if world == "planted" else spec(args, world),
        "steps": args.train_steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "options": options,
    }


def summarise(lines: Lines) -> dict[str, Any]:
    """Average one way to adapt over identities, and count what its intervals say."""
    known = [line for line in lines if line["rmse_reduction_low"] is not None]
    recoveries = [line["recovery"] for line in lines if line["recovery"] is not None]
    holds_zero = [line["rmse_reduction_low"] <= 0 <= line["rmse_reduction_high"] for line in known]
    found: dict[str, Any] = {
        "value": round(mean(line["rmse"] for line in lines), 4),
        "unit": "RMSE, shares of the crop",
        "pck@0.05": round(mean(line["pck@0.05"] for line in lines), 3),
        "parameters": lines[0]["parameters"],
        "lr": lines[0]["lr"],
        "identities": len(lines),
    }
    if known:
        found["reduction"] = round(mean(line["rmse_reduction"] for line in known), 4)
        found["intervals_above_zero"] = sum(line["rmse_reduction_low"] > 0 for line in known)
        found["intervals_with_zero"] = sum(holds_zero)
    honest = [line for line in lines if line["nearest_reduction_low"] is not None]
    if honest:
        pairs = [(line["nearest_reduction_low"], line["nearest_reduction_high"]) for line in honest]
        found["over_nearest"] = round(mean(line["nearest_reduction"] for line in honest), 4)
        found["over_nearest_above_zero"] = sum(low > 0 for low, _ in pairs)
        found["over_nearest_with_zero"] = sum(low <= 0 <= high for low, high in pairs)
    if recoveries:
        found["ratio"] = round(mean(recoveries), 3)
        found["floor"] = "what fine-tuning the decoder takes off the mean token's RMSE"
    return found


def mean(values: Any) -> float:
    """Average some numbers."""
    listed = list(values)
    return float(sum(listed) / len(listed))


def say_world(world: str, lines: Lines, spreads: Mapping[str, float | None]) -> None:
    """Print a line for each way of each head."""
    ways = dict.fromkeys(tuple(line[key] for key in WAY) for line in lines)
    for way in ways:
        own = [line for line in lines if tuple(line[key] for key in WAY) == way]
        variant, mode, init, shots = way
        name = f"identity, {world}, head {variant}: {mode} from {init}, {shots} images"
        about = {"name": name, **summarise(own), "token_std": spreads.get(variant)}
        print(json.dumps(about), flush=True)


WAY = ("variant", "mode", "init", "shots")


def run_world(store: Path, args: argparse.Namespace, world: str) -> Lines:
    """Run the protocol on one world, print what it found, and give its lines."""
    plan = plan_of(args, world)
    report = run_identity_protocol(
        store, plan, asked=asked_of(args, world), device="cpu", progress=tell
    )
    for text in (*report.statements, *report.messages):
        print(f"{world}: {text}", file=sys.stderr)
    path = Path(report.path)
    spreads = {
        variant: json.loads((path.parent / run_id / "run.json").read_text())["learned"]["token_std"]
        for variant, run_id in zip(plan.all_variants, report.heads, strict=True)
    }
    lines: Lines = pq.read_table(path / "lines.parquet").to_pylist()
    say_world(world, lines, spreads)
    return lines


def tell(progress: Progress) -> None:
    """Say how far it is, now and then."""
    if progress.message or (progress.total and progress.done % max(progress.total // 5, 1) == 0):
        text = f"{progress.stage} {progress.done}/{progress.total} {progress.message}"
        print(text, file=sys.stderr, flush=True)


def say_times(lines: Lines, args: argparse.Namespace, rate: float | None) -> None:
    """Print how long one adaptation takes by token, by decoder, and through the backbone."""
    seconds = {}
    for mode in ("token", "decoder"):
        own = [
            line for line in lines if (line["mode"], line["shots"]) == (mode, str(args.shots[-1]))
        ]
        own = [line for line in own if line["variant"] == "main" and line["init"] == "mean"]
        if own:
            seconds[mode] = mean(line["seconds"] / line["seeds"] for line in own)
    if "token" not in seconds:
        return
    line = {
        "name": "identity: seconds of one adaptation by its token, and of answering once",
        "value": round(seconds["token"], 3),
        "unit": "s",
        "machine": platform.machine(),
    }
    if "decoder" in seconds:
        line["decoder_s"] = round(seconds["decoder"], 3)
    if rate:
        images = args.steps * min(args.shots[-1], Recipe().batch_size)
        line["backbone_each_step_s"] = round(seconds["token"] + images / rate, 1)
    print(json.dumps({**line, **vars(args), "store": None}), flush=True)


def main() -> None:
    """Extract, run the protocol on every world, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--identities", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=int, default=128, help="side of a picture, pixels")
    parser.add_argument("--image-size", type=int, default=128, help="side of the input, pixels")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--tap", default="stage:3")
    parser.add_argument(
        "--tail",
        type=int,
        default=0,
        help="last blocks of a ViT between the tap, the block before them, and the decoder",
    )
    parser.add_argument(
        "--store",
        type=Path,
        default=None,
        help="kept, and taken as it is where it exists; by default a new one is not kept",
    )
    parser.add_argument("--worlds", nargs="+", default=["planted", "shuffled"])
    parser.add_argument("--variants", nargs="*", default=["film", "no_margin"])
    parser.add_argument("--modes", nargs="+", default=["token", "decoder"])
    parser.add_argument("--inits", nargs="+", default=["mean"])
    parser.add_argument("--lr-factors", type=float, nargs="+", default=[0.1, 0.3, 1, 3])
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="of an adaptation")
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--set", nargs="*", default=["ff=512"], metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = args.store or Path(name) / "creatures.zarr"
        rate = None if store.exists() else extract(store, args)
        found = {world: run_world(store, args, world) for world in args.worlds}
        say_times(found[args.worlds[0]], args, rate)


if __name__ == "__main__":
    main()
