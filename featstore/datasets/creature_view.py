"""Look at a made-up animal: where its bones and keypoints are, and which of them are seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featstore.datasets.creature_bodies import NAMES, Body, Kind, bearing
from featstore.datasets.scenes import Dice
from featstore.types import Box

SEEN, HIDDEN = 2, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Balls:
    """Bones in a picture, in pixels: x to the right, y down, z towards the viewer."""

    ends: np.ndarray  # (bones, 2, 3) float64
    widths: np.ndarray  # (bones, 2) float64, radii
    covers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """An animal in its picture."""

    hw: tuple[int, int]
    balls: Balls
    joints: np.ndarray  # (keypoints, 3) float64, as the bones' ends
    seen: tuple[int, ...]  # SEEN or HIDDEN, one a keypoint
    box: Box
    facing: float  # 1.0: it looks to the right, -1.0: to the left
    scale: float  # pixels a length of the trunk
    ground: float  # row that its feet stand on

    @property
    def side(self) -> float:
        """Give the longer side of the box."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


def look_at(body: Body, kind: Kind, hw: tuple[int, int], dice: Dice) -> View:
    """Choose a direction and a place in the picture; sides are seen more than front or back."""
    facing = dice.choice((-1.0, 1.0))
    turn, pitch = bearing(dice.uniform(-0.95, 0.95)), bearing(dice.uniform(-0.02, 0.4))
    cosine, sine = facing * turn[0], facing * turn[1]
    ends = np.array([(bone.start, bone.end) for bone in body.bones])
    spots = np.concatenate([ends.reshape(-1, 3), [body.points[name] for name in NAMES]])
    x = cosine * spots[:, 0] + sine * spots[:, 2]
    near = cosine * spots[:, 2] - sine * spots[:, 0]
    y = near * pitch[1] - spots[:, 1] * pitch[0]  # down
    z = near * pitch[0] + spots[:, 1] * pitch[1]
    widths = np.array([bone.width for bone in body.bones])
    flat = np.stack([x, y, z], axis=1)
    n_bones = len(body.bones)
    scale, shift = _fit(_box_of(flat[: 2 * n_bones, :2], widths.ravel()), hw, dice)
    flat = flat * scale + np.array([*shift, 0.0])
    balls = Balls(
        ends=flat[: 2 * n_bones].reshape(-1, 2, 3),
        widths=widths * scale,
        covers=tuple(bone.cover for bone in body.bones),
    )
    joints = flat[2 * n_bones :]
    box = _box_of(balls.ends.reshape(-1, 3)[:, :2], balls.widths.ravel())
    return View(
        hw=hw,
        balls=balls,
        joints=joints,
        seen=_seen(balls, joints, _flesh(kind) * scale),
        box=(max(box[0], 0.0), max(box[1], 0.0), min(box[2], hw[1]), min(box[3], hw[0])),
        facing=facing,
        scale=scale,
        ground=float(joints[_PAWS, 1].max()),
    )


_PAWS = [number for number, name in enumerate(NAMES) if name.endswith("paw")]


def _box_of(ends: np.ndarray, widths: np.ndarray) -> Box:
    low, high = (ends - widths[:, None]).min(axis=0), (ends + widths[:, None]).max(axis=0)
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1]))


def _fit(box: Box, hw: tuple[int, int], dice: Dice) -> tuple[float, tuple[float, float]]:
    """Choose how large an animal stands in the picture, and where: all of it is inside."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = dice.uniform(0.45, 0.8) * min(hw[1] / width, hw[0] / height)
    left = dice.uniform(0.04, 0.96 - scale * width / hw[1]) * hw[1]
    top = dice.uniform(0.04, 0.96 - scale * height / hw[0]) * hw[0]
    return scale, (left - scale * box[0], top - scale * box[1])


def _flesh(kind: Kind) -> np.ndarray:
    """Tell how much of the animal itself may lie over a keypoint that is seen, (keypoints,)."""
    size = kind.proportions
    depths = {
        "eye": 0.21 * size.head,  # which is 0.2 thick
        "nose": 1.2 * size.snout_width,
        "neck": 0.9 * size.chest,
        "tail": 0.8 * size.rump,
        "shoulder": 0.75 * size.chest,
        "hip": 0.8 * size.rump,
    }
    limb = 2.5 * size.leg_width
    return np.array([depths.get(name.rpartition("_")[2], limb) for name in NAMES])


def _seen(balls: Balls, joints: np.ndarray, flesh: np.ndarray) -> tuple[int, ...]:
    start, along = balls.ends[:, 0], balls.ends[:, 1] - balls.ends[:, 0]
    square = along[:, 0] * along[:, 0] + along[:, 1] * along[:, 1] + 1e-9
    gap = joints[:, None, :] - start
    part = (gap[..., 0] * along[:, 0] + gap[..., 1] * along[:, 1]) / square
    part = np.minimum(np.maximum(part, 0.0), 1.0)
    across = (gap[..., 0] - part * along[:, 0], gap[..., 1] - part * along[:, 1])
    radius = balls.widths[:, 0] + part * (balls.widths[:, 1] - balls.widths[:, 0])
    height = radius * radius - across[0] * across[0] - across[1] * across[1]
    surface = part * along[:, 2] - gap[..., 2] + np.sqrt(np.maximum(height, 0.0))
    over = np.where(height > 0, surface, 0.0).max(axis=1)
    return tuple(SEEN if is_seen else HIDDEN for is_seen in (over < flesh).tolist())
