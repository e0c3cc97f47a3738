"""Bodies of made-up animals: what a kind looks like, how an animal stands, and where its bones are.

An animal stands in its own frame: x forward, y up, z to its right; the ground is y = 0 and the
trunk is 1 long. Every part is a bone, a ball rolled along a line while its radius changes. As in
`featstore.datasets.furnish`, only ``+ - * /`` and the square root make numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

from featstore.datasets.scenes import Dice, Vector

NAMES = (
    "left_eye",
    "right_eye",
    "nose",
    "neck",
    "root_of_tail",
    "left_shoulder",
    "left_elbow",
    "left_front_paw",
    "right_shoulder",
    "right_elbow",
    "right_front_paw",
    "left_hip",
    "left_knee",
    "left_back_paw",
    "right_hip",
    "right_knee",
    "right_back_paw",
)
EDGES = (
    *((0, 1), (0, 2), (1, 2), (2, 3), (3, 4)),
    *((3, 5), (5, 6), (6, 7), (3, 8), (8, 9), (9, 10)),
    *((4, 11), (11, 12), (12, 13), (4, 14), (14, 15), (15, 16)),
)
COAT, DARK, PALE, HORN, INNER = range(5)
"""What a bone is covered with."""
PATTERNS = ("plain", "stripes", "spots", "patches", "saddle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Proportions:
    """Sizes of the parts, in lengths of the trunk."""

    front_leg: float
    back_leg: float
    leg_width: float
    taper: float  # of a leg: width at the paw over that at the shoulder
    chest: float  # radius of the trunk in front
    rump: float
    sag: float  # how far the belly hangs
    hump: float
    neck: float
    neck_width: float
    head: float  # radius of the skull
    snout: float
    snout_width: float
    ear: float
    ear_width: float
    horn: float  # below 0.1: none
    tail: float
    tail_width: float
    tuft: float  # below 0.04: none


@dataclass(frozen=True, kw_only=True, slots=True)
class Coat:
    """Colours, 0 to 1, and pattern."""

    base: Vector
    second: Vector
    pale: Vector  # belly and muzzle
    dark: Vector  # nose, eyes and hooves
    horn: Vector
    pattern: str
    period: float  # of the pattern, in lengths of the trunk
    share: float  # of the second colour, 0 to 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What animals of one kind share."""

    proportions: Proportions
    coat: Coat
    carriage: float  # how steeply the neck rises, about radians


@dataclass(frozen=True, kw_only=True, slots=True)
class Bone:
    """A ball of radius `width[0]` at `start` that becomes one of `width[1]` at `end`."""

    start: Vector
    end: Vector
    width: tuple[float, float]
    cover: int


@dataclass(kw_only=True, slots=True)
class Body:
    """Bones and keypoints of an animal in its pose."""

    bones: list[Bone] = field(default_factory=list)
    points: dict[str, Vector] = field(default_factory=dict)

    def add(
        self, start: Vector, end: Vector, width: tuple[float, float], *, cover: int = COAT
    ) -> Vector:
        """Add a bone and give its end."""
        self.bones.append(Bone(start=start, end=end, width=width, cover=cover))
        return end


_RANGES = {
    "front_leg": (0.35, 1.15),
    "back_leg": (0.92, 1.12),  # of the front leg
    "leg_width": (0.05, 0.1),
    "taper": (0.45, 0.8),
    "chest": (0.2, 0.32),
    "rump": (0.75, 1.1),  # of the chest
    "sag": (0.0, 0.12),
    "hump": (-0.08, 0.12),
    "neck": (0.15, 0.8),
    "neck_width": (0.4, 0.7),  # of the chest
    "head": (0.1, 0.17),
    "snout": (0.6, 2.0),  # of the head
    "snout_width": (0.35, 0.75),  # of the head
    "ear": (0.5, 1.9),  # of the head
    "ear_width": (0.2, 0.5),  # of the head
    "horn": (-1.2, 2.2),  # of the head
    "tail": (0.15, 0.8),
    "tail_width": (0.025, 0.06),
    "tuft": (0.0, 0.09),
}
_PARTS_OF = {
    "back_leg": "front_leg",
    "rump": "chest",
    "neck_width": "chest",
    **dict.fromkeys(("snout", "snout_width", "ear", "ear_width", "horn"), "head"),
}


