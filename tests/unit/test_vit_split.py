"""ViT-Split's heads: what they compute, what they count, and how they learn from a stored tail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import featstore
import heads
from featstore.errors import InvalidInputError, NotFoundError
from featstore.tail import TailSpec, TailWeights, plain_block
from featstore.types import TapShape, ignore_progress
from heads.base import TapTokens
from heads.build import build_head
from heads.feed import Feed
from heads.model import load
from heads.predictions import predict_rows
from heads.runs import list_runs, read_run
from heads.selection import pairs_from_table
from heads.setup import Request, make_setup
from heads.stages import group_norm
from heads.vit_block import Tail
from tests.fakes import DIM, GRID, FakeReader, Things, fake_extract, fake_plan

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 4
SHAPES = (
    *(TapShape(tap=f"block:{n}", dim=DIM, grid=GRID, n_prefix=1) for n in range(DEPTH)),
    TapShape(tap="norm", dim=DIM, grid=GRID, n_prefix=1),
)
BACKBONE = {"name": "fake", "unit": "block", "depth": DEPTH, "n_prefix": 1}
SCALE = {f"block:{n}": 1.0 + n for n in range(DEPTH)}
SHORT = {"steps": 4, "batch_size": 8, "device": "cpu", "lr": 1e-2}
QUIET = {"pictures": 0, "checks": 2}


def make_spec(n_blocks: int) -> TailSpec:
    blocks = (plain_block(DIM, 2),) * n_blocks
    return TailSpec(first=DEPTH - n_blocks, blocks=blocks, n_prefix=1)


def make_tail(n_blocks: int) -> TailWeights:
    torch.manual_seed(7)
    state = Tail(make_spec(n_blocks)).state_dict()
    return TailWeights(spec=make_spec(n_blocks), tensors={k: v.numpy() for k, v in state.items()})


def fake_store(path, readers, **options):
    given = {"shapes": SHAPES, "backbone": BACKBONE, "scale": SCALE, "tail": make_tail(3)}
    fake_extract(path, readers, **(given | options))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return fake_store(tmp_path_factory.mktemp("split") / "s.zarr", [Things(30)])


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "s.zarr")


def learn(store, **changes):
    options = {**QUIET, **changes.pop("options", {})}
    given = {"task": "depth", "head": "vit_split", **SHORT, **changes}
    return heads.train(store, options=options, **given)


def set_up(store, **changes):
    """What a training would begin with; nothing is trained."""
    options = {**QUIET, **changes.pop("options", {})}
    request = Request(**{"task": "depth", "head": "vit_split", "options": options, **changes})
    opened = featstore.open(store)
    targets = Path(store).parent / "targets"
    device = torch.device("cpu")
    return make_setup(
        opened, request, device=device, targets_path=targets, progress=ignore_progress
    ).record


def record_of(report):
    return json.loads((Path(report.path) / "run.json").read_text())


def weights(report):
    return safetensors.torch.load_file(Path(report.path) / "head.safetensors")


def make_inputs(n_taps, *, batch=2, grid=(3, 4), dim=DIM, valid=None):
    generator = torch.Generator().manual_seed(0)
    return [
        TapTokens(
            patch=torch.randn(batch, grid[0] * grid[1], dim, generator=generator),
            prefix=torch.randn(batch, 1, dim, generator=generator),
            grid=grid,
            valid=valid,
        )
        for _ in range(n_taps)
    ]


def tap(number, *, grid=(3, 4), dim=DIM):
    return TapShape(tap=f"block:{number}", dim=dim, grid=grid, n_prefix=1)


def make_head(**options):
    torch.manual_seed(0)
    chosen = {"kt": 2, **options}
    taps = [] if chosen.get("parts") == "task" else [tap(0), tap(2)]
    tail = None if chosen.get("parts") == "prior" else make_spec(chosen["kt"])
    taps += [] if tail is None else [tap(DEPTH - 1 - chosen["kt"])]
    return build_head("vit_split", taps=taps, n_outputs=3, options=chosen, tail=tail)


def test_the_head_is_what_its_parts_say_one_after_another():
    head = make_head().eval()
    inputs = make_inputs(3)
    as_map = [tokens.patch.mT.reshape(2, DIM, 3, 4) for tokens in inputs]
    prior = head.prior.net(torch.cat(as_map[:2], dim=1))
    tokens = torch.cat([inputs[2].prefix, inputs[2].patch], dim=1)
    task = head.tail(tokens, (3, 4))[:, 1:].mT.reshape(2, DIM, 3, 4)
    expected = head.stage(head.fusion.net(torch.cat([prior, task], dim=1)))
    torch.testing.assert_close(head(inputs), expected)
    assert head(inputs).shape == (2, 3, 12, 16)
    added = make_head(fusion="add").eval()
    added.load_state_dict(head.state_dict(), strict=False)
    torch.testing.assert_close(added(inputs), head.stage(prior + task))
    only = make_head(parts="task").eval()
    only.load_state_dict(head.state_dict(), strict=False)
    torch.testing.assert_close(only(inputs[2:]), head.stage(task))


def test_parts_prior_is_the_prior_head():
    alone, part = make_head(parts="prior").eval(), make_inputs(2)
    taps = [tap(0), tap(2)]
    prior = build_head("vit_split_prior", taps=taps, n_outputs=3).eval()
    prior.load_state_dict(alone.state_dict())
    assert torch.equal(alone(part), prior(part))


def test_untrained_copies_give_the_backbones_own_last_tokens():
    tail, head = make_tail(3), make_head(parts="task", kt=3)
    head.fill_tail(tail)
    own = Tail(tail.spec)
    own.load_state_dict({name: torch.from_numpy(array) for name, array in tail.tensors.items()})
    inputs = make_inputs(1)
    sequence = torch.cat([inputs[0].prefix, inputs[0].patch], dim=1)
    expected = own(sequence, (3, 4))[:, 1:]
    torch.testing.assert_close(head._task(inputs[0]).flatten(2).mT, expected)


def test_any_grid_will_do_and_the_output_follows_it():
    head = make_head().eval()
    assert head(make_inputs(3, grid=(5, 2))).shape == (2, 3, 20, 8)
    assert head.output_hw == (12, 16)
    head.read_grids([tap(n, grid=(5, 2)) for n in (0, 2, 1)])
    assert head.output_hw == (20, 8)


def test_padding_is_zeros_to_the_prior_and_what_it_was_to_the_copies():
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 8:] = False
    head, (clean,) = make_head(parts="prior").eval(), make_inputs(1, valid=valid)
    before = head([clean, clean])
    clean.patch[0, 8:] = float("nan")
    assert torch.equal(head([clean, clean]), before)
    task = make_head(parts="task").eval()
    (inputs,) = make_inputs(1, valid=valid)
    found = task._task(inputs)
    assert not found.flatten(2)[0, :, 8:].any()
    inputs.patch[0, 8:] += 1
    assert not torch.equal(task._task(inputs)[0, :, 0, 0], found[0, :, 0, 0])


def test_the_stage_follows_the_task_and_cannot_contradict_it(store):
    stages = {"depth": ("depth", [16, 16]), "segmentation": ("dense", [16, 16])}
    stages["classification"] = ("pooled", [1, 1])
    for task, (stage, output_hw) in stages.items():
        record = set_up(store, task=task)
        assert (record["options"]["head"]["stage"], record["output_hw"]) == (stage, output_hw)
    with pytest.raises(InvalidInputError, match="`stage` must be pooled for this task"):
        set_up(store, task="classification", options={"stage": "dense"})
    with pytest.raises(InvalidInputError, match="`stage` must be depth for this task"):
        set_up(store, options={"stage": "pooled"})


@pytest.mark.parametrize("head", ["vit_split", "vit_split_prior"])
def test_depth_begins_at_the_mean_of_the_training_images(store, head):
    report = learn(store, head=head, steps=1, lr=1e-12)
    model = load(read_run(Path(report.path)), device="cpu")
    features = featstore.open(store).feature_set()
    pairs = pairs_from_table(pq.read_table(Path(report.path) / "pairs.parquet"), "train")
    reader = Things(30)
    logs = [np.log(reader.depth(pair.path)).mean() for pair in pairs]
    predicted = predict_rows(model, Feed(features, model.array_names, model.device), [0])
    np.testing.assert_allclose(predicted, np.exp(np.mean(logs)), rtol=0.05)
    # The loss hardly says how large all depths are: at this rate it would take long to learn.
    report = learn(store, head=head, steps=10, lr=3e-4)
    mean = np.mean([reader.depth(pair.path).mean() for pair in pairs])
    test = pairs_from_table(pq.read_table(Path(report.path) / "pairs.parquet"), "test")
    errors = [np.sqrt(((reader.depth(pair.path) - mean) ** 2).mean()) for pair in test]
    assert report.metrics["rmse"] < 1.1 * np.mean(errors)


def test_it_classifies(store):
    report = learn(store, head="vit_split_prior", task="classification", options={"kp": 2})
    assert report.metrics.keys() >= {"top1", "ce"}


def test_padded_tokens_are_not_pooled():
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 8:] = False
    options = {"stage": "pooled", "mixer": "none"}
    head = build_head("vit_split_prior", taps=[tap(0)], n_outputs=3, options=options)
    (tokens,) = make_inputs(1, valid=valid)
    means = torch.stack([tokens.patch[0, :8].mean(0), tokens.patch[1].mean(0)])
    torch.testing.assert_close(head([tokens])[:, :, 0, 0], head.stage(means))


@pytest.mark.parametrize(("channels", "groups"), [(384, 32), (192, 32), (64, 32), (32, 16), (6, 3)])
def test_groups_have_two_channels_at_least_and_are_those_of_the_release(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_width_and_mixer_change_what_they_should():
    def shape_of(**options):
        head = build_head("vit_split_prior", taps=[tap(0), tap(1)], n_outputs=2, options=options)
        return head.prior.width, head.n_parameters()

    width, n_default = shape_of()
    assert width == DIM
    assert n_default == (2 * 8 + 1) * 8 + 162 * 8 + 18 + 9 * 64 + 8 * 64 + 8 * 8 + 9 * 2
    assert shape_of(width=4)[0] == 4
    assert shape_of(mixer="plain")[1] == n_default - 162 * 8 - 18 + 8
    assert shape_of(mixer="none")[0] == 2 * DIM
    assert make_head(width=4).fusion.net[0].out_channels == 4


# Configuration, backbone, taps, kt, classes (None: depth), parameters in millions.
COUNTS = [
    ("ADE S", "dinov2_s", {"layers": "uniform", "kt": 3}, 150, 10.231),
    ("ADE B", "dinov2_b", {"layers": "uniform", "kt": 3}, 150, 40.516),
    ("ADE L", "dinov2_l", {"layers": "uniform", "kp": 8, "kt": 4}, 150, 88.640),
    ("ADE G", "dinov2_g", {"layers": "uniform", "kp": 14, "b": 27, "kt": 8}, 150, 326.530),
    ("Cityscapes B", "dinov2_b", {"layers": "last", "kp": 5, "kt": 5}, 19, 55.184),
    ("Cityscapes L", "dinov2_l", {"layers": "uniform", "kp": 8, "kt": 10}, 19, 164.095),
    ("Context B", "dinov2_b", {"layers": "last", "kp": 4, "kt": 4}, 59, 47.535),
    ("Context L", "dinov2_l", {"layers": "last", "kp": 10, "kt": 6}, 59, 115.840),
    ("NYU S", "dinov2_s", {"layers": "uniform", "kt": 3, "stage": "depth"}, 1, 9.336),
    ("NYU B, Kt 4", "dinov2_b", {"layers": "uniform", "kt": 4, "stage": "depth"}, 1, 44.045),
    ("NYU B, Kt 3", "dinov2_b", {"layers": "uniform", "kt": 3, "stage": "depth"}, 1, 36.956),
    ("NYU L", "dinov2_l", {"layers": "uniform", "b": 6, "kt": 3, "stage": "depth"}, 1, 65.527),
]


@pytest.mark.parametrize(("name", "backbone", "options", "n_outputs", "millions"), COUNTS)
def test_parameters_are_those_built_from_the_release(name, backbone, options, n_outputs, millions):
    from heads.describe import describe_head

    found = describe_head(
        "vit_split", backbone=backbone, grid=(2, 2), n_outputs=n_outputs, options=options
    )
    assert round(found["parameters"] / 1e6, 3) == pytest.approx(millions)
    assert found["dead_parameters"] == 2 * found["width"]
    if name == "ADE S":  # HEADS.md 2.3, in millions
        parts = {part: round(n / 1e6, 2) for part, n in found["parameters_by_part"].items()}
        assert parts == {"prior": 1.98, "tail": 5.33, "fusion": 1.69, "stage": 1.24}


@pytest.mark.parametrize(
    ("backbone", "kp", "millions"),
    [("dinov2_s", 4, 3.22), ("dinov2_b", 4, 12.63), ("dinov2_l", 8, 26.54)],
)
def test_the_prior_alone_counts_as_the_release(backbone, kp, millions):
    from heads.describe import describe_head

    found = describe_head(
        "vit_split_prior", backbone=backbone, grid=(2, 2), n_outputs=150, options={"kp": kp}
    )
    assert round(found["parameters"] / 1e6, 2) == pytest.approx(millions)
    assert found["dead_parameters"] == 0


def test_it_reads_the_stored_blocks_and_beside_them_the_raw_one_before_the_copies(store):
    report = learn(store, options={"kt": 2})
    record = record_of(report)
    assert record["taps"] == ["block:0", "block:1", "block:2", "block:3"]
    assert record["head_taps"] == [*record["taps"], "block:1"]
    assert record["normed_taps"] == record["taps"]
    assert TailSpec.from_json(record["tail"]) == make_spec(2)
    model = load(report.path)
    assert model.head.raw_inputs == {4}
    features = featstore.open(store).feature_set()
    arrays = {n: torch.from_numpy(features.read(n, rows=[0, 1])) for n in model.array_names}
    inputs = model.tokens(arrays, [None, None])
    assert torch.equal(inputs[4].patch, arrays["block:1"].float())
    assert torch.equal(inputs[4].prefix, arrays["block:1/prefix"].float())
    normed = torch.nn.functional.layer_norm(arrays["block:1"].float(), (DIM,), eps=1e-6)
    torch.testing.assert_close(inputs[1].patch, normed)


@pytest.mark.parametrize(
    ("options", "taps"),
    [
        ({"layers": "uniform", "kp": 2, "b": 1}, ["block:1", "block:3"]),
        ({"kp": 3, "b": 0}, ["block:0", "block:1", "block:3"]),
        ({"kp": 3, "b": 0, "rounding": "nearest"}, ["block:0", "block:2", "block:3"]),
        ({"layers": "last", "kp": 2}, ["block:2", "block:3"]),
    ],
)
def test_layers_choose_the_taps_of_the_prior(store, options, taps):
    record = set_up(store, options={"kt": 3, **options})
    assert record["head_taps"] == [*taps, "block:0"]


def test_named_taps_are_those_of_the_prior(store):
    assert set_up(store, taps=("block:-1",))["head_taps"] == ["block:3", "block:0"]
    with pytest.raises(InvalidInputError, match="the options of the head choose them"):
        set_up(store, taps=("block:3",), options={"kp": 2})


def test_the_copies_learn_a_tenth_as_fast_and_the_norm_stays(store):
    report = learn(store, steps=1, options={"tail_lr": "0.1"})
    slow = weights(report)
    fast = weights(learn(store, steps=1, options={"tail_lr": "1"}))
    begun = make_tail(3).tensors

    def moved(found, part):
        names = [n for n in begun if n.startswith(part)]
        return max((found[f"head.tail.{n}"].numpy() - begun[n]).__abs__().max() for n in names)

    # AdamW's first step is the rate, whatever the gradient; weights also decay by the rate.
    assert moved(slow, "blocks") == pytest.approx(1e-3, rel=0.05)
    assert moved(fast, "blocks") == pytest.approx(1e-2, rel=0.05)
    assert moved(slow, "norm") == moved(fast, "norm") == 0
    assert torch.equal(slow["head.stage.0.weight"], fast["head.stage.0.weight"])


def stop_at(step):
    def stop(report):
        if report.stage == "train" and report.total and report.done == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_run_ends_with_the_bytes_of_an_undisturbed_one(store, step):
    changes = {"options": {"schedule": "poly", "warmup": 2, "clip": 1.0}}
    undisturbed = learn(store, **changes)
    with pytest.raises(KeyboardInterrupt):
        learn(store, progress=stop_at(step), **changes)
    report = heads.train(store, resume="@last", device="cpu")
    mine, theirs = weights(report), weights(undisturbed)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    curves = [pq.read_table(Path(r.path) / "curves.parquet") for r in (report, undisturbed)]
    assert curves[0].equals(curves[1])


def test_taps_that_are_stored_later_do_not_change_a_resumed_run(tmp_path):
    few = [shape for shape in SHAPES if shape.tap in ("block:0", "block:3")]
    store = fake_store(tmp_path / "s.zarr", [FakeReader(20)], shapes=few)
    undisturbed = learn(store)
    with pytest.raises(KeyboardInterrupt):
        learn(store, progress=stop_at(2))
    fake_store(store, [FakeReader(20)])
    report = heads.train(store, resume="@last", device="cpu")
    assert record_of(report)["taps"] == ["block:0", "block:3"]
    assert torch.equal(
        weights(report)["head.stage.0.weight"], weights(undisturbed)["head.stage.0.weight"]
    )


def test_a_run_needs_no_store_to_predict(store, tmp_path):
    report = learn(store)
    features = featstore.open(store).feature_set()
    names = load(report.path).array_names
    arrays = {name: features.read(name, rows=[0, 1, 2]) for name in names}
    expected = load(report.path).predict(arrays)
    folder = shutil.copytree(report.path, tmp_path / "run")
    shutil.rmtree(store)
    found = load(folder).predict(arrays)
    assert np.array_equal(found, expected)
    assert found.shape == (3, 1, 16, 16)
    del arrays["block:0/prefix"]
    with pytest.raises(InvalidInputError, match="`prefix tokens` must be the 1"):
        load(folder).predict(arrays)


def test_detection_learns_two_of_them_side_by_side(store):
    report = learn(store, task="detection", options={"kt": 2})
    found = weights(report)
    one, other = (found[f"head.parts.{n}.tail.blocks.0.mlp.fc1.weight"] for n in (0, 1))
    begun = torch.from_numpy(make_tail(3).tensors["blocks.1.mlp.fc1.weight"])
    for copy in (one, other):
        assert 0 < (copy - begun).abs().max() < 4 * 1.2e-3
    assert not torch.equal(one, other)
    assert report.dead_parameters == 2 * 2 * DIM


def test_a_gate_is_learned_and_told(store):
    report = learn(store, head="vit_split_prior", options={"gate": "sparse", "k": 2, "kp": 3})
    gate = report.learned["gate"]
    assert list(gate) == ["block:0", "block:1", "block:2", "block:3"]
    columns = np.array(list(gate.values()))
    assert columns.shape == (4, 3)
    np.testing.assert_allclose(columns.sum(axis=0), 1, rtol=1e-6)
    assert ((columns > 0).sum(axis=0) == 2).all()
    assert record_of(report)["learned"] == report.learned
    with pytest.raises(InvalidInputError, match="5 or more for a gate that keeps 5"):
        learn(store, head="vit_split_prior", options={"gate": "sparse", "k": 5})


def test_what_is_lacking_is_named_with_the_command_that_adds_it(tmp_path):
    few = [shape for shape in SHAPES if shape.tap in ("block:0", "norm")]
    store = fake_store(tmp_path / "s.zarr", [FakeReader(20)], shapes=few, tail=None)
    with pytest.raises(
        NotFoundError,
        match=r"Add block:3 and block:1: `featstore extract .*--taps block:3,block:1 --tail 2",
    ):
        learn(store, options={"layers": "last", "kp": 1, "kt": 2})
    with pytest.raises(
        NotFoundError, match=r"no tail, and 3 blocks are needed.*--taps block:0 --tail 3"
    ):
        learn(store)
    fake_store(store, [FakeReader(20)], tail=make_tail(1))
    with pytest.raises(NotFoundError, match=r"a tail of 1, and 3 blocks are needed.*--tail 3"):
        learn(store)
    with pytest.raises(InvalidInputError, match="`kt` must be from 1 to 3"):
        learn(store, options={"kt": 4})
    assert list_runs(store) == []


def test_nets_of_stages_and_other_grids_are_refused(tmp_path):
    stages = [TapShape(tap=f"stage:{n}", dim=DIM, grid=GRID, n_prefix=1) for n in (0, 1)]
    about = {"name": "net", "unit": "stage", "depth": 2}
    store = fake_store(
        tmp_path / "s.zarr", [FakeReader(20)], shapes=stages, backbone=about, tail=None
    )
    with pytest.raises(InvalidInputError, match="copies the last blocks of a ViT"):
        learn(store)
    with pytest.raises(InvalidInputError, match="Name taps with --tap instead"):
        learn(store, head="vit_split_prior", options={"kp": 2})
    taps = [tap(0), tap(1, grid=(2, 2))]
    with pytest.raises(InvalidInputError, match="block:0 3x4, block:1 2x2"):
        build_head("vit_split_prior", taps=taps, n_outputs=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kt": 0}, "at least 1 block"),
        ({"parts": "all"}, "one of both, prior, task"),
        ({"fusion": "mean"}, "one of net, add"),
        ({"tail_lr": 0.0}, "above 0"),
        ({"width": 4, "fusion": "add"}, "their width is the backbone's"),
        ({"width": 4, "mixer": "none"}, "auto with mixer=none"),
        ({"mixer": "both"}, "one of deformable"),
        ({"layers": "first"}, "one of auto"),
        ({"layers": "stored", "kp": 3}, "left out with layers=stored"),
        ({"layers": "last", "gate": "sparse"}, "stored with a gate"),
        ({"rounding": "up"}, "one of floor"),
        ({"gate": "soft"}, "one of none, sparse"),
        ({"stage": "mask"}, "one of auto, dense"),
        ({"sampler": "mmcv"}, "one of plain"),
    ],
)
def test_options_that_cannot_be_are_refused(options, reason):
    with pytest.raises(InvalidInputError, match=reason):
        build_head("vit_split", taps=[tap(0)], n_outputs=1, options=options)


def test_a_tail_of_other_blocks_than_the_taps_say_is_refused():
    taps = [tap(0), tap(1)]
    for tail in (None, make_spec(3)):
        with pytest.raises(InvalidInputError, match="the blocks after the last tap"):
            build_head("vit_split", taps=taps, n_outputs=1, options={"kt": 2}, tail=tail)
    with pytest.raises(InvalidInputError, match="at least one for the prior"):
        build_head("vit_split", taps=[tap(1)], n_outputs=1, options={"kt": 2}, tail=make_spec(2))


BLOCKED = """
import sys
sys.modules["timm"] = None
import heads
report = heads.train(sys.argv[1], task="depth", head="vit_split", steps=1, batch_size=8,
                     device="cpu", options={"pictures": 0})
