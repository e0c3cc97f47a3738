"""Sigmas of skeletons that are in wide use: how exactly people place each keypoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

AP10K: Mapping[str, float] = {
    "left_eye": 0.025,
    "right_eye": 0.025,
    "nose": 0.026,
    "neck": 0.035,
    "root_of_tail": 0.035,
    "left_shoulder": 0.079,
    "left_elbow": 0.072,
    "left_front_paw": 0.062,
    "right_shoulder": 0.079,
    "right_elbow": 0.072,
    "right_front_paw": 0.062,
    "left_hip": 0.107,
    "left_knee": 0.087,
    "left_back_paw": 0.089,
    "right_hip": 0.107,
    "right_knee": 0.087,
    "right_back_paw": 0.089,
}
"""Of AP-10K, as its own repository evaluates it; APT-36K marks the same keypoints.

An early file of MMPose lists the same numbers in the order of COCO's persons, which is another.
"""

COCO_PERSON: Mapping[str, float] = {
    "nose": 0.026,
    "left_eye": 0.025,
    "right_eye": 0.025,
    "left_ear": 0.035,
    "right_ear": 0.035,
    "left_shoulder": 0.079,
    "right_shoulder": 0.079,
    "left_elbow": 0.072,
    "right_elbow": 0.072,
    "left_wrist": 0.062,
    "right_wrist": 0.062,
    "left_hip": 0.107,
    "right_hip": 0.107,
    "left_knee": 0.087,
    "right_knee": 0.087,
    "left_ankle": 0.089,
    "right_ankle": 0.089,
}
"""Of the persons of COCO."""

_SHORT = {"l": "left", "r": "right", "f": "front", "b": "back"}


def known_sigmas(names: Sequence[str]) -> tuple[float, ...] | None:
    """Give the sigmas of a known skeleton by its names, in their order; None of any other."""
    plain = ["_".join(_words(name)) for name in names]
    for known in (AP10K, COCO_PERSON):
        if sorted(plain) == sorted(known):
            return tuple(known[name] for name in plain)
    return None


def _words(name: str) -> list[str]:
    """Split "L_F_Paw" into left, front, paw."""
    return [_SHORT.get(word, word) for word in re.split(r"[\W_]+", name.lower())]