def build_kind(dice: Dice) -> Kind:
    """Draw a kind of animal."""
    sizes: dict[str, float] = {}
    for name, (low, high) in _RANGES.items():
        sizes[name] = dice.uniform(low, high) * sizes.get(_PARTS_OF.get(name, ""), 1.0)
    return Kind(
        proportions=Proportions(**sizes), coat=_build_coat(dice), carriage=dice.uniform(0.35, 1.3)
    )


def _build_coat(dice: Dice) -> Coat:
    base = _fur(dice)
    second = _fur(dice)
    if abs(sum(base) - sum(second)) < 0.6:  # a pattern that nobody would see
        factor = 0.35 if sum(base) > 1.2 else 2.2
        second = _scaled(base, factor)
    light, dark = dice.uniform(0.3, 0.7), dice.uniform(0.03, 0.14)
    bone = dice.uniform(0.45, 0.8)
    return Coat(
        base=base,
        second=second,
        pale=(_mixed(base[0], light), _mixed(base[1], light), _mixed(base[2], light)),
        dark=(dark, dark * 0.9, dark * 0.85),
        horn=(bone, bone * 0.9, bone * 0.72),
        pattern=dice.choice(PATTERNS),
        period=dice.uniform(0.1, 0.26),
        share=dice.uniform(0.3, 0.6),
    )


def _fur(dice: Dice) -> Vector:
    """Draw a colour of fur: white, grey, brown, red, black."""
    value, warmth = dice.uniform(0.12, 0.92), dice.uniform(0.0, 1.0)
    return (value, value * (1 - 0.38 * warmth), value * (1 - 0.65 * warmth))


def _scaled(colour: Vector, factor: float) -> Vector:
    red, green, blue = (min(part * factor, 0.95) for part in colour)
    return (red, green, blue)


def _mixed(value: float, light: float) -> float:
    return value + (0.95 - value) * light


def individual(kind: Kind, dice: Dice) -> Kind:
    """Vary a kind: animals of one kind differ a little in every size and in their colours."""
    sizes = {
        part.name: getattr(kind.proportions, part.name) * dice.uniform(0.93, 1.07)
        for part in fields(kind.proportions)
    }
    tone = dice.uniform(0.88, 1.12)
    coat = replace(
        kind.coat, base=_scaled(kind.coat.base, tone), second=_scaled(kind.coat.second, tone)
    )
    return replace(kind, proportions=Proportions(**sizes), coat=coat)


def pose(kind: Kind, dice: Dice) -> Body:
    """Stand, walk, run, graze or sit: place all bones of an animal."""
    size, body = kind.proportions, Body()
    is_sitting = dice.uniform() < 0.12
    stride = dice.choice((0.12, 0.45, 0.8)) * dice.uniform(0.6, 1.0) * (0.0 if is_sitting else 1.0)
    swing = dice.uniform(-1.0, 1.0) * stride
    swings = {
        "left_front": swing,
        "right_front": -swing,
        "left_back": dice.choice((swing, -swing)),
    }
    swings["right_back"] = -swings["left_back"]
    swings = {leg: swing + dice.uniform(-0.12, 0.12) for leg, swing in swings.items()}
    steps = {
        leg: _back_steps(size, swing, dice, is_sitting)
        if leg.endswith("back")
        else _front_steps(size, swing, dice)
        for leg, swing in swings.items()
    }
    drops = {leg: -sum(step[1] for step in each) for leg, each in steps.items()}
    front = max(drops["left_front"], drops["right_front"]) + 0.3 * size.chest
    back = max(drops["left_back"], drops["right_back"]) + 0.2 * size.rump
    withers, croup = (0.5, front, 0.0), (-0.5, back, 0.0)
    _add_trunk(body, size, withers, croup)
    for leg, each in steps.items():
        side = -1.0 if leg.startswith("left") else 1.0
        _add_leg(body, size, leg, (side, withers, croup), each)
    _add_tail(body, size, croup, dice)
    _add_neck_and_head(body, kind, withers, dice, is_grazing=dice.uniform() < 0.18)
    return body


def bearing(angle: float) -> tuple[float, float]:
    """Give cosine and sine of an angle of about `angle` radians; exactly 2 atan(angle / 2)."""
    half = angle / 2
    square = half * half
    return ((1 - square) / (1 + square), 2 * half / (1 + square))


