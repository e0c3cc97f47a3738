"""How close does `extract` come to a bare forward loop, and does its memory stay flat?

    python benchmarks/extract.py rate --images 256
    python benchmarks/extract.py memory --small 500 --large 5000

`rate` alternates, in one run, a bare loop over decoded and normalised images in memory with an
extraction from JPEG files by the same backbone, taps and batch size. Two ratios are printed: of
the shards' part, and of the whole call after the model's loading (hashing, thumbnails, index).
`memory` extracts two numbers of images in fresh processes and compares their peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def write_photos(folder: Path, n_images: int, height: int, width: int) -> None:
    """Write JPEG files with smooth, photo-like content."""
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(n_images):
        coarse = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.jpg", quality=90)


def bare_seconds(backbone, images: np.ndarray, batch_size: int, n_images: int) -> float:
    """Time timm's own forward over `n_images` images that lie normalised in memory."""
    import torch

    mean = torch.tensor(backbone.mean).view(1, 3, 1, 1)
    std = torch.tensor(backbone.std).view(1, 3, 1, 1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    ready = ((pixels - mean) / std).contiguous()
    indices = sorted({int(t.split(":")[1]) for t in backbone.taps if t.startswith("block")})
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(n_images // batch_size):
            backbone.model.forward_intermediates(
                ready, indices=indices, return_prefix_tokens=True, norm=False, output_fmt="NLC"
            )
    return time.perf_counter() - start


def rate(args: argparse.Namespace) -> None:
    """Print the two ratios."""
    from featstore.backbones import load_backbone
    from featstore.extract import extract
    from featstore.plan import RunOptions

    backbone = load_backbone(
        args.backbone, image_size=None, weights="random", device="cpu", taps=None
    )
    height, width = backbone.input_hw
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (args.batch_size, height, width, 3), dtype=np.uint8)
    bare_seconds(backbone, images, args.batch_size, args.batch_size)  # warm up
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        folder.mkdir()
        write_photos(folder, args.images, 480, 640)
        ratios, whole_ratios = [], []
        for repeat in range(args.repeats):
            before = bare_seconds(backbone, images, args.batch_size, args.images)
            report = extract(
                Path(name) / f"s{repeat}.zarr",
                backbone=args.backbone,
                weights="random",
                data=[f"folder:{folder}"],
                options=RunOptions(device="cpu", batch_size=args.batch_size),
            )
            after = bare_seconds(backbone, images, args.batch_size, args.images)
            bare = 2 * args.images / (before + after)
            ratios.append(report.images_per_second / bare)
            whole_ratios.append(args.images / report.seconds / bare)
            print(json.dumps({"bare": bare, "extract": report.images_per_second}), file=sys.stderr)
    for name, values, floor in (
        ("extract.rate", ratios, "bare forward loop"),
        (
            "extract.rate_whole_call",
            whole_ratios,
            "bare forward loop; the call also loads the model",
        ),
    ):
        result = {
            "name": name,
            "value": round(report.images_per_second, 2),
            "unit": "images/s",
            "ratio": round(float(np.median(values)), 3),
            "ratios": [round(value, 3) for value in values],
            "floor": floor,
        }
        print(json.dumps({**result, **vars(args), "machine": platform.machine()}))


def memory(args: argparse.Namespace) -> None:
    """Print peak memory of two sizes."""
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        for n_images in (args.small, args.large):
            folder = Path(name) / f"photos{n_images}"
            folder.mkdir()
            write_photos(folder, n_images, 96, 128)
            command = [sys.executable, __file__, "peak", "--folder", str(folder)]
            command += ["--store", f"{name}/{n_images}.zarr"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[n_images] = json.loads(done.stdout)["peak_mb"]
    result = {
        "name": "extract.memory",
        "value": peaks[args.large],
        "unit": "MB",
        "ratio": round(peaks[args.large] / peaks[args.small], 3),
        "floor": f"peak with {args.small} images: {peaks[args.small]} MB",
    }
    print(json.dumps({**result, "small": args.small, "large": args.large}))


def peak(args: argparse.Namespace) -> None:
    """Extract once and print this process's peak memory (called by `memory`)."""
    from featstore.extract import extract

    extract(
        args.store,
        backbone="vit_tiny_patch16_224",
        weights="random",
        image_size=(64, 64),
        data=[f"folder:{args.folder}"],
    )
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("rate")
    one.add_argument("--backbone", default="dinov2_s")
    one.add_argument("--images", type=int, default=256)
    one.add_argument("--batch-size", type=int, default=16)
    one.add_argument("--repeats", type=int, default=3)
    one.set_defaults(run=rate)
    two = commands.add_parser("memory")
    two.add_argument("--small", type=int, default=500)
    two.add_argument("--large", type=int, default=5000)
    two.set_defaults(run=memory)
    three = commands.add_parser("peak")
    three.add_argument("--folder", required=True)
    three.add_argument("--store", required=True)
    three.set_defaults(run=peak)
    args = parser.parse_args(sys.argv[1:] or ["rate"])
    run = args.run
    del args.run
    run(args)


if __name__ == "__main__":
    main()
