"""`featstore extract --for PRESET`: the features that a preset of `heads` needs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from cli.common import is_said, say
from featstore.plan import compose_resize, parse_resize


def fill_from_preset(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Give the options of `extract` with what a preset needs where the user said nothing.

    What was taken, and what the user wants otherwise, is told on stderr.

    Raises:
        NotFoundError: There is no such preset.
        InvalidInputError: The resize rule that follows is none.
    """
    from heads.presets import find_preset

    said_backbone = options["backbone"] if is_said("backbone") else None
    preset = find_preset(name, backbone=said_backbone)
    needs = preset.needs
    wanted: dict[str, Any] = {
        "backbone": needs.backbone,
        "image_size": needs.image_size,
        "taps": needs.taps,
        "dtype": needs.dtype,
    }
    if needs.tail is not None:
        wanted["tail"] = needs.tail
    said = {each for each in wanted if is_said(each)}
    filled = options | {each: value for each, value in wanted.items() if each not in said}
    filled |= {"resize": _resize(needs.resize, options), "basis": None, "upscale": None}
    words = [
        f"--backbone {filled['backbone']}",
        f"--image-size {_flat(filled['image_size'])}",
        f"--resize {shlex.quote(filled['resize'])}",
        f"--taps {_flat(filled['taps'])}",
        f"--dtype {filled['dtype']}",
        *([f"--tail {filled['tail']}"] if filled.get("tail") is not None else []),
    ]
    say(f"For {preset.name}: {' '.join(words)}")
    differing = sorted(each for each in said if _flat(options[each]) != _flat(wanted[each]))
    if parse_resize(filled["resize"]) != parse_resize(needs.resize):
        differing.append("resize")
    if differing:
        expected = wanted | {"resize": needs.resize}
        parts = [f"{each} (preset: {_flat(expected[each])})" for each in differing]
        say(f"Not as {preset.name} needs it: {', '.join(parts)}.")
    _warn_of_data(preset.name, preset.data, options["data"])
    return filled


def _resize(rule: str, options: dict[str, Any]) -> str:
    """Change what was said of a rule: --resize changes all of it, --basis and --upscale a part."""
    basis, upscale = options["basis"], options["upscale"]
    if is_said("resize"):
        return compose_resize(options["resize"], basis=basis, upscale=upscale)
    needed = parse_resize(rule)
    return compose_resize(needed.kind, basis=basis or needed.via, upscale=upscale or needed.upscale)


def _warn_of_data(name: str, expected: Sequence[str], data: Sequence[str]) -> None:
    from featstore.datasets import format_of

    for spec in data:
        if format_of(spec) not in expected:
            formats = " or ".join(expected)
            say(f"{name}: {spec} is not the paper's data, which is of format {formats}.")


def _flat(value: Any) -> str:
    """Write a value as the command line takes it; taps may come in one text or in several."""
    if not isinstance(value, tuple):
        return str(value)
    return ("x" if isinstance(value[0], int) else ",").join(map(str, value))