def _down(angle: float, length: float) -> tuple[float, float]:
    """Step down a leg that swings forward by `angle`: how far forward and up."""
    cosine, sine = bearing(angle)
    return (sine * length, -cosine * length)


def _front_steps(size: Proportions, swing: float, dice: Dice) -> list[tuple[float, float]]:
    bend = dice.uniform(0.0, 0.35) + max(swing, 0.0) * dice.uniform(0.0, 0.9)
    length = size.front_leg
    return [_down(swing - 0.25, 0.45 * length), _down(swing + 0.18 - bend, 0.55 * length)]


def _back_steps(
    size: Proportions, swing: float, dice: Dice, is_sitting: bool
) -> list[tuple[float, float]]:
    length = size.back_leg
    if is_sitting:
        return [_down(1.5, 0.42 * length), _down(-1.35, 0.36 * length), _down(1.1, 0.24 * length)]
    bend = dice.uniform(0.0, 0.3) + max(swing, 0.0) * dice.uniform(0.0, 0.6)
    return [
        _down(swing + 0.35, 0.42 * length),
        _down(swing - 0.5 - bend, 0.34 * length),
        _down(swing + 0.05 - bend / 2, 0.26 * length),
    ]


def _moved(at: Vector, x: float, y: float, z: float = 0.0) -> Vector:
    return (at[0] + x, at[1] + y, at[2] + z)


def _between(a: Vector, b: Vector, part: float) -> Vector:
    return (a[0] + (b[0] - a[0]) * part, a[1] + (b[1] - a[1]) * part, a[2] + (b[2] - a[2]) * part)


def _add_trunk(body: Body, size: Proportions, withers: Vector, croup: Vector) -> None:
    middle = _moved(_between(withers, croup, 0.45), 0.0, size.hump - 0.5 * size.sag)
    width = (size.chest + size.rump) / 2 * (1 + 0.5 * size.sag)
    body.add(withers, middle, (size.chest, width))
    body.add(middle, croup, (width, size.rump))
    belly = _moved(middle, 0.0, -size.hump - 0.6 * size.sag - 0.12 * width)
    body.add(_moved(withers, -0.05, -0.2 * size.chest), belly, (0.8 * size.chest, 0.85 * width))
    body.add(belly, _moved(croup, 0.08, -0.1 * size.rump), (0.85 * width, 0.7 * size.rump))


def _add_leg(
    body: Body,
    size: Proportions,
    leg: str,
    trunk: tuple[float, Vector, Vector],
    steps: list[tuple[float, float]],
) -> None:
    """Hang a leg on the trunk: (side, withers, croup)."""
    side, withers, croup = trunk
    is_front = leg.endswith("front")
    girth, at = (size.chest, withers) if is_front else (size.rump, croup)
    joint = _moved(at, 0.0, -(0.3 if is_front else 0.2) * girth, side * 0.55 * girth)
    names = ("shoulder", "elbow") if is_front else ("hip", "knee")
    which = "left" if side < 0 else "right"
    body.points[f"{which}_{names[0]}"] = joint
    widths = [1.5 if is_front else 1.9, 1.0, 1.0 if is_front else 0.8, 1.0]
    widths[len(steps)] = size.taper
    for number, step in enumerate(steps):
        width = (widths[number] * size.leg_width, widths[number + 1] * size.leg_width)
        joint = body.add(joint, _moved(joint, *step), width)
        if number == 0:
            body.points[f"{which}_{names[1]}"] = joint
    body.points[f"{leg}_paw"] = joint
    toe = size.taper * size.leg_width
    body.add(joint, _moved(joint, 0.9 * toe, -0.1 * toe), (1.1 * toe, 0.9 * toe), cover=DARK)


def _add_tail(body: Body, size: Proportions, croup: Vector, dice: Dice) -> None:
    at = _moved(croup, -0.8 * size.rump, 0.45 * size.rump)
    body.points["root_of_tail"] = at
    angle, curl, aside = dice.uniform(-0.9, 1.0), dice.uniform(-0.5, 0.5), dice.uniform(-0.4, 0.4)
    for part in range(3):
        cosine, sine = bearing(angle)
        step = size.tail / 3
        width = (size.tail_width * (1 - 0.2 * part), size.tail_width * (0.8 - 0.2 * part))
        at = body.add(at, _moved(at, -cosine * step, sine * step, aside * step), width)
        angle += curl
    if size.tuft > 0.04:
        body.add(at, _moved(at, -0.5 * size.tuft, 0.0), (size.tuft, 0.6 * size.tuft), cover=DARK)


