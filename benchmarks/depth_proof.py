"""Is the depth head worth training? On rooms that it never saw, against what it has to beat.

    python benchmarks/depth_proof.py
    python benchmarks/depth_proof.py --images 100 --steps 200 --seeds 0

Trains DeAP on `rooms` of one seed and measures it on rooms of another: three training seeds,
beside ridge on the same tap, nearest patches, the train mean of each pixel, and the same head on
random weights. Errors are test RMSE in metres with 95 % intervals that resample whole scenes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import heads
from featstore.api import FeatureSet
from featstore.api import open as open_store
from featstore.datasets import open_dataset
from featstore.extract import extract
from heads.baselines import fit_mean_map
from heads.evaluate import measure_pairs
from heads.feed import Feed
from heads.labels import StoredLabels
from heads.model import Model, load
from heads.nearest import fit_nearest
from heads.reference import Fitted, FittedHead, TapBatches
from heads.ridge import fit_ridge
from heads.runs import find_run
from heads.selection import Pair, select_split

BACKBONE = "efficientnet_lite0"


def unseen_pairs(model: Model, features: FeatureSet) -> tuple[tuple[Pair, ...], StoredLabels]:
    """Choose the unseen rooms: the larger split, no image of which was trained on."""
    kind = model.task.label_kind
    pairs, labels = select_split(
        features.store, features, taps=list(model.tap_names), kind=kind, split="train", data=None
    )
    return tuple(pairs), labels


def measure(model: Model, head: nn.Module, features: FeatureSet) -> dict[str, object]:
    """Measure a head or a baseline on the unseen rooms."""
    as_model = Model(head=head, task=model.task, taps=model.taps, norm=model.norm)
    pairs, labels = unseen_pairs(model, features)
    result = measure_pairs(
        as_model, Feed(features, as_model.array_names, as_model.device), pairs, labels
    )
    rmse = next(metric for metric in result.metrics if metric.name == "rmse")
    return {"rmse": round(rmse.value, 4), "low": round(rmse.low, 4), "high": round(rmse.high, 4)}


def fitted(model: Model, features: FeatureSet) -> dict[str, Fitted]:
    """Fit what the head has to beat on the same training rooms."""
    kind = model.task.label_kind
    pairs, labels = select_split(
        features.store, features, taps=list(model.tap_names), kind=kind, split="train", data=None
    )
    held_out = set(sorted({pair.group for pair in pairs})[::8])
    parts = ([], [])
    for pair in pairs:
        parts[pair.group in held_out].append(pair)
    train, validation = (TapBatches(model, features, part, labels) for part in parts)
    return {
        "ridge": fit_ridge(model.task, train, validation, output_hw=model.head.output_hw),
        "nearest patches": fit_nearest(
            model.task, train, validation, output_hw=model.head.output_hw
        ),
        "train mean": fit_mean_map(train),
    }


def main() -> None:
    """Extract two sets of rooms, train, compare, print one JSON line a result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for weights in (None, "random"):
            run_one(Path(name), weights, args)


def run_one(folder: Path, weights: str | None, args: argparse.Namespace) -> None:
    """Compare on features of one set of weights."""
    known = open_dataset(f"rooms:n={args.images},seed=0")
    unseen = open_dataset(f"unseen=rooms:n={args.images},seed=1")
    stores = folder / f"{weights}-known.zarr", folder / f"{weights}-unseen.zarr"
    for store, reader in zip(stores, (known, unseen), strict=True):
        extract(store, backbone=BACKBONE, weights=weights, taps=["stage:3"], data=[reader])
    trained_on, measured_on = (open_store(store).feature_set() for store in stores)
    results: dict[str, object] = {}
    for seed in args.seeds:
        report = heads.train(
            stores[0],
            task="depth",
            steps=args.steps,
            batch_size=args.batch_size,
            lr=3e-3,
            seed=seed,
            options={"schedule": "cosine"},
        )
        model = load(find_run(stores[0], report.run_id))
        results[f"deap, seed {seed}"] = measure(model, model.head, measured_on)
    if weights is None:
        for name, baseline in fitted(model, trained_on).items():
            results[name] = measure(model, FittedHead(baseline, model.head), measured_on)
    for name, found in results.items():
        line = {
            "name": f"depth_proof, {weights or 'pretrained'} weights: {name}",
            "value": found["rmse"],
            "unit": "m",
            "low": found["low"],
            "high": found["high"],
        }
        if "train mean" in results:
            line["ratio"] = round(found["rmse"] / results["train mean"]["rmse"], 3)
            line["floor"] = "train mean of each pixel"
        print(json.dumps({**line, **vars(args)}), flush=True)


if __name__ == "__main__":
    main()
