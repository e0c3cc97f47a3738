"""How fast a backbone runs: a measurement beside the runs, part of no key and no checksum.

``runs/latency-KEY.json`` may be deleted at any time. It holds one entry for each device and each
depth that the backbone of a feature set was run to; a new measurement replaces the entry.

Source:
    MAXA, ICLR 2025 submission zV6D212c7Q, section 4.5: ten batches of eight images.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.errors import FormatError
from featstore.files import write_json
from featstore.taps import parse_tap

if TYPE_CHECKING:
    from featstore.backbones import Backbone

BATCH_SIZE = 8
BATCHES = 10
BUDGET_S = 2.0
"""After so long no further batch is begun: a slow backbone is timed on fewer batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """The time of a batch of images on one device: drawn pixels in, taps out."""

    device: str  # "cpu", "cuda" ...
    device_name: str
    blocks: int  # blocks or stages that were run, of `depth`
    depth: int
    batch_size: int
    batches: int  # that were timed
    seconds: float  # the median of a batch
    libraries: Mapping[str, str]

    @property
    def ms_per_image(self) -> float:
        """Milliseconds an image."""
        return 1000 * self.seconds / self.batch_size


def run_once(model: Backbone, images: np.ndarray) -> None:
    """Run one batch to the end; reading one number back waits for the device."""
    outputs = model.forward(images)
    float(next(iter(outputs.values())).flatten()[0])


def measure_latency(model: Backbone, *, budget_s: float = BUDGET_S) -> Latency:
    """Time ten batches of eight grey images, or as many as are begun within the budget.

    A first batch warms the device up and does not count, unless it is the only one.
    """
    from featstore.backbones.devices import describe_device

    images = np.full((BATCH_SIZE, *model.input_hw, 3), 128, np.uint8)
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) <= BATCHES and (not seconds or time.perf_counter() - began < budget_s):
        start = time.perf_counter()
        run_once(model, images)
        seconds.append(time.perf_counter() - start)
    timed = seconds[1:] or seconds
    return Latency(
        device=model.device,
        device_name=describe_device(model.device),
        blocks=_blocks_run(model),
        depth=model.depth,
        batch_size=BATCH_SIZE,
        batches=len(timed),
        seconds=statistics.median(timed),
        libraries=dict(model.library_versions),
    )


def latency_path(store: Path, key: str) -> Path:
    """Give the file with what was measured of the backbone of a feature set."""
    return store / "runs" / f"latency-{key}.json"


def record_latency(path: Path, model: Backbone, *, is_renewed: bool) -> Latency:
    """Measure a backbone and keep the result.

    Args:
        path: See `latency_path`; two at once must not call it for one file.
        model: As it was loaded for the taps of an extraction.
        is_renewed: Measure even if this device and depth were measured before.
    """
    from featstore.backbones.devices import describe_device

    key = (describe_device(model.device), _blocks_run(model))
    try:
        known = {(each.device_name, each.blocks): each for each in read_latencies(path)}
    except FormatError:  # it is made anew
        known = {}
    if key not in known or is_renewed:
        known[key] = measure_latency(model)
        write_json(path, {"latency": [asdict(known[each]) for each in sorted(known)]})
    return known[key]


def read_latencies(path: Path) -> tuple[Latency, ...]:
    """Read what was measured; nothing where nothing was.

    Raises:
        FormatError: The file is damaged.
    """
    if not path.exists():
        return ()
    try:
        return tuple(_latency(each) for each in json.loads(path.read_text())["latency"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path} is damaged. Delete it; the next `featstore extract` measures again."
        ) from error


def _latency(value: Mapping[str, Any]) -> Latency:
    found = Latency(**{field.name: value[field.name] for field in fields(Latency)})
    if not (found.seconds > 0 and found.batch_size > 0):
        raise ValueError("no time or no image")
    return found


def _blocks_run(model: Backbone) -> int:
    """Count the blocks or stages that the taps need: the others were cut off."""
    numbers = (parse_tap(tap).index for tap in model.taps)
    return 1 + max(model.depth - 1 if number is None else number for number in numbers)
