"""What do several heads on one pass cost, beside one pass of reading and each head's own steps?

    python benchmarks/many_heads.py --heads 8 --rows 256 --steps 32

Trains one DeAP head alone and then several side by side (learning rates differ), both from a
stream (`--cache none`), in turn, and reads the same epochs without a step. Prints one JSON line:
`ratio` is the seconds of all heads over (one pass of reading + the heads' own steps), where the
steps of one head are the seconds alone less the reading. The goal is 1.1 at most. Evaluation is
left out: every run is timed by its own record.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import make_store, print_line, time_in_turn

import featstore
from featstore.types import TapShape
from heads.base import TapTokens, shift_output_biases
from heads.build import build_head
from heads.drive import drive
from heads.feed import Feed, Rows
from heads.loop import Batch, Loop, LoopOptions, Recipe
from heads.model import Model
from heads.supply import Shared
from heads.tasks import build_task

TAP = "block:0"
DEVICE = torch.device("cpu")


class OnePass:
    """Epochs of a stream without held-out part; stands where `heads.supply.Pass` stands."""

    def __init__(self, feed: Feed, n_rows: int, batch_size: int) -> None:
        self._feed = feed
        self._rows = range(n_rows)
        self._batch_size = batch_size

    def rest_of_epoch(self, step: int) -> Any:
        """Give what follows after `step` steps."""
        epoch, start = divmod(step, len(self._rows) // self._batch_size)
        batches = self._feed.shuffled(
            self._rows, batch_size=self._batch_size, seed=0, epoch=epoch, start=start
        )
        for stored in batches:
            yield Shared(pairs=[], stored=stored)

    def held_out(self) -> Sequence[Shared]:
        """Nothing is held out."""
        return ()


class Lane:
    """One head with made-up targets; stands where `heads.training.Training` stands."""

    def __init__(self, shape: TapShape, lr: float, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        head = build_head("deap", taps=[shape], n_outputs=1, options={"queries": 28})
        task = build_task("depth")
        shift_output_biases(head, task.settings.output_bias)
        recipe = Recipe(
            steps=args.steps,
            batch_size=args.batch,
            lr=lr,
            weight_decay=0.01,
            seed=0,
            loop=LoopOptions(),
        )
        self.loop = Loop(Model(head=head, task=task, taps=[shape], norm=None), recipe)
        self.supply = self
        size = (args.batch, *head.output_hw)
        self._targets = {"depth": torch.rand(size) * 9 + 0.5, "valid": torch.rand(size) < 0.8}
        self._grid = shape.grid

    def batch(self, shared: Shared) -> Batch:
        """Make the head's input."""
        stored: Rows = shared.stored
        tokens = TapTokens(patch=stored.tensors[TAP].float(), grid=self._grid)
        return Batch(pairs=[], inputs=[tokens], targets=self._targets)

    def held_out_metric(self) -> None:
        """Nothing is held out."""

    def save(self) -> None:
        """Nothing is kept."""

    def fail(self, error: Exception) -> None:
        """No head may fail here."""
        raise error


def make_features(path: Path, shape: TapShape, n_rows: int) -> Any:
    """Make a store of noise and open its feature set."""
    folder = make_store(path, [shape], n_rows)
    return featstore.open(folder.path.parent.parent).feature_set()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    shape = TapShape(tap=TAP, dim=args.dim, grid=(args.grid, args.grid))
    with tempfile.TemporaryDirectory() as name:
        feed = Feed(make_features(Path(name) / "s.zarr", shape, args.rows), [TAP], DEVICE)
        one_pass = OnePass(feed, args.rows, args.batch)

        def train(n_heads: int) -> None:
            lanes = [Lane(shape, 1e-3 / (1 + number), args) for number in range(n_heads)]
            drive(lanes, one_pass, checkpoint_s=1e9, progress=lambda report: None)

        def read() -> None:
            step = 0
            while step < args.steps:
                for _ in one_pass.rest_of_epoch(step):
                    step += 1
                    if step == args.steps:
                        return

        runs = {"one": lambda: train(1), "many": lambda: train(args.heads), "read": read}
        seconds = time_in_turn(runs, args.repeats)
    ratios = [
        many / (read_s + args.heads * (one - read_s))
        for one, many, read_s in zip(seconds["one"], seconds["many"], seconds["read"], strict=True)
    ]
    n_images = args.steps * args.batch
    floor = (
        f"one pass of reading {1000 * min(seconds['read']) / n_images:.3f} ms/image + {args.heads} "
        f"heads of {1000 * min(seconds['one']) / n_images:.2f}"
    )
    value = 1000 * min(seconds["many"]) / n_images
    ratio = statistics.median(ratios)
    print_line("many_heads", value, "ms/image", ratio=ratio, floor=floor, **vars(args))


if __name__ == "__main__":
    main()
