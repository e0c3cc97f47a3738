"""How much faster do two workers extract than one, with one thread each?

    python benchmarks/cluster.py --backbone vit_base_patch16_224 --images 512

Extracts the same images by a local cluster of one worker and by one of several, in turn, each in
a fresh process with OMP_NUM_THREADS=1 and one thread that decodes. Prints one JSON line: the
ratio is the median, over the rounds, of wall times; a second ratio leaves out what does not grow
with the images (starting, loading, hashing), by the time from the first report of rows on. Choose
at least four shards a worker (64 images each for the default backbone), or the last one decides.
The stores must have the same bytes, also as one without a cluster.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import print_line
from extract import write_photos


def measure(args: argparse.Namespace) -> None:
    """Extract once and print the seconds (called by `main`)."""
    from featstore.extract import extract
    from featstore.plan import RunOptions

    moments: list[tuple[float, int]] = []

    def progress(report) -> None:
        if report.stage == "extract" and report.total:
            moments.append((time.perf_counter(), report.done))

    options = RunOptions(
        workers=args.workers or None,
        device="cpu",
        batch_size=args.batch_size,
        n_threads=1,
        targets=False,
    )
    start = time.perf_counter()
    extract(
        args.store,
        backbone=args.backbone,
        weights="random",
        data=[f"folder:{args.folder}"],
        options=options,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    (first_s, first), (last_s, last) = moments[0], moments[-1]
    rate = (last - first) / (last_s - first_s)
    print(json.dumps({"seconds": seconds, "images_per_second": rate}))


def run(args: argparse.Namespace, folder: Path, store: Path, workers: int) -> dict[str, float]:
    """Extract in a fresh process."""
    command = [sys.executable, __file__, "--measure", "--folder", str(folder)]
    command += ["--store", str(store), "--workers", str(workers)]
    command += ["--backbone", args.backbone, "--batch-size", str(args.batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout))


def content(store: Path) -> dict[str, str]:
    """Hash what the promise of equal bytes covers."""
    left_out = ("runs", ".locks", "index.duckdb", "targets")
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*"))
        if file.is_file() and not (name := str(file.relative_to(store))).startswith(left_out)
    }


def compare(args: argparse.Namespace) -> None:
    """Print the ratios."""
    whole, rates, last = [], [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        folder.mkdir()
        write_photos(folder, args.images, 240, 320)
        stores = {0: Path(name) / "serial.zarr"}
        run(args, folder, stores[0], 0)
        for repeat in range(args.repeats):
            for workers in (1, args.workers):
                stores[workers] = Path(name) / f"{workers}-{repeat}.zarr"
                last[workers] = run(args, folder, stores[workers], workers)
            one, many = last[1], last[args.workers]
            whole.append(one["seconds"] / many["seconds"])
            rates.append(many["images_per_second"] / one["images_per_second"])
        found = [content(store) for store in stores.values()]
        assert all(one == found[0] for one in found), "the stores differ"
    print_line(
        "cluster.extract",
        args.images / last[args.workers]["seconds"],
        "images/s",
        ratio=statistics.median(whole),
        ratio_of_rates=round(statistics.median(rates), 3),
        floor="one worker, the same threads each",
        backbone=args.backbone,
        images=args.images,
        workers=args.workers,
        repeats=args.repeats,
        same_bytes=True,
    )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    measure(args) if args.measure else compare(args)


if __name__ == "__main__":
    main()
