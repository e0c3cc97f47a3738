"""Skeletons and keypoint labels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from featstore.errors import InvalidInputError
from featstore.skeleton import Skeleton, skeleton_from_json, swaps_from_names
from heads.keypoint_labels import keypoint_record, keypoints_text


def test_a_skeleton_survives_json():
    skeleton = Skeleton(
        names=("nose", "l_eye", "r_eye"), edges=((0, 1),), swaps=((1, 2),), sigmas=(0.1, 0.2, 0.2)
    )
    assert skeleton_from_json(json.loads(json.dumps(skeleton.to_json()))) == skeleton
    assert skeleton.mirror_order() == (0, 2, 1)
    assert Skeleton(names=("a",)).mirror_order() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": ()},
        {"names": ("a", "a")},
        {"names": ("a", "b"), "edges": ((0, 2),)},
        {"names": ("a", "b", "c"), "swaps": ((0, 1), (1, 2))},
        {"names": ("a", "b"), "sigmas": (0.1,)},
        {"names": ("a",), "sigmas": (0.0,)},
    ],
)
def test_a_skeleton_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(InvalidInputError):
        Skeleton(**wrong)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["L_Eye", "R_Eye", "Nose"], ((0, 1),)),
        (["left_front_paw", "nose", "right_front_paw"], ((0, 2),)),
        (["paw left", "paw right"], ((0, 1),)),
        (["collar", "rear"], None),  # letters inside of a word are no sides
        (["left_eye", "nose"], None),  # nobody knows what becomes of the left eye
    ],
)
def test_sides_are_found_by_their_names(names, expected):
    assert swaps_from_names(names) == expected


def test_a_label_reads_as_it_was_written():
    attributes = json.dumps({"keypoints": [[1.5, 2, 2], [0, 0, 0]], "box": [0, 1, 4, 6]})
    text = keypoints_text(attributes, "fox")
    assert text is not None
    record = keypoint_record(text)
    np.testing.assert_array_equal(record["keypoints"], [[1.5, 2, 2], [0, 0, 0]])
    assert (record["box"].tolist(), float(record["area"])) == ([0, 1, 4, 6], 20.0)
    assert str(record["identity"]) == "fox"
    assert keypoints_text("{}", "fox") is None


@pytest.mark.parametrize("points", [[[1, 2]], [[0, 0, 0]], [[None, 2, 2]], "abc", []])
def test_a_label_without_places_is_refused(points):
    about = {"keypoints": points, "box": None, "area": None, "identity": None}
    with pytest.raises(InvalidInputError):
        keypoint_record(json.dumps(about))
