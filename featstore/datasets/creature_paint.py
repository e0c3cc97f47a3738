"""Paint made-up animals: bones as shaded solids with fur, in front of a landscape."""

from __future__ import annotations

import numpy as np

from featstore.datasets.creature_bodies import COAT, DARK, HORN, INNER, PALE, Coat
from featstore.datasets.creature_model import Canvas, F, Grain, compose, model, ramp, window_of
from featstore.datasets.creature_scenery import cast_shadow, draw_things, landscape
from featstore.datasets.creature_view import View
from featstore.datasets.scenes import Dice, Vector


def paint(view: View, coat: Coat, dice: Dice, grain: Grain) -> np.ndarray:
    """Paint an animal in a landscape.

    Args:
        view: Where its bones are.
        coat: How it is covered.
        dice: Choices of light and landscape.
        grain: Noise of fur, ground and sensor.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    light = _light(dice)
    planes = landscape(view, dice, grain)
    draw_things(planes, view, light, (dice, grain))
    cast_shadow(planes, view)
    window = window_of(view.box, view.hw)
    canvas = model(view.balls, window)
    colours = _animal_colours(canvas, coat, view.scale, grain)
    compose(planes, window, canvas, colours, light)
    return _expose(planes, dice, grain)


def _light(dice: Dice) -> Vector:
    """Draw where light comes from: above, mostly from the viewer's side."""
    x, y, z = dice.uniform(-0.7, 0.7), -dice.uniform(0.4, 0.9), dice.uniform(0.35, 0.9)
    length = float(np.sqrt(x * x + y * y + z * z))
    return (x / length, y / length, z / length)


def _animal_colours(canvas: Canvas, coat: Coat, scale: float, grain: Grain) -> list[np.ndarray]:
    """Colour every covered pixel before it is lit, one array a channel."""
    shape = canvas.depth.shape
    fur = grain.speckle(shape, (1, 2))
    second = _pattern(canvas, coat, scale, grain)
    belly = np.minimum(np.maximum(canvas.normal_y * F(2.2) - F(0.9), F(0)), F(1))
    is_coat = canvas.cover == COAT
    tables = [(DARK, coat.dark), (PALE, coat.pale), (HORN, coat.horn), (INNER, coat.pale)]
    colours = []
    for channel in range(3):
        base, pale = F(coat.base[channel]), F(coat.pale[channel])
        plane = base + second * (F(coat.second[channel]) - base)
        plane += belly * (pale - plane) * F(0.6)
        table = np.zeros(8, np.float32)
        for cover, colour in tables:
            table[cover] = colour[channel]
        plane = np.where(is_coat, plane, table[canvas.cover])
        colours.append(plane * (F(0.86) + F(0.28) * fur))
    return colours


def _pattern(canvas: Canvas, coat: Coat, scale: float, grain: Grain) -> np.ndarray:
    """Give how much of the second colour each pixel has, 0 to 1."""
    shape, period = canvas.depth.shape, coat.period * scale
    if coat.pattern == "plain":
        return np.zeros(shape, np.float32)
    if coat.pattern == "saddle":
        return ramp(-canvas.normal_y * F(1.5) - F(0.75 - coat.share))
    if coat.pattern == "stripes":
        wobble = grain.field(shape, (period, period)) * F(1.2)
        phase = canvas.along * F(1 / period) + wobble
        wave = np.abs(phase - np.floor(phase) - F(0.5)) * F(2)  # 0 to 1 and back
        return ramp((F(coat.share) - wave) * F(4))
    cell = 0.55 * period if coat.pattern == "spots" else 1.6 * period
    return ramp((grain.field(shape, (cell, cell)) - F(1.02 - coat.share)) * F(7))


def _expose(planes: np.ndarray, dice: Dice, grain: Grain) -> np.ndarray:
    """Turn planes into 8-bit RGB with the sensor's noise."""
    gain, noise = dice.uniform(205.0, 265.0), dice.uniform(2.0, 12.0)
    warmth = dice.uniform(-0.07, 0.07)
    picture = np.empty((*planes.shape[1:], 3), np.uint8)
    for channel, plane in enumerate(planes):
        speckle = grain.bytes(*plane.shape) * F(noise / 255)
        speckle += F(0.5 - noise / 2)
        plane *= F(gain * (1 + warmth * (1 - channel)))
        plane += speckle
        picture[..., channel] = np.minimum(np.maximum(plane, F(0), out=plane), F(255), out=plane)
    return picture
