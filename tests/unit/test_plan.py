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
from featstore.hashing import short_key
from featstore.plan import ExtractPlan, Resize, RunOptions, compose_resize, parse_resize
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
    st.sampled_from(["squash", "letterbox", "crop", "pad", "via:448", "crop+via:224:nearest"]),
    st.sampled_from(["float16", "float32", "bfloat16"]),
    st.text(max_size=20),
)
def test_a_plan_survives_json(image_size, resize, dtype, tag):
    plan = fake_plan(image_size=image_size, resize=resize, dtype=dtype, tag=tag)
    again = ExtractPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.key() == plan.key()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("squash", Resize(kind="squash")),
        ("via:448", Resize(kind="squash", via=448)),
        ("via:224:nearest", Resize(kind="squash", via=224, upscale="nearest")),
        ("crop+via:224", Resize(kind="crop", via=224)),
        ("letterbox+via:64:bicubic", Resize(kind="letterbox", via=64, upscale="bicubic")),
    ],
)
def test_a_resize_rule_is_read_and_written(text, rule):
    assert parse_resize(text) == rule
    assert str(rule) == text


def test_one_rule_written_in_two_ways_has_one_key():
    key = fake_plan(resize="via:224").key()
    assert key == short_key({**fake_plan().to_json(), "resize": "via:224"})
    assert fake_plan(resize="squash+via:224").key() == key
    assert fake_plan(resize="via:224:bilinear").key() == key  # the plan's interpolation
    assert fake_plan(resize="via:224:nearest").key() != key
    assert fake_plan(resize="crop+via:224").key() != key


def test_a_basis_is_added_to_a_rule():
    assert compose_resize("squash", basis=224, upscale="nearest") == "via:224:nearest"
    assert compose_resize("crop", basis=224, upscale=None) == "crop+via:224"
    assert compose_resize("pad", basis=None, upscale=None) == "pad"


@pytest.mark.parametrize(
    ("rule", "basis", "upscale", "match"),
    [
        ("pad", 224, None, "squash, crop or letterbox"),
        ("via:8", 224, None, "Give the basis once"),
        ("crop", None, "nearest", "--basis"),
        ("crop", 224, "lanczos", "nearest|bilinear|bicubic"),
    ],
)
def test_a_basis_that_cannot_be_added_is_refused(rule, basis, upscale, match):
    with pytest.raises(InvalidInputError, match=match):
        compose_resize(rule, basis=basis, upscale=upscale)


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
        ({"resize": "crop+via:224:lanczos"}, "nearest|bilinear|bicubic"),
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
