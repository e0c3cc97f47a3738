"""How far above its matrix products is one training step of the DeAP depth head?

    python benchmarks/deap_step.py --width 384 --grid 16 --batch 16 --threads 2

Prints one JSON line. `floors` is the step over its floor: the time of its own matrix products and
convolutions, forward and backward, each called again alone on the tensors of the step. `speedup`
is the step of a plain version (tests/plain_heads.py) over ours. Compare these two between commits.
A step is forward, loss, backward and AdamW, on features that lie in memory.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from featstore.types import TapShape
from heads.base import TapTokens, shift_output_biases
from heads.build import build_head
from heads.tasks import build_task

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"}


class RecordProducts(TorchDispatchMode):
    """Keep every matrix product and convolution that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def best_seconds(run, repeats):
    """Least of `repeats` timings, after two untimed calls: noise only ever adds."""
    run()
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def make_step(args):
    """Build the head and its step, with the forward pass to be given."""
    torch.manual_seed(0)
    grid = (args.grid, args.grid)
    tap = TapShape(tap="norm", dim=args.width, grid=grid)
    options = {"queries": args.queries}
    head, task = build_head("deap", taps=[tap], n_outputs=1, options=options), build_task("depth")
    shift_output_biases(head, task.settings.output_bias)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    tokens = TapTokens(patch=torch.randn(args.batch, args.grid**2, args.width), grid=grid)
    shape = (args.batch, *head.output_hw)
    targets = {"depth": torch.rand(shape) * 9 + 0.5, "valid": torch.rand(shape) < 0.8}

    def step(forward):
        optimiser.zero_grad()
        task.loss(forward(), targets).backward()
        optimiser.step()

    return head, tokens, step


def seconds_of_products(step, repeats):
    """Sum the best time of each matrix product of one step, run alone."""
    with RecordProducts() as recorded:
        step()
    with torch.no_grad():
        return sum(
            best_seconds(lambda call=call: call[0](*call[1], **call[2]), repeats)
            for call in recorded.calls
        )


def main():
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--queries", type=int, default=28)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from plain_heads import plain_deap

    torch.set_num_threads(args.threads)
    head, tokens, step = make_step(args)
    ours = best_seconds(lambda: step(lambda: head([tokens])), args.repeats)
    floor = seconds_of_products(lambda: step(lambda: head([tokens])), args.repeats)
    plain = best_seconds(
        lambda: step(lambda: plain_deap(head, tokens.patch, tokens.grid, "code")), 2
    )
    print(
        json.dumps(
            {
                "bench": "deap_step",
                **vars(args),
                "ms_per_image": round(1000 * ours / args.batch, 2),
                "floor_ms_per_image": round(1000 * floor / args.batch, 2),
                "plain_ms_per_image": round(1000 * plain / args.batch, 2),
                "floors": round(ours / floor, 2),
                "speedup": round(plain / ours, 2),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