heads.evaluate(report.path, device="cpu")
print([name for name in sys.modules if name.startswith("featstore.backbones")])
"""


def test_it_trains_where_timm_cannot_be_imported(store):
    words = [sys.executable, "-c", BLOCKED, str(store)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_is_measured_on_other_features_of_its_backbone(store):
    report = learn(store)
    own = featstore.open(store).feature_set().key
    larger = fake_plan(image_size=(32, 32), weights_sha256="1" * 64)
    fake_store(store, [Things(30)], plan=larger)
    for key in (own, larger.key()):  # the fake backbone gives the same tokens for any size
        again = heads.evaluate(report.path, feature_set=key, device="cpu")
        assert (again.metrics, again.images) == (report.metrics, report.images)
    others = [
        (fake_plan(tag="other", weights_sha256="2" * 64), {}),
        (fake_plan(weights_sha256="3" * 64), {"norm_weight": 2.0}),
        (fake_plan(tag="random:0", weights_sha256="4" * 64), {}),
    ]
    for plan, changes in others:
        fake_store(store, [Things(10)], plan=plan, **changes)
        with pytest.raises(InvalidInputError, match="the same weights of the same backbone"):
            heads.evaluate(report.path, feature_set=plan.key(), device="cpu")


def test_other_features_have_the_images_and_the_taps_of_the_run(store):
    report = learn(store, options={"kp": 2})
    strangers = fake_plan(image_size=(32, 32))
    fake_store(store, [FakeReader(10, name="more", seed=5)], plan=strangers)
    with pytest.raises(InvalidInputError, match="has the images of the run"):
        heads.evaluate(report.path, feature_set=strangers.key(), device="cpu")
    few = fake_plan(image_size=(48, 48))
    fake_store(store, [Things(30)], plan=few, shapes=SHAPES[:1], tail=None)
    with pytest.raises(NotFoundError, match="Unknown tap 'block:2'"):
        heads.evaluate(report.path, feature_set=few.key(), device="cpu")


def test_a_preset_trains_and_takes_its_options_from_the_backbones_size(tmp_path):
    about = {**BACKBONE, "name": "dinov2_b"}
    store = fake_store(tmp_path / "s.zarr", [Things(20)], backbone=about)
    changes = {"steps": 2, "batch_size": 8, "device": "cpu", "val_fraction": 0.1}
    options = {"kt": 3, "kp": 2, "pictures": 0, "checks": 1}
    report = heads.train(store, preset="vit-split-nyu", options=options, **changes)
    record = record_of(report)
    assert record["preset"]["name"] == "vit-split-nyu@b"
    assert record["preset"]["deviations"]["kt"] == {"preset": 4, "given": 3}
    assert record["options"]["head"]["layers"] == "uniform"
    loop = record["training"]["loop"]
    assert (loop["schedule"], loop["clip"], record["training"]["lr"]) == ("onecycle", 3.5, 3e-4)
    assert any("tap is block:2" in text for text in record["preset"]["misfits"])
