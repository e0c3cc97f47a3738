"""Does everything but the arrays scale? A store of metadata alone, and what is asked of it.

    python benchmarks/scale.py --rows 1000000

The default is 10,000,000 rows in 100,000 shards of one tap: 100,000 ledgers, and no array. Each
question is asked in a process of its own, whose largest memory and processor seconds (all threads,
imports left out) are told. One JSON line each; `ratio` is the value over the goal, if there is one.
The whole needs about 6 GB of disk and 5 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
from _common import print_line
from _metadata import SHAPE, make_metadata, write_ledgers

import featstore
from featstore.assign import ShardState, shard_states
from featstore.cleanup import gc
from featstore.files import write_parquet
from featstore.index import rebuild, refresh
from featstore.order import permutation
from featstore.store import FeatureSetFolder, open_folder

N_NEW = 1000
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
COUNT = "select count(*) from samples where split = 'train' and label = 'class7'"
Answer = dict[str, float]


def folder_of(path: Path) -> FeatureSetFolder:
    """Give the only feature set."""
    store = open_folder(path)
    return store.feature_set(store.feature_set_keys()[0])


def timed(run: Callable[[], object]) -> float:
    """Give the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def fold_all(path: Path) -> Answer:
    """Fold the index from nothing."""
    seconds = timed(lambda: rebuild(path))
    return {"fold_all": seconds, "index_bytes": (path / "index.duckdb").stat().st_size}


def first_question(path: Path) -> Answer:
    """Open a store and ask the first question of a process."""

    def ask() -> None:
        store = featstore.open(path)
        store.feature_set()
        store.sql("select count(*) from rows")

    return {"open": timed(ask)}


def filtered_count(path: Path) -> Answer:
    """Count by split and label, as a process does that asked before."""
    store = featstore.open(path)
    first = timed(lambda: store.sql(COUNT))
    later = sorted(timed(lambda: store.sql(COUNT)) for _ in range(5))
    return {"filtered_count.first": first, "filtered_count": later[len(later) // 2]}


def epoch(path: Path, shuffle: bool | str) -> Answer:
    """Plan the first epoch of a process."""
    features = featstore.open(path).feature_set()
    return {
        f"epoch.{'window' if shuffle == 'window' else 'permutation'}": timed(
            lambda: features.stream([SHAPE.tap], shuffle=shuffle, seed=1)
        )
    }


def epoch_where(path: Path) -> Answer:
    """Plan an epoch of the rows of a split."""
    features = featstore.open(path).feature_set()
    run = lambda: features.stream([SHAPE.tap], shuffle=True, where="split = 'train'")  # noqa: E731
    return {"epoch.where": timed(run)}


def plan(path: Path) -> Answer:
    """Find which shards lack which taps and which rows were rejected; then look at every key."""
    folder = folder_of(path)
    states: list[ShardState] = []
    seconds = timed(lambda: states.extend(shard_states(folder, [SHAPE.tap])))
    n_missing = sum(SHAPE.tap not in state.committed for state in states)
    keys = timed(lambda: deque((key for one in states for key in one.lines.keyed()), maxlen=0))
    return {"plan": seconds, "plan.keys": keys, "plan.missing_shards": n_missing}


def fold_new(path: Path) -> Answer:
    """Fold what 1,000 new ledgers say."""
    folder = folder_of(path)
    n_rows = folder.layout.n_shards(_n_rows(path))
    order = permutation(_n_rows(path), seed=0, epoch=0)
    write_ledgers(folder, order, range(n_rows - N_NEW, n_rows))
    return {"fold_new": timed(lambda: refresh(path))}


def collect(path: Path) -> Answer:
    """Look for waste."""
    return {"gc": timed(lambda: gc(path, dry_run=True))}


def remove(path: Path) -> Answer:
    """Bury every hundredth row, and fold that."""
    buried = pa.table({"row": pa.array(range(0, _n_rows(path), 100), pa.int64())})
    target = folder_of(path).path / "tombstones" / "00000.parquet"
    write = timed(lambda: write_parquet(target, buried))
    return {"remove": write + timed(lambda: refresh(path))}


def _n_rows(path: Path) -> int:
    return int(json.loads((path / "made.json").read_text())["rows"])


QUESTIONS: dict[str, Callable[[Path], Answer]] = {
    "fold_all": fold_all,
    "open": first_question,
    "filtered_count": filtered_count,
    "epoch.permutation": lambda path: epoch(path, True),
    "epoch.window": lambda path: epoch(path, "window"),
    "epoch.where": epoch_where,
    "plan": plan,
    "fold_new": fold_new,
    "gc": collect,
    "remove": remove,
    "filtered_count.after": filtered_count,
}
GOALS = {
    "open": 2.0,
    "filtered_count": 0.3,
    "epoch.permutation": 5.0,
    "epoch.window": 5.0,
    "fold_new": 10.0,
}
GOAL_MB = {"epoch.permutation": 1000.0, "epoch.window": 1000.0}


def ask_in_child(question: str, path: Path) -> Answer:
    """Ask in a process of its own; its answer also tells its largest memory."""
    command = [sys.executable, __file__, "--ask", question, "--store", str(path)]
    source = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    answer: Answer = json.loads(done.stdout)
    return answer


def make_in_child(path: Path, n_rows: int, shard_rows: int) -> None:
    """Make the store in a process of its own: children begin with the memory of their parent."""
    process = get_context("spawn").Process(
        target=make_metadata, args=(path, n_rows, shard_rows), kwargs={"n_held_back": N_NEW}
    )
    seconds = timed(lambda: (process.start(), process.join()))
    if process.exitcode:
        raise SystemExit(process.exitcode)
    (path / "made.json").write_text(json.dumps({"rows": n_rows}))
    print_line("scale.make", seconds, "s", ratio=0.0, floor="none", rows=n_rows)


def report(question: str, answer: Answer, about: dict[str, object]) -> None:
    """Print a line each value."""
    peak, cpu = answer.pop("peak_mb"), answer.pop("cpu_s")
    for name, value in answer.items():
        is_seconds = not name.endswith(("bytes", "shards"))
        goal = GOALS.get(name) if question != "filtered_count.after" else None
        print_line(
            f"scale.{question if name == 'filtered_count' else name}",
            value,
            "s" if is_seconds else "",
            ratio=value / goal if goal else 0.0,
            floor=f"goal: {goal:g} s" if goal else "none",
            peak_mb=round(peak),
            cpu_s=round(cpu, 2),
            **({"peak_goal_mb": GOAL_MB[name]} if name in GOAL_MB else {}),
            **about,
        )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shard-rows", type=int, default=100)
    parser.add_argument("--questions", default=",".join(QUESTIONS))
    parser.add_argument("--ask", choices=QUESTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help="keep the store here, or use the one there")
    args = parser.parse_args()
    if args.ask:
        before = time.process_time()
        answer = QUESTIONS[args.ask](args.store)
        cpu = time.process_time() - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e6
        print(json.dumps({**answer, "peak_mb": peak, "cpu_s": cpu}))
        return
    with tempfile.TemporaryDirectory() as name:
        path = args.store or Path(name) / "s.zarr"
        if not path.exists():
            make_in_child(path, args.rows, args.shard_rows)
        about: dict[str, object] = {"rows": _n_rows(path)}
        for question in filter(None, args.questions.split(",")):
            report(question, ask_in_child(question, path), about)


if __name__ == "__main__":
    main()
