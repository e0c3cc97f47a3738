"""What every preset meets by being listed."""

from __future__ import annotations

import json

import pytest

from cli.common import plain
from featstore.catalogue import CATALOGUE
from featstore.datasets import READERS
from featstore.errors import NotFoundError
from featstore.plan import parse_resize
from heads.build import HEADS
from heads.describe import describe_with_preset
from heads.loop import LoopOptions
from heads.options import split_options
from heads.presets import PAPER, PRESETS, RELEASE, Preset, find_preset
from heads.presets.base import SIZES
from heads.tasks import TASKS

BASES = sorted({preset.base for preset in PRESETS.values()})


@pytest.fixture(params=list(PRESETS))
def preset(request: pytest.FixtureRequest) -> Preset:
    return PRESETS[request.param]


def test_the_experiments_are_those_promised():
    tasks = "voc coco-stuff boundaries instances".split()
    deap = [f"deap-{task}" for task in [*tasks, "nyu", "detection"]]
    maxa = [f"maxa-{task}" for task in [*tasks, "depth", "distance"]]
    split = [f"vit-split-{data}" for data in "ade20k cityscapes pascal-context nyu".split()]
    assert sorted(deap + maxa + split) == BASES


@pytest.mark.parametrize("base", BASES)
def test_a_short_name_means_the_release_for_deap_and_the_paper_for_maxa(base):
    variant = RELEASE if base.startswith("deap") else PAPER
    if base.startswith("vit-split"):
        variant = next(size for size in SIZES if f"{base}@{size}" in PRESETS)
    assert find_preset(base) is PRESETS[f"{base}@{variant}"]


def test_a_short_name_means_the_size_of_the_backbone_that_is_used():
    assert find_preset("vit-split-nyu", backbone="dinov2_l").variant == "l"
    assert find_preset("vit-split-nyu", backbone="dinov2_b_reg").variant == "b"
    assert find_preset("vit-split-nyu", backbone="clip_b").variant == "s"
    assert find_preset("vit-split-nyu@s", backbone="dinov2_l").variant == "s"
    assert find_preset("deap-voc", backbone="dinov2_b").variant == RELEASE


def test_an_unknown_preset_offers_the_nearest():
    with pytest.raises(NotFoundError, match="Did you mean 'deap-voc'"):
        find_preset("deap-vco")
    with pytest.raises(NotFoundError, match="Did you mean 'maxa-distance@paper'"):
        find_preset("maxa-distance@release")


def test_its_head_has_the_parameters_of_the_paper(preset):
    found = describe_with_preset(preset, preset.head)
    assert found["parameters"] == preset.parameters
    rows, columns = found["output_shape"][1:]
    if preset.head == "vit_split":
        assert (rows, columns) == tuple(4 * n for n in found["grid"])
        assert set(found["taps"]) == set(preset.needs.taps)
        assert preset.needs.tail == preset.head_options["kt"]
        return
    assert (rows, columns) == (8 * preset.head_options["queries"],) * 2
    assert (found["width"], found["grid"]) == (768, [37, 37])


def test_its_options_belong_to_whom_it_says(preset):
    owners = {
        "head": (HEADS[preset.head].OPTIONS, preset.head_options),
        "task": (TASKS[preset.task].OPTIONS, preset.task_options | preset.data_options),
        "loop": (LoopOptions, preset.loop_options),
    }
    for kind, options in owners.values():
        assert split_options(options, {"own": kind})["own"] == options
        kind(**options)


def test_its_data_can_be_read_and_its_features_extracted(preset):
    assert {f"{name}.v1" for name in preset.data} <= set(READERS)
    assert preset.data
    stride = CATALOGUE[preset.needs.backbone].stride
    assert all(side % stride == 0 for side in preset.needs.image_size)
    assert str(parse_resize(preset.needs.resize)) == preset.needs.resize


def test_the_papers_outputs_are_224_a_side(preset):
    if preset.variant in SIZES:
        assert any("One cached view" in note for note in preset.notes)
    elif preset.variant == PAPER:
        assert preset.head_options["queries"] == 28
        assert preset.head_options["mask_form"] == "paper"
    else:
        assert preset.lr == 1e-3
        assert preset.weight_decay == 0.01
        assert preset.needs.resize.endswith("via:224:nearest")


def test_its_notes_are_sentences_that_say_where_the_readings_differ(preset):
    assert all(note.endswith(".") and note[0].isupper() for note in preset.notes)
    text = " ".join(preset.notes)
    assert "mask" in text or preset.variant in SIZES
    assert "release" in text
    assert "Inferred" in text


@pytest.mark.parametrize("base", BASES)
def test_two_readings_differ_in_what_is_known_to_differ(base):
    found = [preset for preset in PRESETS.values() if preset.base == base]
    if {preset.variant for preset in found} == {PAPER, RELEASE}:
        one, other = (preset.to_json() for preset in found)
        differing = {name for name in one if one[name] != other[name]}
        assert {"variant", "head_options", "weight_decay", "needs", "notes"} <= differing
        assert ("lr" in differing) == (one["task"] in ("depth", "boundaries"))
        assert not differing & {"task", "head", "steps", "data", "parameters", "task_options"}


def test_a_preset_is_plain_json(preset):
    again = json.loads(json.dumps(plain(preset.to_json())))
    assert again["name"] == preset.name
    assert again["head_options"] == preset.head_options