def _add_neck_and_head(
    body: Body, kind: Kind, withers: Vector, dice: Dice, *, is_grazing: bool
) -> None:
    size = kind.proportions
    rise = dice.uniform(-0.9, -0.45) if is_grazing else kind.carriage + dice.uniform(-0.3, 0.3)
    cosine, sine = bearing(rise)
    aside = dice.uniform(-0.35, 0.35)
    root = _moved(withers, 0.35 * size.chest, 0.35 * size.chest)
    length = size.neck + 0.6 * size.chest
    poll = _moved(root, cosine * length, sine * length, aside * length * 0.6)
    # A head that grazes stays above the ground.
    poll = (poll[0], max(poll[1], 1.6 * size.head), poll[2])
    body.add(root, poll, (0.72 * size.chest, max(size.neck_width, 0.8 * size.head)))
    body.points["neck"] = _between(root, poll, 0.45)
    nod = rise - dice.uniform(0.5, 1.1) if rise > 0 else rise * dice.uniform(0.2, 1.0)
    _add_head(body, size, poll, (bearing(nod), aside + dice.uniform(-0.5, 0.5)))


def _add_head(
    body: Body, size: Proportions, poll: Vector, facing: tuple[tuple[float, float], float]
) -> None:
    """Build a head that looks along (cosine and sine of its nod, its turn aside)."""
    (cosine, sine), aside = facing
    turn = bearing(aside)
    ahead = (cosine * turn[0], sine, cosine * turn[1])
    right = (-turn[1], 0.0, turn[0])
    up = (-sine * turn[0], cosine, -sine * turn[1])

    def at(forward: float, upward: float, across: float = 0.0) -> Vector:
        x, y, z = (
            poll[axis]
            + size.head * (forward * ahead[axis] + upward * up[axis] + across * right[axis])
            for axis in range(3)
        )
        return (x, y, z)

    reach, thin = size.snout / size.head, size.snout_width / size.head
    body.add(poll, at(0.5, 0.0), (size.head, 0.9 * size.head))
    muzzle = at(0.5 + reach, -0.25)
    body.add(at(0.5, -0.15), muzzle, (0.75 * size.head, size.snout_width), cover=PALE)
    body.add(at(0.3, 0.1), at(0.5 + 0.6 * reach, 0.0), (0.75 * size.head, 0.85 * size.snout_width))
    tip = at(0.5 + reach + 0.7 * thin, -0.15)
    body.add(tip, tip, (0.4 * size.snout_width, 0.4 * size.snout_width), cover=DARK)
    body.points["nose"] = tip
    for side, name in ((-1.0, "left"), (1.0, "right")):
        eye = at(0.75, 0.35, 0.72 * side)
        body.add(eye, eye, (0.2 * size.head, 0.2 * size.head), cover=DARK)
        body.points[f"{name}_eye"] = eye
        long = size.ear / size.head
        root, end = at(-0.15, 0.7, 0.5 * side), at(-0.25, 0.7 + long, (0.5 + 0.5 * long) * side)
        body.add(root, end, (size.ear_width, 0.5 * size.ear_width))
        inner = (0.55 * size.ear_width, 0.3 * size.ear_width)
        body.add(at(0.1, 0.85, 0.5 * side), _between(root, end, 0.75), inner, cover=INNER)
        if size.horn > 0.1:
            horn, wide = size.horn / size.head, 0.22 * size.head
            bend = at(0.1, 0.8 + 0.5 * horn, (0.35 + 0.25 * horn) * side)
            body.add(at(0.2, 0.8, 0.35 * side), bend, (wide, 0.7 * wide), cover=HORN)
            body.add(bend, at(0.3, 0.8 + horn, 0.45 * side), (0.7 * wide, 0.2 * wide), cover=HORN)


def length_of(vector: tuple[float, ...]) -> float:
    """Give the length of a vector."""
    return math.sqrt(sum(part * part for part in vector))
