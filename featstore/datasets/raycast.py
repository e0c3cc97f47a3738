"""Cast rays into a scene: exact depth, and what each ray meets.

A ray's direction has length 1 along the optical axis, so its parameter at the hit *is* the depth
along that axis (z-depth), in metres. All arithmetic is float32 with ``+ - * /``, square roots and
comparisons, which give the same bits on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featstore.datasets.scenes import Camera, Scene, Solid, Vector

Arrays3 = tuple[np.ndarray, np.ndarray, np.ndarray]
N_PLANES = 6
_NEAR = 1e-3
_FAR = np.float32(np.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """What the rays of one picture meet, each array (H, W)."""

    depth: np.ndarray  # float32, metres along the optical axis
    thing: np.ndarray  # int16: 0 to 5 a plane of the room, then 6 + number of the solid
    rays: Arrays3  # float32 directions


def cast(scene: Scene, camera: Camera, hw: tuple[int, int]) -> Hits:
    """Find what each pixel's centre sees."""
    rays = _rays(camera, hw)
    depth, thing = _hit_room(scene.size, camera.at, rays)
    for number, solid in enumerate(scene.solids):
        window = _window(solid, camera, hw)
        seen = (rays[0][window], rays[1][window], rays[2][window])
        distance = hit(solid, camera.at, seen)
        is_nearer = distance < depth[window]
        depth[window] = np.where(is_nearer, distance, depth[window])
        thing[window] = np.where(is_nearer, np.int16(N_PLANES + number), thing[window])
    return Hits(depth=depth, thing=thing, rays=rays)


def _rays(camera: Camera, hw: tuple[int, int]) -> Arrays3:
    height, width = hw
    focal = camera.focal * width
    u = ((np.arange(width) + 0.5 - width / 2) / focal).astype(np.float32)[None, :]
    v = ((np.arange(height) + 0.5 - height / 2) / focal).astype(np.float32)[:, None]
    x, y, z = (
        camera.forward[axis] + u * camera.right[axis] + v * camera.down[axis] for axis in range(3)
    )
    return (x, y, z)


def _hit_room(size: Vector, at: Vector, rays: Arrays3) -> tuple[np.ndarray, np.ndarray]:
    """Meet the room's planes from inside."""
    depth = np.full(rays[0].shape, _FAR, dtype=np.float32)
    thing = np.zeros(rays[0].shape, dtype=np.int16)
    with np.errstate(divide="ignore", invalid="ignore"):
        for axis in range(3):
            is_far = rays[axis] > 0
            distance = (np.where(is_far, np.float32(size[axis]), np.float32(0)) - at[axis]) / rays[
                axis
            ]
            is_nearer = (distance > 0) & (distance < depth)  # a ray along the plane gives -inf
            depth = np.where(is_nearer, distance, depth)
            thing = np.where(is_nearer, (2 * axis + is_far).astype(np.int16), thing)
    return depth, thing


def _window(solid: Solid, camera: Camera, hw: tuple[int, int]) -> tuple[slice, slice]:
    """Find the rectangle of pixels that can see a solid, from the corners of its bounding cube."""
    height, width = hw
    focal = camera.focal * width
    reach = reach_of(solid)
    columns, rows = [], []
    for corner in range(8):
        offset = (
            solid.centre[0] + (reach if corner & 1 else -reach) - camera.at[0],
            solid.centre[1] + (solid.half[1] if corner & 2 else -solid.half[1]) - camera.at[1],
            solid.centre[2] + (reach if corner & 4 else -reach) - camera.at[2],
        )
        depth = _dot(offset, camera.forward)
        if depth < 0.05:
            return (slice(0, height), slice(0, width))
        columns.append(width / 2 + focal * _dot(offset, camera.right) / depth)
        rows.append(height / 2 + focal * _dot(offset, camera.down) / depth)
    return (_span(rows, height), _span(columns, width))


def reach_of(solid: Solid) -> float:
    """Give how far a solid may extend along x or z from its centre, however it is turned."""
    return solid.half[0] + solid.half[2] if solid.shape == "box" else solid.half[0]


def _span(edges: list[float], size: int) -> slice:
    low, high = int(min(max(min(edges) - 1, 0), size)), int(min(max(max(edges) + 2, 0), size))
    return slice(low, high)


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def hit(solid: Solid, at: Vector | Arrays3, rays: Arrays3) -> np.ndarray:
    """Give the parameter at which each ray enters a solid, infinite where it does not.

    Args:
        solid: What to meet.
        at: Where the rays start: one point, or a point a ray.
        rays: Directions, of any length.
    """
    cosine, sine = solid.turn
    x, y, z = (np.asarray(at[axis] - solid.centre[axis], np.float32) for axis in range(3))
    start = (cosine * x + sine * z, y, cosine * z - sine * x)
    along = (cosine * rays[0] + sine * rays[2], rays[1], cosine * rays[2] - sine * rays[0])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _SHAPES[solid.shape](solid.half, start, along)


def _hit_box(half: Vector, start: Arrays3, along: Arrays3) -> np.ndarray:
    near, far = np.asarray(_NEAR, np.float32), np.asarray(_FAR)
    for axis in range(3):
        inverse = np.float32(1) / along[axis]
        first, second = (-half[axis] - start[axis]) * inverse, (half[axis] - start[axis]) * inverse
        near = np.maximum(near, np.minimum(first, second))
        far = np.minimum(far, np.maximum(first, second))
    # Not `near > far`: a ray inside a face's plane gives NaN, which must count as a miss.
    is_hit = (near <= far) & (near > _NEAR)
    return np.where(is_hit, near, _FAR)


def _hit_sphere(half: Vector, start: Arrays3, along: Arrays3) -> np.ndarray:
    a = along[0] * along[0] + along[1] * along[1] + along[2] * along[2]
    b = start[0] * along[0] + start[1] * along[1] + start[2] * along[2]
    c = start[0] * start[0] + start[1] * start[1] + start[2] * start[2] - half[0] * half[0]
    inside_root = b * b - a * c
    distance = (-b - np.sqrt(np.maximum(inside_root, 0))) / a
    return np.where((inside_root > 0) & (distance > _NEAR), distance, _FAR)


def _hit_cylinder(half: Vector, start: Arrays3, along: Arrays3) -> np.ndarray:
    """Meet the wall of an upright cylinder or the lid that faces the start."""
    square = half[0] * half[0]
    a = along[0] * along[0] + along[2] * along[2]
    b = start[0] * along[0] + start[2] * along[2]
    c = start[0] * start[0] + start[2] * start[2] - square
    inside_root = b * b - a * c
    side = (-b - np.sqrt(np.maximum(inside_root, 0))) / a
    is_side = (inside_root > 0) & (side > _NEAR) & (np.abs(start[1] + side * along[1]) <= half[1])
    lid_y = np.where(np.asarray(start[1]) > 0, np.float32(half[1]), np.float32(-half[1]))
    lid = (lid_y - start[1]) / along[1]
    lid_x, lid_z = start[0] + lid * along[0], start[2] + lid * along[2]
    is_lid = (lid > _NEAR) & (lid_x * lid_x + lid_z * lid_z <= square)
    return np.minimum(np.where(is_side, side, _FAR), np.where(is_lid, lid, _FAR))


_SHAPES = {"box": _hit_box, "sphere": _hit_sphere, "cylinder": _hit_cylinder}
