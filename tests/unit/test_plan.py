"""Equal plans have equal keys everywhere; every field changes the key."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import InvalidInputError
from featstore.plan import ExtractPlan, RunOptions
from tests.fakes import fake_plan

CHANGES = {
    "architecture": "other_net",
    "tag": "other",
    "weights_sha256": "0" * 64,
    "image_size": (16, 32),
    "resize": "letterbox",
    "interpolation": "bicubic",
    "mean": (0.4, 0.5, 0.5),
    "std": (0.4, 0.5, 0.5),
    "position_grid": "bicubic",
    "precision": "bfloat16",
    "dtype": "float32",
    "format": 2,
}


def test_one_key_is_pinned_by_value():
    assert fake_plan().key() == "15a244a80e89a3dc"


@pytest.mark.parametrize("name", [field.name for field in fields(ExtractPlan)])
def test_every_field_changes_the_key(name):
    assert replace(fake_plan(), **{name: CHANGES[name]}).key() != fake_plan().key()


def test_the_key_is_the_same_in_another_process_and_folder(tmp_path):
    value = json.dumps(json.dumps(fake_plan().to_json()))
    code = (
        "import json; from featstore.plan import ExtractPlan; "
        f"print(ExtractPlan.from_json(json.loads({value})).key())"
    )
    from tests.conftest import ROOT

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "123"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == fake_plan().key()


@given(
    st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    st.sampled_from(["squash", "letterbox", "crop", "pad", "via:448"]),
    st.sampled_from(["float16", "float32", "bfloat16"]),
    st.text(max_size=20),
)
def test_a_plan_survives_json(image_size, resize, dtype, tag):
    plan = fake_plan(image_size=image_size, resize=resize, dtype=dtype, tag=tag)
    again = ExtractPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.key() == plan.key()


def test_differences_are_told_field_by_field():
    other = fake_plan(image_size=(32, 32), dtype="float32")
    assert fake_plan().differences(other) == {
        "image_size": ([16, 16], [32, 32]),
        "dtype": ("float16", "float32"),
    }


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "int8"}, "float16, float32, bfloat16"),
        ({"resize": "strech"}, "squash, letterbox"),
        ({"resize": "via:0"}, "via:N"),
        ({"image_size": (0, 4)}, "positive"),
    ],
)
def test_a_bad_plan_is_refused(changes, match):
    with pytest.raises(InvalidInputError, match=match):
        fake_plan(**changes)


def test_a_field_of_a_newer_version_is_refused():
    with pytest.raises(InvalidInputError, match="from_the_future"):
        ExtractPlan.from_json({**fake_plan().to_json(), "from_the_future": 1})


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"batch_size": -1}, {"on_bad_image": "cry"}, {"views": ("up",)}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        RunOptions(**options)
