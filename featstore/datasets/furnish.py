"""Furnish random rooms and choose where they are looked at from.

Numbers come from the raw stream of PCG64, which NumPy promises never to change, and only from
``+ - * /`` and the square root, so that a seed gives the same scene on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from featstore.datasets.scenes import (
    CLASSES,
    PATTERNS,
    Camera,
    Dice,
    Light,
    Scene,
    Solid,
    Surface,
    Vector,
)


@dataclass(kw_only=True, slots=True)
class _Builder:
    """A scene under construction, with the circles that are taken on its floor."""

    dice: Dice
    size: Vector
    surfaces: list[Surface] = field(default_factory=list)
    solids: list[Solid] = field(default_factory=list)
    circles: list[tuple[float, float, float]] = field(default_factory=list)
    n_instances: int = 0

    def paint(self, class_name: str, patterns: Sequence[str]) -> int:
        """Add a random surface and give its number."""
        dice = self.dice
        tone, second = _colour(dice), _colour(dice)
        mix = dice.uniform(0.3, 1.0)
        blended = tuple(a + (b - a) * mix for a, b in zip(tone, second, strict=True))
        self.surfaces.append(
            Surface(
                class_id=CLASSES.index(class_name),
                colour=tone,
                second=(blended[0], blended[1], blended[2]),
                pattern=PATTERNS.index(dice.choice(patterns)),
                period=dice.uniform(0.12, 0.6),
                grain=dice.uniform(0.15, 0.6),
                gloss=dice.uniform(0.0, 0.5) * dice.integer(0, 1),
            )
        )
        return len(self.surfaces) - 1

    def add(
        self, shape: str, centre: Vector, half: Vector, *, turn: tuple[float, float], surface: int
    ) -> None:
        """Add one solid to the thing that was begun last."""
        self.solids.append(
            Solid(
                shape=shape,
                centre=centre,
                half=half,
                turn=turn,
                surface=surface,
                instance=self.n_instances,
            )
        )

    def begin(self) -> None:
        """Begin a new thing, an instance of its own."""
        self.n_instances += 1

    def find_place(self, radius: float) -> tuple[float, float] | None:
        """Find a free circle on the floor, or None if a few tries find none."""
        for _ in range(12):
            x = self.dice.uniform(radius, max(self.size[0] - radius, radius))
            z = self.dice.uniform(radius, max(self.size[2] - radius, radius))
            if self.clearance(x, z) > radius:
                self.circles.append((x, z, radius))
                return (x, z)
        return None

    def clearance(self, x: float, z: float) -> float:
        """Give the distance to the nearest wall or taken circle."""
        walls = min(x, z, self.size[0] - x, self.size[2] - z)
        things = (math.sqrt((x - a) ** 2 + (z - b) ** 2) - r for a, b, r in self.circles)
        return min([walls, *things])


def _colour(dice: Dice) -> Vector:
    """Draw a colour: any hue, mostly muted, from dark to bright."""
    value, grey = dice.uniform(0.12, 0.85), dice.uniform(0.15, 0.95)
    red, green, blue = (value * (grey + (1 - grey) * dice.uniform()) for _ in range(3))
    return (red, green, blue)


def build_scene(seed: int, number: int) -> tuple[Scene, list[tuple[float, float, float]]]:
    """Furnish scene `number` of `seed`; give it with its furniture's circles (x, z, radius)."""
    dice = Dice(seed, number, 1)
    size = (dice.uniform(3.0, 6.5), dice.uniform(2.3, 3.2), dice.uniform(3.0, 6.5))
    room = _Builder(dice=dice, size=size)
    _paint_room(room)
    _hang_on_walls(room)
    for _ in range(int(size[0] * size[2] / 3.2) + dice.integer(1, 3)):
        dice.choice(_FURNITURE)(room)
    lights = tuple(_light(dice, size) for _ in range(dice.integer(1, 2)))
    scene = Scene(
        size=size,
        surfaces=tuple(room.surfaces),
        solids=tuple(room.solids),
        lights=lights,
        ambient=dice.uniform(0.18, 0.5),
        salt=dice.integer(0, 2**31 - 1),
    )
    return scene, room.circles


def _paint_room(room: _Builder) -> None:
    walls = ("plain", "stripes", "bricks", "clouds", "tiles", "dots")
    papers = [room.paint("wall", walls) for _ in range(2)]
    left, right, near, far = (room.surfaces[room.dice.choice(papers)] for _ in range(4))
    floor = room.surfaces[room.paint("floor", ("planks", "tiles", "checker", "clouds"))]
    ceiling = room.surfaces[room.paint("ceiling", ("plain", "plain", "tiles", "planks"))]
    room.surfaces[:] = [left, right, floor, ceiling, near, far]


