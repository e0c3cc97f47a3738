"""Progress on stderr: one line rewritten in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from cli.tables import duration
from featstore.types import Progress

TERMINAL_INTERVAL_S = 0.1
PLAIN_INTERVAL_S = 5.0
_UNITS = {
    "items": "images",
    "labels": "images",
    "extract": "images",
    "verify": "shards",
    "index": "files",
    "copy": "rows",
    "compact": "shards",
    "train": "steps",
    "targets": "labels",
    "evaluate": "images",
    "predict": "images",
    "adapt": "adaptations",
    "cka": "mini-batches",
    "protocol": "cells",
}


class ProgressLine:
    """A progress callback that draws to a stream; used in a ``with``, so that the line ends.

    Calls may come from any thread, one at a time.
    """

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._interval_s = TERMINAL_INTERVAL_S if self._is_terminal else PLAIN_INTERVAL_S
        self._stage = ""
        self._first_done = 0
        self._start_s = 0.0
        self._drawn_s = float("-inf")
        self._width = 0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_line()

    def __call__(self, report: Progress) -> None:
        """Draw a report, unless the last one was drawn a moment ago."""
        if report.message:
            self._end_line()
            self._stream.write(report.message + "\n")
            self._stream.flush()
        if report.total:
            self._advance(report)

    def _advance(self, report: Progress) -> None:
        now_s = self._clock()
        if report.stage != self._stage:
            self._end_line()
            self._stage, self._first_done, self._start_s = report.stage, report.done, now_s
            # A terminal shows a stage at once; a log waits until there is something to say.
            self._drawn_s = float("-inf") if self._is_terminal else now_s
        is_last = report.done >= report.total
        if not is_last and now_s - self._drawn_s < self._interval_s:
            return
        if is_last and not self._is_terminal and self._drawn_s == self._start_s:
            return  # a stage so short that it never showed needs no closing line
        self._drawn_s = now_s
        self._draw(
            progress_text(
                report, n_new=report.done - self._first_done, seconds=now_s - self._start_s
            )
        )

    def _draw(self, text: str) -> None:
        if self._is_terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _end_line(self) -> None:
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


def progress_text(report: Progress, *, n_new: int, seconds: float) -> str:
    """Write one line: how far, how fast, how long still.

    Args:
        report: Where the stage stands.
        n_new: How much of it was done since the stage began here, the base of the rate.
        seconds: Time since then.
    """
    unit = _UNITS.get(report.stage, "")
    text = f"{report.stage}: {report.done:,}/{report.total:,} {unit}".rstrip()
    text += f" ({100 * report.done / report.total:.0f} %)"
    if n_new < 1 or seconds <= 0:
        return text
    rate = n_new / seconds
    text += f", {rate:.3g} {unit or 'done'}/s"
    if report.done < report.total:
        text += f", {duration((report.total - report.done) / rate)} left"
    return text
