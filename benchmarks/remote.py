"""How fast does a window shuffle stream from an object store, neighbours joined and one by one?

    python benchmarks/remote.py --rows 1024 --grid 14 --dim 192

A store of noise is put into an S3 server of this machine (moto's, in a process of its own) and an
epoch with `shuffle="window"` is read, in turn with joined requests and with one request a row. No
chunk is kept between epochs. Prints one JSON line: `ratio` is the median, over rounds, of the rate
of joined requests over that of one a row. The server computes much and answers from memory; real
stores are further away, where requests cost more and bytes less than here.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _common import SHARD_ROWS, make_store, print_line, time_in_turn

from featstore.remote import chunks
from featstore.remote.client import Client, client_of
from featstore.remote.location import parse_url
from featstore.store import FeatureSetFolder, StoreFolder, locate
from featstore.stream import open_stream
from featstore.types import TapShape

TAP = "block:0"
URL = "s3://bucket/features.zarr"


@contextmanager
def s3_server() -> Iterator[None]:
    """Run an S3 server with an empty bucket, and have the environment name it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as server:
        try:
            make_bucket(port)
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
            os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "none"
            os.environ["AWS_REGION"] = "us-east-1"
            yield
        finally:
            server.terminate()


def make_bucket(port: int) -> None:
    """Make the bucket as soon as the server listens."""
    for _ in range(300):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("PUT", "/bucket")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise RuntimeError("The S3 server does not start.")


def put(folder: Path) -> FeatureSetFolder:
    """Put a store into the bucket and open it there."""
    client = client_of(parse_url(URL))
    for path in folder.rglob("*"):
        if path.is_file() and ".locks" not in path.parts:
            client.upload(path.relative_to(folder).as_posix(), path)
    store = StoreFolder(locate(URL))
    return store.feature_set(store.feature_set_keys()[0])


class Counted:
    """Counts the requests for ranges of every client."""

    def __init__(self) -> None:
        self.n = 0
        read = Client.read_range

        def read_range(client: Client, key: str, start: int, stop: int) -> memoryview:
            self.n += 1
            return read(client, key, start, stop)

        Client.read_range = read_range  # type: ignore[method-assign]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--grid", type=int, default=14)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    shape = TapShape(tap=TAP, dim=asked.dim, grid=(asked.grid, asked.grid), n_prefix=0)
    counted, requests = Counted(), {}
    joined = chunks.REQUEST_BYTES

    with tempfile.TemporaryDirectory() as place, s3_server():
        os.environ["FEATSTORE_CACHE"], os.environ["FEATSTORE_CACHE_BYTES"] = place, "0"
        make_store(Path(place) / "near.zarr", [shape], asked.rows)
        folder = put(Path(place) / "near.zarr")

        def epoch(name: str, request_bytes: int) -> None:
            chunks.REQUEST_BYTES = request_bytes
            before, n_rows = counted.n, 0
            for batch in open_stream(folder, [TAP], batch_size=asked.batch, shuffle="window"):
                n_rows += len(batch)
            assert n_rows == asked.rows
            requests[name] = counted.n - before

        runs = {
            "joined": lambda: epoch("joined", joined),
            "a row": lambda: epoch("a row", 0),
        }
        seconds = time_in_turn(runs, asked.rounds)
    ratios = [b / a for a, b in zip(seconds["joined"], seconds["a row"], strict=True)]
    row_bytes = asked.grid**2 * asked.dim * 2
    best, floor = (asked.rows / min(seconds[name]) for name in ("joined", "a row"))
    print_line(
        "remote.window",
        best,
        "rows/s",
        ratio=statistics.median(ratios),
        floor=f"one request a row: {floor:.0f} rows/s",
        mb_per_s=round(best * row_bytes / 1e6, 1),
        requests=requests,
        rows=asked.rows,
        row_bytes=row_bytes,
        shards=-(-asked.rows // SHARD_ROWS),
    )


if __name__ == "__main__":
    main()
