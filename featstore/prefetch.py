"""Threads that fill a ring of reused slots ahead of one consumer, in order.

The threads know the work, never the iterator that consumes it: when nobody holds the iterator any
more it stops them, and they let go of everything.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

Fill = Callable[[int, T, Callable[[], bool]], None]
"""Fill a slot with piece number n; ask now and then whether to stop."""

_own_threads = threading.local()


class _Work(Generic[T]):
    """What the threads and the consumer share."""

    def __init__(self, n_pieces: int, slots: list[T], fill: Fill[T]) -> None:
        self.n_pieces = n_pieces
        self.free: list[T] = list(slots)
        self.ready: dict[int, T | BaseException] = {}
        self.fill: Fill[T] | None = fill
        self.following = 0
        self.is_stopped = False
        self.changed = threading.Condition()

    def run(self) -> None:
        """Fill pieces until there are none, or until told to stop."""
        _own_threads.is_one = True
        fill = self.fill
        assert fill is not None
        while (taken := self._take()) is not None:
            number, slot = taken
            result: T | BaseException = slot
            try:
                fill(number, slot, self._asked)
            # Handed to the consumer, who raises it where the piece would have come.
            except BaseException as error:  # noqa: BLE001
                result = error
            with self.changed:
                self.ready[number] = result
                if result is not slot:  # the consumer gets no further
                    self.following = self.n_pieces
                self.changed.notify_all()

    def _asked(self) -> bool:
        return self.is_stopped

    def _take(self) -> tuple[int, T] | None:
        with self.changed:
            while not self.is_stopped and self.following < self.n_pieces and not self.free:
                self.changed.wait()
            if self.is_stopped or self.following >= self.n_pieces:
                return None
            number = self.following
            self.following += 1
            # The slot used last is the warmest; those never needed are never touched.
            return number, self.free.pop()


def _stop(work: _Work[T], threads: list[threading.Thread], release: Callable[[], None]) -> None:
    with work.changed:
        work.is_stopped = True
        work.changed.notify_all()
    # A collection of garbage can run this inside any thread; a filling one must not wait.
    if not getattr(_own_threads, "is_one", False):
        for thread in threads:
            thread.join()
    work.free.clear()
    work.ready.clear()
    work.fill = None
    release()


class Prefetcher(Generic[T]):
    """Pieces 0, 1, ... as filled slots. A slot is filled again once the next one is asked for."""

    def __init__(
        self,
        n_pieces: int,
        slots: list[T],
        fill: Fill[T],
        *,
        n_threads: int,
        release: Callable[[], None],
    ) -> None:
        self._work: _Work[T] = _Work(n_pieces, slots, fill)
        self._number = 0
        self._held: T | None = None
        threads = [
            threading.Thread(target=self._work.run, name=f"featstore-stream-{n}", daemon=True)
            for n in range(min(n_threads, len(slots), n_pieces))
        ]
        for thread in threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._work, threads, release)

    def next(self) -> T | None:
        """Give the next filled slot, or None at the end; the slot given before is free again.

        Raises:
            BaseException: Whatever filling this piece raised; the threads are stopped then.
        """
        if not self._finalizer.alive or self._number == self._work.n_pieces:
            self.close()
            return None
        work = self._work
        with work.changed:
            if self._held is not None:
                work.free.append(self._held)
                self._held = None
                work.changed.notify_all()
            while self._number not in work.ready:
                work.changed.wait()
            found = work.ready.pop(self._number)
        self._number += 1
        if isinstance(found, BaseException):
            self.close()
            raise found
        self._held = found
        return found

    def close(self) -> None:
        """Stop the threads and wait for them."""
        self._finalizer()
