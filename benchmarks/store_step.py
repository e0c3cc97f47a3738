"""What does a training step cost from the store, and with the backbone run in every step?

    python benchmarks/store_step.py --head vit_split --set kt=3 --set kp=4
    python benchmarks/store_step.py --head linear --named --taps block:8 --device cuda

One JSON line: the best time of three steps of the same head on the same images, taken in turn.
`store_ms` reads the rows from the store, `memory_ms` has them in memory (the floor of the first),
`backbone_ms` runs the backbone on drawn images that lie in memory before each step: its floor, as
nothing is read, decoded or augmented. A step is forward, loss, backward and AdamW. With stored
rows the whole training also saves the epochs' decoding; that is not counted here.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from _common import time_in_turn
from torch import Tensor

import featstore
from featstore.extract import prepare_backbone
from featstore.images import decode, draw
from heads.feed import Feed
from heads.setup import Request, Setup, make_setup

BLOCKS = ["block:2", "block:5", "block:8", "block:11"]  # uniform over twelve, from 2


def extract(args: argparse.Namespace, store: Path) -> str:
    """Make the store; give its feature set."""
    report = featstore.extract(
        store,
        backbone=args.backbone,
        weights=args.weights,
        image_size=(args.image_size, args.image_size),
        taps=args.taps,
        data=[args.data],
        tail=args.tail,
        options=featstore.RunOptions(device=args.device),
    )
    return report.feature_set


def make_step(setup: Setup) -> Callable[[Mapping[str, Tensor], list[int]], None]:
    """Give the step of a head on the arrays of some rows."""
    model, device = setup.model, setup.model.device
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-4)
    keys = {pair.row: pair.key for pair in setup.selection.train}
    placements = setup.features.placements(sorted(keys))
    model.head.train()

    def step(arrays: Mapping[str, Tensor], rows: list[int]) -> None:
        targets = setup.targets.batch([keys[row] for row in rows])
        on_device = {name: torch.from_numpy(array).to(device) for name, array in targets.items()}
        inputs = model.tokens(arrays, [placements[row] for row in rows])
        optimizer.zero_grad(set_to_none=True)
        model.task.loss(model.head(inputs), on_device).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def drawn_images(setup: Setup, rows: list[int], data: str) -> np.ndarray:
    """Draw the images of some rows as the extraction did: (rows, H, W, 3) uint8."""
    from featstore.datasets import open_dataset

    reader = open_dataset(data)
    items = {item.path: item for item in reader.items()}
    paths = {pair.row: pair.path for pair in setup.selection.train}
    placements = setup.features.placements(rows)
    pixels = [decode(reader.read_image(items[paths[row]])) for row in rows]
    drawn = [
        draw(pixel, placements[row], interpolation="bicubic", fill_rgb=(0, 0, 0))
        for row, pixel in zip(rows, pixels, strict=True)
    ]
    return np.stack(drawn)


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="rooms:n=12")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--taps", type=lambda t: t.split(","), default=BLOCKS)
    parser.add_argument("--tail", type=int, default=3)
    parser.add_argument("--head", default="vit_split")
    parser.add_argument("--task", default="segmentation")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--named", action="store_true", help="Let the head read --taps.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print(json.dumps(result))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Time the three steps in turn."""
    store = folder / "features.zarr"
    request = Request(
        task=args.task,
        head=args.head,
        feature_set=extract(args, store),
        taps=tuple(args.taps) if args.named else (),
        options=dict(pair.split("=", 1) for pair in args.set),
    )
    torch.manual_seed(0)
    setup = make_setup(
        featstore.open(store),
        request,
        device=torch.device(args.device),
        targets_path=folder / "targets",
        progress=lambda report: None,
    )
    rows = sorted({pair.row for pair in setup.selection.train})[: args.batch]
    feed = Feed(setup.features, setup.model.array_names, setup.model.device)
    step = make_step(setup)
    in_memory = feed.tensors(rows)
    images = drawn_images(setup, rows, args.data)
    backbone = prepare_backbone(
        args.backbone,
        image_size=(args.image_size, args.image_size),
        resize="squash",
        weights=args.weights,
        device=args.device,
        taps=list(setup.model.tap_names),
    )
    ways = {
        "store_ms": lambda: step(feed.tensors(rows), rows),
        "memory_ms": lambda: step(in_memory, rows),
        "backbone_ms": lambda: step(backbone.forward(images), rows),
    }
    seconds = time_in_turn(ways, args.repeats)
    best = {name: round(1000 * min(times), 1) for name, times in seconds.items()}
    return {
        "bench": "store_step",
        **{name: getattr(args, name) for name in ("head", "task", "set", "batch", "image_size")},
        "parameters": setup.model.head.n_parameters(),
        **best,
        "backbone_over_store": round(best["backbone_ms"] / best["store_ms"], 2),
        "store_over_memory": round(best["store_ms"] / best["memory_ms"], 3),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    main()
