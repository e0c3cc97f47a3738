"""The figure of speed against score: what a better backbone costs in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import NotFoundError
from featstore.latency import Latency, latency_path, read_latencies
from featstore.store import locate
from heads.comparable import (
    Backbones,
    interval_text,
    left_out,
    measured_text,
    metric_text,
    of_one_head,
    primary,
    what_there_is,
)
from heads.figures import Dot, FigureData, Panel
from heads.table import Entry, Line, Table

_AGAIN = (
    "Run `featstore extract` again with the arguments that they were extracted with: it extracts "
    "nothing twice and measures the latency."
)


def latencies_of(store: str | Path, entries: Sequence[Entry]) -> dict[str, tuple[Latency, ...]]:
    """Read what `featstore extract` measured of the backbone of each run, by the run's id.

    Raises:
        FormatError: A file of it is damaged.
    """
    keys = {entry.run_id: entry.record["feature_sets"][0] for entry in entries}
    folder = locate(store)
    read = {key: read_latencies(latency_path(folder, key)) for key in set(keys.values())}
    return {run_id: read[key] for run_id, key in keys.items()}


def speed_figure(
    table: Table, latencies: Mapping[str, Sequence[Latency]], *, is_any_device: bool = False
) -> FigureData:
    """Compare backbones on each task: the time of an image against the score.

    Of several depths that a backbone was run to, the deepest counts, whatever tap a head reads.

    Args:
        table: All boards of a store.
        latencies: Of the backbone of each run; see `latencies_of`.
        is_any_device: Let backbones stand together that were timed on different devices;
            otherwise the device with the most backbones is taken.

    Raises:
        NotFoundError: No latency is recorded, or no task has two backbones with one.

    Source:
        MAXA, ICLR 2025 submission zV6D212c7Q, section 4.5 and figure 6, which shows the time as a
        multiple of the fastest backbone's; those are among the rows.
    """
    head, tasks = of_one_head(table)
    lines = [line for each in tasks for line in each.lines.values()]
    devices = Counter(name for line in lines for name in _devices(line, latencies))
    if lines and not devices:
        names = sorted({line.backbone for line in lines})
        raise NotFoundError(
            f"The figure speed needs the latency of the backbones, and that of {', '.join(names)} "
            f"was not measured. {_AGAIN}"
        )
    # Of equally many, the first by name.
    device = max(sorted(devices), key=lambda name: devices[name], default="")
    timed = [(each, _timed(each, latencies, device, is_any_device)) for each in tasks]
    timed = [(each, found) for each, found in timed if len(found) > 1]
    if not timed:
        others = "" if len(devices) < 2 else f" They were timed on {' and '.join(sorted(devices))}."
        hint = "" if len(devices) < 2 or is_any_device else " --any-device shows them together."
        raise NotFoundError(
            "The figure speed needs finished runs of one head and recipe on two backbones whose "
            f"latency was measured on one device, and {what_there_is(table)}.{others}{hint} "
            f"{_AGAIN}"
        )
    shown = [line for _, found in timed for line, _ in found.values()]
    return FigureData(
        kind="speed",
        title=f"Time of the backbone against the score, with the head {head}",
        panels=tuple(_panel(each, found) for each, found in timed),
        rows=tuple(row for each, found in timed for row in _rows(each, found, head)),
        notes=(*_untimed(timed, device, is_any_device), *left_out(table, shown)),
    )


_Found = Mapping[str, tuple[Line, Latency]]


def _devices(line: Line, latencies: Mapping[str, Sequence[Latency]]) -> set[str]:
    return {each.device_name for run_id in line.run_ids for each in latencies.get(run_id, ())}


def _timed(
    each: Backbones,
    latencies: Mapping[str, Sequence[Latency]],
    device: str,
    is_any_device: bool,
) -> dict[str, tuple[Line, Latency]]:
    """Give the lines of a task whose latency is known on the device, with that."""
    found = {}
    for name, line in each.lines.items():
        measured = [one for run_id in line.run_ids for one in latencies.get(run_id, ())]
        own = [one for one in measured if one.device_name == device]
        fitting = own or (measured if is_any_device else [])
        if fitting:
            found[name] = (line, max(fitting, key=lambda one: one.blocks / one.depth))
    return found


def _panel(each: Backbones, found: _Found) -> Panel:
    board = each.board
    dots = []
    for name, (line, latency) in found.items():
        value = primary(board, line)
        dots.append(
            Dot(name=name, x=latency.ms_per_image, y=value.value, low=value.low, high=value.high)
        )
    devices = " and ".join(sorted({latency.device_name for _, latency in found.values()}))
    lines = [line for line, _ in found.values()]
    return Panel(
        title=metric_text(board),
        subtitle=f"{measured_text(board)}; backbone timed on {devices}",
        x_label="; ".join(filter(None, ["ms an image", interval_text(board, lines)])),
        series={"": tuple(sorted(dots, key=lambda dot: dot.x))},
    )


def _rows(each: Backbones, found: _Found, head: str) -> list[dict[str, Any]]:
    fastest = min(latency.ms_per_image for _, latency in found.values())
    rows = []
    for name, (line, latency) in found.items():
        value = primary(each.board, line)
        rows.append(
            {
                "task": each.board.task,
                "metric": each.board.primary_metric,
                "board": each.board.heading,
                "head": head,
                "backbone": name,
                "ms_per_image": latency.ms_per_image,
                "times_fastest": latency.ms_per_image / fastest,
                "device": latency.device_name,
                "batch_size": latency.batch_size,
                "batches": latency.batches,
                "blocks": latency.blocks,
                "depth": latency.depth,
                "score": value.value,
                "low": value.low,
                "high": value.high,
                "runs": " ".join(line.run_ids),
            }
        )
    return rows


def _untimed(
    timed: Sequence[tuple[Backbones, _Found]], device: str, is_any_device: bool
) -> tuple[str, ...]:
    """Name the backbones that could stand in a panel if they had been timed."""
    missing = sorted({name for each, found in timed for name in each.lines if name not in found})
    if not missing:
        return ()
    where = "" if is_any_device else f" on {device}"
    return (f"Not drawn, as their latency was not measured{where}: {', '.join(missing)}. {_AGAIN}",)
