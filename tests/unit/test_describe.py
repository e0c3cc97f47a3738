from __future__ import annotations

import json

import pytest

from cli.common import exit_code
from cli.heads_app import heads as program
from featstore.errors import InvalidInputError, NotFoundError
from heads.build import HEADS
from heads.describe import describe_head


def test_the_depth_head_at_width_768_is_described_as_the_paper_counts_it():
    found = describe_head("deap", width=768, grid=(16, 16))
    assert found["head"] == "deap.v1"
    assert (found["parameters"], found["dead_parameters"]) == (43_286, 1_552)
    assert found["live_parameters"] == 41_734
    assert sum(found["parameters_by_part"].values()) == 43_286
    assert found["output_shape"] == [1, 224, 224]
    assert found["bytes_per_image"] == 16 * 16 * 768 * 2
    assert json.loads(json.dumps(found)) == found


def test_the_products_of_a_forward_pass_are_those_counted_by_hand():
    found = describe_head("deap", width=64, grid=(4, 4), options={"queries": 4})
    n_tokens, n_queries = 16, 16
    features, positions = n_tokens * 64 * 48, n_tokens * 8 * 48
    queries = n_queries * 8 * 16
    attention = 8 * n_queries * n_tokens * (2 + 4)
    ffn = n_queries * (32 * 64 + 64 * 16)
    cnn = 16 * (16 * 36 + 16 * 4) + 64 * (4 * 36 + 16 * 4) + 256 * (4 * 36 + 16 * 4) + 1024 * 4
    skip = 16 * 16 + 4 * 4 * 32 + 32 * 4 * 32
    multiplications = features + positions + queries + attention + ffn + cnn + skip
    assert found["forward_flops"] == 2 * multiplications
    assert 2 * found["forward_flops"] < found["step_flops"] < 4 * found["forward_flops"]


def test_options_outputs_and_dtype_change_what_they_should():
    found = describe_head(
        "deap", width=768, grid=(7, 9), n_outputs=21, dtype="float32", options={"queries": "56"}
    )
    assert found["parameters"] == 47_272
    assert found["output_shape"] == [21, 448, 448]
    assert found["bytes_per_image"] == 7 * 9 * 768 * 4
    assert found["options"]["queries"] == 56


def test_names_that_do_not_exist_offer_the_nearest():
    with pytest.raises(NotFoundError, match=r"Unknown head 'daep'. Did you mean 'deap'\?"):
        describe_head("daep", width=8, grid=(2, 2))
    with pytest.raises(NotFoundError, match=r"Did you mean 'mask_form'\?"):
        describe_head("deap", width=8, grid=(2, 2), options={"mask_from": "paper"})


def test_sizes_and_dtypes_that_cannot_be_are_refused():
    with pytest.raises(InvalidInputError, match="positive numbers"):
        describe_head("deap", width=0, grid=(2, 2))
    with pytest.raises(InvalidInputError, match="float16, bfloat16, float32"):
        describe_head("deap", width=8, grid=(2, 2), dtype="int8")


@pytest.mark.parametrize("name", list(HEADS))
def test_the_parts_sum_to_the_whole(name):
    found = describe_head(name, width=16, grid=(3, 4))
    assert sum(found["parameters_by_part"].values()) == found["parameters"]


def test_several_numbers_of_outputs_are_heads_side_by_side():
    found = describe_head("deap", width=768, grid=(16, 16), n_outputs=(1, 2))
    assert found["parameters"] == 100 * 768 + 9794
    assert found["output_shape"] == [3, 224, 224]


def test_vit_split_is_described_by_its_preset_without_weights(capsys):
    words = ["describe", "vit_split", "--preset", "vit-split-ade20k", "--backbone", "dinov2_s"]
    assert exit_code(program, [*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["preset"], found["backbone"]) == ("vit-split-ade20k@s", "dinov2_s")
    assert (found["parameters"], found["dead_parameters"]) == (10_231_098, 768)
    assert found["taps"] == ["block:2", "block:5", "block:8", "block:11"]
    assert found["output_shape"] == [150, 148, 148]
    # Four taps of 37 x 37 tokens and one prefix token, read once each.
    assert found["bytes_per_image"] == 4 * (37 * 37 + 1) * 384 * 2


def test_a_preset_describes_its_own_head_where_none_is_named(capsys):
    assert exit_code(program, ["describe", "--preset", "deap-voc", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["head"], found["parameters"]) == ("deap.v1", 47_272)
    words = ["describe", "linear", "--preset", "deap-voc", "--set", "size=64", "--json"]
    assert exit_code(program, words) == 0
    assert json.loads(capsys.readouterr().out)["output_shape"] == [21, 64, 64]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--preset", "deap-voc", "--width", "8"], "leave out --width"),
        (["--backbone", "dinov2_s", "--width", "8"], "leave out --width"),
        (["--backbone", "hiera_bp"], "described by their --width"),
    ],
)
def test_what_contradicts_a_preset_or_a_backbone_is_refused(capsys, words, reason):
    assert exit_code(program, ["describe", "vit_split", *words]) != 0
    assert reason in capsys.readouterr().err


def test_copied_blocks_without_a_backbone_are_those_of_the_usual_vit():
    found = describe_head("vit_split", width=384, grid=(4, 4), options={"kt": 1})
    assert found["parameters_by_part"]["tail"] == 12 * 384**2 + 13 * 384
    with pytest.raises(InvalidInputError, match="one of the two"):
        describe_head("vit_split", width=384, backbone="dinov2_s", grid=(4, 4))
