"""What a head is and costs, without data: parameters, output, arithmetic, bytes read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from featstore.errors import invalid
from featstore.types import TapShape
from heads.base import Head, TapTokens
from heads.build import HEADS, build_head

BYTES_PER_NUMBER = {"float16": 2, "bfloat16": 2, "float32": 4}


def describe_head(
    name: str,
    *,
    width: int,
    grid: tuple[int, int],
    n_outputs: int | Sequence[int] = 1,
    dtype: str = "float16",
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a head for one tap of `width` channels on `grid`, as JSON values.

    Args:
        name: Registered name, with or without its version.
        width: Channels of the tap.
        grid: Rows and columns of the tap.
        n_outputs: Output channels; several numbers make as many heads, side by side.
        dtype: How the features are stored: it decides the bytes read an image.
        options: Options of the head; may be text.

    Returns:
        ``head``, ``options``, ``parameters`` (all), ``dead_parameters`` (counted, never
        applied), ``live_parameters``, ``parameters_by_part``, ``output_shape`` of one image,
        ``forward_flops`` and ``step_flops`` (forward and backward) of one image, where a
        multiplication and an addition count as two, and ``bytes_per_image`` read from the store.

    Raises:
        NotFoundError: The head or an option is not known.
        InvalidInputError: A size, the dtype or an option has a wrong value.
    """
    if min(width, *grid) < 1:
        raise invalid("width, grid", (width, grid), "positive numbers")
    if dtype not in BYTES_PER_NUMBER:
        raise invalid("dtype", dtype, f"one of {', '.join(BYTES_PER_NUMBER)}")
    tap = TapShape(tap="norm", dim=width, grid=grid)
    head = build_head(name, taps=[tap], n_outputs=n_outputs, options=options)
    forward_flops, step_flops, output_shape = _count_flops(head, tap)
    n_parameters, n_dead = head.n_parameters(), head.dead_parameters()
    return {
        "head": HEADS.full_name(name),
        "options": asdict(head.options),
        "width": width,
        "grid": list(grid),
        "parameters": n_parameters,
        "dead_parameters": n_dead,
        "live_parameters": n_parameters - n_dead,
        "parameters_by_part": _count_by_part(head),
        "output_shape": list(output_shape),
        "forward_flops": forward_flops,
        "step_flops": step_flops,
        "bytes_per_image": tap.bytes_per_row(BYTES_PER_NUMBER[dtype]),
        "dtype": dtype,
    }


def _count_by_part(head: Head) -> dict[str, int]:
    """Count the parameters of each part; what the head itself holds is a part by its own name."""
    counts: dict[str, int] = {}
    for name, parameter in head.named_parameters():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _count_flops(head: Head, tap: TapShape) -> tuple[int, int, tuple[int, ...]]:
    """Run one image of zeros forward and backward; only products and convolutions count."""
    assert tap.grid is not None
    patch = torch.zeros(1, tap.grid[0] * tap.grid[1], tap.dim)
    tokens = TapTokens(patch=patch, grid=tap.grid)
    head.eval()  # a norm over a batch of one has no spread
    with FlopCounterMode(display=False) as counter:
        output = head([tokens])
        forward_flops = int(counter.get_total_flops())
        output.sum().backward()
    return forward_flops, int(counter.get_total_flops()), tuple(output.shape[1:])
