"""What an extraction would cost, from a short timed forward pass; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featstore.backbones import Backbone
from featstore.errors import InvalidInputError
from featstore.extract import default_batch_size, plan_of, prepare_backbone
from featstore.plan import RunOptions
from featstore.planning import open_readers, select_items
from featstore.store import STORE_DTYPES
from featstore.types import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Cost of an extraction, if nothing of it is stored yet."""

    backbone: str
    feature_set: str
    taps: dict[str, int]  # tap -> bytes an image
    images: int  # rows: an image counts once a view
    bytes_per_image: int
    tail: int  # blocks of the backbone
    tail_bytes: int  # of their weights, once
    bytes: int
    images_per_second: float  # of the forward pass alone
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Give JSON values."""
        return asdict(self)


def estimate(
    *,
    backbone: str,
    data: Sequence[str | Reader],
    taps: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    resize: str = "squash",
    dtype: str = "float16",
    weights: str | Path | None = None,
    tail: int | str | None = None,
    options: RunOptions | None = None,
) -> Estimate:
    """Tell bytes an image, total size and time of an extraction before it runs.

    Takes the arguments of `extract.extract`. The time is that of the forward pass, which is the
    larger part of an extraction; images are counted as items, before equal ones are joined.

    Raises:
        InvalidInputError: As in `extract`.
    """
    options = options or RunOptions()
    if dtype not in STORE_DTYPES:
        raise InvalidInputError(f"`dtype` must be one of {', '.join(STORE_DTYPES)}. Got {dtype!r}.")
    selected = select_items(open_readers(data), options)
    model = prepare_backbone(
        backbone,
        image_size=image_size,
        resize=resize,
        weights=weights,
        device=options.device,
        taps=taps,
        tail=tail,
    )
    plan = plan_of(model, resize=resize, dtype=dtype)
    itemsize = int(STORE_DTYPES[dtype][-1])
    per_tap = {tap: model.tap_shapes[tap].bytes_per_row(itemsize) for tap in model.taps}
    n_rows = len(options.views) * sum(
        len({(item.path, item.crop) for item in items}) for items in selected.values()
    )
    tail_bytes = 0 if model.tail is None else model.tail.n_bytes
    speed = images_per_second(model, options.batch_size or default_batch_size(model.device))
    return Estimate(
        backbone=model.name,
        feature_set=plan.key(),
        taps=per_tap,
        images=n_rows,
        bytes_per_image=sum(per_tap.values()),
        tail=0 if model.tail is None else model.tail.spec.n_blocks,
        tail_bytes=tail_bytes,
        bytes=n_rows * sum(per_tap.values()) + tail_bytes,
        images_per_second=round(speed, 2),
        seconds=round(n_rows / speed, 1),
    )


def images_per_second(model: Backbone, batch_size: int, *, n_batches: int = 2) -> float:
    """Time a few forward passes of grey images, after one that does not count."""
    images = np.full((batch_size, *model.input_hw, 3), 128, np.uint8)
    _run_once(model, images)
    start = time.perf_counter()
    for _ in range(n_batches):
        _run_once(model, images)
    return batch_size * n_batches / (time.perf_counter() - start)


def _run_once(model: Backbone, images: np.ndarray) -> None:
    """Run one batch to the end; reading one number back waits for the device."""
    outputs = model.forward(images)
    float(next(iter(outputs.values())).flatten()[0])