def _light(dice: Dice, size: Vector) -> Light:
    strength = dice.uniform(0.5, 1.6) * (size[0] + size[2]) / 4
    warm = dice.uniform(0.6, 1.1)
    at = (
        dice.uniform(0.1, 0.9) * size[0],
        dice.uniform(0.75, 0.95) * size[1],
        dice.uniform(0.1, 0.9) * size[2],
    )
    return Light(at=at, colour=(strength, strength * (0.5 + 0.5 * warm), strength * warm))


def _hang_on_walls(room: _Builder) -> None:
    """Hang pictures and a door flat on the walls, and maybe lay a rug."""
    dice, size = room.dice, room.size
    kinds = ["door"] + ["picture"] * dice.integer(1, 5)
    for kind in kinds:
        room.begin()
        surface = room.paint(kind, ("clouds", "checker", "dots", "stripes", "tiles", "plain"))
        is_x, is_far = dice.integer(0, 1) == 0, dice.integer(0, 1) == 1
        if kind == "door":
            half_u, half_v, height = dice.uniform(0.38, 0.5), dice.uniform(0.95, 1.05), 0.0
            height = half_v
        else:
            half_u, half_v = dice.uniform(0.15, 0.6), dice.uniform(0.15, 0.45)
            height = dice.uniform(1.2, 1.75)
        along = dice.uniform(half_u, (size[2] if is_x else size[0]) - half_u)
        depth = dice.uniform(0.01, 0.03)
        across = ((size[0] if is_x else size[2]) - depth) if is_far else depth
        centre = (across, height, along) if is_x else (along, height, across)
        half = (depth, half_v, half_u) if is_x else (half_u, half_v, depth)
        room.add("box", centre, half, turn=(1.0, 0.0), surface=surface)
    if dice.integer(0, 1):
        room.begin()
        surface = room.paint("rug", ("stripes", "checker", "dots", "clouds"))
        half = (dice.uniform(0.5, 1.2), 0.006, dice.uniform(0.4, 0.9))
        centre = (dice.uniform(1.2, size[0] - 1.2), 0.006, dice.uniform(1.2, size[2] - 1.2))
        room.add("box", centre, half, turn=dice.turn(), surface=surface)


def _place_table(room: _Builder) -> None:
    dice = room.dice
    half_x, half_z, top = dice.uniform(0.35, 0.8), dice.uniform(0.3, 0.5), dice.uniform(0.42, 0.8)
    place = room.find_place(math.sqrt(half_x**2 + half_z**2))
    if place is None:
        return
    room.begin()
    surface, turn = room.paint("table", ("planks", "plain", "clouds", "tiles")), dice.turn()
    thick, leg = dice.uniform(0.015, 0.04), dice.uniform(0.02, 0.045)
    room.add("box", (place[0], top, place[1]), (half_x, thick, half_z), turn=turn, surface=surface)
    for sign_x, sign_z in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        offset = _turned(sign_x * (half_x - leg), sign_z * (half_z - leg), turn)
        centre = (place[0] + offset[0], (top - thick) / 2, place[1] + offset[1])
        room.add("box", centre, (leg, (top - thick) / 2, leg), turn=turn, surface=surface)
    for sign in (-1, 1)[: dice.integer(0, 2)]:
        offset = _turned(sign * half_x * 0.5, dice.uniform(-0.4, 0.4) * half_z, turn)
        spot = (place[0] + offset[0], place[1] + offset[1])
        _place_small(room, spot, top + thick, largest=0.16)


def _place_small(
    room: _Builder, spot: tuple[float, float], floor: float, *, largest: float
) -> None:
    """Put a ball, a barrel or a crate on something."""
    dice = room.dice
    room.begin()
    name, shape = dice.choice((("ball", "sphere"), ("barrel", "cylinder"), ("crate", "box")))
    radius = dice.uniform(0.4, 1.0) * largest
    height = radius if name == "ball" else dice.uniform(0.5, 1.8) * radius
    half_z = dice.uniform(0.5, 1.0) * radius if name == "crate" else radius
    patterns = ("plain", "checker", "stripes", "clouds", "dots", "planks")
    surface = room.paint(name, patterns)
    centre = (spot[0], floor + height, spot[1])
    room.add(shape, centre, (radius, height, half_z), turn=dice.turn(), surface=surface)


def _place_loose(room: _Builder) -> None:
    largest = room.dice.uniform(0.15, 0.4)
    place = room.find_place(largest * 1.42)
    if place is not None:
        _place_small(room, place, 0.0, largest=largest)


