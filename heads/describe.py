"""What a head is and costs, without data: parameters, output, arithmetic, bytes read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from featstore.catalogue import CATALOGUE
from featstore.errors import invalid
from featstore.tail import TailSpec
from featstore.types import TapShape
from featstore.vit_sizes import VitSize, plain_vit, vit_size
from heads.base import Head, TapTokens
from heads.build import HEADS, build_head
from heads.options import parse_options
from heads.presets.base import Preset
from heads.tasks import TASKS

BYTES_PER_NUMBER = {"float16": 2, "bfloat16": 2, "float32": 4}


def describe_head(
    name: str,
    *,
    width: int | None = None,
    grid: tuple[int, int],
    backbone: str | None = None,
    taps: Sequence[str] = ("norm",),
    n_outputs: int | Sequence[int] = 1,
    dtype: str = "float16",
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a head for taps of `width` channels on `grid`, as JSON values.

    Args:
        name: Registered name, with or without its version.
        width: Channels of a tap; blocks that a head copies are then those of the usual ViT of
            this width.
        grid: Rows and columns of a tap.
        backbone: Of the catalogue, in place of `width`.
        taps: What the head reads, unless its options choose.
        n_outputs: Output channels, or keypoints where the head asks for these; several numbers
            make as many heads, side by side.
        dtype: How the features are stored: it decides the bytes read an image.
        options: Options of the head; may be text.

    Returns:
        ``head``, ``options``, ``backbone``, ``taps`` (each once), ``parameters`` (all),
        ``dead_parameters`` (counted, never applied), ``live_parameters``, ``frozen_parameters``
        (of the backbone, held beside these), ``parameters_by_part``,
        ``output_shape`` of one image, ``forward_flops`` and ``step_flops`` (forward and backward)
        of one image, where a multiplication and an addition count as two, and ``bytes_per_image``
        read from the store.

    Raises:
        NotFoundError: The head, the backbone or an option is not known.
        InvalidInputError: A size, the dtype or an option has a wrong value.
    """
    if (width is None) == (backbone is None):
        raise invalid("width, backbone", (width, backbone), "one of the two")
    if min(1 if width is None else width, *grid) < 1:
        raise invalid("width, grid", (width, grid), "positive numbers")
    if dtype not in BYTES_PER_NUMBER:
        raise invalid("dtype", dtype, f"one of {', '.join(BYTES_PER_NUMBER)}")
    head_type = HEADS[name]
    chosen = asdict(head_type.OPTIONS(**parse_options(head_type.OPTIONS, options or {})))
    size = plain_vit(width) if width is not None else vit_size(str(backbone))
    shapes, tail = taps_on(head_type, size, grid=grid, named=taps, options=chosen)
    # Shapes are enough: copied blocks may be 200 million numbers.
    device = torch.device("cpu" if tail is None else "meta")
    asked = (n_outputs,) if isinstance(n_outputs, int) else n_outputs
    counts = [count * head_type.n_numbers(chosen) for count in asked]
    with device:
        head = build_head(name, taps=shapes, n_outputs=counts, options=chosen, tail=tail)
    forward_flops, step_flops, output_shape = _count_flops(head, shapes, device)
    n_parameters, n_dead = head.n_parameters(), head.dead_parameters()
    read = dict.fromkeys(shapes)
    return {
        "head": HEADS.full_name(name),
        "options": asdict(head.options),
        "backbone": backbone,
        "width": size.width,
        "grid": list(grid),
        "taps": [shape.tap for shape in read],
        "parameters": n_parameters,
        "dead_parameters": n_dead,
        "live_parameters": n_parameters - n_dead,
        "frozen_parameters": sum(p.numel() for p in head.parameters() if not p.requires_grad),
        "parameters_by_part": _count_by_part(head),
        "output_shape": list(output_shape),
        "forward_flops": forward_flops,
        "step_flops": step_flops,
        "bytes_per_image": sum(tap.bytes_per_row(BYTES_PER_NUMBER[dtype]) for tap in read),
        "dtype": dtype,
    }


def describe_with_preset(
    preset: Preset,
    name: str,
    *,
    backbone: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a head on the taps and with the options of a published experiment.

    Args:
        preset: The experiment.
        name: The head; options of the preset are those of its own head only.
        backbone: In place of the preset's.
        options: Options of the head that win; may be text.

    Returns:
        What `describe_head` gives, and ``preset``.
    """
    needs, entry = preset.needs, CATALOGUE[backbone or preset.needs.backbone]
    head_type, task_type = HEADS[name], TASKS[preset.task]
    own = preset.head_options if HEADS[preset.head] is head_type else {}
    said = parse_options(head_type.OPTIONS, {**own, **(options or {})})
    filled = asdict(head_type.OPTIONS(**said))
    numbers = head_type.n_numbers(filled)
    found = describe_head(
        name,
        backbone=entry.name,
        grid=(-(-needs.image_size[0] // entry.stride), -(-needs.image_size[1] // entry.stride)),
        taps=needs.taps,
        n_outputs=[n // numbers for n in task_type(**preset.task_options).readouts],
        dtype=needs.dtype,
        options=head_type.completed(filled, stage=task_type.stage),
    )
    return {**found, "preset": preset.name}


def taps_on(
    head_type: type[Head],
    size: VitSize,
    *,
    grid: tuple[int, int],
    named: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[list[TapShape], TailSpec | None]:
    """Give what a head would read of a ViT, and the blocks that it would copy.

    Args:
        head_type: Head.
        size: The ViT.
        grid: Rows and columns of its taps.
        named: Taps, unless the options choose.
        options: All options of the head.
    """
    asked = head_type.asked_taps(options, depth=size.depth)
    added = head_type.added_taps(options, depth=size.depth)
    shapes = [
        TapShape(tap=tap, dim=size.width, grid=grid, n_prefix=size.n_prefix)
        for tap in (*(named if asked is None else asked), *added)
    ]
    n_copied = head_type.n_tail_blocks(options)
    return shapes, size.tail(n_copied) if n_copied else None


def _count_by_part(head: Head) -> dict[str, int]:
    """Count what each part trains; what the head itself holds is a part by its own name."""
    counts: dict[str, int] = {}
    for name, parameter in head.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _count_flops(
    head: Head, taps: Sequence[TapShape], device: torch.device
) -> tuple[int, int, tuple[int, ...]]:
    """Run one image of zeros forward and backward; only products and convolutions count."""
    head.eval()  # a norm over a batch of one has no spread
    with FlopCounterMode(display=False) as counter:
        output = head([_tokens(tap, device) for tap in taps])
        forward_flops = int(counter.get_total_flops())
        output.sum().backward()
    return forward_flops, int(counter.get_total_flops()), tuple(output.shape[1:])


def _tokens(tap: TapShape, device: torch.device) -> TapTokens:
    assert tap.grid is not None
    tensors = {name: torch.zeros(1, *size, device=device) for name, size in tap.arrays.items()}
    return TapTokens(patch=tensors["patch"], prefix=tensors.get("prefix"), grid=tap.grid)
