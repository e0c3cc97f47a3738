"""What a made-up room consists of: surfaces, solids, lights, a camera, and the dice for all of it.

Metres; x and z span the floor, y points up; a room is the box from the origin to its `size`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Vector = tuple[float, float, float]

CLASSES = (
    "wall",
    "floor",
    "ceiling",
    "table",
    "seat",
    "cabinet",
    "crate",
    "ball",
    "barrel",
    "picture",
    "door",
    "rug",
)
PATTERNS = ("plain", "tiles", "checker", "stripes", "bricks", "planks", "clouds", "dots")


class Dice:
    """A stream of random choices that is the same with every version of NumPy."""

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw a number in [low, high)."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """Draw a whole number from low to high, both included."""
        return low + int(self.uniform() * (high - low + 1))

    def choice(self, options: Sequence[T]) -> T:
        """Draw one of `options`."""
        return options[self.integer(0, len(options) - 1)]

    def turn(self) -> tuple[float, float]:
        """Draw the cosine and sine of an angle."""
        while True:
            x, y = self.uniform(-1, 1), self.uniform(-1, 1)
            length = math.sqrt(x * x + y * y)
            if 0.1 < length <= 1:
                return (x / length, y / length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Surface:
    """How one thing looks."""

    class_id: int
    colour: Vector  # linear RGB, 0 to 1
    second: Vector  # the pattern's other colour
    pattern: int  # place in PATTERNS
    period: float  # of the pattern, metres
    grain: float  # strength of the fine noise, 0 to 1
    gloss: float  # strength of the highlight, 0 to 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Solid:
    """A box, sphere or upright cylinder, turned about the vertical through its centre."""

    shape: str  # "box", "sphere" or "cylinder"
    centre: Vector
    half: Vector  # half sizes; a sphere has three equal radii, a cylinder equal x and z
    turn: tuple[float, float]  # cosine and sine
    surface: int
    instance: int  # 1, 2, ...; parts of one thing share it


@dataclass(frozen=True, kw_only=True, slots=True)
class Light:
    """A point light."""

    at: Vector
    colour: Vector  # strength at one metre


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One room. The first six surfaces are its planes: -x, +x, floor, ceiling, -z, +z."""

    size: Vector
    surfaces: tuple[Surface, ...]
    solids: tuple[Solid, ...]
    lights: tuple[Light, ...]
    ambient: float
    salt: int  # of the grain of its surfaces


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """A pinhole; `right` and `down` span the picture. `focal` is in picture widths."""

    at: Vector
    forward: Vector
    right: Vector
    down: Vector
    focal: float
    exposure: float  # mean brightness that the picture gets, 0 to 1
    blue: float  # white balance: gain of blue over red
    noise: float  # of the sensor, in 8-bit steps
    salt: int  # of that noise
