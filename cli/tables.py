"""Text for people: aligned tables, and numbers with their units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_METRICS = 30


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Align rows under their column names, numbers to the right."""
    body = [[cell(value) for value in row] for row in rows]
    kinds = [list(column) for column in zip(*body, strict=True)] or [[] for _ in columns]
    widths = [
        max(len(name), *(len(text) for text in texts), 0)
        for name, texts in zip(columns, kinds, strict=True)
    ]
    is_right = [bool(texts) and all(map(_is_number, texts)) for texts in kinds]
    lines = [columns, ["-" * width for width in widths], *body]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, is_right, strict=True)
        ).rstrip()
        for line in lines
    )


def facts(values: Mapping[str, Any]) -> str:
    """Write names and values in two aligned columns."""
    width = max((len(name) for name in values), default=0)
    return "\n".join(f"{name.ljust(width)}  {cell(value)}" for name, value in values.items())


def cell(value: Any) -> str:
    """Write one value of a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple | set):
        return ", ".join(cell(each) for each in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(each)}" for name, each in value.items())
    return str(value)


def number(value: float) -> str:
    """Write a number with four significant digits."""
    if math.isnan(value):
        return "nan"
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.4g}"


def size(n_bytes: float) -> str:
    """Write a number of bytes with a decimal unit: 12.3 MB."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.95:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """Write a duration: 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def interval(value: float, low: float | None, high: float | None, *, unit: str = "") -> str:
    """Write a metric with its 95 % interval: 0.412 m [0.390, 0.433]."""
    text = f"{value:.3f}{' ' + unit if unit else ''}"
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return text
    return f"{text} [{low:.3f}, {high:.3f}]"


def metrics(values: Mapping[str, float], intervals: Mapping[str, Sequence[float] | None]) -> str:
    """Write metrics with their 95 % intervals; of hundreds (one a class) the first ones."""
    lines = []
    for name, value in list(values.items())[:MAX_METRICS]:
        low, high = intervals.get(name) or (None, None)
        lines.append([name, f"{value:.4f}", "-" if low is None else f"[{low:.4f}, {high:.4f}]"])
    text = table(["metric", "value", "95 % interval"], lines)
    n_more = len(values) - len(lines)
    return f"{text}\n{count(n_more, 'more metric')}: --json lists all." if n_more else text


def count(n: int, noun: str) -> str:
    """Write a count with its noun, plural where it is not one."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _is_number(text: str) -> bool:
    if text == "-":
        return True
    try:
        float(text.partition(" ")[0].replace(",", ""))
    except ValueError:
        return False
    return True
