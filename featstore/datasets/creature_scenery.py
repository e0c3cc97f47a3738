"""Landscapes behind made-up animals: sky, ground, trees, bushes and rocks."""

from __future__ import annotations

import numpy as np

from featstore.datasets.creature_model import F, Grain, compose, model, window_of
from featstore.datasets.creature_view import Balls, View
from featstore.datasets.scenes import Dice, Vector


def landscape(view: View, dice: Dice, grain: Grain) -> np.ndarray:
    """Paint sky and ground, (3, H, W) float32."""
    height, width = view.hw
    horizon = view.ground - dice.uniform(0.12, 0.75) * height * 0.6
    sky = dice.choice(((0.55, 0.7, 0.9), (0.75, 0.8, 0.85), (0.85, 0.72, 0.6), (0.35, 0.45, 0.4)))
    soil = dice.choice(
        (
            (0.36, 0.45, 0.2),
            (0.62, 0.55, 0.35),
            (0.45, 0.36, 0.26),
            (0.8, 0.82, 0.85),
            (0.3, 0.33, 0.2),
        )
    )
    tone, hill = dice.uniform(0.75, 1.15), dice.uniform(4.0, 26.0)
    rows = np.arange(height, dtype=np.float32)[:, None]
    skyline = grain.field((1, width), (1.0, width / 5)) * F(hill) - F(horizon)
    land = rows + skyline
    np.minimum(np.maximum(land, F(0), out=land), F(1), out=land)
    haze = np.minimum(np.maximum(F(1) - (rows - F(horizon)) * F(3 / height), F(0)), F(0.6))
    texture = grain.field(view.hw, (height / 14, width / 6)) * F(0.4)
    texture += grain.speckle(view.hw, dice.choice(((1, 2), (2, 1), (2, 2), (2, 4)))) * F(0.3)
    texture += F(0.62)
    texture *= land
    texture *= (F(1) - haze) * F(tone)
    air = grain.field(view.hw, (height / 6, width / 3)) * F(0.3)
    air += F(0.85)
    air *= F(1) - land
    air += land * (F(0.8) * haze)
    planes = np.empty((3, height, width), np.float32)
    for channel, plane in enumerate(planes):
        np.multiply(air, F(sky[channel]), out=plane)
        plane += texture * F(soil[channel])
    return planes


def draw_things(planes: np.ndarray, view: View, light: Vector, chance: tuple[Dice, Grain]) -> None:
    """Stand a few trees, bushes and rocks behind the animal, the farthest first."""
    dice, grain = chance
    height, width = view.hw
    things = []
    for _ in range(dice.integer(0, 3)):
        foot = view.ground - dice.uniform(0.02, 0.3) * height
        size = dice.uniform(0.06, 0.22) * height
        things.append(dice.choice(_THINGS)(dice.uniform(0.0, width), foot, size, dice))
    if not things:
        return
    balls = Balls(
        ends=np.array([ball[0] for thing, _ in things for ball in thing]),
        widths=np.array([ball[1] for thing, _ in things for ball in thing]),
        covers=tuple(number for number, (thing, _) in enumerate(things) for _ in thing),
    )
    low = (balls.ends[..., :2] - balls.widths[..., None]).min(axis=(0, 1))
    high = (balls.ends[..., :2] + balls.widths[..., None]).max(axis=(0, 1))
    window = window_of((low[0], low[1], high[0], high[1]), view.hw)
    canvas = model(balls, window)
    texture = F(0.7) + F(0.6) * grain.speckle(canvas.depth.shape, (2, 2))
    colours = np.array([colour for _, colour in things], np.float32)
    planes_of = [colours[:, channel][canvas.cover] * texture for channel in range(3)]
    compose(planes, window, canvas, planes_of, light)


_Thing = tuple[list[tuple[tuple[Vector, Vector], tuple[float, float]]], Vector]


def _tree(x: float, foot: float, size: float, dice: Dice) -> _Thing:
    lean, thick, z = dice.uniform(-0.3, 0.3) * size, dice.uniform(0.06, 0.16) * size, 9 * foot
    top = (x + lean, foot - 2.2 * size, z)
    crowns = [
        (
            top[0] + dice.uniform(-0.8, 0.8) * size,
            top[1] + dice.uniform(-0.7, 0.5) * size,
            z + dice.uniform(-0.5, 1.0) * size,
        )
        for _ in range(4)
    ]
    green = dice.uniform(0.2, 0.5)
    colour = (green * dice.uniform(0.5, 1.1), green, green * dice.uniform(0.2, 0.6))
    trunk = (((x, foot, z), top), (thick, 0.6 * thick))
    return [trunk, *(((at, at), (0.65 * size, 0.65 * size)) for at in crowns)], colour


def _bush(x: float, foot: float, size: float, dice: Dice) -> _Thing:
    spots = [
        (
            x + dice.uniform(-0.9, 0.9) * size,
            foot - dice.uniform(0.1, 0.5) * size,
            9 * foot + dice.uniform(-0.5, 0.5) * size,
        )
        for _ in range(5)
    ]
    green = dice.uniform(0.25, 0.55)
    colour = (green * dice.uniform(0.5, 1.2), green, green * dice.uniform(0.2, 0.7))
    return [((at, at), (0.45 * size, 0.45 * size)) for at in spots], colour


def _rock(x: float, foot: float, size: float, dice: Dice) -> _Thing:
    grey, z = dice.uniform(0.25, 0.65), 9 * foot
    low = ((x - 0.5 * size, foot - 0.2 * size, z), (x + 0.6 * size, foot - 0.1 * size, z))
    high = ((x, foot - 0.45 * size, z), (x + 0.3 * size, foot - 0.2 * size, z + 0.2 * size))
    width = (0.4 * size, 0.3 * size)
    return [(low, width), (high, width)], (grey, grey, 0.95 * grey)


_THINGS = (_tree, _bush, _rock)


def cast_shadow(planes: np.ndarray, view: View) -> None:
    """Darken the ground under the animal."""
    x0, _, x1, _ = view.box
    middle, reach = (x0 + x1) / 2, 0.55 * (x1 - x0)
    flat = 0.16 * view.scale
    centre = view.ground - 0.4 * flat
    window = window_of((middle - reach, centre - flat, middle + reach, centre + flat), view.hw)
    rows = np.arange(window[0].start, window[0].stop, dtype=np.float32)[:, None]
    columns = np.arange(window[1].start, window[1].stop, dtype=np.float32)[None, :]
    x, y = (columns - F(middle)) * F(1 / reach), (rows - F(centre)) * F(1 / flat)
    dark = np.maximum(F(1) - x * x - y * y, F(0))
    planes[:, window[0], window[1]] *= F(1) - F(0.5) * dark
