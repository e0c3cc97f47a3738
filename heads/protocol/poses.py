"""Test instances as several ways to adapt see them, drawn from the stored thumbnails."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featstore.errors import BadImageError
from featstore.images import decode, thumbnail
from featstore.skeleton import Skeleton
from heads.identity_images import MEAN, Instance
from heads.keypoint_labels import KEYPOINTS
from heads.protocol.animals import Animals
from heads.protocol.cells import Cell, Outcome
from heads.protocol.design import Design, Shots
from heads.protocol.page import PosePicture
from heads.protocol.plan import MAIN, TOKEN, Way
from heads.protocol.results import DECODER
from heads.tasks.pose_picture import close_up, draw_pose, moved

_GREY = 200
_SIDE = 320  # pixels of a panel
_RANKS = (("best", 0.0), ("median", 0.5), ("worst", 1.0))


def draw_poses(
    cells: Sequence[Cell],
    animals: Animals,
    designs: dict[str, Design],
    skeleton: Skeleton,
    shots: Shots,
) -> list[PosePicture]:
    """Draw the best, the median and the worst test instance of each identity.

    Args:
        cells: Of the held-out identities.
        animals: All instances.
        designs: Of the held-out identities.
        skeleton: What is drawn.
        shots: How many images the ways have learned from; the token's error ranks the instances.
    """
    found = {(cell.unit.identity, cell.unit.way): cell for cell in cells if cell.error is None}
    pictures = []
    for identity, design in designs.items():
        ways = [(TOKEN, 0), (TOKEN, shots), (DECODER, shots)]
        names = ("mean token", f"token, {shots} images", f"decoder, {shots} images")
        seen = {
            name: cell.outcomes[0]
            for name, (mode, count) in zip(names, ways, strict=True)
            if (cell := found.get((identity, _way(mode, count)))) is not None
        }
        ranked = seen.get(names[1])
        if ranked is None:
            continue
        order = np.argsort([one.squares / one.points for one in ranked], kind="stable")
        for rank, share in _RANKS:
            place = int(order[round(share * (len(order) - 1))])
            instance = animals.instances[identity][design.test[place]]
            of_it = {name: each[place] for name, each in seen.items()}
            panels = _panels(instance, animals, skeleton, of_it)
            caption = f"{identity}, {rank} with the token: {instance.pair.path}"
            pictures.append(PosePicture(caption=caption, panels=panels))
    return pictures


def _way(mode: str, shots: Shots) -> Way:
    return Way(variant=MAIN, mode=mode, init=MEAN, shots=shots)


def _panels(
    instance: Instance, animals: Animals, skeleton: Skeleton, seen: dict[str, Outcome]
) -> tuple[tuple[str, bytes], ...]:
    placement = instance.placement
    picture, close = close_up(_image(instance, animals), placement, side=_SIDE)
    keypoints = instance.record[KEYPOINTS]
    places = {"marked": np.where(keypoints[:, 2:] > 0, keypoints[:, :2], np.nan)}
    rmse = {name: (one.squares / one.points) ** 0.5 for name, one in seen.items()}
    for name, one in seen.items():
        places[f"{name}: RMSE {rmse[name]:.3f}"] = np.array(one.places).reshape(-1, 2)
    return tuple(
        (name, thumbnail(draw_pose(picture, moved(points, placement, close), skeleton), _SIDE))
        for name, points in places.items()
    )


def _image(instance: Instance, animals: Animals) -> np.ndarray:
    """Give the stored thumbnail; grey where there is none."""
    data = animals.labels.image(instance.pair.dataset, instance.pair.item)
    try:
        if data is not None:
            return decode(data)
    except BadImageError:
        pass
    height, width = instance.placement.source_hw
    return np.full((height, width, 3), _GREY, dtype=np.uint8)
