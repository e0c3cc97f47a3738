"""How long does a store of many rows take to open, to ask and to plan an epoch of?

    python benchmarks/open.py --rows 10000,100000,1000000

The stores are made of metadata alone: items, assignment and ledgers, no shards. One JSON line a
size and question; `ratio` is the time over that of the smallest size, next to the ratio of the
rows (the `floor` of work that goes through every row). The index is folded once per size, timed as
`open.fold`; everything else finds it up to date.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _common import SHARD_ROWS, image_keys, ledger_table, make_feature_set, print_line, write_table

import featstore
from featstore.feature_sets import grow_arrays
from featstore.index import refresh
from featstore.types import TapShape

SHAPE = TapShape(tap="block:8", dim=768, grid=(16, 16))
COUNT = "select count(*) from samples where split = 'train' and label = 'class7'"
LISTING = """
import sys, time, featstore
start = time.perf_counter()
store = featstore.open(sys.argv[1])
rows = store.sql('select count(*) from rows').column(0)[0].as_py()
print(time.perf_counter() - start)
"""


def make_metadata(path: Path, n_rows: int) -> None:
    """Make a store that looks full, without one shard."""
    _, folder = make_feature_set(path, [SHAPE], n_rows)
    grow_arrays(folder, [SHAPE.tap])
    keys = image_keys(n_rows)
    random = np.random.default_rng(0)
    for shard in range(folder.layout.n_shards(n_rows)):
        rows = range(shard * SHARD_ROWS, min(n_rows, (shard + 1) * SHARD_ROWS))
        crcs = {"patch": random.integers(0, 2**32, len(rows)).tolist()}
        ledger = ledger_table(rows, keys[rows.start : rows.stop], crcs)
        write_table(folder.ledger_path(SHAPE.tap, shard), ledger)


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Least of `repeats` timings, after an untimed one: noise only ever adds."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def fresh_process_seconds(path: Path) -> float:
    """Time opening a store and one question in a new process, the imports left out of neither."""
    done = subprocess.run(
        [sys.executable, "-c", LISTING, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    return float(done.stdout)


def measure(path: Path, repeats: int) -> dict[str, float]:
    """Time everything on one store."""
    start = time.perf_counter()
    refresh(path)
    seconds = {"fold": time.perf_counter() - start}
    store = featstore.open(path)
    features = store.feature_set()

    def plan(epoch: list[int]) -> None:
        epoch[0] += 1
        features.stream([SHAPE.tap], batch_size=64, shuffle=True, epoch=epoch[0])

    epoch = [0]
    seconds["open"] = best_seconds(lambda: featstore.open(path).feature_set().taps, repeats)
    seconds["first_question_of_a_process"] = fresh_process_seconds(path)
    seconds["filtered_count"] = best_seconds(lambda: store.sql(COUNT), repeats)
    seconds["plan_epoch"] = best_seconds(lambda: plan(epoch), repeats)
    return seconds


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    sizes = [int(text) for text in args.rows.split(",")]
    smallest: dict[str, float] = {}
    for n_rows in sizes:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "s.zarr"
            make_metadata(path, n_rows)
            seconds = measure(path, args.repeats)
        smallest = smallest or seconds
        for question, value in seconds.items():
            print_line(
                f"open.{question}",
                1000 * value,
                "ms",
                ratio=value / smallest[question],
                floor=f"{n_rows / sizes[0]:g} times the rows",
                rows=n_rows,
            )


if __name__ == "__main__":
    main()
