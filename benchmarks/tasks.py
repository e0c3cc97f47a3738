"""Heads beside each other on one task, over seeds: means, and paired differences with intervals.

    python benchmarks/tasks.py --data rooms:n=300 --weights WEIGHTS --task boundaries \
        --arms deap,bicubic,linear,conv --seeds 10

An arm is HEAD, HEAD/VARIANT or HEAD+random (random backbone weights), with its own options behind
colons: deap:lr=0.002:dim=24. `taps` is one of them: taps=5+8 reads blocks 5 and 8, taps=norm the
final norm, and taps= leaves the choice to the head; --tap is what the others read, --taps adds what
the store needs. All arms of a seed hold out the same groups and see the same batches.
`--workers` spreads the seeds over processes of one thread each. The interval of a difference is
Student's over seeds: what another seed would give on these test images, not what others would.

With a fresh store the JSON line also says how long the training took with the extraction before
it, and how long running the backbone in every step would have taken at the same rate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

import featstore
import heads
from featstore.extraction import ExtractReport


def features(args: argparse.Namespace, store: Path, weights: str) -> ExtractReport:
    """Extract where it is not done yet."""
    return featstore.extract(
        store,
        backbone=args.backbone,
        weights=weights,
        image_size=(args.image_size, args.image_size),
        taps=list(dict.fromkeys([args.tap, *args.taps])),
        data=[args.data],
        tail=args.tail,
        options=featstore.RunOptions(views=tuple(args.views)),
    )


def named_taps(text: str) -> list[str]:
    """Read the taps of an arm: "5+8" or "norm"; nothing leaves the choice to the head."""
    return [f"block:{name}" if name.isdigit() else name for name in text.split("+") if name]


def config(arm: str, args: argparse.Namespace, seed: int) -> dict[str, object]:
    """Turn an arm into arguments of `heads.train`."""
    spoken, *own = arm.split(":")
    name, _, weights = spoken.partition("+")
    head, _, variant = name.partition("/")
    options: dict[str, object] = {"pictures": 0, "checks": args.checks, "metric_images": 0}
    options |= {"patience": 0} | dict(pair.split("=", 1) for pair in args.set)
    options |= dict(pair.split("=", 1) for pair in own)
    if variant:
        options["variant"] = variant
    taps = options.pop("taps", None)
    recipe = {name: float(options.pop(name)) for name in ("lr", "weight_decay") if name in options}
    return recipe | {
        "task": args.task,
        "head": head,
        "feature_set": args.features[weights or "file"],
        "taps": [args.tap] if taps is None else named_taps(str(taps)),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "seed": seed,
        "options": options,
    }


def train_seed(args: argparse.Namespace, store: Path, seed: int) -> dict[str, dict[str, float]]:
    """Train every arm with one seed: arm to metric to value."""
    configs = [config(arm, args, seed) for arm in args.arms]
    report = heads.train_many(store, configs, device=args.device)
    found: dict[str, dict[str, float]] = {}
    for arm, run, error in zip(args.arms, report.runs, report.errors, strict=True):
        if run is None:
            raise SystemExit(f"{arm}, seed {seed}: {error}")
        found[arm] = {"seconds": run.seconds} | run.metrics | {"parameters": run.parameters}
        name = next(iter(run.metrics))
        print(f"seed {seed}  {arm:20s} {name} {run.metrics[name]:.4f}", file=sys.stderr, flush=True)
    return found


def measure(args: argparse.Namespace, store: Path) -> dict[str, dict[str, list[float]]]:
    """Train every arm with every seed: arm to metric to one value a seed."""
    seeds = range(args.seeds)
    if args.workers == 1:
        rows = [train_seed(args, store, seed) for seed in seeds]
    else:
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        context = multiprocessing.get_context("spawn")  # the children read the two variables
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            rows = list(pool.map(partial(train_seed, args, store), seeds))
    return {
        arm: {name: [row[arm][name] for row in rows] for name in rows[0][arm]} for arm in args.arms
    }


def compare(first: list[float], other: list[float]) -> dict[str, float | bool]:
    """Give the mean difference of paired values and its 95 % interval over seeds."""
    difference = np.array(first) - np.array(other)
    mean, n = float(difference.mean()), len(difference)
    reach = 0.0
    if n > 1:
        reach = float(stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n))
    return {
        "difference": round(mean, 4),
        "low": round(mean - reach, 4),
        "high": round(mean + reach, 4),
        "is_resolved": n > 1 and abs(mean) > reach,
    }


def cost(
    args: argparse.Namespace, extracted: ExtractReport, seconds: list[float]
) -> dict[str, float]:
    """Compare extracting once with running the backbone in every step, at the same rate."""
    training = float(np.mean(seconds))
    every_step = args.steps * args.batch_size / extracted.images_per_second
    return {
        "images_per_second": round(extracted.images_per_second, 2),
        "extraction_s": round(extracted.seconds, 1),
        "training_s": round(training, 1),
        "backbone_in_every_step_s": round(every_step + training, 1),
        "times_faster": round((every_step + training) / (extracted.seconds + training), 2),
    }


def main() -> None:
    """Parse, train, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="rooms:n=60")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0.in1k")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--tap", default="stage:3")
    parser.add_argument("--taps", type=lambda text: text.split(","), default=[])
    parser.add_argument("--tail", type=int, default=None, help="Store the last blocks.")
    parser.add_argument("--views", action="append", default=[])
    parser.add_argument("--task", default="boundaries")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=["deap", "linear"])
    parser.add_argument("--metrics", type=lambda text: text.split(","), default=[])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--checks", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--store", type=Path, default=None, help="Keep the features here.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = args.store or Path(folder) / "features.zarr"
        extracted = features(args, store, args.weights)
        args.features = {"file": extracted.feature_set}
        if any(arm.endswith("+random") for arm in args.arms):
            args.features["random"] = features(args, store, "random").feature_set
        found = measure(args, store)
    names = args.metrics or [list(found[args.arms[0]])[1]]  # the first metric after the seconds
    first, *others = args.arms
    result: dict[str, object] = {"task": args.task, "data": args.data, "tap": args.tap}
    result |= {"steps": args.steps, "batch_size": args.batch_size, "seeds": args.seeds}
    if extracted.new_rows and len(args.arms) == 1:
        result["cost"] = cost(args, extracted, found[first]["seconds"])
    result["parameters"] = {arm: int(found[arm]["parameters"][0]) for arm in args.arms}
    for name in names:
        for arm in args.arms:
            values = np.array(found[arm][name])
            print(f"{name:14s} {arm:40s} {values.mean():.4f} (sd {values.std():.4f})")
        result[name] = {
            "means": {arm: round(float(np.mean(found[arm][name])), 4) for arm in args.arms},
            "against": {arm: compare(found[first][name], found[arm][name]) for arm in others},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
