"""How fast do batches come out of a store, against a memory map and against other formats?

    python benchmarks/read.py --rows 1024
    python benchmarks/read.py --rows 1024 --only store,memmap --repeats 9

Prints one JSON line a contender and access: `random` batches of 64 rows, `sequential` batches,
`four_taps` at once (a quarter of the rows each), all warm, then `cold` ones, with the files
dropped from the page cache. `ratio` is the median, over rounds in which the contenders take turns,
of the speed over the floor's: a fancy index of `np.memmap` on one raw file when warm, a plain
sequential read when cold. Every chunk that comes out of the store is checked (crc32c, twice
compared). Rivals that are not installed are named on stderr and left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from _common import evict, make_store, throughput_lines, time_in_turn

from featstore.store import FeatureSetFolder
from featstore.stream import open_stream, read_rows
from featstore.types import TapShape

TAP = "block:0"
Read = Callable[[np.ndarray], object]


class Inputs:
    """The same numbers in every format, and the batches that are asked for."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path = path
        self.batch = args.batch
        self.shape = TapShape(tap=TAP, dim=args.dim, grid=(args.grid, args.grid))
        self.store = make_store(path / "one.zarr", [self.shape], args.rows)
        self.array_path = self.store.array_path(TAP, "patch")
        self.row_bytes = self.shape.bytes_per_row(2)
        random = np.random.default_rng(0)
        n_batches = args.batches
        self.random = [
            random.choice(args.rows, args.batch, replace=False) for _ in range(n_batches)
        ]
        whole = args.rows // args.batch * args.batch
        self.sequential = list(np.arange(whole).reshape(-1, args.batch)[:n_batches])
        self.values = np.concatenate(list(self._values(args.rows)))

    def _values(self, n_rows: int) -> Iterator[np.ndarray]:
        for start in range(0, n_rows, 256):
            yield read_rows(self.store, TAP, np.arange(start, min(n_rows, start + 256)))


def through_stream(store: FeatureSetFolder, taps: list[str], batches: list[np.ndarray]) -> None:
    """Take every batch from a stream and do nothing with it."""
    rows = np.concatenate(batches)
    for _ in open_stream(store, taps, rows=rows, batch_size=len(batches[0])):
        pass


def memmap_reader(inputs: Inputs) -> Read:
    """Index a memory map of one raw file."""
    path = inputs.path / "raw.bin"
    inputs.values.tofile(path)
    mapped = np.memmap(path, np.float16, "r", shape=inputs.values.shape)
    return lambda rows: mapped[rows]


def memmap_take_reader(inputs: Inputs) -> Read:
    """Gather from a memory map into one buffer that is used again and starts on a page."""
    mapped = np.memmap(inputs.path / "raw.bin", np.float16, "r", shape=inputs.values.shape)
    memory = np.empty(inputs.batch * inputs.row_bytes + 4096, np.uint8)
    memory = memory[-memory.ctypes.data % 4096 :][: inputs.batch * inputs.row_bytes]
    buffer = memory.view(np.float16).reshape(inputs.batch, *inputs.values.shape[1:])
    return lambda rows: np.take(mapped, rows, axis=0, out=buffer, mode="clip")


def zarr_reader(inputs: Inputs) -> Read:
    """Index with zarr-python."""
    import zarr

    array = zarr.open_array(inputs.array_path, mode="r")
    return lambda rows: array.oindex[rows]


def zarrs_reader(inputs: Inputs) -> Read:
    """Index with zarr-python over the zarrs pipeline."""
    import zarr
    import zarrs

    assert zarrs
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(inputs.array_path, mode="r")
    return lambda rows: array.oindex[rows]


def tensorstore_reader(inputs: Inputs) -> Read:
    """Index with tensorstore, which reads and checks the same shards."""
    import tensorstore

    store = {"driver": "file", "path": str(inputs.array_path)}
    array = tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()
    return lambda rows: array[rows].read().result()


def h5_images_reader(inputs: Inputs) -> Read:
    """Read HDF5 with one dataset an image."""
    import h5py

    path = inputs.path / "images.h5"
    with h5py.File(path, "w") as file:
        for row, values in enumerate(inputs.values):
            file.create_dataset(str(row), data=values)
    opened = h5py.File(path)
    return lambda rows: np.stack([opened[str(row)][()] for row in rows])


def h5_chunks_reader(inputs: Inputs) -> Read:
    """Read HDF5 with one dataset, a chunk an image."""
    import h5py

    path = inputs.path / "chunks.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=inputs.values, chunks=(1, *inputs.values.shape[1:]))
    data = h5py.File(path)["x"]

    def read(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *data.shape[1:]), data.dtype)
        for place, row in enumerate(rows):
            data.read_direct(out, np.s_[row], np.s_[place])
        return out

    return read


def pt_reader(inputs: Inputs) -> Read:
    """Read one `.pt` file an image and tap."""
    import torch

    folder = inputs.path / "pt"
    folder.mkdir()
    for row, values in enumerate(inputs.values):
        torch.save(torch.from_numpy(values), folder / f"{row}.pt")
    return lambda rows: torch.stack([torch.load(folder / f"{row}.pt") for row in rows])


def lance_reader(inputs: Inputs) -> Read:
    """Take rows from a Lance file of fixed-size lists."""
    import lance
    import pyarrow as pa

    flat = pa.array(inputs.values.reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, inputs.values[0].size)
    path = inputs.path / "x.lance"
    lance.write_dataset(pa.table({"x": column}), str(path))
    data = lance.dataset(str(path))

    def read(rows: np.ndarray) -> np.ndarray:
        taken = data.take(rows.tolist())["x"].combine_chunks()
        return taken.values.to_numpy(zero_copy_only=False).reshape(-1, *inputs.values.shape[1:])

    return read


