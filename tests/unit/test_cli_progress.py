from __future__ import annotations

import io

from cli.progress import ProgressLine, progress_text
from featstore.types import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_the_line_tells_how_far_how_fast_and_how_long_still():
    report = Progress(stage="extract", done=300, total=1200)
    text = progress_text(report, n_new=100, seconds=10)
    assert text == "extract: 300/1,200 images (25 %), 10 images/s, 1 min 30 s left"


def test_the_last_line_has_no_time_left():
    assert "left" not in progress_text(Progress(stage="train", done=5, total=5), n_new=5, seconds=1)


def test_a_terminal_gets_one_line_rewritten():
    stream, clock = Terminal(), Clock()
    with ProgressLine(stream, clock=clock) as progress:
        for done in range(101):
            progress(Progress(stage="train", done=done, total=100))
            clock.now_s += 0.05
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert 30 < text.count("\r") < 60  # every 0.1 s, not every step


def test_a_log_gets_a_line_every_few_seconds():
    stream, clock = io.StringIO(), Clock()
    with ProgressLine(stream, clock=clock) as progress:
        for done in range(21):
            progress(Progress(stage="extract", done=done, total=20))
            clock.now_s += 1
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert [line.split()[1] for line in lines] == ["5/20", "10/20", "15/20", "20/20"]


def test_a_message_is_a_line_of_its_own():
    stream, clock = Terminal(), Clock()
    with ProgressLine(stream, clock=clock) as progress:
        progress(Progress(stage="extract", done=1, total=2))
        progress(Progress(stage="extract", message="Skipped a.png: truncated."))
    assert stream.getvalue().splitlines()[-1] == "Skipped a.png: truncated."


def test_a_shorter_line_wipes_the_longer_one():
    stream, clock = Terminal(), Clock()
    with ProgressLine(stream, clock=clock) as progress:
        progress(Progress(stage="extract", done=1, total=1_000_000))
        clock.now_s += 1
        progress(Progress(stage="extract", done=1_000_000, total=1_000_000))
        clock.now_s += 1
        progress(Progress(stage="index", done=1, total=9))
    widths = [len(part) for part in stream.getvalue().replace("\n", "").split("\r")[1:]]
    assert widths[1] >= widths[0]
