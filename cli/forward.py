"""The one place that runs a backbone for a head: features of new images, by a run's own plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.backbones import load_from_identity
from featstore.codecs import decode, encode
from featstore.geometry import place
from featstore.images import draw
from featstore.plan import ExtractPlan, parse_resize
from featstore.types import Box, Placement

if TYPE_CHECKING:
    from featstore.backbones import Backbone
    from heads.predict import Forward


def make_forward(record: Mapping[str, Any], *, weights: str | Path | None, device: str) -> Forward:
    """Give what turns images into the taps of a run; the backbone is loaded for the first ones.

    Numbers are rounded to the store's dtype, so that a head sees what it was trained on.

    Args:
        record: What ``run.json`` says.
        weights: The backbone's weights file or "random[:SEED]", where they were not its own.
        device: Where to compute.

    Raises:
        InvalidInputError: From the callable: the weights are not those of the run, or are not on
            this machine.
    """

    @cache
    def loaded() -> tuple[ExtractPlan, Backbone]:
        plan = ExtractPlan.from_json(record["plan"])
        backbone = load_from_identity(
            record["backbone"], weights=weights, device=device, taps=record["taps"]
        )
        return plan, backbone

    def forward(
        images: Sequence[np.ndarray], crops: Sequence[Box | None] | None = None, /
    ) -> list[tuple[Mapping[str, np.ndarray], Placement]]:
        plan, backbone = loaded()
        regions = crops or [None] * len(images)
        drawn = [_drawn(*shown, plan) for shown in zip(images, regions, strict=True)]
        outputs = {
            name: decode(encode(tensor.float().cpu().numpy(), plan.dtype), plan.dtype)
            for name, tensor in backbone.forward(np.stack([pixels for pixels, _ in drawn])).items()
        }
        return [
            ({name: array[index] for name, array in outputs.items()}, placement)
            for index, (_, placement) in enumerate(drawn)
        ]

    return forward


def _drawn(image: np.ndarray, crop: Box | None, plan: ExtractPlan) -> tuple[np.ndarray, Placement]:
    """Draw an image, or a region of it, into the backbone's input as extraction does."""
    placement = place(
        source_hw=(image.shape[0], image.shape[1]),
        crop=crop,
        input_hw=plan.image_size,
        resize=plan.resize,
        view="plain",
    )
    rule = parse_resize(plan.resize)
    red, green, blue = (round(255 * channel) for channel in plan.mean)
    pixels = draw(
        image,
        placement,
        interpolation=plan.interpolation,
        fill_rgb=(red, green, blue),
        via=rule.via,
        upscale=rule.upscale,
    )
    return pixels, placement