def litdata_reader(inputs: Inputs) -> Read:
    """Read items of a litdata streaming data set."""
    import litdata
    from litdata.streaming.cache import Cache

    folder = str(inputs.path / "litdata")
    cache = Cache(folder, chunk_bytes="64MB")
    for row, values in enumerate(inputs.values):
        cache[row] = {"x": values}
    cache.done()
    cache.merge()
    data = litdata.StreamingDataset(folder)
    return lambda rows: np.stack([data[int(row)]["x"] for row in rows])


RIVALS = {
    "zarr_python": (zarr_reader, 2),
    "zarrs": (zarrs_reader, 2),
    "tensorstore": (tensorstore_reader, 8),
    "h5py_datasets": (h5_images_reader, 8),
    "h5py_chunks": (h5_chunks_reader, 8),
    "pt_files": (pt_reader, 8),
    "lance": (lance_reader, 8),
    "litdata": (litdata_reader, 8),
}
"""How each rival reads, and how many batches of it are enough to time."""


def make_rivals(inputs: Inputs, wanted: set[str]) -> dict[str, tuple[Read, int]]:
    """Open the rivals that are installed, and check that each gives the right numbers."""
    found: dict[str, tuple[Read, int]] = {}
    for name, (make, n_batches) in RIVALS.items():
        if wanted and name not in wanted:
            continue
        try:
            read = make(inputs)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        rows = inputs.random[0]
        np.testing.assert_array_equal(np.asarray(read(rows)), inputs.values[rows])
        found[name] = (read, n_batches)
    return found


def warm(inputs: Inputs, args: argparse.Namespace) -> None:
    """Time random and sequential batches out of the page cache."""
    map_read, take_read = memmap_reader(inputs), memmap_take_reader(inputs)
    rivals = make_rivals(inputs, set(args.only.split(",")) if args.only else set())
    for access, batches in (("random", inputs.random), ("sequential", inputs.sequential)):
        runs: dict[str, Callable[[], None]] = {
            "memmap": lambda batches=batches: run(map_read, batches),
            "memmap_take": lambda batches=batches: run(take_read, batches),
            "store": lambda batches=batches: through_stream(inputs.store, [TAP], batches),
            "store_read": lambda batches=batches: run(
                lambda rows: read_rows(inputs.store, TAP, rows), batches
            ),
        }
        counts = dict.fromkeys(runs, len(batches))
        for name, (read, n_batches) in rivals.items():
            counts[name] = min(n_batches, len(batches))
            runs[name] = lambda read=read, few=batches[: counts[name]]: run(read, few)
        seconds = time_in_turn(runs, args.repeats)
        size = inputs.row_bytes * args.batch
        n_bytes = {name: count * size for name, count in counts.items()}
        about = {"rows": args.rows, "batch": args.batch, "row_kb": inputs.row_bytes // 1000}
        throughput_lines(seconds, n_bytes, prefix=f"read.{access}", floor="memmap", **about)


def run(read: Read, batches: list[np.ndarray]) -> None:
    """Read every batch."""
    for rows in batches:
        read(rows)


def four_taps(inputs: Inputs, args: argparse.Namespace) -> None:
    """Time four taps in one batch against one tap, byte for byte."""
    shapes = [
        TapShape(tap=f"block:{number}", dim=args.dim, grid=inputs.shape.grid) for number in range(4)
    ]
    n_rows = max(args.batch, args.rows // 4)
    store = make_store(inputs.path / "four.zarr", shapes, n_rows)
    random = np.random.default_rng(1)
    few = [random.choice(n_rows, args.batch, replace=False) for _ in range(args.batches // 4 or 1)]
    many = [random.choice(n_rows, args.batch, replace=False) for _ in range(4 * len(few))]
    runs = {
        "one_tap": lambda: through_stream(store, ["block:0"], many),
        "four_taps": lambda: through_stream(store, [shape.tap for shape in shapes], few),
    }
    seconds = time_in_turn(runs, args.repeats)
    size = 4 * len(few) * args.batch * inputs.row_bytes
    throughput_lines(
        seconds, dict.fromkeys(runs, size), prefix="read", floor="one_tap", rows=n_rows
    )


def cold(inputs: Inputs, args: argparse.Namespace) -> None:
    """Time a whole pass with nothing in the page cache, against a plain read of the same files."""
    files = sorted(path for path in (inputs.array_path / "c").rglob("*") if path.is_file())
    order = np.random.default_rng(2).permutation(args.rows)

    def plain() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.read(2**22):
                    pass

    def streamed(rows: np.ndarray, shuffle: object) -> Callable[[], None]:
        def go() -> None:
            options = {"batch_size": args.batch, "shuffle": shuffle}
            for _ in open_stream(inputs.store, [TAP], rows=rows, **options):
                pass

        return go

    runs = {
        "plain_read": plain,
        "store_sequential": streamed(np.arange(args.rows), False),
        "store_window": streamed(np.arange(args.rows), "window"),
        "store_random": streamed(order, False),
    }

    def after_eviction(go: Callable[[], None]) -> Callable[[], None]:
        # Dropping pages takes a few milliseconds and is timed with each contender alike.
        return lambda: (evict(files), go())[-1]

    seconds = time_in_turn({n: after_eviction(r) for n, r in runs.items()}, args.cold_repeats)
    n_bytes = dict.fromkeys(runs, args.rows * inputs.row_bytes)
    throughput_lines(seconds, n_bytes, prefix="read.cold", floor="plain_read", rows=args.rows)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold-repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="rivals, separated by commas; empty: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inputs = Inputs(Path(name), args)
        warm(inputs, args)
        four_taps(inputs, args)
        cold(inputs, args)


if __name__ == "__main__":
    main()
