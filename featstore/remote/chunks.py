"""Rows of shards behind a URL: neighbours in one request, several requests at once, each checked.

A reader says which chunks it wants now and which it is going to want. Where wanted chunks and
expected ones lie close together in a shard they come by one request, and what is only expected
waits in the cache. A chunk that another thread has asked for already is waited for, not asked for
twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.errors import FormatError, NotFoundError
from featstore.remote.cache import DiskChunks, open_chunks
from featstore.remote.client import client_of
from featstore.remote.location import Mirror, find_mirror
from featstore.shards import ABSENT, CRC_BYTES, Recent, ShardLayout, crc32c, parse_shard_index

MEMORY_BYTES = 128 * 2**20
"""For chunks that wait, of all readers of a stream, where there is no cache on the disk."""
REQUEST_BYTES = 4 * 2**20
"""No request asks for more, but for a chunk that is larger."""
GAP_BYTES = 256 * 1024
"""So many bytes that nobody wants are read rather than making one more request."""
MOST_EXPECTED = 4096  # chunks, of which a window has 8 shards' at most 2048
_WRONG_TRIES = 3
_MAX_INDEXES = 4096


class WrongChunkError(Exception):
    """A chunk is not what the ledger says, however often it is read."""

    def __init__(self, shard: int, chunk: int, problem: str) -> None:
        super().__init__(problem)
        self.shard = shard
        self.chunk = chunk


@dataclass(frozen=True, slots=True)
class Wanted:
    """One chunk, and where its bytes go."""

    shard: int
    chunk: int
    crc: int  # that the ledger names
    out: np.ndarray  # uint8 (chunk_bytes,), contiguous


@dataclass(frozen=True, slots=True)
class _Request:
    """Neighbouring chunks of one shard."""

    shard: int
    start: int
    stop: int
    places: dict[int, int]  # chunk -> where it begins in the shard


class _Flight:
    """A request under way: chunk -> its bytes, or None where they are damaged."""

    def __init__(self, request: _Request) -> None:
        self.request = request
        self.future: Future[dict[int, np.ndarray | None]] = Future()


def open_remote(
    path: Path, layout: ShardLayout, file_of: Callable[[int], Path], *, n_readers: int
) -> RemoteChunks | None:
    """Give the chunks of an array of the feature set at `path`; None if they lie there."""
    mirror = find_mirror(path)
    return None if mirror is None else RemoteChunks(mirror, layout, file_of, n_readers=n_readers)


class RemoteChunks:
    """The chunks of one array of a feature set behind a URL; safe to use from threads."""

    def __init__(
        self,
        mirror: Mirror,
        layout: ShardLayout,
        file_of: Callable[[int], Path],
        *,
        n_readers: int = 1,
    ) -> None:
        self._client = client_of(mirror.remote)
        self._mirror = mirror
        self._layout = layout
        self._file = file_of
        self._waiting = open_chunks(MEMORY_BYTES // n_readers)
        is_disk = isinstance(self._waiting, DiskChunks)
        # A part, so that what waits is not thrown out before its turn comes.
        part = self._waiting.limit_bytes // (4 * n_readers if is_disk else 2)
        self.n_expected = min(MOST_EXPECTED, part // layout.chunk_bytes)
        self._expected: dict[int, set[int]] = {}
        self._asked: dict[int, int] = {}  # shard -> a bit for each chunk that was asked for
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._lock = threading.Lock()

    def expect(self, places: Iterable[tuple[int, int]]) -> None:
        """Name the chunks (shard, chunk) that are going to be wanted next, each once."""
        expected: dict[int, set[int]] = {}
        for shard, chunk in places:
            expected.setdefault(shard, set()).add(chunk)
        self._expected = expected

    def read(self, wanted: Sequence[Wanted]) -> None:
        """Fill what is wanted, each chunk compared with its checksum and the ledger's.

        Raises:
            WrongChunkError: A chunk stays wrong when it is read again.
            StorageError: The store does not answer within the stated time.
        """
        missing = [one for one in wanted if not self._from_waiting(one)]
        if not missing:
            return
        flights = self._begin(missing, self._indexes({one.shard for one in missing}))
        for one in missing:
            flight = flights.get((one.shard, one.chunk))
            found = None if flight is None else flight.future.result().get(one.chunk)
            if found is not None:
                np.copyto(one.out, found)
                if crc32c(one.out) == one.crc:
                    continue
            elif flight is None and self._from_waiting(one):
                continue
            self._read_again(one)

    def _from_waiting(self, one: Wanted) -> bool:
        key = self._key(one.shard)
        found = self._waiting.get(key, one.chunk, one.out, self._layout)
        if found is not None and found != one.crc:
            self._waiting.drop(key, one.chunk, self._layout)
        return found == one.crc

    def _key(self, shard: int) -> str:
        return self._mirror.url_of(self._file(shard))

    def _indexes(self, shards: Iterable[int]) -> dict[int, np.ndarray]:
        """Give the indexes of some shards; one that another thread reads is waited for."""
        mine, found = [], {}
        with _indexes_lock:
            for shard in shards:
                key = self._key(shard)
                if key not in _INDEXES:
                    mine.append(shard)
                    _INDEXES.put(key, Future())
                found[shard] = _INDEXES.get(key, _no_index)
        for shard in mine:
            self._client.pool.submit(self._load_index, shard, found[shard])
        return {shard: future.result() for shard, future in found.items()}

    def _load_index(self, shard: int, future: Future[np.ndarray]) -> None:
        try:
            future.set_result(self._read_index(shard))
        # Handed to those who wait for it; the next one who asks tries again.
        except BaseException as error:  # noqa: BLE001
            _INDEXES.drop(self._key(shard))
            future.set_exception(error)

    def _read_index(self, shard: int) -> np.ndarray:
        path, n_chunks = self._file(shard), self._layout.n_chunks
        n_bytes = 16 * n_chunks + CRC_BYTES
        for attempt in range(_WRONG_TRIES):
            try:
                data, size = self._client.read_tail(self._mirror.key(path), n_bytes)
                tail = np.frombuffer(data, np.uint8)
                return parse_shard_index(path, tail, n_chunks=n_chunks, size=size)
            except NotFoundError:
                raise WrongChunkError(shard, 0, f"The store has no {path}.") from None
            except FormatError as error:
                if attempt + 1 == _WRONG_TRIES:
                    raise WrongChunkError(shard, 0, str(error)) from error
        raise AssertionError("one of the attempts returns or raises")

    def _begin(
        self, missing: Sequence[Wanted], indexes: dict[int, np.ndarray]
    ) -> dict[tuple[int, int], _Flight]:
        """Start the requests that nobody has started; give the flight of each missing chunk.

        A chunk without one has landed since it was missed, and waits.
        """
        by_shard: dict[int, set[int]] = {}
        for one in missing:
            by_shard.setdefault(one.shard, set()).add(one.chunk)
        flights: dict[tuple[int, int], _Flight] = {}
        for shard, chunks in by_shard.items():
            started = []
            with self._lock:
                # Under the lock: what is neither waiting nor flying now was asked for by nobody.
                held = self._waiting.held(self._key(shard), self._layout)
                flying = {c: f for c in chunks if (f := self._flights.get((shard, c))) is not None}
                flights.update({(shard, chunk): flight for chunk, flight in flying.items()})
                wanted = chunks - flying.keys() - held
                asked = self._asked.get(shard, 0)
                expected = {
                    chunk
                    for chunk in self._expected.get(shard, set()) - chunks - held
                    if not asked >> chunk & 1
                }
                for request in self._requests(shard, indexes[shard], wanted, expected):
                    flight = _Flight(request)
                    started.append(flight)
                    asked |= sum(1 << chunk for chunk in request.places)
                    flights.update({(shard, chunk): flight for chunk in request.places})
                    self._flights.update({(shard, chunk): flight for chunk in request.places})
                self._asked[shard] = asked
            for flight in started:
                self._client.pool.submit(self._fly, flight, chunks)
        return flights

    def _requests(
        self, shard: int, index: np.ndarray, wanted: set[int], expected: set[int]
    ) -> list[_Request]:
        """Join chunks that lie close together; what holds nothing that is wanted is left out."""
        n_bytes = self._layout.chunk_bytes
        places: dict[int, int] = {}
        if not wanted:
            return []
        for chunk in wanted | expected:
            start, size = index[chunk].tolist()
            if size == n_bytes + CRC_BYTES:
                places[chunk] = start
            elif chunk in wanted:
                problem = "is missing" if start == size == ABSENT else f"has {size} bytes"
                text = f"Chunk {chunk} {problem} in shard file {self._file(shard)}."
                raise WrongChunkError(shard, chunk, text)
        joined: list[list[int]] = []
        for chunk in sorted(places, key=places.__getitem__):
            start, stop = places[chunk], places[chunk] + n_bytes + CRC_BYTES
            last = joined[-1] if joined else None
            if last is not None and self._is_near(places[last[0]], places[last[-1]], start, stop):
                last.append(chunk)
            else:
                joined.append([chunk])
        return [
            _Request(
                shard,
                places[chunks[0]],
                places[chunks[-1]] + n_bytes + CRC_BYTES,
                {chunk: places[chunk] for chunk in chunks},
            )
            for chunks in joined
            if wanted.intersection(chunks)
        ]

    def _is_near(self, first: int, last: int, start: int, stop: int) -> bool:
        end = last + self._layout.chunk_bytes + CRC_BYTES
        return start - end <= GAP_BYTES and stop - first <= REQUEST_BYTES

    def _fly(self, flight: _Flight, wanted: set[int]) -> None:
        """Make one request; keep what nobody waits for, and on the disk everything."""
        request = flight.request
        key = self._key(request.shard)
        try:
            found = self._fetch(request)
            for chunk, data in found.items():
                is_kept = isinstance(self._waiting, DiskChunks) or chunk not in wanted
                if data is not None and is_kept:
                    self._waiting.put(key, chunk, data, self._layout)
        # Handed to those who wait for it.
        except BaseException as error:  # noqa: BLE001
            self._land(request)
            flight.future.set_exception(error)
            return
        self._land(request)
        flight.future.set_result(found)

    def _land(self, request: _Request) -> None:
        with self._lock:
            for chunk in request.places:
                self._flights.pop((request.shard, chunk), None)

    def _fetch(self, request: _Request) -> dict[int, np.ndarray | None]:
        """Read neighbouring chunks; a body with damage in it is read again before it counts."""
        path, n_bytes = self._file(request.shard), self._layout.chunk_bytes
        found: dict[int, np.ndarray | None] = {}
        for _ in range(_WRONG_TRIES):
            try:
                body = self._client.read_range(self._mirror.key(path), request.start, request.stop)
            except NotFoundError:
                raise WrongChunkError(request.shard, 0, f"The store has no {path}.") from None
            data = np.frombuffer(body, np.uint8)
            for chunk, place in request.places.items():
                if found.get(chunk) is None:
                    start = place - request.start
                    part, end = data[start : start + n_bytes], start + n_bytes
                    named = int.from_bytes(data[end : end + CRC_BYTES].tobytes(), "little")
                    found[chunk] = part if crc32c(part) == named else None
            if all(part is not None for part in found.values()):
                break
        return found

    def _read_again(self, one: Wanted) -> None:
        """Read one chunk by itself, index and all: what came was not what the ledger names."""
        problem = f"Chunk {one.chunk} of shard file {self._file(one.shard)} is damaged or cut off."
        index = self._read_index(one.shard)
        _INDEXES.drop(self._key(one.shard))
        for request in self._requests(one.shard, index, {one.chunk}, set()):
            found = self._fetch(request)[one.chunk]
            if found is not None:
                np.copyto(one.out, found)
                if crc32c(one.out) == one.crc:
                    self._waiting.put(self._key(one.shard), one.chunk, found, self._layout)
                    return
                problem = "It holds other bytes than were committed."
        raise WrongChunkError(one.shard, one.chunk, problem)


def _no_index(key: str) -> Future[np.ndarray]:
    raise AssertionError(f"{key} is kept before it is asked for")


_INDEXES: Recent[str, Future[np.ndarray]] = Recent(_MAX_INDEXES)
"""The indexes of shards that this process read last, by URL, for every epoch's readers."""
_indexes_lock = threading.Lock()
