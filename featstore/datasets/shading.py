"""Colour the pixels of a cast picture: patterns, lights, shadows, highlights, sensor.

As in `featstore.datasets.raycast`, only operations that give the same bits on every machine are
used: no sine, power or exponential, no sums whose order is the library's choice. Patterns are
smoothed over a pixel's footprint, so that far ones fade instead of flickering.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featstore.datasets.raycast import N_PLANES, Arrays3, Hits, hit, reach_of
from featstore.datasets.scenes import CLASSES, PATTERNS, Camera, Scene, Solid, Surface, Vector

_BAND = 8192  # pixels that are coloured at a time: their arrays stay in the processor's cache
_FLAT = {CLASSES.index(name) for name in ("picture", "door", "rug")}  # too thin to shade a thing
_AXES = ((2, 1), (0, 2), (0, 1))  # the two axes that span a face with normal x, y or z


@dataclass(frozen=True, kw_only=True, slots=True)
class _Points:
    """What the pixels see, flat, one entry a pixel."""

    at: Arrays3  # in the room, metres
    normal: Arrays3
    local: Arrays3  # in the thing's own frame, metres
    flat: tuple[np.ndarray, np.ndarray]  # coordinates along the face, metres
    surface: np.ndarray  # number of the surface


def shade(scene: Scene, camera: Camera, hits: Hits) -> np.ndarray:
    """Colour a picture.

    Args:
        scene: What was met.
        camera: Where from.
        hits: What `cast` gave for the two.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = hits.depth.shape
    planes = np.empty((3, height, width), np.float32)
    step = max(_BAND // width, 1)
    for top in range(0, height, step):
        rows = slice(top, top + step)
        thing, depth = hits.thing[rows].ravel(), hits.depth[rows].ravel()
        rays = (hits.rays[0][rows].ravel(), hits.rays[1][rows].ravel(), hits.rays[2][rows].ravel())
        band = _shade_band(scene, camera, thing, depth, rays, pixel=1 / (camera.focal * width))
        for channel in range(3):
            planes[channel, rows] = band[channel].reshape(-1, width)
    return _expose(planes, camera)


def _shade_band(
    scene: Scene,
    camera: Camera,
    thing: np.ndarray,
    depth: np.ndarray,
    rays: Arrays3,
    *,
    pixel: float,
) -> list[np.ndarray]:
    """Give the light that some pixels send, one array a channel; `pixel` is a pixel's slope."""
    points = _locate(scene, camera, thing, depth, rays)
    facing = np.abs(_dot(points.normal, rays)) / np.sqrt(_dot(rays, rays))
    footprint = depth * np.float32(pixel) / np.maximum(facing, np.float32(0.15))
    albedo = _albedo(scene.surfaces, points, footprint, scene.salt)
    light, shine = _illuminate(scene, points, rays)
    gloss = np.array([surface.gloss for surface in scene.surfaces], np.float32)[points.surface]
    return [albedo[c] * light[c] + gloss * shine[c] for c in range(3)]


def _dot(a: Arrays3, b: Arrays3) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _locate(
    scene: Scene, camera: Camera, thing: np.ndarray, depth: np.ndarray, rays: Arrays3
) -> _Points:
    """Find point, normal and surface coordinates of what each pixel sees, thing by thing."""
    at = (
        camera.at[0] + depth * rays[0],
        camera.at[1] + depth * rays[1],
        camera.at[2] + depth * rays[2],
    )
    normal, local = np.zeros((3, len(depth)), np.float32), np.zeros((3, len(depth)), np.float32)
    flat = np.zeros((2, len(depth)), np.float32)
    surface = np.zeros(len(depth), np.int64)
    order = np.argsort(thing, kind="stable")
    numbers, starts = np.unique(thing[order], return_index=True)
    for number, pixels in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        mine = (at[0][pixels], at[1][pixels], at[2][pixels])
        if number < N_PLANES:
            axis = number // 2
            normal[axis, pixels] = -1.0 if number % 2 else 1.0
            surface[pixels] = number
            local[:, pixels] = mine
            flat[:, pixels] = [mine[k] for k in _AXES[axis]]
        else:
            solid = scene.solids[number - N_PLANES]
            cosine, sine = solid.turn
            x, y, z = (mine[axis] - solid.centre[axis] for axis in range(3))
            own = (cosine * x + sine * z, y, cosine * z - sine * x)
            across, along = _SKINS[solid.shape](solid.half, own)
            normal[0, pixels] = cosine * across[0] - sine * across[2]
            normal[1, pixels] = across[1]
            normal[2, pixels] = sine * across[0] + cosine * across[2]
            surface[pixels] = solid.surface
            local[:, pixels], flat[:, pixels] = own, along
    return _Points(
        at=at,
        normal=(normal[0], normal[1], normal[2]),
        local=(local[0], local[1], local[2]),
        flat=(flat[0], flat[1]),
        surface=surface,
    )


def _skin_box(half: Vector, own: Arrays3) -> tuple[np.ndarray, np.ndarray]:
    """Give the normals (3, n) and the coordinates along the face (2, n) of points on a box."""
    reach = np.stack([np.abs(own[axis]) / np.float32(half[axis]) for axis in range(3)])
    face = reach.argmax(axis=0)
    signs = np.where(np.stack(own) > 0, np.float32(1), np.float32(-1))
    normals = np.where(face == np.arange(3)[:, None], signs, np.float32(0))
    along = np.stack([np.choose(face, [own[spans[k]] for spans in _AXES]) for k in range(2)])
    return normals, along


def _skin_sphere(half: Vector, own: Arrays3) -> tuple[np.ndarray, np.ndarray]:
    normals = np.stack(own) / np.float32(half[0])
    return normals, np.stack([own[0] + np.float32(0.5) * own[2], own[1]])


def _skin_cylinder(half: Vector, own: Arrays3) -> tuple[np.ndarray, np.ndarray]:
    is_lid = np.abs(own[1]) > half[1] * 0.9999
    normals = np.stack([own[0] / half[0], np.zeros_like(own[1]), own[2] / half[0]])
    lids = np.stack([np.zeros_like(own[1]), np.sign(own[1]), np.zeros_like(own[1])])
    along = np.stack([own[0] + np.float32(0.5) * own[2], np.where(is_lid, own[2], own[1])])
    return np.where(is_lid, lids, normals), along


_SKINS = {"box": _skin_box, "sphere": _skin_sphere, "cylinder": _skin_cylinder}


def _albedo(
    surfaces: tuple[Surface, ...], points: _Points, footprint: np.ndarray, salt: int
) -> list[np.ndarray]:
    """Mix the two colours of each surface by its pattern and add grain; one array a channel."""
    period = np.array([s.period for s in surfaces], np.float32)[points.surface]
    pattern = np.array([s.pattern for s in surfaces])[points.surface]
    u, v = points.flat[0] / period, points.flat[1] / period
    blur = np.maximum(footprint / period, 1e-3)
    mix = np.zeros(len(u), np.float32)
    offset = (points.surface * 131 + salt).astype(np.uint32)
    for number, name in enumerate(PATTERNS):
        pixels = np.flatnonzero(pattern == number)
        if name != "plain" and len(pixels):
            mix[pixels] = _PATTERNS[name](u[pixels], v[pixels], blur[pixels], offset[pixels])
    grain = np.array([s.grain for s in surfaces], np.float32)[points.surface]
    fine = _noise(points.local, np.float32(45.0), offset) * _fade(footprint * 45)
    coarse = _noise(points.local, np.float32(6.0), offset + np.uint32(7)) * _fade(footprint * 6)
    tone = 1 + grain * (fine * np.float32(0.5) + coarse * np.float32(0.5))
    first = np.array([s.colour for s in surfaces], np.float32)
    step = np.array([s.second for s in surfaces], np.float32) - first
    return [(first[points.surface, c] + mix * step[points.surface, c]) * tone for c in range(3)]


def _fade(blur: np.ndarray) -> np.ndarray:
    """Fade out what has a period of less than two pixels."""
    return np.clip(2 - 4 * blur, 0, 1)


def _wave(t: np.ndarray) -> np.ndarray:
    """Give a triangle wave of period 1 between -1 and 1, 0 at whole and half numbers."""
    shifted = t + np.float32(0.25)
    return 1 - 4 * np.abs(shifted - np.floor(shifted) - np.float32(0.5))


def _checker(u: np.ndarray, v: np.ndarray, blur: np.ndarray, _: np.ndarray) -> np.ndarray:
    sharp = np.float32(0.25) / blur
    squares = np.clip(_wave(u / 2) * sharp, -1, 1) * np.clip(_wave(v / 2) * sharp, -1, 1)
    return np.float32(0.5) + np.float32(0.5) * squares * _fade(blur)


def _stripes(u: np.ndarray, _v: np.ndarray, blur: np.ndarray, _: np.ndarray) -> np.ndarray:
    bands = np.clip(_wave(u) * (np.float32(0.25) / blur), -1, 1)
    return np.float32(0.5) + np.float32(0.5) * bands * _fade(blur)


def _dots(u: np.ndarray, v: np.ndarray, blur: np.ndarray, _: np.ndarray) -> np.ndarray:
    x, y = u - np.floor(u) - np.float32(0.5), v - np.floor(v) - np.float32(0.5)
    inside = np.float32(0.3) - np.sqrt(x * x + y * y)
    return np.clip(inside / blur + np.float32(0.5), 0, 1) * _fade(blur)


def _cells(u: np.ndarray, v: np.ndarray, blur: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Draw tiles of slightly different shades with joints of the second colour between them."""
    column, row = np.floor(u), np.floor(v)
    edge_u = np.float32(0.5) - np.abs(u - column - np.float32(0.5))
    edge_v = np.float32(0.5) - np.abs(v - row - np.float32(0.5))
    edge = np.minimum(edge_u, edge_v) - np.float32(0.03)
    joint = np.clip(np.float32(0.5) - edge / blur, 0, 1) * np.clip(np.float32(0.06) / blur, 0, 1)
    shade = np.float32(0.45) * _hash(column, row, np.zeros_like(row), offset)
    return np.maximum(joint, shade * _fade(blur))


def _bricks(u: np.ndarray, v: np.ndarray, blur: np.ndarray, offset: np.ndarray) -> np.ndarray:
    row = np.floor(v * 2)
    shift = np.float32(0.5) * (row - 2 * np.floor(row / 2))
    return _cells(u + shift, v * 2, blur * 2, offset)


def _planks(u: np.ndarray, v: np.ndarray, blur: np.ndarray, offset: np.ndarray) -> np.ndarray:
    row = np.floor(v * 3)
    shift = _hash(row, row, row, offset)
    boards = _cells(u * np.float32(0.4) + shift, v * 3, blur * 3, offset)
    flat = (u * np.float32(0.6), v * 7, np.zeros_like(u))
    figure = np.float32(0.5) + np.float32(0.5) * _noise(flat, np.float32(1.0), offset)
    return np.clip(boards + np.float32(0.4) * figure * _fade(blur * 7), 0, 1)


def _clouds(u: np.ndarray, v: np.ndarray, blur: np.ndarray, offset: np.ndarray) -> np.ndarray:
    flat = (u, v, np.zeros_like(u))
    large = _noise(flat, np.float32(0.7), offset) * _fade(blur * np.float32(0.7))
    small = _noise(flat, np.float32(2.9), offset + np.uint32(3)) * _fade(blur * 3)
    return np.clip(np.float32(0.5) + np.float32(0.8) * large + np.float32(0.45) * small, 0, 1)


_PATTERNS = {
    "tiles": _cells,
    "checker": _checker,
    "stripes": _stripes,
    "bricks": _bricks,
    "planks": _planks,
    "clouds": _clouds,
    "dots": _dots,
}


def _hash(x: np.ndarray, y: np.ndarray, z: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Give each lattice point (whole numbers in float32) a number in [0, 1)."""
    mixed = x.astype(np.int32).view(np.uint32) * np.uint32(0x9E3779B1)
    mixed ^= y.astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA77)
    mixed ^= z.astype(np.int32).view(np.uint32) * np.uint32(0xC2B2AE3D)
    return _scramble(mixed ^ (offset * np.uint32(0x27D4EB2F)))


def _scramble(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    bits = (bits ^ (bits >> np.uint32(12))) * np.uint32(0x297A2D39)
    return ((bits ^ (bits >> np.uint32(15))) >> np.uint32(8)).astype(np.float32) * np.float32(
        2**-24
    )


def _noise(local: Arrays3, frequency: np.float32, offset: np.ndarray) -> np.ndarray:
    """Give smooth noise in [-1, 1]: random numbers on a lattice, blended between its points."""
    scaled = [axis * frequency for axis in local]
    low = [np.floor(axis) for axis in scaled]
    part = [axis - base for axis, base in zip(scaled, low, strict=True)]
    blend = [t * t * (3 - 2 * t) for t in part]
    total = np.zeros_like(scaled[0])
    for corner in range(8):
        upper = [(corner >> axis) & 1 for axis in range(3)]
        weight = np.ones_like(total)
        for axis in range(3):
            weight = weight * (blend[axis] if upper[axis] else 1 - blend[axis])
        total += weight * _hash(low[0] + upper[0], low[1] + upper[1], low[2] + upper[2], offset)
    return 2 * total - 1


def _illuminate(
    scene: Scene, points: _Points, rays: Arrays3
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Add up the light that falls on each point and the highlights, one array a channel."""
    normal = points.normal
    sky = np.float32(scene.ambient) * (np.float32(0.75) + np.float32(0.25) * normal[1])
    sky = sky * _corner_shade(scene, points)
    light, shine = [sky] * 3, [np.zeros_like(sky)] * 3
    length = np.sqrt(_dot(rays, rays))
    for lamp in scene.lights:
        to_lamp = tuple(lamp.at[axis] - points.at[axis] for axis in range(3))
        square = to_lamp[0] * to_lamp[0] + to_lamp[1] * to_lamp[1] + to_lamp[2] * to_lamp[2]
        distance = np.sqrt(square)
        slant = _dot(normal, (to_lamp[0], to_lamp[1], to_lamp[2])) / distance
        is_lit = slant > 0
        is_lit[is_lit] = _is_clear(scene, points, (to_lamp[0], to_lamp[1], to_lamp[2]), is_lit)
        strength = np.where(is_lit, slant, 0) / (square + np.float32(0.6))
        middle = tuple(to_lamp[axis] / distance - rays[axis] / length for axis in range(3))
        middle3 = (middle[0], middle[1], middle[2])
        glint = np.maximum(_dot(normal, middle3), 0) / np.sqrt(_dot(middle3, middle3) + 1e-6)
        for _ in range(5):  # to the 32nd power
            glint = glint * glint
        glint = np.where(is_lit, glint, 0) / (square + np.float32(0.6))
        light = [total + strength * lamp.colour[c] for c, total in enumerate(light)]
        shine = [total + glint * lamp.colour[c] for c, total in enumerate(shine)]
    return light, shine


def _corner_shade(scene: Scene, points: _Points) -> np.ndarray:
    """Darken where walls meet and near the floor, as light that bounces does."""
    shade = np.ones_like(points.at[0])
    for axis in range(3):
        gap = np.maximum(np.minimum(points.at[axis], scene.size[axis] - points.at[axis]), 0)
        # A point on this very plane is not in its own corner.
        darkening = np.float32(0.4) * (1 - np.abs(points.normal[axis])) / (1 + 12 * gap * gap)
        shade = shade * (1 - darkening)
    return shade


def _is_clear(scene: Scene, points: _Points, to_lamp: Arrays3, chosen: np.ndarray) -> np.ndarray:
    """Tell which of the chosen points see the lamp, no solid standing between."""
    rays = (to_lamp[0][chosen], to_lamp[1][chosen], to_lamp[2][chosen])
    start = tuple(
        points.at[axis][chosen] + np.float32(2e-3) * points.normal[axis][chosen]
        for axis in range(3)
    )
    is_clear = np.ones(len(rays[0]), dtype=bool)
    if not len(is_clear):
        return is_clear
    ends = [np.concatenate([start[axis], start[axis] + rays[axis]]) for axis in range(3)]
    low, high = [float(end.min()) for end in ends], [float(end.max()) for end in ends]
    for solid in scene.solids:
        is_thin = scene.surfaces[solid.surface].class_id in _FLAT
        if not is_thin and _is_within(solid, low, high):
            is_clear &= ~(hit(solid, (start[0], start[1], start[2]), rays) < 1)
    return is_clear


def _is_within(solid: Solid, low: list[float], high: list[float]) -> bool:
    """Tell whether a solid may reach into a box."""
    reach = (reach_of(solid), solid.half[1], reach_of(solid))
    return all(
        low[axis] < solid.centre[axis] + reach[axis]
        and solid.centre[axis] - reach[axis] < high[axis]
        for axis in range(3)
    )


def _expose(planes: np.ndarray, camera: Camera) -> np.ndarray:
    """Turn light into 8-bit RGB: exposure, white balance, lens blur, soft clipping, noise."""
    # Whole numbers add up to the same sum in any order.
    levels = np.minimum(planes[1] * np.float32(4096), np.float32(65535)).astype(np.int64)
    gain = np.float32(camera.exposure * 4096 * levels.size / max(int(levels.sum()), 1))
    height, width = planes.shape[1:]
    seeds = np.arange(height * width, dtype=np.uint32).reshape(height, width)
    picture = np.empty((height, width, 3), np.uint8)
    balance = (1.0, 1.0, camera.blue)
    for channel, plane in enumerate(planes):
        exposed = _smooth(_smooth(plane, axis=0), axis=1) * (gain * np.float32(balance[channel]))
        # Linear to 8 bits: a soft shoulder, then a gamma of 2.
        curved = np.sqrt(exposed * (1 + exposed * np.float32(0.15)) / (1 + exposed))
        twist = np.uint32((camera.salt + channel * 7919) % 2**32)
        noise = _scramble(seeds * np.uint32(0x9E3779B1) ^ twist) - np.float32(0.5)
        noise = noise + _scramble(seeds * np.uint32(0x85EBCA77) ^ twist) - np.float32(0.5)
        noisy = curved * np.float32(255 * 1.15) + noise * np.float32(camera.noise * 1.5)
        picture[..., channel] = np.clip(np.floor(noisy + np.float32(0.5)), 0, 255).astype(np.uint8)
    return picture


def _smooth(plane: np.ndarray, *, axis: int) -> np.ndarray:
    """Blur by 1-6-1 along one axis, as a lens does."""
    before, after = np.roll(plane, 1, axis=axis), np.roll(plane, -1, axis=axis)
    first, last = [slice(None)] * 2, [slice(None)] * 2
    first[axis], last[axis] = slice(0, 1), slice(-1, None)
    before[tuple(first)], after[tuple(last)] = plane[tuple(first)], plane[tuple(last)]
    return (before + 6 * plane + after) * np.float32(0.125)
