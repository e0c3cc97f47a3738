"""Numbers to colours, for pictures."""

from __future__ import annotations

import numpy as np

# matplotlib's "viridis" at nine even steps: brightness rises evenly, also for colour-blind eyes
_STOPS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    dtype=np.float64,
)


def paint(values_hw: np.ndarray, valid_hw: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Colour numbers from dark blue (low) to yellow (high); black where not valid.

    Args:
        values_hw: (H, W) numbers; anything where not valid.
        valid_hw: (H, W) bool.
        span: The values of the first and of the last colour; others are clamped.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    low, high = span
    share = (np.where(valid_hw, values_hw, low) - low) / (high - low)
    place = np.clip(share, 0, 1) * (len(_STOPS) - 1)
    steps = np.arange(len(_STOPS))
    channels = [np.interp(place, steps, _STOPS[:, channel]) for channel in range(3)]
    colours = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return np.where(valid_hw[..., None], colours, np.uint8(0))


def class_colours(n: int) -> np.ndarray:
    """Give (n, 3) uint8 colours that are told apart: hues a golden angle apart, three shades."""
    number = np.arange(n)
    hue = (0.58 + number * 0.618034) % 1
    value = np.array([0.95, 0.75, 0.55])[number // 3 % 3]
    strength = np.array([0.75, 0.45, 0.9])[number % 3]
    # Of a hue, each channel is high around its own third of the circle.
    channel = (np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    share = np.clip(np.minimum(channel, 4 - channel), 0, 1)
    rgb = value[:, None] * (1 - strength[:, None] * share)
    return np.rint(255 * rgb).astype(np.uint8)


def lay_over(
    image_hwc: np.ndarray, colours_hwc: np.ndarray, where_hw: np.ndarray, opacity: float
) -> np.ndarray:
    """Lay colours over an image where `where_hw` says: (H, W, 3) uint8."""
    mixed = (1 - opacity) * image_hwc + opacity * np.asarray(colours_hwc, dtype=np.float64)
    return np.where(where_hw[..., None], np.rint(mixed), image_hwc).astype(np.uint8)


def dimmed(image_hwc: np.ndarray) -> np.ndarray:
    """Give a dark grey version of an image, to paint on: (H, W, 3) uint8."""
    grey = image_hwc.mean(axis=2, keepdims=True)
    return np.repeat(np.rint(30 + 0.4 * grey), 3, axis=2).astype(np.uint8)
