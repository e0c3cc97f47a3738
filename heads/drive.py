"""Trainings side by side: one pass reads, every head learns from what it read."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from featstore.errors import InvalidInputError
from featstore.types import Progress, ProgressCallback
from heads.loop import Loop
from heads.supply import Pass, Shared, Supply


class Lane(Protocol):
    """One training among those that are driven together."""

    @property
    def loop(self) -> Loop:
        """What it has learned so far."""
        ...

    @property
    def supply(self) -> Supply:
        """What makes its batches."""
        ...

    def save(self) -> None:
        """Write its state down."""
        ...

    def fail(self, error: InvalidInputError) -> None:
        """Note that it cannot go on."""
        ...


def drive(
    lanes: Sequence[Lane], shared_pass: Pass, *, checkpoint_s: float, progress: ProgressCallback
) -> None:
    """Train all lanes to their ends; they stand at the same step.

    Ctrl-C takes effect between two batches, and every lane is saved before it goes on its way. A
    lane whose loss is not finite fails alone.

    Args:
        lanes: What is trained; a lane that is done already is passed over.
        shared_pass: Gives the batches.
        checkpoint_s: Seconds between two checkpoints.
        progress: Called after every step.

    Raises:
        KeyboardInterrupt: Ctrl-C, or the progress callback asked for it.
    """
    active = [lane for lane in lanes if not lane.loop.is_done]
    total = max((lane.loop.recipe.steps for lane in active), default=0)
    is_due = _every(checkpoint_s)
    is_whole = True  # False in the middle of a step
    try:
        with deferred_interrupt() as is_asked:
            while active:
                step = active[0].loop.step
                for shared in shared_pass.rest_of_epoch(step):
                    is_whole = False
                    active = _advance(active, shared, shared_pass)
                    is_whole = True
                    step += 1
                    progress(Progress(stage="train", done=step, total=total))
                    if is_asked():
                        raise KeyboardInterrupt
                    if not active:
                        break
                    if is_due():
                        _save(active)
    except KeyboardInterrupt:
        if is_whole:
            _save(active)
        raise


def _advance(active: Sequence[Lane], shared: Shared, shared_pass: Pass) -> list[Lane]:
    """Do one step of every lane; give the lanes that go on."""
    going = _that_can(active, lambda lane: lane.loop.advance(lane.supply.batch(shared)))
    due = [lane for lane in going if lane.loop.is_check_due]
    if due:
        looking = due
        for held_out in shared_pass.held_out():
            looking = _that_can(looking, _look_at(held_out))
        judged = _that_can(looking, lambda lane: lane.loop.judge(lane.supply.held_out_metric()))
        going = [lane for lane in going if lane not in due or lane in judged]
    for lane in going:
        if lane.loop.is_done:
            lane.loop.end()
            lane.save()
    return [lane for lane in going if not lane.loop.is_done]


def _look_at(held_out: Shared) -> Callable[[Lane], None]:
    return lambda lane: lane.loop.look(lane.supply.batch(held_out))


def _that_can(lanes: Sequence[Lane], do: Callable[[Lane], None]) -> list[Lane]:
    """Do something with each lane; give those that did not fail."""
    done: list[Lane] = []
    for lane in lanes:
        try:
            do(lane)
        except InvalidInputError as error:
            lane.fail(error)
        else:
            done.append(lane)
    return done


def _save(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.save()


def _every(seconds: float) -> Callable[[], bool]:
    """Make a question that is true once every so many seconds."""
    last = time.monotonic()

    def is_due() -> bool:
        nonlocal last
        if time.monotonic() - last < seconds:
            return False
        last = time.monotonic()
        return True

    return is_due


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until it is asked for; a second one acts at once.

    Only the main thread gets signals; elsewhere nothing is changed. Yields the question.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, note) if is_main else None
    try:
        yield lambda: bool(asked)
    finally:
        if is_main:  # a handler that was not set from Python reads as None
            signal.signal(signal.SIGINT, before or signal.default_int_handler)
