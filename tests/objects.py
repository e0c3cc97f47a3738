"""An S3 server of this process, and a proxy before it that answers wrongly when it is told to."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

KINDS = ("500", "503", "timeout", "truncated", "cut", "corrupted")
_BUSY = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
_DROPPED = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to an object store, and draws faults from a seeded generator."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port = upstream_port
        self.lock = threading.Lock()
        self.behave()

    def behave(self, share: float = 0.0, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> None:
        """Answer a share of the requests with one of these faults from now on."""
        self.share, self.turns, self.random = share, list(kinds), random.Random(seed)
        self.stall_s = 1.0
        self.faults: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str]] = []  # method, path, range

    def draw(self, method: str, path: str, asked: str) -> str:
        """Note a request; give the fault that it gets, or nothing."""
        with self.lock:
            self.requests.append((method, path, asked))
            if self.random.random() >= self.share:
                return ""
            # Only objects have a checksum: a flipped byte of a list is nobody's to find.
            is_object = method == "GET" and "list-type" not in path
            fitting = [k for k in self.turns if is_object or k not in ("truncated", "corrupted")]
            if not fitting:
                return ""
            kind = fitting[0]
            # Each in its turn, so that none is left out by chance.
            self.turns.append(self.turns.pop(self.turns.index(kind)))
            self.faults[kind] += 1
            return kind

    def shard_requests(self) -> list[str]:
        """List the ranges that were asked of shard files."""
        return [asked for _, path, asked in self.requests if re.search("/c/[0-9]", path)]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.draw(self.command, self.path, self.headers.get("Range", ""))
        if kind in ("500", "503", "403"):
            self._answer(int(kind), {"Content-Type": "application/xml"}, _BUSY)
            return
        if kind == "timeout":
            time.sleep(self.server.stall_s)
            self.close_connection = True
            return
        status, headers, data = self._ask(body)
        if kind == "corrupted" and data:
            noise = random.Random(time.monotonic_ns())
            wrong = bytearray(data)
            for place in range(noise.randrange(min(97, len(data))), len(data), 97):
                wrong[place] ^= noise.randrange(1, 256)
            data = bytes(wrong)
        if kind == "truncated":
            data = data[: len(data) // 2]
        if kind == "cut":  # a request that changes something has done so
            self.close_connection = True
            if self.command == "GET":
                self._answer(status, headers, data[: len(data) // 2], n_bytes=len(data) or 1)
            return
        self._answer(status, headers, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _do  # noqa: N815

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body, dict(self.headers))
            response = upstream.getresponse()
            kept = {k: v for k, v in response.getheaders() if k.lower() not in _DROPPED}
            if self.command == "HEAD":
                kept["Content-Length"] = response.getheader("Content-Length", "0")
            return response.status, kept, response.read()

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, n_bytes: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data) if n_bytes is None else n_bytes))
        self.end_headers()
        self.wfile.write(data)


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, as a plain web server gives them: lists of links, and ranges."""

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = asked.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = int(last) + 1 if first and last else len(data)
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(data[start:stop])


@contextlib.contextmanager
def serving(server: http.server.ThreadingHTTPServer) -> Iterator[None]:
    """Run a server in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[Proxy]:
    """Run an S3 server with one empty bucket, behind a proxy."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        made = http.client.HTTPConnection("127.0.0.1", port)
        made.request("PUT", f"/{bucket}")
        made.getresponse().read()
        made.close()
        proxy = Proxy(port)
        with serving(proxy):
            yield proxy
    finally:
        server.stop()
