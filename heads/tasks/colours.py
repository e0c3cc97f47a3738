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
