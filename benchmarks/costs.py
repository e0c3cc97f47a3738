"""What extracting many images costs: bytes, files, hours and money, from sizes alone.

    python benchmarks/costs.py

Prints the tables of docs/SCALE.md. Bytes and files follow from the store's own arithmetic; hours
and money from the assumptions below, which are round numbers to replace by one's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from featstore.catalogue import CATALOGUE
from featstore.layout import choose_shard_rows
from featstore.taps import base_tap, default_taps
from featstore.types import TapShape
from featstore.vit_sizes import vit_size

ITEMSIZE = 2  # float16
CARDS = {"A100": (10e12, 2.0), "H100": (30e12, 3.0)}
"""Assumed sustained float32 operations a second (TF32 off) and dollars an hour, by card."""
STORAGE_DOLLARS = 0.023  # a GB (1e9 bytes) and month in a bucket
PUT_DOLLARS, GET_DOLLARS, LIST_DOLLARS = 5e-6, 4e-7, 5e-6  # a request; one lists 1,000 names
PART_BYTES = 8 * 2**20  # of a file, in one request
N_IMAGES = (10**6, 10**8, 10**9)
BACKBONES = ("dinov2_s", "dinov2_b", "dinov2_l")
CHOICES = ("norm.cls", "norm", "default")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One backbone with some taps, an image."""

    backbone: str
    shapes: tuple[TapShape, ...]
    flops: float

    @property
    def n_bytes(self) -> int:
        """Count the bytes of all arrays."""
        return sum(shape.bytes_per_row(ITEMSIZE) for shape in self.shapes)

    @property
    def shard_rows(self) -> int:
        """Give the rows a shard that `featstore extract` chooses on a GPU."""
        widest = max(shape.bytes_per_row(ITEMSIZE) for shape in self.shapes)
        return choose_shard_rows(bytes_per_row=widest, flops_per_row=self.flops, device="cuda")

    def n_files(self, n_images: int) -> int:
        """Count shards of all arrays, and a ledger for each tap and shard."""
        n_shards = -(-n_images // self.shard_rows)
        return n_shards * sum(len(shape.arrays) + 1 for shape in self.shapes)


def cost_of(backbone: str, taps: Sequence[str]) -> Cost:
    """Work out what one image costs at the backbone's default size."""
    entry, size = CATALOGUE[backbone], vit_size(backbone)
    side = entry.default_size // entry.stride
    shapes = tuple(
        TapShape(tap=tap, dim=entry.width, grid=None)
        if tap != base_tap(tap)
        else TapShape(tap=tap, dim=entry.width, grid=(side, side), n_prefix=entry.n_prefix)
        for tap in taps
    )
    n_tokens, width = side * side + size.n_prefix, size.width
    n_mlp_layers = 3 if size.mlp == "gated" else 2
    a_token = 4 * width**2 + n_mlp_layers * width * size.hidden + 2 * n_tokens * width
    patches = side * side * 3 * entry.stride**2 * width
    flops = 2.0 * (size.depth * n_tokens * a_token + patches)
    return Cost(backbone=backbone, shapes=shapes, flops=flops)


def taps_of(backbone: str, choice: str) -> tuple[str, ...]:
    """Name the taps of one choice."""
    entry = CATALOGUE[backbone]
    return default_taps(unit=entry.unit, depth=entry.depth) if choice == "default" else (choice,)


def _costs() -> Iterator[tuple[str, Cost]]:
    for backbone in BACKBONES:
        for choice in CHOICES:
            yield choice, cost_of(backbone, taps_of(backbone, choice))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB" if count < 1000 else f"{count:,.0f} PB"


def _count(count: float) -> str:
    return f"{count:,.0f}"


def _money(dollars: float) -> str:
    return f"{dollars:,.2f}" if dollars < 10 else f"{dollars:,.0f}"


def storage_table() -> str:
    """Write bytes, and dollars a month, by backbone, taps and number of images."""
    head = ["backbone", "taps", "an image"]
    head += [f"{_count(n)} images" for n in N_IMAGES] + ["dollars a month, most images"]
    lines = [
        [
            cost.backbone,
            ", ".join(shape.tap for shape in cost.shapes),
            _bytes(cost.n_bytes),
            *(_bytes(n * cost.n_bytes) for n in N_IMAGES),
            _money(N_IMAGES[-1] * cost.n_bytes / 1e9 * STORAGE_DOLLARS),
        ]
        for _, cost in _costs()
    ]
    return _table(head, lines)


def compute_table() -> str:
    """Write GPU hours and dollars by backbone; the taps change neither."""
    head = ["backbone", "GFLOP an image", "card", "images a second"]
    head += [f"hours, {_count(n)}" for n in N_IMAGES] + ["dollars, most images"]
    lines = []
    for backbone in BACKBONES:
        flops = cost_of(backbone, ("norm",)).flops
        for card, (speed, price) in CARDS.items():
            hours = [n * flops / speed / 3600 for n in N_IMAGES]
            lines.append(
                [
                    backbone,
                    f"{flops / 1e9:.1f}",
                    card,
                    _count(speed / flops),
                    *(f"{value:,.3g}" if value < 1000 else _count(value) for value in hours),
                    _money(hours[-1] * price),
                ]
            )
    return _table(head, lines)


def files_table() -> str:
    """Write files (which are inodes, or objects) and what their requests cost in a bucket."""
    head = ["backbone", "taps", "rows a shard"]
    head += [f"files, {_count(n)}" for n in N_IMAGES]
    head += ["dollars to write", "to list once", "to read once"]
    lines = []
    for choice, cost in _costs():
        n_files = cost.n_files(N_IMAGES[-1])
        n_parts = n_files + N_IMAGES[-1] * cost.n_bytes / PART_BYTES
        lines.append(
            [
                cost.backbone,
                choice,
                str(cost.shard_rows),
                *(_count(cost.n_files(n)) for n in N_IMAGES),
                _money(n_parts * PUT_DOLLARS),
                _money(n_files / 1000 * LIST_DOLLARS),
                _money(n_parts * GET_DOLLARS),
            ]
        )
    return _table(head, lines)


TABLES = {"storage": storage_table, "compute": compute_table, "files": files_table}

if __name__ == "__main__":
    for name, table in TABLES.items():
        print(f"{name}:\n\n{table()}\n")