def _place_cabinet(room: _Builder) -> None:
    """Stand a cabinet with its back to a wall."""
    dice, size = room.dice, room.size
    half_u, half_v, half_d = (
        dice.uniform(0.3, 0.7),
        dice.uniform(0.35, 1.05),
        dice.uniform(0.18, 0.32),
    )
    is_x, is_far = dice.integer(0, 1) == 0, dice.integer(0, 1) == 1
    along = dice.uniform(half_u, (size[2] if is_x else size[0]) - half_u)
    across = ((size[0] if is_x else size[2]) - half_d) if is_far else half_d
    x, z = (across, along) if is_x else (along, across)
    reach = math.sqrt(half_u**2 + half_d**2)
    if any(math.sqrt((x - a) ** 2 + (z - b) ** 2) < r + reach for a, b, r in room.circles):
        return
    room.circles.append((x, z, reach))
    room.begin()
    surface = room.paint("cabinet", ("tiles", "planks", "plain", "stripes"))
    half = (half_d, half_v, half_u) if is_x else (half_u, half_v, half_d)
    room.add("box", (x, half_v, z), half, turn=(1.0, 0.0), surface=surface)
    if half_v < 0.7 and dice.integer(0, 1):
        _place_small(room, (x, z), 2 * half_v, largest=half_d * 0.9)


def _place_seat(room: _Builder) -> None:
    """Stand an armchair or a sofa: a seat, a back and maybe arms."""
    dice = room.dice
    half_x, half_z, height = (
        dice.uniform(0.25, 0.85),
        dice.uniform(0.25, 0.42),
        dice.uniform(0.2, 0.24),
    )
    place = room.find_place(math.sqrt((half_x + 0.1) ** 2 + (half_z + 0.1) ** 2))
    if place is None:
        return
    room.begin()
    surface, turn = (
        room.paint("seat", ("plain", "stripes", "checker", "clouds", "dots")),
        dice.turn(),
    )
    back = dice.uniform(0.38, 0.5)
    parts = [
        ((0.0, height, 0.0), (half_x, height, half_z)),
        ((0.0, back, half_z), (half_x, back, 0.08)),
    ]
    if dice.integer(0, 1):
        arm = (0.07, height + 0.1, half_z)
        parts += [((side * half_x, height + 0.1, 0.0), arm) for side in (-1, 1)]
    for centre, half in parts:
        offset = _turned(centre[0], centre[2], turn)
        at = (place[0] + offset[0], centre[1], place[1] + offset[1])
        room.add("box", at, half, turn=turn, surface=surface)


def _turned(x: float, z: float, turn: tuple[float, float]) -> tuple[float, float]:
    """Turn a point of a thing's own frame into the room's."""
    return (turn[0] * x - turn[1] * z, turn[1] * x + turn[0] * z)


_FURNITURE = (_place_table, _place_cabinet, _place_cabinet, _place_seat, _place_loose, _place_loose)


def build_camera(
    seed: int,
    number: int,
    view: int,
    *,
    scene: Scene,
    circles: Sequence[tuple[float, float, float]],
) -> Camera:
    """Choose where view `view` of a scene is taken from: on free floor, looking into the room."""
    dice = Dice(seed, number, 2, view)
    room = _Builder(dice=dice, size=scene.size, circles=list(circles))
    spots = [
        (dice.uniform(0.3, scene.size[0] - 0.3), dice.uniform(0.3, scene.size[2] - 0.3))
        for _ in range(40)
    ]
    free = [spot for spot in spots if room.clearance(*spot) > 0.3]
    x, z = free[0] if free else max(spots, key=lambda spot: room.clearance(*spot))
    targets = [(dice.uniform(0, scene.size[0]), dice.uniform(0, scene.size[2])) for _ in range(3)]
    target = max(targets, key=lambda spot: (spot[0] - x) ** 2 + (spot[1] - z) ** 2)
    at = (x, dice.uniform(1.3, 1.7), z)
    forward = _unit((target[0] - x, dice.uniform(0.0, 1.7) - at[1], target[1] - z))
    up = (dice.uniform(-0.1, 0.1), 1.0, dice.uniform(-0.1, 0.1))
    right = _unit(_cross(forward, up))
    return Camera(
        at=at,
        forward=forward,
        right=right,
        down=_cross(forward, right),
        focal=dice.uniform(0.78, 0.86),
        exposure=dice.uniform(0.2, 0.42),
        blue=dice.uniform(0.85, 1.2),
        noise=dice.uniform(0.5, 4.0),
        salt=dice.integer(0, 2**31 - 1),
    )


def _unit(vector: Vector) -> Vector:
    length = math.sqrt(vector[0] ** 2 + vector[1] ** 2 + vector[2] ** 2)
    return (vector[0] / length, vector[1] / length, vector[2] / length)


def _cross(a: Vector, b: Vector) -> Vector:
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
