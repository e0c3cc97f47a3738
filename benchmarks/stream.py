"""What does training from a store cost, against the same training on a tensor in memory?

    python benchmarks/stream.py --rows 256 --batch 16

One epoch of DeAP training steps (forward, loss, backward, AdamW) in a shuffled order, three ways
in turn: from a stream of the store, from one float16 tensor in memory by the same row numbers, and
reading the stream without a step. Prints one JSON line each; `ratio` is the median, over rounds, of
the seconds over those of the tensor in memory. The store lies in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from _common import make_store, print_line, time_in_turn

from featstore.store import FeatureSetFolder
from featstore.stream import open_stream, read_rows
from featstore.types import TapShape
from heads.base import TapTokens, shift_output_biases
from heads.build import build_head
from heads.tasks import build_task

TAP = "block:0"
Batches = Callable[[], Iterator[torch.Tensor]]


def make_step(shape: TapShape, batch_size: int, queries: int) -> Callable[[torch.Tensor], None]:
    """Build the head and give the call that trains it on one batch of stored tokens."""
    torch.manual_seed(0)
    head = build_head("deap", taps=[shape], n_outputs=1, options={"queries": queries})
    task = build_task("depth")
    shift_output_biases(head, task.settings.output_bias)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    size = (batch_size, *head.output_hw)
    targets = {"depth": torch.rand(size) * 9 + 0.5, "valid": torch.rand(size) < 0.8}

    def step(stored: torch.Tensor) -> None:
        tokens = TapTokens(patch=stored.float(), grid=shape.grid)
        optimiser.zero_grad()
        task.loss(head([tokens]), targets).backward()
        optimiser.step()

    return step


def from_store(store: FeatureSetFolder, rows: np.ndarray, batch_size: int) -> Batches:
    """Give the batches of a stream."""

    def batches() -> Iterator[torch.Tensor]:
        for batch in open_stream(store, [TAP], rows=rows, batch_size=batch_size, drop_last=True):
            yield torch.from_numpy(batch[TAP])

    return batches


def from_memory(tokens: torch.Tensor, rows: np.ndarray, batch_size: int) -> Batches:
    """Give the same batches out of one tensor."""

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield tokens[torch.from_numpy(rows[start : start + batch_size])]

    return batches


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=28)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = TapShape(tap=TAP, dim=args.dim, grid=(args.grid, args.grid))
    step = make_step(shape, args.batch, args.queries)
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name) / "s.zarr", [shape], args.rows)
        rows = np.random.default_rng(0).permutation(args.rows)
        tokens = torch.from_numpy(read_rows(store, TAP, np.arange(args.rows)))
        streamed = from_store(store, rows, args.batch)
        held = from_memory(tokens, rows, args.batch)
        for mine, its in zip(streamed(), held(), strict=True):
            assert torch.equal(mine, its)

        def train(batches: Batches) -> None:
            for stored in batches():
                step(stored)

        def read() -> None:
            for _ in streamed():
                pass

        seconds = time_in_turn(
            {
                "tensor": lambda: train(held),
                "store": lambda: train(streamed),
                "store_without_step": read,
            },
            args.repeats,
        )
    n_images = args.rows // args.batch * args.batch
    floor = f"tensor: {1000 * min(seconds['tensor']) / n_images:.2f} ms"
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["tensor"], strict=True)]
        value = 1000 * min(own) / n_images
        ratio = statistics.median(ratios)
        print_line(f"stream.{name}", value, "ms/image", ratio=ratio, floor=floor, **vars(args))


if __name__ == "__main__":
    main()
